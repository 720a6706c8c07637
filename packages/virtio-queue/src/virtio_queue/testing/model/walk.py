"""Descriptors checked in plain Python (sections 2.7.5 and 2.8 of virtio 1.3)."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from virtio_queue import _rules
from virtio_queue.constants import (
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_WRITE,
    MAX_CHAIN_BYTES,
    MAX_INDIRECT_DESCRIPTORS,
)

if TYPE_CHECKING:
    from virtio_queue.errors import ChainError
    from vm_memory import GuestAddress, GuestMemory

__all__ = ["DESCRIPTOR", "Walk"]

DESCRIPTOR = struct.Struct("<QIHH")


class Walk:
    """Collects the elements of one chain and checks each as it comes."""

    def __init__(self, memory: GuestMemory, size: int, *, packed: bool, indirect: bool) -> None:
        self.memory = memory
        self.size = size
        self.packed = packed
        self.indirect = indirect
        self.total = 0
        self.readable: list[tuple[int, int]] = []
        self.writable: list[tuple[int, int]] = []

    def broken(self, rule: int, descriptor: int | None, value: int) -> ChainError:
        """Make the error for a broken rule."""
        return _rules.broken(rule, descriptor, value, packed=self.packed)

    def read(self, table: int, index: int) -> tuple[int, int, int, int]:
        """Copy one descriptor out of a table, once."""
        address: GuestAddress = table + 16 * index  # type: ignore[assignment]
        fields: tuple[int, int, int, int] = DESCRIPTOR.unpack(self.memory.read(address, 16))
        return fields

    def inside(self, address: int, length: int) -> bool:
        """Whether a range is all guest memory."""
        place: GuestAddress = address  # type: ignore[assignment]
        return address + length <= 1 << 64 and self.memory.check_range(place, length)

    def add(self, index: int, address: int, length: int, flags: int) -> None:
        """Check one element: direction order, total length, place in guest memory."""
        if not flags & DESC_F_WRITE and self.writable:
            raise self.broken(_rules.ORDER, index, address)
        self.total += length
        if self.total > MAX_CHAIN_BYTES:
            raise self.broken(_rules.TOTAL, index, self.total)
        if length and address + length > 1 << 64:
            raise self.broken(_rules.WRAPS, index, address)
        if length and not self.inside(address, length):
            raise self.broken(_rules.PLACE, index, address)
        (self.writable if flags & DESC_F_WRITE else self.readable).append((address, length))

    def entries(self, index: int, address: int, length: int) -> int:
        """Check an indirect table's extent and return how many descriptors it has."""
        entries = length // 16
        if length == 0 or length % 16:
            raise self.broken(_rules.TABLE_LENGTH, index, length)
        if entries > max(self.size, MAX_INDIRECT_DESCRIPTORS):
            raise self.broken(_rules.TABLE_LIMIT, index, entries)
        if not self.inside(address, length):
            raise self.broken(_rules.TABLE_PLACE, index, address)
        return entries

    def split_chain(self, table: int, head: int) -> int:
        """Follow a split chain and return how many descriptors of the queue's table it has."""
        index = head
        slots = 0
        while True:
            if index >= self.size:
                raise self.broken(_rules.INDEX, index, index)
            slots += 1
            if slots > self.size:
                raise self.broken(_rules.LOOP, index, slots)
            address, length, flags, following = self.read(table, index)
            if flags & DESC_F_INDIRECT:
                if not self.indirect:
                    raise self.broken(_rules.NOT_NEGOTIATED, index, flags)
                if flags & DESC_F_NEXT:
                    raise self.broken(_rules.INDIRECT_NEXT, index, flags)
                self.split_table(address, self.entries(index, address, length))
                return slots
            self.add(index, address, length, flags)
            if not flags & DESC_F_NEXT:
                return slots
            index = following

    def split_table(self, table: int, entries: int) -> None:
        """Follow a chain within an indirect table, whose entries are linked by `next`."""
        index = 0
        for _ in range(entries):
            if index >= entries:
                raise self.broken(_rules.TABLE_NEXT, index, index)
            address, length, flags, following = self.read(table, index)
            if flags & DESC_F_INDIRECT:
                raise self.broken(_rules.NESTED, index, flags)
            self.add(index, address, length, flags)
            if not flags & DESC_F_NEXT:
                return
            index = following
        if index >= entries:
            raise self.broken(_rules.TABLE_NEXT, index, index)
        raise self.broken(_rules.TABLE_LOOP, index, entries)

    def packed_table(self, table: int, entries: int) -> None:
        """Take all of an indirect table, whose entries simply follow each other (2.8.7)."""
        for index in range(entries):
            address, length, _, flags = self.read(table, index)
            self.add(index, address, length, flags)
