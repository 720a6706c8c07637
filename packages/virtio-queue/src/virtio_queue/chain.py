"""Descriptor chains: what the driver made available, checked and copied out of the rings.

Section 2.7.4 (message framing): a device must not depend on how a message is cut into
descriptors; `DescriptorChain.reader` and `DescriptorChain.writer` hide it.
"""

from __future__ import annotations

from virtio_queue.reader import Reader
from virtio_queue.writer import Writer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vm_memory import GuestMemory

__all__ = ["DescriptorChain"]

Segment = tuple[int, int]


class DescriptorChain:
    """One buffer of the driver: what the device may read, then what it may write.

    The descriptors were read once and checked; what the guest does to its rings afterwards
    changes nothing here. Two chains are equal when they describe the same buffer.

    Attributes:
        head: the number that goes back with `Queue.add_used`: index of the first descriptor
            (split ring) or buffer ID (packed ring).
        readable: (guest address, length in bytes) of each device-readable element.
        writable: the same for the device-writable elements, which follow the readable ones.
        slots: descriptors the chain occupies in the ring itself (an indirect one counts as one).
        readable_length: sum of the readable lengths in bytes.
        writable_length: sum of the writable lengths in bytes.
    """

    __slots__ = ("head", "readable", "readable_length", "slots", "writable", "writable_length")

    def __init__(
        self,
        head: int,
        readable: tuple[Segment, ...],
        writable: tuple[Segment, ...],
        slots: int = 1,
    ) -> None:
        self.head = head
        self.readable = readable
        self.writable = writable
        self.slots = slots
        total = 0
        for _, length in readable:
            total += length
        self.readable_length = total
        total = 0
        for _, length in writable:
            total += length
        self.writable_length = total

    def reader(self, memory: GuestMemory) -> Reader:
        """Return a `Reader` at the first device-readable byte."""
        return Reader(memory, self.readable, self.readable_length)

    def writer(self, memory: GuestMemory) -> Writer:
        """Return a `Writer` at the first device-writable byte."""
        return Writer(memory, self.writable, self.writable_length)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DescriptorChain):
            return NotImplemented
        return (self.head, self.readable, self.writable, self.slots) == (
            other.head,
            other.readable,
            other.writable,
            other.slots,
        )

    def __hash__(self) -> int:
        return hash((self.head, self.readable, self.writable, self.slots))

    def __repr__(self) -> str:
        return (
            f"DescriptorChain(head={self.head}, readable={self.readable!r}, "
            f"writable={self.writable!r}, slots={self.slots})"
        )
