"""The driver of a packed virtqueue (sections 2.8.21 and 2.8.22 of virtio 1.3)."""

from __future__ import annotations

import struct
from collections import deque
from typing import TYPE_CHECKING

from virtio_queue.constants import (
    DESC_F_AVAIL,
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_USED,
    DESC_F_WRITE,
    F_EVENT_IDX,
    F_IN_ORDER,
    F_RING_PACKED,
    F_VERSION_1,
)
from virtio_queue.errors import UsageError
from virtio_queue.testing.driver import DeviceRuleError, Driver, Used
from vm_memory import fence

if TYPE_CHECKING:
    from collections.abc import Iterable

    from virtio_queue.testing.arena import Arena
    from vm_memory import GuestMemory

__all__ = ["PackedDriver"]

_DESCRIPTOR = struct.Struct("<QIHH")
_ENABLE, _DISABLE, _DESC = 0, 1, 2


class PackedDriver(Driver):
    """A correct driver of a packed ring, with the means to be an incorrect one.

    `write_descriptor` writes what it is told; everything else keeps the specification's rules
    and checks that the device does.

    Example:
        >>> from vm_memory import GuestAddress, GuestMemory
        >>> from virtio_queue import Queue
        >>> memory = GuestMemory.from_ranges([(GuestAddress(0), 1 << 20)])
        >>> driver = PackedDriver(memory, 5)
        >>> queue = Queue(8)
        >>> driver.configure(queue)
        >>> head = driver.add([b"abc"], [2])
        >>> chain = queue.pop(memory)
        >>> chain.writer(memory).write(b"ok")
        2
        >>> queue.add_used(memory, head, 2)
        >>> driver.reap()
        [Used(head=0, length=2, data=b'ok')]
        >>> memory.close()
    """

    def __init__(
        self,
        memory: GuestMemory,
        size: int,
        *,
        features: int = F_VERSION_1 | F_RING_PACKED,
        arena: Arena | None = None,
    ) -> None:
        super().__init__(memory, size, features=features | F_RING_PACKED, arena=arena)
        self._event_idx = bool(features & F_EVENT_IDX)
        self._ids = deque(range(size))
        self.free = size
        self.next_avail = 0
        self.avail_wrap = 1
        self.next_used = 0
        self.used_wrap = 1
        self._unkicked = 0
        self._held: tuple[int, int] | None = None

    def _allocate_rings(self) -> tuple[int, int, int]:
        areas = (
            self.arena.allocate(16 * self.size, align=16),
            self.arena.allocate(4, align=4),
            self.arena.allocate(4, align=4),
        )
        for address, length in zip(areas, (16 * self.size, 4, 4), strict=True):
            self.write(address, bytes(length))
        return areas

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
            publish: False holds this and what follows back until `publish`.

        Returns:
            The buffer ID, which the device gives back.

        Raises:
            UsageError: the ring or the arena is full; nothing was made available.
        """
        self.require_indirect(indirect)
        buffer = self.place(readable, writable)
        elements = self.elements(buffer)
        slots = 1 if indirect else len(elements)
        if self.free < slots:
            for block in buffer.blocks:
                self.arena.free(block)
            raise UsageError("add", "no free descriptors; reap used buffers first")
        if indirect:
            table = self._block(buffer, 16 * len(elements))
            for at, (address, length, flags) in enumerate(elements):
                self.write(table + 16 * at, _DESCRIPTOR.pack(address, length, 0, flags))
            elements = [(table, 16 * len(elements), DESC_F_INDIRECT)]
        buffer.head = self._ids.popleft()
        buffer.slots = slots
        self.outstanding[buffer.head] = buffer
        self.free -= slots
        self._unkicked += slots
        for at, (address, length, flags) in enumerate(elements):
            flags |= DESC_F_AVAIL if self.avail_wrap else DESC_F_USED
            if at < slots - 1:
                flags |= DESC_F_NEXT
            offset = self.next_avail
            if at == 0 and self._held is None:
                # The first descriptor's flags make everything behind it visible: they come last.
                self._held = (offset, flags)
                self.write_descriptor(offset, address, length, buffer.head, None)
            else:
                self.write_descriptor(offset, address, length, buffer.head, flags)
            self.next_avail += 1
            if self.next_avail == self.size:
                self.next_avail = 0
                self.avail_wrap ^= 1
        if publish:
            self.publish()
        return buffer.head

    def publish(self) -> None:
        """Let the device see what was added since the last time."""
        if self._held is not None:
            offset, flags = self._held
            self._held = None
            self.store16(self.descriptor_area + 16 * offset + 14, flags)

    def kick_needed(self) -> bool:
        """Whether the device wants to hear of what was published since the last call (2.8.10)."""
        added, self._unkicked = self._unkicked, 0
        fence()
        wish = self.load16(self.device_area)
        flags = self.load16(self.device_area + 2) & 3
        if not added or flags == _DISABLE:
            return False
        if flags != _DESC:
            return True
        passed = self.next_avail - (wish & 0x7FFF) - 1
        if wish >> 15 != self.avail_wrap:
            passed += self.size
        return passed % (2 * self.size) < added

    def _take_used(self) -> list[Used]:
        reaped: list[Used] = []
        while self.outstanding:
            base = self.descriptor_area + 16 * self.next_used
            flags = self.load16(base + 14)
            avail, used = bool(flags & DESC_F_AVAIL), bool(flags & DESC_F_USED)
            if avail != used or used != bool(self.used_wrap):
                break
            _, length, head, _ = _DESCRIPTOR.unpack(self.read(base, 16))
            if not flags & DESC_F_WRITE:
                length = 0
            if self.features & F_IN_ORDER:
                while (first := next(iter(self.outstanding), head)) != head:
                    room = sum(size for _, size in self.outstanding[first].writable)
                    reaped.append(self._reap_one(first, room))
            reaped.append(self._reap_one(head, length))
        return reaped

    def _reap_one(self, head: int, length: int) -> Used:
        buffer = self.outstanding.get(head)
        used = self.take_back(head, length, "2.8.22")
        if buffer is None:
            raise DeviceRuleError("2.8.22", f"buffer {head} is not the device's")
        self._ids.append(head)
        self.free += buffer.slots
        self.next_used += buffer.slots
        if self.next_used >= self.size:
            self.next_used -= self.size
            self.used_wrap ^= 1
        return used

    def enable_interrupts(self) -> None:
        """Ask for a notification of the next used buffer (2.8.10)."""
        self._interrupts = True
        if self._event_idx:
            self.store16(self.driver_area, self.next_used | self.used_wrap << 15)
            self.store16(self.driver_area + 2, _DESC)
        else:
            self.store16(self.driver_area + 2, _ENABLE)
        fence()

    def disable_interrupts(self) -> None:
        """Say that notifications are not needed."""
        self._interrupts = False
        self.store16(self.driver_area + 2, _DISABLE)

    def write_descriptor(
        self, offset: int, address: int, length: int, buffer_id: int, flags: int | None
    ) -> None:
        """Write one ring descriptor, its flags last; None leaves the flags as they are."""
        base = self.descriptor_area + 16 * offset
        self.write(base, _DESCRIPTOR.pack(address, length, buffer_id, 0)[:14])
        if flags is not None:
            self.store16(base + 14, flags)
