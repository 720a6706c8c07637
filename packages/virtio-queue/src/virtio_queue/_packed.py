"""The device's side of a packed virtqueue (section 2.8 of virtio 1.3), in Python."""

from __future__ import annotations

from typing import TYPE_CHECKING

from virtio_queue._walk import DESCRIPTOR, PACKED_SECTIONS, Elements, read_descriptor, table_entries
from virtio_queue.chain import DescriptorChain
from virtio_queue.constants import (
    DESC_F_AVAIL,
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_USED,
    DESC_F_WRITE,
)
from virtio_queue.errors import ChainError
from vm_memory import Order, fence

if TYPE_CHECKING:
    from collections.abc import Container, Sequence

    from vm_memory import GuestAddress, GuestMemory

_ACQUIRE, _RELEASE, _RELAXED = Order.ACQUIRE, Order.RELEASE, Order.RELAXED
_ENABLE, _DISABLE, _DESC = 0, 1, 2
_WRAP = 1 << 15


class PackedRing:
    """Positions in one packed ring and the accesses that move them.

    A position is an offset in bits 0 to 14 and the ring wrap counter in bit 15, as the event
    suppression structure has it (2.8.14). Ordering against the driver (2.8.21, 2.8.22): the
    flags of the first descriptor are loaded with acquire before the rest of the list is read;
    the flags of a used descriptor are stored with release after its other fields; in a batch
    the first one last. Full fences stand where the driver's and the device's event suppression
    cross.
    """

    __slots__ = (
        "_desc",
        "_device_event",
        "_driver_event",
        "_event_idx",
        "_indirect",
        "_size",
        "next_avail",
        "next_used",
        "pending",
    )

    def __init__(
        self,
        size: int,
        areas: tuple[int, int, int],
        *,
        event_idx: bool,
        indirect: bool,
    ) -> None:
        self._size = size
        self._desc, self._driver_event, self._device_event = areas
        self._event_idx = event_idx
        self._indirect = indirect
        self.next_avail = _WRAP
        self.next_used = _WRAP
        # Ring descriptors used since the last decision whether to notify.
        self.pending = 0

    def _advance(self, position: int, count: int) -> int:
        """Move a position by `count` descriptors (at most the ring's size, either way)."""
        offset = (position & ~_WRAP) + count
        if offset >= self._size:
            return (offset - self._size) | (~position & _WRAP)
        if offset < 0:
            return (offset + self._size) | (~position & _WRAP)
        return offset | (position & _WRAP)

    def _flags_at(self, offset: int) -> GuestAddress:
        return self._desc + 16 * offset + 14  # type: ignore[return-value]

    def _is_available(self, flags: int, position: int) -> bool:
        wrap = bool(position & _WRAP)
        return bool(flags & DESC_F_AVAIL) == wrap and bool(flags & DESC_F_USED) != wrap

    def available(self, memory: GuestMemory) -> int:
        """1 when the next descriptor has been made available, else 0."""
        flags = memory.atomic_load(self._flags_at(self.next_avail & ~_WRAP), 2, _ACQUIRE)
        return int(self._is_available(flags, self.next_avail))

    def pop(self, memory: GuestMemory, in_flight: Container[int]) -> DescriptorChain | None:
        """Take the next buffer, or None when there is none."""
        position = self.next_avail
        if not self.available(memory):
            return None
        elements = Elements(memory, PACKED_SECTIONS)
        slots = 0
        while True:
            index = position & ~_WRAP
            slots += 1
            if slots > self._size:
                raise ChainError("2.8.17", index, slots, "descriptor list longer than the queue")
            address, length, buffer_id, flags = read_descriptor(memory, self._desc, index, "2.8.13")
            if not self._is_available(flags, position):
                raise ChainError(
                    "2.8.17", index, flags, "first descriptor made available before the whole list"
                )
            position = self._advance(position, 1)
            if flags & DESC_F_INDIRECT:
                self._check_indirect(index, flags, slots)
                self._walk_table(memory, elements, index, address, length)
                break
            elements.add(index, address, length, flags & DESC_F_WRITE)
            if not flags & DESC_F_NEXT:
                break
        if buffer_id in in_flight:
            raise ChainError("2.8.21.1", index, buffer_id, "buffer ID is still in flight")
        self._check_space(slots, index)
        self.next_avail = position
        return DescriptorChain(buffer_id, tuple(elements.readable), tuple(elements.writable), slots)

    def _check_space(self, slots: int, index: int) -> None:
        """Refuse more unused descriptors than the ring has places."""
        used = self.next_used
        ahead = (self.next_avail & ~_WRAP) - (used & ~_WRAP)
        if (self.next_avail ^ used) & _WRAP:
            ahead += self._size
        if ahead + slots > self._size:
            raise ChainError(
                "2.8.17", index, ahead + slots, "more descriptors in flight than the ring holds"
            )

    def _check_indirect(self, index: int, flags: int, slots: int) -> None:
        if not self._indirect:
            raise ChainError("2.8.19", index, flags, "INDIRECT without VIRTIO_F_INDIRECT_DESC")
        if flags & DESC_F_NEXT or slots > 1:
            raise ChainError("2.8.19", index, flags, "INDIRECT in a list linked by NEXT")

    def _walk_table(
        self, memory: GuestMemory, elements: Elements, index: int, address: int, length: int
    ) -> None:
        entries = table_entries(memory, index, address, length, self._size, "2.8.7")
        for entry in range(entries):
            where, size, _, flags = read_descriptor(memory, address, entry, "2.8.7")
            elements.add(entry, where, size, flags & DESC_F_WRITE)

    def undo(self, chain: DescriptorChain) -> None:
        """Step back over the buffer that was taken last."""
        self.next_avail = self._advance(self.next_avail, -chain.slots)

    def put_used(self, memory: GuestMemory, entries: Sequence[tuple[DescriptorChain, int]]) -> None:
        """Write used descriptors; the first becomes visible last, and with it all of them."""
        position = self.next_used
        first: tuple[GuestAddress, int] | None = None
        for chain, length in entries:
            offset = position & ~_WRAP
            flags = DESC_F_AVAIL | DESC_F_USED if position & _WRAP else 0
            if length:
                flags |= DESC_F_WRITE
            address: GuestAddress = self._desc + 16 * offset + 8  # type: ignore[assignment]
            memory.write(address, DESCRIPTOR.pack(0, length, chain.head, 0)[8:14])
            where = self._flags_at(offset)
            if first is None:
                first = (where, flags)
            else:
                memory.atomic_store(where, 2, flags, _RELEASE)
            position = self._advance(position, chain.slots)
            self.pending += chain.slots
        if first is not None:
            memory.atomic_store(first[0], 2, first[1], _RELEASE)
        self.next_used = position

    def needs_notification(self, memory: GuestMemory) -> bool:
        """Decide once for everything published since the last call (2.8.10)."""
        if not self.pending:
            return False
        pending, self.pending = self.pending, 0
        fence()
        event_address: GuestAddress = self._driver_event  # type: ignore[assignment]
        event = memory.atomic_load(event_address, 4, _RELAXED)
        flags = event >> 16 & 3
        if flags == _DISABLE:
            return False
        if flags != _DESC or not self._event_idx:
            return True
        # Both positions on one axis, which repeats after two rounds of the ring.
        wish = event & ~_WRAP & 0xFFFF
        if wish >= self._size:
            return True
        passed = (self.next_used & ~_WRAP) - wish - 1
        if (event ^ self.next_used) & _WRAP:
            passed += self._size
        return passed % (2 * self._size) < pending

    def enable_notifications(self, memory: GuestMemory) -> bool:
        """Ask the driver for kicks; True when a buffer is there already."""
        event_address: GuestAddress = self._device_event  # type: ignore[assignment]
        if self._event_idx:
            # One store: the driver must not see a new position with old flags.
            event = self.next_avail | _DESC << 16
        else:
            event = _ENABLE << 16
        memory.atomic_store(event_address, 4, event, _RELEASE)
        fence()
        return self.available(memory) > 0

    def disable_notifications(self, memory: GuestMemory) -> None:
        """Tell the driver that kicks are not needed."""
        event_address: GuestAddress = self._device_event  # type: ignore[assignment]
        memory.atomic_store(event_address, 4, _DISABLE << 16, _RELAXED)
