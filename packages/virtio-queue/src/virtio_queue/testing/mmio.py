"""A driver that brings a device up through its virtio-mmio registers (3.1.1 and 4.2.3)."""

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
from virtio_queue.testing.arena import Arena
from virtio_queue.testing.driver import DeviceRuleError
from virtio_queue.testing.packed import PackedDriver
from virtio_queue.testing.split import SplitDriver

if TYPE_CHECKING:
    from virtio_queue.mmio import MmioTransport

__all__ = ["MmioDriver"]

_AREAS = ((0x080, "descriptor_area"), (0x090, "driver_area"), (0x0A0, "device_area"))


class MmioDriver:
    """The register accesses Linux makes, and one ring driver for each queue.

    Args:
        transport: the register file.
        arena: where rings and buffers come from; by default 512 KiB from guest address 4096.
    """

    def __init__(self, transport: MmioTransport, *, arena: Arena | None = None) -> None:
        self.transport = transport
        self.memory = transport.device.memory
        self.arena = Arena(0x1000, 512 << 10) if arena is None else arena
        self.features = 0
        self.queues: list[SplitDriver | PackedDriver] = []

    def get(self, register: int) -> int:
        """Read a control register."""
        return int.from_bytes(self.transport.read(register, 4), "little")

    def set(self, register: int, value: int) -> None:
        """Write a control register."""
        self.transport.write(register, value.to_bytes(4, "little"))

    @property
    def status(self) -> int:
        """The device status field."""
        return self.get(0x070)

    def add_status(self, bits: int) -> int:
        """Set status bits and return what the device made of it."""
        self.set(0x070, self.status | bits)
        return self.status

    def read_features(self) -> int:
        """Return the offered feature bits."""
        words = []
        for page in (0, 1):
            self.set(0x014, page)
            words.append(self.get(0x010))
        return words[0] | words[1] << 32

    def negotiate(self, wanted: int) -> int:
        """Go from reset to FEATURES_OK with what is both offered and wanted.

        Raises:
            DeviceRuleError: the device does not reset, or refuses its own features.
        """
        self.set(0x070, 0)
        if self.status:
            raise DeviceRuleError("2.4", "status is not 0 after a reset")
        self.add_status(STATUS_ACKNOWLEDGE)
        self.add_status(STATUS_DRIVER)
        self.features = self.read_features() & wanted
        for page in (0, 1):
            self.set(0x024, page)
            self.set(0x020, self.features >> 32 * page & 0xFFFFFFFF)
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
        """Configure and enable one queue (4.2.3.2); False when the device has no such queue."""
        self.set(0x030, index)
        largest = self.get(0x034)
        if largest == 0:
            return False
        if self.get(0x044):
            raise DeviceRuleError("4.2.3.2", f"queue {index} is ready before it was set up")
        kind = PackedDriver if self.features & F_RING_PACKED else SplitDriver
        entries = largest if size is None else min(size, largest)
        driver = kind(self.memory, entries, features=self.features, arena=self.arena)
        self.queues[index : index + 1] = [driver]
        self.set(0x038, entries)
        for register, name in _AREAS:
            address: int = getattr(driver, name)
            self.set(register, address & 0xFFFFFFFF)
            self.set(register + 4, address >> 32)
        self.set(0x044, 1)
        if self.get(0x044) != 1:
            raise DeviceRuleError("4.2.3.2", f"queue {index} does not become ready")
        return True

    def kick(self, index: int = 0) -> None:
        """Notify the device, whether it wants it or not (4.2.3.3)."""
        value = index
        if self.features & F_NOTIFICATION_DATA:
            driver = self.queues[index]
            value |= driver.next_avail << 16
            if isinstance(driver, PackedDriver):
                value |= driver.avail_wrap << 31
        self.set(0x050, value & 0xFFFFFFFF)

    def acknowledge(self) -> int:
        """Read and acknowledge the interrupt status, and return it."""
        status = self.get(0x060)
        self.set(0x064, status)
        return status
