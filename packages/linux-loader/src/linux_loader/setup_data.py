"""`struct setup_data`: what the zero page has no room for (boot.rst, section "setup_data")."""

from __future__ import annotations

import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["SETUP_E820_EXT", "SETUP_RNG_SEED", "setup_data_list"]

SETUP_E820_EXT = 1
"""More memory ranges than the zero page's 128."""
SETUP_RNG_SEED = 9
"""Entropy for the kernel's random number generator; it wipes it after use (Linux 6.0)."""

_HEADER = struct.Struct("<QII")


def setup_data_list(address: int, items: Sequence[tuple[int, bytes]]) -> bytes:
    """Return a list of entries, each pointing at the next, as it lies at `address`.

    Args:
        address: guest-physical, a multiple of 8.
        items: type and content of each entry.
    """
    result = b""
    for index, (kind, data) in enumerate(items):
        following = address + len(result) + _HEADER.size + -(-len(data) // 8) * 8
        last = index == len(items) - 1
        entry = _HEADER.pack(0 if last else following, kind, len(data)) + data
        result += entry.ljust(-(-len(entry) // 8) * 8, b"\0")
    return result
