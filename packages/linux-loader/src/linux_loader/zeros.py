"""Which parts of a kernel's file are zeros: fresh memory is zero, so they need not be copied.

A third of a distribution's unpacked kernel is: its BSS, which the linker wrote out because a
section follows it, and the gaps to the next 2 MiB.
"""

from __future__ import annotations

import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from linux_loader.source import Source

__all__ = ["decode_zeros", "encode_zeros", "find_zeros"]

_BLOCK = 64 << 10
_PAIR = struct.Struct("<QQ")
_MAX_RANGES = 4096


def find_zeros(source: Source) -> tuple[tuple[int, int], ...]:
    """Read a file and return its ranges of zeros, in blocks of 64 KiB, neighbours joined."""
    result: list[tuple[int, int]] = []
    block = bytes(_BLOCK)
    for start in range(0, source.size - _BLOCK + 1, _BLOCK):
        if source.read("zeros", start, _BLOCK) == block:
            if result and result[-1][1] == start:
                result[-1] = (result[-1][0], start + _BLOCK)
            else:
                result.append((start, start + _BLOCK))
    return tuple(result[:_MAX_RANGES])


def encode_zeros(zeros: tuple[tuple[int, int], ...]) -> bytes:
    """Return ranges as pairs of 64-bit numbers."""
    return b"".join([_PAIR.pack(*pair) for pair in zeros])


def decode_zeros(data: bytes, size: int) -> tuple[tuple[int, int], ...]:
    """Read ranges of a file of `size` bytes; none where they cannot be right."""
    if len(data) % _PAIR.size or len(data) > _PAIR.size * _MAX_RANGES:
        return ()
    zeros = tuple(_PAIR.iter_unpack(data))
    before = 0
    for start, end in zeros:
        if not before <= start < end <= size:
            return ()
        before = end
    return zeros
