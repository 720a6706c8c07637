"""Arithmetic of ranges of guest memory, each a guest address and a length in bytes."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["Ranges", "joined", "total", "without"]

Ranges = list[tuple[int, int]]
"""Guest address and length of each piece."""


def total(ranges: Ranges) -> int:
    """Bytes in all of them."""
    return sum(length for _, length in ranges)


def joined(*several: Iterable[tuple[int, int]]) -> Ranges:
    """What lies in any of them, sorted and coalesced."""
    found: Ranges = []
    for address, length in sorted(piece for ranges in several for piece in ranges):
        if found and address <= (end := sum(found[-1])):
            found[-1] = (found[-1][0], max(end, address + length) - found[-1][0])
        else:
            found.append((address, length))
    return found


def without(ranges: Ranges, others: Ranges) -> Ranges:
    """What of sorted ranges lies in none of the others, which are sorted and within them."""
    found, waiting = [], iter(others)
    other = next(waiting, None)
    for start, length in ranges:
        address, end = start, start + length
        while other is not None and other[0] < end:
            if other[0] > address:
                found.append((address, other[0] - address))
            address = min(sum(other), end)
            if sum(other) > end:
                break
            other = next(waiting, None)
        if address < end:
            found.append((address, end - address))
    return found
