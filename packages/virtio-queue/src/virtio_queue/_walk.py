"""The one place in Python where descriptors are checked (sections 2.7.5 and 2.8 of virtio 1.3)."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from virtio_queue.constants import MAX_CHAIN_BYTES, MAX_INDIRECT_DESCRIPTORS
from virtio_queue.errors import ChainError
from vm_memory import VmMemoryError

if TYPE_CHECKING:
    from vm_memory import GuestAddress, GuestMemory

DESCRIPTOR = struct.Struct("<QIHH")

SPLIT_SECTIONS = ("2.7.4.2", "2.7.5.2", "2.7.5")
PACKED_SECTIONS = ("2.8.17", "2.8.5", "2.8.4")

_NEXT, _WRITE, _INDIRECT = 1, 2, 4


class Elements:
    """Collects the elements of one chain and checks each as it comes."""

    __slots__ = ("_memory", "_sections", "_total", "readable", "writable")

    def __init__(self, memory: GuestMemory, sections: tuple[str, str, str]) -> None:
        self._memory = memory
        # Where the ring's format states: direction order, total length, place of a buffer.
        self._sections = sections
        self._total = 0
        self.readable: list[tuple[int, int]] = []
        self.writable: list[tuple[int, int]] = []

    def add(self, index: int, address: int, length: int, writes: int) -> None:
        """Check one element: direction order, total length, place in guest memory."""
        if writes:
            kind = self.writable
        else:
            kind = self.readable
            if self.writable:
                raise ChainError(
                    self._sections[0],
                    index,
                    address,
                    "device-readable element after a device-writable one",
                )
        self._total += length
        if self._total > MAX_CHAIN_BYTES:
            raise ChainError(
                self._sections[1], index, self._total, "chain longer than 2**32 bytes in total"
            )
        if length:
            place = self._sections[2]
            if address + length > 1 << 64:
                raise ChainError(place, index, address, "address + length passes 2**64")
            if not self._memory.check_range(address, length):  # type: ignore[arg-type]
                raise ChainError(place, index, address, "buffer outside guest memory")
        kind.append((address, length))


def read_descriptor(
    memory: GuestMemory, table: int, index: int, section: str
) -> tuple[int, int, int, int]:
    """Copy one descriptor out of a table, once."""
    address: GuestAddress = table + 16 * index  # type: ignore[assignment]
    try:
        raw = memory.read(address, 16)
    except VmMemoryError as error:
        raise ChainError(section, index, address, "descriptor outside guest memory") from error
    fields: tuple[int, int, int, int] = DESCRIPTOR.unpack(raw)
    return fields


def table_entries(
    memory: GuestMemory, index: int, address: int, length: int, size: int, section: str
) -> int:
    """Check an indirect table's extent and return how many descriptors it has.

    The table is only data: its address needs no alignment.
    """
    if length == 0 or length % 16:
        raise ChainError(section, index, length, "indirect table length not a multiple of 16")
    entries = length // 16
    if entries > max(size, MAX_INDIRECT_DESCRIPTORS):
        raise ChainError(
            section, index, entries, "indirect table longer than the device's limit of descriptors"
        )
    if address + length > 1 << 64 or not memory.check_range(address, length):  # type: ignore[arg-type]
        raise ChainError(section, index, address, "indirect table outside guest memory")
    return entries


def walk_split(
    memory: GuestMemory, table: int, size: int, head: int, *, indirect: bool
) -> tuple[Elements, int]:
    """Follow a split chain from `head`.

    Returns:
        Its elements and how many descriptors of the ring's own table it occupies.

    Raises:
        ChainError: at the first fault; what was collected until then is dropped.
    """
    elements = Elements(memory, SPLIT_SECTIONS)
    index = head
    slots = 0
    while True:
        if index >= size:
            raise ChainError("2.7.5", index, index, f"descriptor index not below queue size {size}")
        slots += 1
        if slots > size:
            raise ChainError("2.7.5.2", index, slots, "descriptor chain loops")
        address, length, flags, following = read_descriptor(memory, table, index, "2.7.5")
        if flags & _INDIRECT:
            if not indirect:
                raise ChainError(
                    "2.7.5.3.1", index, flags, "INDIRECT without VIRTIO_F_INDIRECT_DESC"
                )
            if flags & _NEXT:
                raise ChainError("2.7.5.3.1", index, flags, "INDIRECT and NEXT in one descriptor")
            entries = table_entries(memory, index, address, length, size, "2.7.5.3")
            _walk_table(memory, elements, address, entries)
            return elements, slots
        elements.add(index, address, length, flags & _WRITE)
        if not flags & _NEXT:
            return elements, slots
        index = following


def _walk_table(memory: GuestMemory, elements: Elements, table: int, entries: int) -> None:
    index = 0
    for _ in range(entries):
        if index >= entries:
            raise ChainError("2.7.5.3", index, index, "next outside the indirect table")
        address, length, flags, following = read_descriptor(memory, table, index, "2.7.5.3")
        if flags & _INDIRECT:
            raise ChainError("2.7.5.3.1", index, flags, "INDIRECT inside an indirect table")
        elements.add(index, address, length, flags & _WRITE)
        if not flags & _NEXT:
            return
        index = following
    if index >= entries:
        raise ChainError("2.7.5.3", index, index, "next outside the indirect table")
    raise ChainError("2.7.5.2", index, entries, "indirect descriptor chain loops")
