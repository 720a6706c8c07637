"""Saved states: frozen values with a version and plain fields, one class for each thing saved.

Kept apart from the classes that make them, so that a boot which never saves does not pay for
them.
"""

from __future__ import annotations

from attrs import field, frozen

__all__ = ["ChainState", "DeviceState", "MmioState", "PciState", "QueueState"]


@frozen
class ChainState:
    """One chain in flight: taken from the ring, not yet used.

    Attributes:
        head: as `DescriptorChain.head`.
        readable: (guest address, length) of each device-readable element.
        writable: the same for device-writable elements.
        slots: ring descriptors it occupies.
        completed: length in bytes of a completion that waits for its turn (IN_ORDER), or None.
    """

    head: int
    readable: tuple[tuple[int, int], ...]
    writable: tuple[tuple[int, int], ...]
    slots: int
    completed: int | None = None


@frozen
class QueueState:
    """Everything `Queue.restore` needs.

    Attributes:
        max_size: largest size the device offers.
        size: size in use.
        ready: whether the driver enabled the queue.
        features: negotiated feature bits that concern queues.
        descriptor_area: guest address of the descriptor table or ring.
        driver_area: guest address of the available ring or the driver event suppression.
        device_area: guest address of the used ring or the device event suppression.
        next_avail: next position to take; in a packed ring bit 15 is its wrap counter.
        next_used: next position to use; in a packed ring bit 15 is its wrap counter.
        pending: used buffers published since the last notification decision.
        in_flight: chains taken and not used, in the order they were taken.
        version: format version.
    """

    max_size: int
    size: int
    ready: bool
    features: int
    descriptor_area: int
    driver_area: int
    device_area: int
    next_avail: int
    next_used: int
    pending: int
    in_flight: tuple[ChainState, ...] = field(factory=tuple)
    version: int = 1


@frozen
class DeviceState:
    """Everything `VirtioDevice.restore` needs, except the model's own state.

    Attributes:
        device_id: device type, to refuse a state of another one.
        device_features: what was offered.
        driver_features: what the driver accepted so far.
        status: device status bits.
        interrupt_status: pending interrupt bits.
        config_generation: 0 to 2**32 - 1.
        queues: one state a queue.
        queue_resets: indices of queues that were reset and not enabled again.
        misconfigured: (queue index, field of `QueueState`, value) of writes that were refused and
            not corrected yet.
        version: format version.
    """

    device_id: int
    device_features: int
    driver_features: int
    status: int
    interrupt_status: int
    config_generation: int
    queues: tuple[QueueState, ...]
    queue_resets: tuple[int, ...] = ()
    misconfigured: tuple[tuple[int, str, int], ...] = ()
    version: int = 1


@frozen
class MmioState:
    """The selectors of a virtio-mmio register file.

    Attributes:
        device_features_sel: DeviceFeaturesSel.
        driver_features_sel: DriverFeaturesSel.
        queue_sel: QueueSel.
        shm_sel: SHMSel.
        version: format version.
    """

    device_features_sel: int
    driver_features_sel: int
    queue_sel: int
    shm_sel: int
    version: int = 1


@frozen
class PciState:
    """The selectors and vectors of a virtio-pci common configuration.

    Attributes:
        device_feature_select: as the field.
        driver_feature_select: as the field.
        queue_select: as the field.
        config_msix_vector: vector of configuration changes, or 0xffff.
        queue_msix_vectors: vector of each queue, or 0xffff.
        version: format version.
    """

    device_feature_select: int
    driver_feature_select: int
    queue_select: int
    config_msix_vector: int
    queue_msix_vectors: tuple[int, ...]
    version: int = 1
