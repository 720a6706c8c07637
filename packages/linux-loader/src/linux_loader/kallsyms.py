"""The kernel's own symbol table, found in its image without any help (kernel/kallsyms.c).

The table compresses names by 256 tokens. No header tells where its parts lie, so they are found by
what only they look like: the tokens of the ten digits follow each other, an index of offsets
follows the tokens, and before them lies a count with so many names behind it, and their markers.
"""

from __future__ import annotations

import struct
from operator import gt

__all__ = ["find_kallsyms"]

_DIGITS = b"".join([bytes([digit, 0]) for digit in b"0123456789"])
_SEARCHED = 8 << 20
_MIN_SYMBOLS, _MAX_SYMBOLS = 256, 1 << 20
_TYPES = {bytes([letter]) for letter in b"AaBbDdRrTtVvWwUuGgSsNn?"}
_MAX_NAME = 512  # KSYM_NAME_LEN
_MAX_PLACES, _MAX_TABLES = 4096, 4
_MAX_TEXT = 64 << 20


def find_kallsyms(data: bytes) -> dict[str, int] | None:
    """Return the symbols of an uncompressed kernel with their addresses; None where none are found.

    Addresses are as the kernel was linked: virtual. Where the base is left to a relocation at
    boot, as in arm64's images, they count from the kernel's beginning. Of symbols that occur more
    than once, the first is kept. Reads the layouts of Linux 4.20 and later.

    Args:
        data: the kernel's image, unpacked.
    """
    position = -1
    tables = 0
    # An image made to waste time has many places that look right: only the first ones count.
    for _ in range(_MAX_PLACES):
        position = data.find(_DIGITS, position + 1)
        if position < 0 or tables == _MAX_TABLES:
            return None
        found = _tokens(data, position)
        if found is not None:
            tables += 1
            start, index, tokens = found
            symbols = _symbols(data, start, index, tokens)
            if symbols is not None:
                return symbols
    return None


def _tokens(data: bytes, digits: int) -> tuple[int, int, list[bytes]] | None:
    """Check what may be the token table around the digits; return its place, its index, tokens."""
    start = digits
    for _ in range(ord("0")):
        # One token back: behind the NUL of the one before it.
        start = data.rfind(b"\0", max(0, start - 64), start - 1) + 1
        if start <= 0:
            return None
    tokens: list[bytes] = []
    offsets: list[int] = []
    position = start
    for _ in range(256):
        end = data.find(b"\0", position, position + 64)
        if end < 0:
            return None
        offsets.append(position - start)
        tokens.append(data[position:end])
        position = end + 1
    if offsets[-1] >= 1 << 16:
        return None
    wanted = struct.pack("<256H", *offsets)
    index = data.find(wanted, position, position + 16 + len(wanted))
    # The start is one token off where the first token is empty or bytes in front look like one.
    return None if index < 0 else (start, index, tokens)


def _symbols(
    data: bytes, at_tokens: int, at_index: int, tokens: list[bytes]
) -> dict[str, int] | None:
    """Look before the tokens for a count, behind which so many names and their markers lie."""
    first = max(0, at_tokens - _SEARCHED) & -8
    tried = 0
    words = memoryview(data)[first : at_tokens & -8].cast("I")
    for index in range(len(words) - 2, -1, -2):
        count = words[index]
        if words[index + 1] or not _MIN_SYMBOLS <= count <= _MAX_SYMBOLS:
            continue
        tried += 1
        if tried > _MAX_PLACES * 16:
            return None
        place = first + 4 * index
        names = _names(data, place + 8, at_tokens, count, tokens)
        if names is None:
            continue
        addresses = _addresses(data, place, at_index + 512, count) or [0] * count
        symbols: dict[str, int] = {}
        for name, address in zip(names, addresses, strict=True):
            symbols.setdefault(name, address)
        return symbols
    return None


def _names(data: bytes, start: int, end: int, count: int, tokens: list[bytes]) -> list[str] | None:
    """Unpack the names; None where they look wrong, or the markers behind them disagree."""
    names: list[str] = []
    text = 0
    marks: list[int] = []
    position = start
    for number in range(count):
        if number % 256 == 0:
            marks.append(position - start)
        if position + 2 > end:
            return None
        length = data[position]
        position += 1
        if length & 0x80:  # since Linux 6.1
            length = length & 0x7F | data[position] << 7
            position += 1
        if not 0 < length <= _MAX_NAME or position + length > end:
            return None
        name = b"".join([tokens[token] for token in data[position : position + length]])
        text += len(name)
        if name[:1] not in _TYPES or not 2 <= len(name) <= _MAX_NAME or text > _MAX_TEXT:
            return None
        names.append(name[1:].decode("ascii", "replace"))
        position += length
    wanted = struct.pack(f"<{len(marks)}I", *marks)
    return names if data.find(wanted, position, position + len(wanted) + 8) >= 0 else None


def _addresses(data: bytes, at_count: int, behind_index: int, count: int) -> list[int] | None:
    """Read offsets and their base: before the names, or since Linux 6.4 behind the tokens."""
    size = 4 * count
    before = (at_count - 8 - size) & -8
    behind = -(-behind_index // 8) * 8
    behind_base = -(-(behind + size) // 8) * 8
    for at_offsets, at_base in ((before, at_count - 8), (behind, behind_base)):
        if at_offsets < 0 or at_base + 8 > len(data):
            continue
        base = int.from_bytes(data[at_base : at_base + 8], "little")
        if base and base >> 47 != 0x1FFFF:
            continue
        offsets = struct.unpack_from(f"<{count}i", data, at_offsets)
        if not base and (offsets[0] < 0 or any(map(gt, offsets, offsets[1:]))):
            continue  # a base of 0 proves nothing: the table itself must look sorted
        if any(offset < 0 for offset in offsets):
            # CONFIG_KALLSYMS_ABSOLUTE_PERCPU: what is not negative is absolute
            return [offset if offset >= 0 else base - 1 - offset for offset in offsets]
        return [base + offset for offset in offsets]
    return None
