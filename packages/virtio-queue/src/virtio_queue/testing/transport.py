"""A driver that brings a device up (3.1.1), whatever the transport."""

from __future__ import annotations

from typing import TYPE_CHECKING

from virtio_queue.constants import (
    F_NOTIFICATION_DATA,
    F_RING_PACKED,
    STATUS_ACKNOWLEDGE,
    STATUS_DRIVER,
    STATUS_DRIVER_OK,
    STATUS_FEATURES_OK,
)
from virtio_queue.errors import UsageError
from virtio_queue.testing.arena import Arena
from virtio_queue.testing.driver import DeviceRuleError
from virtio_queue.testing.packed import PackedDriver
from virtio_queue.testing.split import SplitDriver

if TYPE_CHECKING:
    from vm_memory import GuestMemory

__all__ = ["TransportDriver"]


class TransportDriver:
    """What drivers of all transports have in common; `MmioDriver` and `PciDriver` know registers.

    Args:
        memory: the guest's memory.
        arena: where rings and buffers come from; by default 512 KiB from guest address 4096.

    Attributes:
        features: what was negotiated.
        queues: one ring driver for each queue that was set up.
    """

    def __init__(self, memory: GuestMemory, arena: Arena | None = None) -> None:
        self.memory = memory
        self.arena = Arena(0x1000, 512 << 10) if arena is None else arena
        self.features = 0
        self.queues: list[SplitDriver | PackedDriver] = []

    # What a transport has to know.

    def read_status(self) -> int:
        """Read the device status field."""
        raise UsageError("TransportDriver", "use MmioDriver or PciDriver")

    def write_status(self, status: int) -> None:
        """Write the device status field."""
        raise UsageError("TransportDriver", "use MmioDriver or PciDriver")

    def read_features(self) -> int:
        """Return the offered feature bits."""
        raise UsageError("TransportDriver", "use MmioDriver or PciDriver")

    def write_features(self, features: int) -> None:
        """Write the accepted feature bits."""
        raise UsageError("TransportDriver", "use MmioDriver or PciDriver")

    def queue_limit(self, index: int) -> int:
        """Select a queue and return its largest size, 0 when there is no such queue."""
        raise UsageError("TransportDriver", "use MmioDriver or PciDriver")

    def enable_queue(self, index: int, driver: SplitDriver | PackedDriver) -> bool:
        """Tell the device of a ring and enable it; whether the device did."""
        raise UsageError("TransportDriver", "use MmioDriver or PciDriver")

    # What follows from it.

    @property
    def status(self) -> int:
        """The device status field."""
        return self.read_status()

    def add_status(self, bits: int) -> int:
        """Set status bits and return what the device made of it."""
        self.write_status(self.status | bits)
        return self.status

    def negotiate(self, wanted: int) -> int:
        """Go from reset to FEATURES_OK with what is both offered and wanted.

        Raises:
            DeviceRuleError: the device does not reset, or refuses its own features.
        """
        self.write_status(0)
        if self.status:
            raise DeviceRuleError("2.4", "status is not 0 after a reset")
        self.add_status(STATUS_ACKNOWLEDGE)
        self.add_status(STATUS_DRIVER)
        self.features = self.read_features() & wanted
        self.write_features(self.features)
        if not self.add_status(STATUS_FEATURES_OK) & STATUS_FEATURES_OK:
            raise DeviceRuleError("3.1.1", f"features {self.features:#x} were refused")
        return self.features

    def start(self, wanted: int = (1 << 64) - 1, *, size: int | None = None) -> None:
        """Bring the device up with a ring driver for each queue.

        Args:
            wanted: feature bits to accept where offered.
            size: queue size; by default the largest each queue offers.

        Raises:
            DeviceRuleError: the device refuses a correct driver.
        """
        self.negotiate(wanted)
        self.queues = []
        while self.set_up_queue(len(self.queues), size):
            pass
        if self.add_status(STATUS_DRIVER_OK) & ~15:
            raise DeviceRuleError("3.1.1", f"status {self.status:#x} after DRIVER_OK")

    def set_up_queue(self, index: int, size: int | None = None) -> bool:
        """Configure and enable one queue; False when the device has no such queue.

        Raises:
            DeviceRuleError: the device does not enable it.
        """
        largest = self.queue_limit(index)
        if largest == 0:
            return False
        kind = PackedDriver if self.features & F_RING_PACKED else SplitDriver
        entries = largest if size is None else min(size, largest)
        driver = kind(self.memory, entries, features=self.features, arena=self.arena)
        self.queues[index : index + 1] = [driver]
        if not self.enable_queue(index, driver):
            raise DeviceRuleError("3.1.1", f"queue {index} does not become ready")
        return True

    def notification(self, index: int) -> int:
        """Return what to write to kick a queue: its index, or the notification data (2.9)."""
        if not self.features & F_NOTIFICATION_DATA:
            return index
        driver = self.queues[index]
        value = index | driver.next_avail << 16
        if isinstance(driver, PackedDriver):
            value |= driver.avail_wrap << 31
        return value & 0xFFFFFFFF
