"""The device's side of a packed virtqueue (section 2.8 of virtio 1.3), in plain Python."""

from __future__ import annotations

from typing import TYPE_CHECKING

from virtio_queue import _rules
from virtio_queue.chain import DescriptorChain
from virtio_queue.constants import (
    DESC_F_AVAIL,
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_USED,
    DESC_F_WRITE,
)
from virtio_queue.testing.model.walk import DESCRIPTOR, Walk
from vm_memory import Order, fence

if TYPE_CHECKING:
    from collections.abc import Container, Sequence

    from vm_memory import GuestAddress, GuestMemory

__all__ = ["PackedRing"]

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
        walk = Walk(memory, self._size, packed=True, indirect=self._indirect)
        slots = 0
        while True:
            index = position & ~_WRAP
            slots += 1
            if slots > self._size:
                raise walk.broken(_rules.LIST_LENGTH, index, slots)
            address, length, buffer_id, flags = walk.read(self._desc, index)
            if not self._is_available(flags, position):
                raise walk.broken(_rules.LIST_PARTIAL, index, flags)
            position = self._advance(position, 1)
            if flags & DESC_F_INDIRECT:
                if not self._indirect:
                    raise walk.broken(_rules.NOT_NEGOTIATED, index, flags)
                if flags & DESC_F_NEXT or slots > 1:
                    raise walk.broken(_rules.INDIRECT_NEXT, index, flags)
                walk.packed_table(address, walk.entries(index, address, length))
                break
            walk.add(index, address, length, flags)
            if not flags & DESC_F_NEXT:
                break
        if buffer_id in in_flight:
            raise walk.broken(_rules.IN_FLIGHT, index, buffer_id)
        ahead = self._ahead() + slots
        if ahead > self._size:
            raise walk.broken(_rules.RING_FULL, index, ahead)
        self.next_avail = position
        return DescriptorChain(buffer_id, tuple(walk.readable), tuple(walk.writable), slots)

    def _ahead(self) -> int:
        """Descriptors between the positions of the device's reading and its writing."""
        ahead = (self.next_avail & ~_WRAP) - (self.next_used & ~_WRAP)
        return ahead + self._size if (self.next_avail ^ self.next_used) & _WRAP else ahead

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
