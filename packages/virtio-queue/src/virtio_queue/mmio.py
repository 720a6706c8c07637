"""The register file of virtio over MMIO, version 2 (section 4.2.2 of virtio 1.3)."""

from __future__ import annotations

from virtio_queue.constants import F_NOTIFICATION_DATA

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from virtio_queue.device import QueueField, VirtioDevice
    from virtio_queue.state import MmioState

__all__ = ["CONFIG_OFFSET", "QUEUE_NOTIFY", "REGISTER_SIZE", "MmioTransport"]

QUEUE_NOTIFY = 0x050
"""Offset of the register that is written to kick a queue: 32 bits, for an ioeventfd.

With VIRTIO_F_NOTIFICATION_DATA the value is not the queue index alone: no datamatch then.
"""

CONFIG_OFFSET = 0x100
"""Offset of the device configuration space."""

REGISTER_SIZE = 0x200
"""Size of the window the register file needs for up to 256 bytes of configuration."""

_MAGIC = 0x74726976
_VERSION = 2
_VENDOR = 0
_MASK32 = 0xFFFFFFFF
_NOWHERE = (1 << 64) - 1

# Offset of a low half, and which queue field the pair is.
_AREAS: dict[int, QueueField] = {
    0x080: "descriptor_area",
    0x090: "driver_area",
    0x0A0: "device_area",
}


class MmioTransport:
    """Register reads and writes in, calls to a `VirtioDevice` out.

    Control registers take aligned 32-bit accesses only (4.2.2.2); any other access reads zeros,
    writes nothing and is counted in `VirtioDevice.refused`. Nothing the guest does raises.
    Reading any register, selecting, kicking and acknowledging never wait for I/O in progress.

    The selectors belong to the guest: vCPUs that use them at the same time disturb only each
    other.

    Args:
        device: the device behind the registers.
        notify: told the index of an existing queue that was kicked, by a vCPU thread; what it
            returns is ignored. A kick that an ioeventfd catches never comes here.
    """

    def __init__(self, device: VirtioDevice, notify: Callable[[int], object]) -> None:
        self.device = device
        self._notify = notify
        self._select(0, 0, 0, 0)

    def _select(self, device_features: int, driver_features: int, queue: int, shm: int) -> None:
        self._device_features_sel = device_features
        self._driver_features_sel = driver_features
        self._queue_sel = queue
        self._shm_sel = shm

    def read(self, offset: int, length: int) -> bytes:
        """Read `length` bytes at `offset` from the window's start; always that many."""
        if offset >= CONFIG_OFFSET:
            return self.device.read_config(offset - CONFIG_OFFSET, length)
        if length != 4 or offset & 3 or offset < 0:
            self.device.refuse(f"{length}-byte read at register {offset:#x}: 4.2.2.2 wants 4")
            return bytes(max(length, 0))
        return (self._read_register(offset) & _MASK32).to_bytes(4, "little")

    def write(self, offset: int, data: bytes) -> None:
        """Write `data` at `offset` from the window's start."""
        if offset >= CONFIG_OFFSET:
            self.device.write_config(offset - CONFIG_OFFSET, bytes(data))
        elif len(data) != 4 or offset & 3 or offset < 0:
            self.device.refuse(f"{len(data)}-byte write at register {offset:#x}: 4.2.2.2 wants 4")
        else:
            self._write_register(offset, int.from_bytes(data, "little"))

    def _read_register(self, offset: int) -> int:
        device = self.device
        if offset == 0x060:
            return device.interrupt_status
        if offset == 0x070:
            return device.status
        if offset == 0x000:
            return _MAGIC
        if offset == 0x004:
            return _VERSION
        if offset == 0x008:
            return device.model.device_id
        if offset == 0x00C:
            return _VENDOR
        if offset == 0x010:
            return device.read_device_features(self._device_features_sel)
        if offset in (0x034, 0x044):
            if self._queue_sel >= len(device.queues):
                return 0
            queue = device.queues[self._queue_sel]
            return queue.max_size if offset == 0x034 else int(queue.ready)
        if 0x0B0 <= offset <= 0x0BC:
            base, size = device.shared_memory.get(self._shm_sel, (_NOWHERE, _NOWHERE))
            value = size if offset < 0x0B8 else base
            return value >> 32 if offset & 4 else value
        if offset == 0x0C0:
            # A reset is complete when the write returns.
            return 0
        if offset == 0x0FC:
            return device.read_config_generation()
        device.refuse(f"read of register {offset:#x}, which is not readable")
        return 0

    def _write_register(self, offset: int, value: int) -> None:
        device = self.device
        if offset == QUEUE_NOTIFY:
            self._kick(value)
        elif offset == 0x064:
            device.acknowledge_interrupt(value)
        elif offset == 0x070:
            device.write_status(value)
            if value == 0:
                self._select(0, 0, 0, 0)
        elif offset == 0x014:
            self._device_features_sel = value
        elif offset == 0x020:
            device.write_driver_features(self._driver_features_sel, value)
        elif offset == 0x024:
            self._driver_features_sel = value
        elif offset == 0x030:
            self._queue_sel = value
        elif offset == 0x038:
            device.configure_queue(self._queue_sel, "size", value)
        elif offset == 0x044:
            if value == 1:
                device.enable_queue(self._queue_sel)
            elif value == 0:
                device.disable_queue(self._queue_sel)
            else:
                device.refuse(f"QueueReady {value:#x} is neither 0 nor 1")
        elif offset == 0x0AC:
            self._shm_sel = value
        elif offset == 0x0C0:
            if value == 1:
                device.reset_queue(self._queue_sel)
            else:
                device.refuse(f"QueueReset {value:#x} is not 1")
        elif offset & ~4 in _AREAS:
            area = _AREAS[offset & ~4]
            device.configure_queue_half(self._queue_sel, area, value, high=bool(offset & 4))
        else:
            device.refuse(f"write of register {offset:#x}, which is not writable")

    def _kick(self, value: int) -> None:
        # With NOTIFICATION_DATA the upper half tells how far the driver got: the ring says so too.
        if self.device.driver_features & F_NOTIFICATION_DATA:
            value &= 0xFFFF
        if value < len(self.device.queues):
            self._notify(value)
        else:
            self.device.refuse(f"kick of queue {value}, which does not exist")

    def save(self) -> MmioState:
        """Return the selectors; the device is saved apart."""
        from virtio_queue.state import MmioState

        return MmioState(
            self._device_features_sel, self._driver_features_sel, self._queue_sel, self._shm_sel
        )

    def restore(self, state: MmioState) -> None:
        """Take over saved selectors.

        Raises:
            StateError: a selector is not a 32-bit number, or the version is unknown.
        """
        from virtio_queue._device_saving import expect

        selectors = (
            state.device_features_sel,
            state.driver_features_sel,
            state.queue_sel,
            state.shm_sel,
        )
        expect(state.version == 1, "version", "only version 1 is known")
        expect(all(0 <= value <= _MASK32 for value in selectors), "selectors", "must fit 32 bits")
        self._select(*selectors)
