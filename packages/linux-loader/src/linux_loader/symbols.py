"""Symbols of an ELF file by its own table (System V gABI, "Symbol Table")."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from linux_loader.errors import ImageError

if TYPE_CHECKING:
    from linux_loader.source import Source

__all__ = ["elf_symbols"]

_SHT_SYMTAB = 2
_MAX_SECTIONS = 1 << 16
_MAX_TABLE = 64 << 20
_MAX_NAME = 2048


def elf_symbols(source: Source) -> dict[str, int] | None:
    """Return the symbols of a file that `parse_elf` accepts; None where it was stripped.

    Raises:
        ImageError: the section headers or the table lie outside the file.
    """
    wide = source.read("EI_CLASS", 4, 1) == b"\2"
    header = source.read("e_ident", 0, 64 if wide else 52)
    (offset,) = struct.unpack_from("<Q" if wide else "<I", header, 40 if wide else 32)
    size, count, _ = struct.unpack_from("<HHH", header, 58 if wide else 46)
    if not offset or not count:
        return None
    section = struct.Struct("<IIQQQQIIQQ" if wide else "<10I")
    if size != section.size:
        raise ImageError("e_shentsize", 58 if wide else 46, size, f"must be {section.size}")
    table = source.read("e_shoff", offset, count * size)
    sections = list(section.iter_unpack(table))
    for _, kind, _, _, at, length, link, *_ in sections:
        if kind != _SHT_SYMTAB:
            continue
        if link >= count:
            raise ImageError("sh_link", None, link, "must be a section")
        at_names, names_size = sections[link][4:6]
        if max(length, names_size) > _MAX_TABLE:
            raise ImageError("sh_size", None, length, f"must be at most {_MAX_TABLE:#x}")
        return _read(
            source.read("symbols", at, length), source.read("names", at_names, names_size), wide
        )
    return None


def _read(table: bytes, names: bytes, wide: bool) -> dict[str, int]:
    symbol = struct.Struct("<IBBHQQ" if wide else "<IIIBBH")
    result: dict[str, int] = {}
    text = 0
    for fields in symbol.iter_unpack(table[: len(table) // symbol.size * symbol.size]):
        start, address = fields[0], fields[4] if wide else fields[1]
        end = names.find(b"\0", start, start + _MAX_NAME)
        text += max(0, end - start)
        if text > _MAX_TABLE:
            raise ImageError("st_name", None, start, "names must not overlap without end")
        if start and end > start:
            result.setdefault(names[start:end].decode("ascii", "replace"), address)
    return result
