"""Where memory may come later, and which node it and the processors are of: SRAT (5.2.16).

Linux learns there, before there is any, how far memory may reach, and gives what comes to its node.
"""

from __future__ import annotations

from struct import pack
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["srat"]

_FIRST_X2APIC = 255
_PROCESSOR, _MEMORY, _X2APIC = 0, 1, 2
_ENABLED, _HOT_PLUGGABLE = 1, 2


def srat(cpus: int, ram: Iterable[tuple[int, int]], areas: Iterable[tuple[int, int, int]]) -> bytes:
    """The body of the table.

    Args:
        cpus: how many processors there may be; they are of node 0.
        ram: address and size of memory that is there from the start; it is of node 0.
        areas: address, size and node of memory that may come.
    """
    entries = [pack("<I8x", 1)]
    entries += [
        pack("<BBBBI8x", _PROCESSOR, 16, 0, number, _ENABLED)
        if number < _FIRST_X2APIC
        else pack("<BB2xIII8x", _X2APIC, 24, 0, number, _ENABLED)
        for number in range(cpus)
    ]
    entries += [_memory(*piece, 0, _ENABLED) for piece in ram]
    entries += [_memory(*area, _ENABLED | _HOT_PLUGGABLE) for area in areas]
    return b"".join(entries)


def _memory(address: int, size: int, node: int, flags: int) -> bytes:
    """A memory affinity structure (5.2.16.2)."""
    return pack("<BBI2xQQ4xI8x", _MEMORY, 40, node, address, size, flags)
