"""A driver that brings a device up through its virtio-mmio registers (4.2.3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from virtio_queue.testing.driver import DeviceRuleError
from virtio_queue.testing.transport import TransportDriver

if TYPE_CHECKING:
    from virtio_queue.mmio import MmioTransport
    from virtio_queue.testing.arena import Arena
    from virtio_queue.testing.packed import PackedDriver
    from virtio_queue.testing.split import SplitDriver

__all__ = ["MmioDriver"]

_AREAS = ((0x080, "descriptor_area"), (0x090, "driver_area"), (0x0A0, "device_area"))


class MmioDriver(TransportDriver):
    """The register accesses Linux makes, and one ring driver for each queue.

    Args:
        transport: the register file.
        arena: where rings and buffers come from; by default 512 KiB from guest address 4096.
    """

    def __init__(self, transport: MmioTransport, *, arena: Arena | None = None) -> None:
        super().__init__(transport.device.memory, arena)
        self.transport = transport

    def get(self, register: int) -> int:
        """Read a control register."""
        return int.from_bytes(self.transport.read(register, 4), "little")

    def set(self, register: int, value: int) -> None:
        """Write a control register."""
        self.transport.write(register, value.to_bytes(4, "little"))

    def read_status(self) -> int:
        """Read the device status field."""
        return self.get(0x070)

    def write_status(self, status: int) -> None:
        """Write the device status field."""
        self.set(0x070, status)

    def read_features(self) -> int:
        """Return the offered feature bits."""
        words = []
        for page in (0, 1):
            self.set(0x014, page)
            words.append(self.get(0x010))
        return words[0] | words[1] << 32

    def write_features(self, features: int) -> None:
        """Write the accepted feature bits."""
        for page in (0, 1):
            self.set(0x024, page)
            self.set(0x020, features >> 32 * page & 0xFFFFFFFF)

    def queue_limit(self, index: int) -> int:
        """Select a queue and return its largest size, 0 when there is no such queue."""
        self.set(0x030, index)
        return self.get(0x034)

    def enable_queue(self, index: int, driver: SplitDriver | PackedDriver) -> bool:
        """Configure and enable one queue (4.2.3.2); whether the device did."""
        if self.get(0x044):
            raise DeviceRuleError("4.2.3.2", f"queue {index} is ready before it was set up")
        self.set(0x038, driver.size)
        for register, name in _AREAS:
            address: int = getattr(driver, name)
            self.set(register, address & 0xFFFFFFFF)
            self.set(register + 4, address >> 32)
        self.set(0x044, 1)
        return self.get(0x044) == 1

    def kick(self, index: int = 0) -> None:
        """Notify the device, whether it wants it or not (4.2.3.3)."""
        self.set(0x050, self.notification(index))

    def acknowledge(self) -> int:
        """Read and acknowledge the interrupt status, and return it."""
        status = self.get(0x060)
        self.set(0x064, status)
        return status
