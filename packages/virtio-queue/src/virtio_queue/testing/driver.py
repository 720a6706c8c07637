"""What drivers of split and packed rings have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import define, field, frozen

from virtio_queue.constants import F_INDIRECT_DESC, MAX_CHAIN_BYTES
from virtio_queue.errors import UsageError
from virtio_queue.testing.arena import Arena

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from virtio_queue.queue import Queue
    from vm_memory import GuestAddress, GuestMemory

__all__ = ["Buffer", "DeviceRuleError", "Driver", "Used"]


class DeviceRuleError(AssertionError):
    """The device broke a rule that a driver relies on.

    Attributes:
        section: section of the virtio 1.3 specification.
        rule: what the device did.
    """

    def __init__(self, section: str, rule: str) -> None:
        super().__init__(f"virtio 1.3 section {section}: {rule}")
        self.section = section
        self.rule = rule


@frozen
class Used:
    """A buffer the device gave back.

    Attributes:
        head: what `Driver.add` returned.
        length: bytes the device says it has written.
        data: the first `length` bytes of the device-writable part; nothing beyond them may be
            relied upon (2.7.8.3).
    """

    head: int
    length: int
    data: bytes


@define
class Buffer:
    """A buffer the driver has made available.

    Attributes:
        head: its number in the ring.
        readable: (guest address, length) of each device-readable element.
        writable: the same for the device-writable elements.
        slots: descriptors of the ring it occupies.
        blocks: what it holds of the arena.
    """

    head: int
    readable: list[tuple[int, int]]
    writable: list[tuple[int, int]]
    slots: int = 1
    blocks: list[int] = field(factory=list)


class Driver:
    """A driver of one queue; `SplitDriver` and `PackedDriver` know the ring formats.

    Args:
        memory: the guest's memory.
        size: queue size in descriptors.
        features: negotiated feature bits.
        arena: where rings and buffers come from; by default 512 KiB from address 4096.
    """

    def __init__(
        self,
        memory: GuestMemory,
        size: int,
        *,
        features: int = 0,
        arena: Arena | None = None,
    ) -> None:
        self.memory = memory
        self.size = size
        self.features = features
        self.arena = Arena(0x1000, 512 << 10) if arena is None else arena
        self.outstanding: dict[int, Buffer] = {}
        self._interrupts = True
        self.descriptor_area, self.driver_area, self.device_area = self._allocate_rings()

    def _allocate_rings(self) -> tuple[int, int, int]:
        raise UsageError("Driver", "use SplitDriver or PackedDriver")

    def configure(self, queue: Queue) -> None:
        """Do with a bare queue what a transport does: features, size, addresses, ready."""
        queue.set_features(self.features)
        queue.set_size(self.size)
        queue.set_descriptor_area(self.descriptor_area)
        queue.set_driver_area(self.driver_area)
        queue.set_device_area(self.device_area)
        queue.enable(self.memory)

    def place(self, readable: Iterable[bytes], writable: Iterable[int]) -> Buffer:
        """Copy the readable elements into the arena and set the writable ones aside, zeroed."""
        buffer = Buffer(head=0, readable=[], writable=[])
        for data in readable:
            address = self._block(buffer, len(data))
            self.write(address, data)
            buffer.readable.append((address, len(data)))
        for length in writable:
            address = self._block(buffer, length)
            self.write(address, bytes(length))
            buffer.writable.append((address, length))
        if not buffer.readable and not buffer.writable:
            raise UsageError("add", "a buffer has at least one element (2.6)")
        return buffer

    def _block(self, buffer: Buffer, length: int, align: int = 1) -> int:
        address = self.arena.allocate(length, align=align)
        buffer.blocks.append(address)
        return address

    def elements(self, buffer: Buffer) -> list[tuple[int, int, int]]:
        """List (address, length, WRITE flag) of a buffer, in ring order."""
        readable = [(address, length, 0) for address, length in buffer.readable]
        return readable + [(address, length, 2) for address, length in buffer.writable]

    def take_back(self, head: int, length: int, section: str) -> Used:
        """Check a used buffer and free what it held."""
        buffer = self.outstanding.pop(head, None)
        if buffer is None:
            raise DeviceRuleError(section, f"buffer {head} was used, but is not the device's")
        room = sum(size for _, size in buffer.writable)
        if not 0 <= length <= min(room, MAX_CHAIN_BYTES - 1):
            raise DeviceRuleError(section, f"{length} bytes written into a buffer of {room}")
        data = bytearray()
        for address, size in buffer.writable:
            wanted = min(size, length - len(data))
            data += self.read(address, wanted)
        for block in buffer.blocks:
            self.arena.free(block)
        return Used(head, length, bytes(data))

    def reap(self) -> list[Used]:
        """Take back what the device has used, oldest first.

        With interrupts asked for, the next used buffer sends one: those that came before it was
        asked for are taken too (2.7.14).

        Raises:
            DeviceRuleError: the device broke a rule.
        """
        reaped = self._take_used()
        if self._interrupts:
            self.enable_interrupts()
            while more := self._take_used():
                reaped += more
                self.enable_interrupts()
        return reaped

    def _take_used(self) -> list[Used]:
        raise NotImplementedError

    def enable_interrupts(self) -> None:
        """Ask for a notification of the next used buffer."""

    def require_indirect(self, indirect: bool) -> None:
        """Refuse to make an indirect buffer that was not negotiated."""
        if indirect and not self.features & F_INDIRECT_DESC:
            raise UsageError("indirect", "needs F_INDIRECT_DESC among the features")

    def read(self, address: int, length: int) -> bytes:
        """Read guest memory."""
        place: GuestAddress = address  # type: ignore[assignment]
        return self.memory.read(place, length) if length else b""

    def write(self, address: int, data: bytes | Sequence[int]) -> None:
        """Write guest memory."""
        place: GuestAddress = address  # type: ignore[assignment]
        if data:
            self.memory.write(place, bytes(data))

    def load16(self, address: int) -> int:
        """Load a 16-bit field with acquire."""
        place: GuestAddress = address  # type: ignore[assignment]
        return self.memory.atomic_load(place, 2)

    def store16(self, address: int, value: int) -> None:
        """Store a 16-bit field with release."""
        place: GuestAddress = address  # type: ignore[assignment]
        self.memory.atomic_store(place, 2, value & 0xFFFF)
