"""The driver of a split virtqueue (sections 2.7.13 and 2.7.14 of virtio 1.3)."""

from __future__ import annotations

import struct
from collections import deque
from typing import TYPE_CHECKING

from virtio_queue.constants import (
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    F_EVENT_IDX,
    F_IN_ORDER,
    F_VERSION_1,
)
from virtio_queue.errors import UsageError
from virtio_queue.testing.driver import DeviceRuleError, Driver, Used
from vm_memory import fence

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from virtio_queue.testing.arena import Arena
    from vm_memory import GuestMemory

__all__ = ["SplitDriver"]

_DESCRIPTOR = struct.Struct("<QIHH")
_USED = struct.Struct("<II")
_MASK = 0xFFFF


class SplitDriver(Driver):
    """A correct driver of a split ring, with the means to be an incorrect one.

    `write_descriptor`, `make_available` and `set_avail_idx` write what they are told; everything
    else keeps the specification's rules and checks that the device does.

    Example:
        >>> from vm_memory import GuestAddress, GuestMemory
        >>> from virtio_queue import Queue
        >>> memory = GuestMemory.from_ranges([(GuestAddress(0), 1 << 20)])
        >>> driver = SplitDriver(memory, 8)
        >>> queue = Queue(8)
        >>> driver.configure(queue)
        >>> head = driver.add([b"abc"])
        >>> queue.pop(memory).reader(memory).read(3)
        b'abc'
        >>> queue.add_used(memory, head, 0)
        >>> driver.reap()
        [Used(head=0, length=0, data=b'')]
        >>> memory.close()
    """

    def __init__(
        self,
        memory: GuestMemory,
        size: int,
        *,
        features: int = F_VERSION_1,
        arena: Arena | None = None,
    ) -> None:
        super().__init__(memory, size, features=features, arena=arena)
        self._event_idx = bool(features & F_EVENT_IDX)
        # First in, first out: in-order devices then get descriptors in ring order (2.7.5.2).
        self._free = deque(range(size))
        self._chains: dict[int, list[int]] = {}
        # What lies between `published` and `next_avail` is written but not yet visible.
        self.next_avail = 0
        self.published = 0
        self.last_used = 0

    def _allocate_rings(self) -> tuple[int, int, int]:
        areas = (
            self.arena.allocate(16 * self.size, align=16),
            self.arena.allocate(6 + 2 * self.size, align=2),
            self.arena.allocate(6 + 8 * self.size, align=4),
        )
        for address, length in zip(areas, (16, 2, 8), strict=True):
            self.write(address, bytes(length * self.size + (6 if length != 16 else 0)))
        return areas

    # Correct operation --------------------------------------------------------------------

    @property
    def free(self) -> int:
        """Descriptors that are not in use."""
        return len(self._free)

    def add(
        self,
        readable: Iterable[bytes] = (),
        writable: Iterable[int] = (),
        *,
        indirect: bool = False,
        publish: bool = True,
    ) -> int:
        """Make one buffer available.

        Args:
            readable: contents of the device-readable elements.
            writable: lengths of the device-writable elements.
            indirect: describe it by an indirect table.
            publish: move `avail.idx`; False to collect a batch for `publish`.

        Returns:
            The head, which the device gives back.

        Raises:
            UsageError: the ring or the arena is full; nothing was made available.
        """
        self.require_indirect(indirect)
        buffer = self.place(readable, writable)
        elements = self.elements(buffer)
        if len(self._free) < (1 if indirect else len(elements)):
            for block in buffer.blocks:
                self.arena.free(block)
            raise UsageError("add", "no free descriptors; reap used buffers first")
        if indirect:
            table = self._block(buffer, 16 * len(elements))
            self._write_table(table, elements)
            indices = [self._free.popleft()]
            self.write_descriptor(indices[0], table, 16 * len(elements), DESC_F_INDIRECT)
        else:
            indices = [self._free.popleft() for _ in elements]
            for at, (address, length, flags) in enumerate(elements):
                last = at == len(elements) - 1
                following = 0 if last else indices[at + 1]
                more = 0 if last else DESC_F_NEXT
                self.write_descriptor(indices[at], address, length, flags | more, following)
        buffer.head = indices[0]
        buffer.slots = len(indices)
        self.outstanding[buffer.head] = buffer
        self._chains[buffer.head] = indices
        self.make_available(buffer.head)
        if publish:
            self.publish()
        return buffer.head

    def _write_table(self, table: int, elements: Sequence[tuple[int, int, int]]) -> None:
        for at, (address, length, flags) in enumerate(elements):
            more = DESC_F_NEXT if at < len(elements) - 1 else 0
            following = at + 1 if more else 0
            self.write_descriptor(at, address, length, flags | more, following, table=table)

    def publish(self) -> None:
        """Let the device see what was added since the last time."""
        self.store16(self.driver_area + 2, self.next_avail)

    def kick_needed(self) -> bool:
        """Whether the device wants to hear of what was published since the last call (2.7.10)."""
        old, self.published = self.published, self.next_avail
        fence()
        if not self._event_idx:
            return old != self.next_avail and not self.load16(self.device_area) & 1
        event = self.load16(self.device_area + 4 + 8 * self.size)
        return (self.next_avail - event - 1) & _MASK < (self.next_avail - old) & _MASK

    def _take_used(self) -> list[Used]:
        idx = self.load16(self.device_area + 2)
        ahead = (idx - self.last_used) & _MASK
        if ahead > len(self.outstanding):
            raise DeviceRuleError("2.7.8", f"used idx {idx} is {ahead} ahead of the driver's")
        reaped: list[Used] = []
        while self.last_used != idx:
            slot = self.last_used % self.size
            head, length = _USED.unpack(self.read(self.device_area + 4 + 8 * slot, 8))
            if self.features & F_IN_ORDER:
                reaped += self._reap_batch(head)
            reaped.append(self._reap_one(head, length))
        return reaped

    def _reap_batch(self, last: int) -> list[Used]:
        """Take back the buffers a device skipped: they are used completely (2.7.9)."""
        skipped: list[Used] = []
        while self.outstanding and (head := next(iter(self.outstanding))) != last:
            room = sum(size for _, size in self.outstanding[head].writable)
            skipped.append(self._reap_one(head, room))
        return skipped

    def _reap_one(self, head: int, length: int) -> Used:
        used = self.take_back(head, length, "2.7.8")
        self._free.extend(self._chains.pop(head))
        self.last_used = (self.last_used + 1) & _MASK
        return used

    def enable_interrupts(self) -> None:
        """Ask for a notification of the next used buffer (2.7.7)."""
        self._interrupts = True
        if self._event_idx:
            self.store16(self.driver_area + 4 + 2 * self.size, self.last_used)
        else:
            self.store16(self.driver_area, 0)
        fence()

    def disable_interrupts(self) -> None:
        """Say that notifications are not needed; with EVENT_IDX the event just stays behind."""
        self._interrupts = False
        if not self._event_idx:
            self.store16(self.driver_area, 1)
            return
        self.store16(self.driver_area + 4 + 2 * self.size, (self.last_used - 1) & _MASK)

    # The means to break rules -------------------------------------------------------------

    def write_descriptor(
        self,
        index: int,
        address: int,
        length: int,
        flags: int = 0,
        following: int = 0,
        *,
        table: int | None = None,
    ) -> None:
        """Write one descriptor of the queue's table, or of another one."""
        base = self.descriptor_area if table is None else table
        self.write(base + 16 * index, _DESCRIPTOR.pack(address, length, flags, following))

    def make_available(self, head: int) -> None:
        """Put a head into the next entry of the available ring, without publishing it."""
        slot = self.next_avail % self.size
        self.store16(self.driver_area + 4 + 2 * slot, head)
        self.next_avail = (self.next_avail + 1) & _MASK

    def set_avail_idx(self, idx: int) -> None:
        """Write `avail.idx` itself."""
        self.store16(self.driver_area + 2, idx)
