"""The device side of virtio: virtqueues, the device status machine, transports."""
