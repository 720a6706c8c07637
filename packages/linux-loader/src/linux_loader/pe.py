"""The PE header by which UEFI firmware starts a kernel by itself (its EFI stub).

PE format as in Microsoft's specification, of which UEFI 2.10, section 2.1.1, takes what an
application needs. The loader starts kernels by their own protocols and never by this one; it is
read to tell of an image, and as hostile as the rest of it.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import attrs

from linux_loader.errors import ImageError

if TYPE_CHECKING:
    from linux_loader.source import Source

__all__ = ["PeImage", "PeSection", "parse_pe"]

_MACHINES = {0x014C: "i386", 0x8664: "x86_64", 0xAA64: "arm64", 0x5064: "riscv64"}
_COFF = struct.Struct("<4sHH12xHH")
# From Magic to Subsystem; the two sizes differ between ImageBase and the stack.
_OPTIONAL = struct.Struct("<H14xI12xII16xII4xH")
_SECTION = struct.Struct("<8sIIII16x")
_PE32, _PE32_PLUS = 0x10B, 0x20B
_LEAST_OPTIONAL = {_PE32: 96, _PE32_PLUS: 112}
_EFI_APPLICATION = 10
_MAX_SECTIONS = 96


@attrs.frozen
class PeSection:
    """One section.

    Attributes:
        name: such as `.text`.
        address: where it goes, in bytes from the image's beginning in memory.
        memory_size: bytes it occupies there; those behind `file_size` are zero.
        offset: of its bytes in the file.
        file_size: bytes taken from the file.
    """

    name: str
    address: int
    memory_size: int
    offset: int
    file_size: int


@attrs.frozen
class PeImage:
    """A checked PE header of an EFI application.

    Attributes:
        machine: `i386`, `x86_64`, `arm64` or `riscv64`.
        entry: where the firmware begins, in bytes from the image's beginning in memory.
        image_size: bytes that it occupies there.
        section_alignment: of sections in memory; a power of two.
        sections: sorted by address; none overlaps another.
    """

    machine: str
    entry: int
    image_size: int
    section_alignment: int
    sections: tuple[PeSection, ...]


def parse_pe(source: Source) -> PeImage | None:
    """Read and check the PE header of an EFI application; None where the file has none.

    Raises:
        ImageError: there is one that breaks a rule.
    """
    head = source.read_up_to(0, 64)
    if len(head) < 64 or head[:2] != b"MZ":
        return None
    at = int.from_bytes(head[0x3C:0x40], "little")
    if at + _COFF.size > source.size:
        return None
    coff = source.read("PE header", at, _COFF.size)
    if coff[:4] != b"PE\0\0":
        return None
    _, machine, count, optional_size, _ = _COFF.unpack(coff)
    if machine not in _MACHINES:
        names = ", ".join([f"{number:#x} ({name})" for number, name in _MACHINES.items()])
        raise ImageError("Machine", at + 4, machine, f"must be one of {names}")
    if not 1 <= count <= _MAX_SECTIONS:
        raise ImageError("NumberOfSections", at + 6, count, f"must be 1 to {_MAX_SECTIONS}")
    begin = at + _COFF.size
    magic = int.from_bytes(source.read("Magic", begin, 2), "little")
    wanted = _PE32 if machine == 0x014C else _PE32_PLUS
    if magic != wanted:
        raise ImageError("Magic", begin, magic, f"must be {wanted:#x} for {_MACHINES[machine]}")
    if optional_size < _LEAST_OPTIONAL[magic]:
        least = _LEAST_OPTIONAL[magic]
        raise ImageError("SizeOfOptionalHeader", at + 20, optional_size, f"must be {least} or more")
    fields = _OPTIONAL.unpack(source.read("optional header", begin, _OPTIONAL.size))
    _, entry, section_alignment, file_alignment, image_size, headers_size, subsystem = fields
    _check_alignment("SectionAlignment", begin + 32, section_alignment)
    _check_alignment("FileAlignment", begin + 36, file_alignment)
    if headers_size > min(image_size, source.size):
        rule = f"must not exceed SizeOfImage ({image_size:#x}) and the file ({source.size:#x})"
        raise ImageError("SizeOfHeaders", begin + 60, headers_size, rule)
    if not 0 < entry < image_size:
        rule = f"must lie within SizeOfImage ({image_size:#x})"
        raise ImageError("AddressOfEntryPoint", begin + 16, entry, rule)
    if subsystem != _EFI_APPLICATION:
        raise ImageError("Subsystem", begin + 68, subsystem, "must be 10, an EFI application")
    return PeImage(
        machine=_MACHINES[machine],
        entry=entry,
        image_size=image_size,
        section_alignment=section_alignment,
        sections=_sections(source, begin + optional_size, count, image_size),
    )


def _check_alignment(field: str, at: int, value: int) -> None:
    if not value or value & (value - 1):
        raise ImageError(field, at, value, "must be a power of two")


def _sections(source: Source, at: int, count: int, image_size: int) -> tuple[PeSection, ...]:
    """Read the section table, whose places must be in the image and in the file."""
    table = source.read("section table", at, count * _SECTION.size)
    sections = []
    for index, fields in enumerate(_SECTION.iter_unpack(table)):
        name, memory_size, address, file_size, offset = fields
        here = at + index * _SECTION.size
        if address + memory_size > image_size:
            rule = f"with VirtualSize ({memory_size:#x}) must end within {image_size:#x}"
            raise ImageError("VirtualAddress", here + 12, address, rule)
        if file_size and offset + file_size > source.size:
            rule = f"with SizeOfRawData ({file_size:#x}) must end inside the file"
            raise ImageError("PointerToRawData", here + 20, offset, rule)
        text = name.rstrip(b"\0").decode("ascii", "replace")
        sections.append(PeSection(text, address, memory_size, offset, file_size))
    sections.sort(key=lambda section: section.address)
    end = 0
    for section in sections:
        if section.address < end:
            rule = f"section {section.name!r} must begin behind {end:#x}, where another ends"
            raise ImageError("VirtualAddress", None, section.address, rule)
        end = section.address + section.memory_size
    return tuple(sections)
