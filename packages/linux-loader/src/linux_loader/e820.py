"""The guest's physical memory map, in the terms of the x86 E820 table."""

from __future__ import annotations

import enum
import struct

from linux_loader.errors import PlacementError
from vm_memory._values import frozen

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["E820Entry", "E820Type", "checked_map", "encode", "ram_ranges"]

_ENTRY = struct.Struct("<QQI")


class E820Type(enum.IntEnum):
    """Kinds of memory (ACPI specification 6.5, table 15.2)."""

    RAM = 1
    RESERVED = 2
    ACPI = 3
    NVS = 4
    UNUSABLE = 5
    PMEM = 7


@frozen
class E820Entry:
    """One range of the guest's physical address space.

    Attributes:
        address: first byte, guest-physical.
        size: bytes; at least 1, and `address + size` at most 2**64.
        type: an `E820Type`, or any other 32-bit number a guest may know.
    """

    address: int
    size: int
    type: int


def checked_map(entries: Iterable[E820Entry]) -> tuple[E820Entry, ...]:
    """Return the map sorted by address.

    Raises:
        PlacementError: an entry is empty or out of range, or two entries overlap.
    """
    result = sorted(entries, key=lambda entry: entry.address)
    end = 0
    for entry in result:
        if entry.size < 1 or entry.address < 0 or entry.address + entry.size > 1 << 64:
            raise PlacementError(
                "memory_map", None, entry, "must have 1 byte or more and lie inside 64 bits"
            )
        if not 0 <= entry.type < 1 << 32:
            raise PlacementError("memory_map", None, entry, "the type must fit 32 bits")
        if entry.address < end:
            raise PlacementError("memory_map", None, entry, "must not overlap the entry before it")
        end = entry.address + entry.size
    return tuple(result)


def ram_ranges(entries: Sequence[E820Entry]) -> list[tuple[int, int]]:
    """Return the usable RAM of a checked map as (start, end) pairs, neighbours joined.

    >>> ram_ranges([E820Entry(0, 0x1000, 1), E820Entry(0x1000, 0x1000, 1)])
    [(0, 8192)]
    """
    result: list[tuple[int, int]] = []
    for entry in entries:
        if entry.type != 1:
            continue
        if result and result[-1][1] == entry.address:
            result[-1] = (result[-1][0], entry.address + entry.size)
        else:
            result.append((entry.address, entry.address + entry.size))
    return result


def encode(entries: Iterable[E820Entry]) -> bytes:
    """Return the entries as `struct boot_e820_entry` of the zero page, 20 bytes each."""
    return b"".join([_ENTRY.pack(entry.address, entry.size, entry.type) for entry in entries])
