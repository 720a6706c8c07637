"""The device's side of a split virtqueue (section 2.7 of virtio 1.3), in plain Python."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from virtio_queue import _rules
from virtio_queue.chain import DescriptorChain
from virtio_queue.testing.model.walk import Walk
from vm_memory import Order, fence

if TYPE_CHECKING:
    from collections.abc import Container, Sequence

    from vm_memory import GuestAddress, GuestMemory

__all__ = ["SplitRing"]

_USED_ELEM = struct.Struct("<II")
_MASK = 0xFFFF
_ACQUIRE, _RELEASE, _RELAXED = Order.ACQUIRE, Order.RELEASE, Order.RELAXED


class SplitRing:
    """Indices into one split ring and the accesses that move them.

    Ordering against the driver (2.7.13, 2.7.14): `avail.idx` is loaded with acquire before the
    entries it covers; `used.idx` is stored with release after them; a full fence stands between
    publishing used entries and reading the driver's wish for notifications, and between
    announcing a wish for kicks and looking for buffers once more.
    """

    __slots__ = (
        "_avail",
        "_desc",
        "_event_idx",
        "_indirect",
        "_size",
        "_used",
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
        self._desc, self._avail, self._used = areas
        self._event_idx = event_idx
        self._indirect = indirect
        self.next_avail = 0
        self.next_used = 0
        # Used buffers published since the last decision whether to notify.
        self.pending = 0

    def available(self, memory: GuestMemory) -> int:
        """Chains the driver has made available and the device has not taken."""
        idx_address: GuestAddress = self._avail + 2  # type: ignore[assignment]
        count = (memory.atomic_load(idx_address, 2, _ACQUIRE) - self.next_avail) & _MASK
        if count > self._size:
            raise _rules.broken(_rules.AVAIL_IDX, None, count, packed=False)
        return count

    def pop(self, memory: GuestMemory, in_flight: Container[int]) -> DescriptorChain | None:
        """Take the next chain, or None when there is none."""
        if not self.available(memory):
            return None
        slot = self.next_avail % self._size
        entry: GuestAddress = self._avail + 4 + 2 * slot  # type: ignore[assignment]
        head = memory.atomic_load(entry, 2, _RELAXED)
        walk = Walk(memory, self._size, packed=False, indirect=self._indirect)
        if head in in_flight:
            raise walk.broken(_rules.IN_FLIGHT, head, head)
        slots = walk.split_chain(self._desc, head)
        self.next_avail = (self.next_avail + 1) & _MASK
        return DescriptorChain(head, tuple(walk.readable), tuple(walk.writable), slots)

    def undo(self, chain: DescriptorChain) -> None:
        """Step back over the chain that was taken last."""
        del chain
        self.next_avail = (self.next_avail - 1) & _MASK

    def put_used(self, memory: GuestMemory, entries: Sequence[tuple[DescriptorChain, int]]) -> None:
        """Write used elements and publish them all by one release store."""
        next_used = self.next_used
        for chain, length in entries:
            slot = next_used % self._size
            address: GuestAddress = self._used + 4 + 8 * slot  # type: ignore[assignment]
            memory.write(address, _USED_ELEM.pack(chain.head, length))
            next_used = (next_used + 1) & _MASK
        idx_address: GuestAddress = self._used + 2  # type: ignore[assignment]
        memory.atomic_store(idx_address, 2, next_used, _RELEASE)
        self.next_used = next_used
        self.pending += len(entries)

    def needs_notification(self, memory: GuestMemory) -> bool:
        """Decide once for everything published since the last call (2.7.7.2)."""
        if not self.pending:
            return False
        pending, self.pending = self.pending, 0
        fence()
        if not self._event_idx:
            flags_address: GuestAddress = self._avail  # type: ignore[assignment]
            return not memory.atomic_load(flags_address, 2, _RELAXED) & 1
        event_address: GuestAddress = self._avail + 4 + 2 * self._size  # type: ignore[assignment]
        event = memory.atomic_load(event_address, 2, _RELAXED)
        return (self.next_used - event - 1) & _MASK < pending

    def enable_notifications(self, memory: GuestMemory) -> bool:
        """Ask the driver for kicks; True when buffers are there already."""
        if self._event_idx:
            event: GuestAddress = self._used + 4 + 8 * self._size  # type: ignore[assignment]
            memory.atomic_store(event, 2, self.next_avail, _RELAXED)
        else:
            flags: GuestAddress = self._used  # type: ignore[assignment]
            memory.atomic_store(flags, 2, 0, _RELAXED)
        fence()
        return self.available(memory) > 0

    def disable_notifications(self, memory: GuestMemory) -> None:
        """Tell the driver that kicks are not needed.

        With EVENT_IDX `avail_event` simply stays behind `avail.idx`, and flags must be 0.
        """
        if not self._event_idx:
            flags: GuestAddress = self._used  # type: ignore[assignment]
            memory.atomic_store(flags, 2, 1, _RELAXED)
