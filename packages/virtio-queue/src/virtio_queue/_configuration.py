"""Size, addresses and features of a queue, and everything that is wrong with them."""

from __future__ import annotations

from virtio_queue.constants import (
    F_EVENT_IDX,
    F_IN_ORDER,
    F_INDIRECT_DESC,
    F_NOTIFICATION_DATA,
    F_RING_PACKED,
    MAX_QUEUE_SIZE,
)
from virtio_queue.errors import QueueConfigError, QueueStateError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vm_memory import GuestMemory

_RING_FEATURES = F_INDIRECT_DESC | F_EVENT_IDX | F_RING_PACKED | F_IN_ORDER | F_NOTIFICATION_DATA


class QueueConfiguration:
    """What a driver sets before it enables a queue.

    Attributes:
        max_size: largest size offered to the driver.
        size: size in use, in descriptors.
        features: negotiated feature bits that concern queues.
        descriptor_area: guest address of the descriptor table or ring.
        driver_area: guest address of the available ring or the driver event suppression.
        device_area: guest address of the used ring or the device event suppression.
    """

    __slots__ = (
        "_ready",
        "descriptor_area",
        "device_area",
        "driver_area",
        "features",
        "max_size",
        "size",
    )

    def __init__(self, max_size: int) -> None:
        if not 1 <= max_size <= MAX_QUEUE_SIZE or max_size & (max_size - 1):
            raise UsageError("max_size", f"{max_size} is not a power of two from 1 to 32768")
        self.max_size = max_size
        self._clear()

    def _clear(self) -> None:
        self._ready = False
        self.size = self.max_size
        self.features = 0
        self.descriptor_area = 0
        self.driver_area = 0
        self.device_area = 0

    @property
    def ready(self) -> bool:
        """Whether the driver enabled the queue: chains may be taken."""
        return self._ready

    @property
    def packed(self) -> bool:
        """Whether VIRTIO_F_RING_PACKED was negotiated."""
        return bool(self.features & F_RING_PACKED)

    def set_features(self, features: int) -> None:
        """Store the negotiated feature bits; those that do not concern queues are dropped.

        Raises:
            QueueStateError: the queue is ready.
        """
        self._require_stopped("set_features")
        self.features = features & _RING_FEATURES

    def set_size(self, size: int) -> None:
        """Set the size in descriptors: 1 to `max_size`, in split rings a power of two (2.7).

        Raises:
            QueueConfigError: the value is not allowed; the size keeps its value.
            QueueStateError: the queue is ready.
        """
        self._require_stopped("set_size")
        self._check_size(size)
        self.size = size

    def set_descriptor_area(self, address: int) -> None:
        """Set the guest address of the descriptor table or ring, a multiple of 16.

        Raises:
            QueueConfigError: misaligned or wider than 64 bits; the area keeps its value.
            QueueStateError: the queue is ready.
        """
        self._require_stopped("set_descriptor_area")
        _check_area("descriptor_area", address, 16)
        self.descriptor_area = address

    def set_driver_area(self, address: int) -> None:
        """Set the guest address of the available ring (even) or event suppression (times 4).

        Raises:
            QueueConfigError: misaligned or wider than 64 bits; the area keeps its value.
            QueueStateError: the queue is ready.
        """
        self._require_stopped("set_driver_area")
        _check_area("driver_area", address, 4 if self.packed else 2)
        self.driver_area = address

    def set_device_area(self, address: int) -> None:
        """Set the guest address of the used ring or device event suppression, a multiple of 4.

        Raises:
            QueueConfigError: misaligned or wider than 64 bits; the area keeps its value.
            QueueStateError: the queue is ready.
        """
        self._require_stopped("set_device_area")
        _check_area("device_area", address, 4)
        self.device_area = address

    def _check_size(self, size: int) -> None:
        if not 1 <= size <= self.max_size:
            raise QueueConfigError("size", size, f"must be 1 to {self.max_size}")
        if size & (size - 1) and not self.packed:
            raise QueueConfigError("size", size, "must be a power of two (2.7)")

    def _check(self, memory: GuestMemory) -> None:
        self._check_size(self.size)
        size = self.size
        event = 2 if self.features & F_EVENT_IDX else 0
        if self.packed:
            extents = (
                ("driver_area", self.driver_area, 4, 4),
                ("device_area", self.device_area, 4, 4),
            )
        else:
            extents = (
                ("driver_area", self.driver_area, 2, 4 + 2 * size + event),
                ("device_area", self.device_area, 4, 4 + 8 * size + event),
            )
        for name, address, alignment, length in (
            ("descriptor_area", self.descriptor_area, 16, 16 * size),
            *extents,
        ):
            _check_area(name, address, alignment)
            if address + length > 1 << 64 or not memory.check_range(address, length):  # type: ignore[arg-type]
                raise QueueConfigError(
                    name, address, f"its {length} bytes are not all guest memory"
                )

    def _require_stopped(self, what: str) -> None:
        if self._ready:
            raise QueueStateError(what, "the queue is ready; reset or disable it first")

    def _require_ready(self, what: str) -> None:
        if not self._ready:
            raise QueueStateError(what, "the queue is not ready; wait until the driver enables it")


def _check_area(name: str, address: int, alignment: int) -> None:
    if not 0 <= address < 1 << 64:
        raise QueueConfigError(name, address, "must be a 64-bit guest address")
    if address % alignment:
        raise QueueConfigError(name, address, f"must be a multiple of {alignment}")
