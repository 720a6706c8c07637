"""A driver that brings a device up through its virtio-pci structures (4.1.5)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from virtio_queue.constants import F_NOTIF_CONFIG_DATA, F_NOTIFICATION_DATA
from virtio_queue.errors import UsageError
from virtio_queue.testing.driver import DeviceRuleError
from virtio_queue.testing.transport import TransportDriver

if TYPE_CHECKING:
    from virtio_queue.pci import PciTransport
    from virtio_queue.testing.arena import Arena
    from virtio_queue.testing.packed import PackedDriver
    from virtio_queue.testing.split import SplitDriver

__all__ = ["PciDriver"]

_AREAS = ((0x20, "descriptor_area"), (0x28, "driver_area"), (0x30, "device_area"))


class PciDriver(TransportDriver):
    """The accesses Linux makes to the structures its capabilities name.

    Args:
        transport: the window.
        arena: where rings and buffers come from; by default 512 KiB from guest address 4096.
        queue_vectors: MSI-X vector of each queue; without it the vectors stay unset.
        config_vector: MSI-X vector of configuration changes.
    """

    def __init__(
        self,
        transport: PciTransport,
        *,
        arena: Arena | None = None,
        queue_vectors: tuple[int, ...] = (),
        config_vector: int | None = None,
    ) -> None:
        super().__init__(transport.device.memory, arena)
        self.transport = transport
        self._queue_vectors = queue_vectors
        self._config_vector = config_vector
        places = {}
        for capability in transport.capabilities(0):
            offset = int.from_bytes(capability[8:12], "little")
            more = int.from_bytes(capability[16:20], "little")
            places[capability[3]] = (offset, more)
        self.common, _ = places[1]
        self.notify, self._multiplier = places[2]
        self.isr, _ = places[3]
        self.config, _ = places[4]

    def get(self, field: int, width: int) -> int:
        """Read a field of the common configuration."""
        return int.from_bytes(self.transport.read(self.common + field, width), "little")

    def set(self, field: int, width: int, value: int) -> None:
        """Write a field of the common configuration."""
        self.transport.write(self.common + field, value.to_bytes(width, "little"))

    def read_status(self) -> int:
        """Read the device status field."""
        return self.get(0x14, 1)

    def write_status(self, status: int) -> None:
        """Write the device status field."""
        self.set(0x14, 1, status)

    def read_features(self) -> int:
        """Return the offered feature bits."""
        words = []
        for page in (0, 1):
            self.set(0x00, 4, page)
            words.append(self.get(0x04, 4))
        return words[0] | words[1] << 32

    def write_features(self, features: int) -> None:
        """Write the accepted feature bits."""
        for page in (0, 1):
            self.set(0x08, 4, page)
            self.set(0x0C, 4, features >> 32 * page & 0xFFFFFFFF)

    def queue_limit(self, index: int) -> int:
        """Select a queue and return its largest size, 0 when there is no such queue."""
        if index == 0 and self._config_vector is not None:
            self.set(0x10, 2, self._config_vector)
        self.set(0x16, 2, index)
        return self.get(0x18, 2)

    def enable_queue(self, index: int, driver: SplitDriver | PackedDriver) -> bool:
        """Configure and enable one queue (4.1.5.1.3); whether the device did."""
        if self.get(0x1C, 2):
            raise DeviceRuleError("4.1.4.3.1", f"queue {index} is enabled before it was set up")
        self.set(0x18, 2, driver.size)
        for field, name in _AREAS:
            address: int = getattr(driver, name)
            self.set(field, 4, address & 0xFFFFFFFF)
            self.set(field + 4, 4, address >> 32)
        if index < len(self._queue_vectors):
            self.set(0x1A, 2, self._queue_vectors[index])
            if self.get(0x1A, 2) != self._queue_vectors[index]:
                raise UsageError("queue_vectors", "not in the device's MSI-X table")
        self.set(0x1C, 2, 1)
        return self.get(0x1C, 2) == 1

    def kick(self, index: int = 0) -> None:
        """Notify the device, whether it wants it or not (4.1.5.2)."""
        self.set(0x16, 2, index)
        place = self.notify + self.get(0x1E, 2) * self._multiplier
        value = self.notification(index)
        if self.features & F_NOTIF_CONFIG_DATA:
            value = value & ~0xFFFF | self.get(0x38, 2)
        width = 4 if self.features & F_NOTIFICATION_DATA else 2
        self.transport.write(place, value.to_bytes(width, "little"))

    def read_isr(self) -> int:
        """Read the ISR status, which clears it."""
        return self.transport.read(self.isr, 1)[0]
