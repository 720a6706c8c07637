"""ELF images: which bytes go where, and where to begin (System V gABI, chapters 4 and 5)."""

from __future__ import annotations

import struct

from linux_loader.errors import ImageError
from vm_memory._values import frozen

TYPE_CHECKING = False
if TYPE_CHECKING:
    from linux_loader.source import Source

__all__ = ["ElfImage", "ElfSegment", "Relocation", "parse_elf"]

EM_386 = 3
EM_X86_64 = 62
_MACHINES = {EM_386: "i386", EM_X86_64: "x86_64"}

_HEADER_64 = struct.Struct("<16xHHIQQQIHHH")
_HEADER_32 = struct.Struct("<16xHHIIIIIHHH")
_PROGRAM_64 = struct.Struct("<IIQQQQQQ")
_PROGRAM_32 = struct.Struct("<IIIIIIII")
_NOTE = struct.Struct("<III")

ET_DYN = 3
_PT_LOAD = 1
_PT_NOTE = 4
_XEN_ELFNOTE_PHYS32_ENTRY = 18
_XEN_ELFNOTE_PHYS32_RELOC = 19
_NO_LIMITS = [2 << 20, 0, 0xFFFFFFFF]
"""What the note PHYS32_RELOC means by a number that it leaves out."""
_MAX_PROGRAM_HEADERS = 256
_MAX_NOTES = 1 << 20


@frozen(kw_only=True)
class ElfSegment:
    """A PT_LOAD program header.

    Attributes:
        offset: of its bytes in the file.
        address: p_paddr, guest-physical.
        virtual_address: p_vaddr.
        file_size: bytes taken from the file.
        memory_size: bytes it occupies; those after `file_size` are zero.
        flags: p_flags (1 execute, 2 write, 4 read).
    """

    offset: int
    address: int
    virtual_address: int
    file_size: int
    memory_size: int
    flags: int


@frozen(kw_only=True)
class Relocation:
    """Where a kernel that moves itself may lie: the note XEN_ELFNOTE_PHYS32_RELOC.

    Attributes:
        alignment: of its first byte; a power of two.
        minimum: the lowest address of its first byte.
        maximum: the highest address of its last byte.
    """

    alignment: int
    minimum: int
    maximum: int


@frozen(kw_only=True)
class ElfImage:
    """A checked x86 executable.

    Attributes:
        bits: 32 or 64, the file's class.
        kind: e_type: 2 (ET_EXEC) or 3 (ET_DYN, position-independent).
        machine: e_machine: 3 (EM_386) or 62 (EM_X86_64).
        entry: guest-physical address of e_entry.
        pvh_entry: 32-bit entry of the XEN_ELFNOTE_PHYS32_ENTRY note, or None.
        relocation: what the XEN_ELFNOTE_PHYS32_RELOC note says, or None.
        alignment: the largest p_align of the segments, 1 or more.
        segments: in the file's order; none is empty.
    """

    bits: int
    kind: int
    machine: int
    entry: int
    pvh_entry: int | None
    relocation: Relocation | None
    alignment: int
    segments: tuple[ElfSegment, ...]


def parse_elf(source: Source) -> ElfImage:
    """Read and check the headers of an x86 ELF executable; no segment is read.

    Raises:
        ImageError: any header breaks a rule of the gABI, or asks for what cannot be loaded.
    """
    head = source.read_up_to(0, 4096)
    if len(head) < 52 or head[:4] != b"\x7fELF":
        raise ImageError("e_ident", 0, head[:4], "must begin an ELF header of 52 or 64 bytes")
    if head[4] not in (1, 2):
        raise ImageError("EI_CLASS", 4, head[4], "must be ELFCLASS32 (1) or ELFCLASS64 (2)")
    if head[5] != 1:
        raise ImageError("EI_DATA", 5, head[5], "must be ELFDATA2LSB (1): x86 is little-endian")
    if head[6] != 1:
        raise ImageError("EI_VERSION", 6, head[6], "must be EV_CURRENT (1)")
    wide = head[4] == 2
    if wide and len(head) < 64:
        raise ImageError("e_ehsize", 0, len(head), "an ELF64 header has 64 bytes")
    (e_type, machine, version, entry, phoff, _, _, _, phentsize, phnum) = (
        _HEADER_64 if wide else _HEADER_32
    ).unpack_from(head)
    program = _PROGRAM_64 if wide else _PROGRAM_32
    if e_type not in (2, ET_DYN):
        raise ImageError("e_type", 16, e_type, "must be ET_EXEC (2) or ET_DYN (3)")
    if machine not in _MACHINES:
        raise ImageError("e_machine", 18, machine, "must be EM_386 (3) or EM_X86_64 (62)")
    if version != 1:
        raise ImageError("e_version", 20, version, "must be EV_CURRENT (1)")
    if machine == EM_386 and wide:
        raise ImageError("EI_CLASS", 4, 2, "must be ELFCLASS32 for EM_386")
    at_phentsize = 54 if wide else 42
    if phentsize != program.size:
        raise ImageError("e_phentsize", at_phentsize, phentsize, f"must be {program.size}")
    if not 1 <= phnum <= _MAX_PROGRAM_HEADERS:
        raise ImageError("e_phnum", at_phentsize + 2, phnum, f"must be 1 to {_MAX_PROGRAM_HEADERS}")
    table_size = phnum * program.size
    if phoff + table_size <= len(head):
        table, start = head, phoff
    else:
        table, start = source.read("e_phoff", phoff, table_size), 0

    segments: list[ElfSegment] = []
    alignment = 1
    notes: dict[int, tuple[int, bytes]] = {}
    for index in range(phnum):
        at = phoff + index * program.size
        fields = program.unpack_from(table, start + index * program.size)
        if wide:
            (kind, flags, offset, vaddr, paddr, filesz, memsz, align) = fields
        else:
            (kind, offset, vaddr, paddr, filesz, memsz, flags, align) = fields
        if kind == _PT_LOAD:
            if memsz:
                _check_segment(source, at, offset, paddr, filesz, memsz)
                alignment = max(alignment, align)
                segments.append(
                    ElfSegment(
                        offset=offset,
                        address=paddr,
                        virtual_address=vaddr,
                        file_size=filesz,
                        memory_size=memsz,
                        flags=flags,
                    )
                )
            elif filesz:
                raise ImageError("p_memsz", at, 0, f"must be at least p_filesz ({filesz:#x})")
        elif kind == _PT_NOTE:
            _xen_notes(notes, source, at, offset, filesz, 8 if align == 8 else 4)
    if not segments:
        raise ImageError("e_phnum", at_phentsize + 2, phnum, "must include a PT_LOAD segment")
    pvh_entry = _pvh_entry(notes)
    if pvh_entry is not None and _holder(segments, pvh_entry) is None:
        raise ImageError(
            "XEN_ELFNOTE_PHYS32_ENTRY", None, pvh_entry, "must lie in a PT_LOAD segment"
        )
    return ElfImage(
        bits=64 if wide else 32,
        kind=e_type,
        machine=machine,
        entry=_physical_entry(segments, entry, pvh_entry),
        pvh_entry=pvh_entry,
        relocation=_relocation(notes),
        alignment=alignment,
        segments=tuple(segments),
    )


def _check_segment(
    source: Source, at: int, offset: int, paddr: int, filesz: int, memsz: int
) -> None:
    if filesz > memsz:
        raise ImageError("p_filesz", at, filesz, f"must not exceed p_memsz ({memsz:#x})")
    if offset + filesz > source.size:
        raise ImageError(
            "p_offset",
            at,
            offset,
            f"its {filesz:#x} bytes must lie inside {source.name} of {source.size:#x} bytes",
        )
    if paddr + memsz > 1 << 52:
        raise ImageError("p_paddr", at, paddr, f"with p_memsz ({memsz:#x}) must fit 52 bits")


def _holder(segments: list[ElfSegment], address: int) -> ElfSegment | None:
    for segment in segments:
        if segment.address <= address < segment.address + segment.memory_size:
            return segment
    return None


def _physical_entry(segments: list[ElfSegment], entry: int, pvh_entry: int | None) -> int:
    """Return e_entry as a physical address: linkers write either kind there."""
    if _holder(segments, entry) is not None:
        return entry
    for segment in segments:
        if segment.virtual_address <= entry < segment.virtual_address + segment.memory_size:
            return segment.address + entry - segment.virtual_address
    if pvh_entry is not None:
        return pvh_entry
    raise ImageError("e_entry", 24, entry, "must lie in a PT_LOAD segment")


def _xen_notes(
    found: dict[int, tuple[int, bytes]],
    source: Source,
    at: int,
    offset: int,
    size: int,
    align: int,
) -> None:
    """Add Xen's notes of one PT_NOTE header: by type, where its description lies, and that."""
    if size > _MAX_NOTES:
        raise ImageError("p_filesz", at, size, f"of a PT_NOTE must be at most {_MAX_NOTES:#x}")
    notes = source.read("PT_NOTE", offset, size)
    position = 0
    while position + _NOTE.size <= size:
        namesz, descsz, kind = _NOTE.unpack_from(notes, position)
        name = position + _NOTE.size
        # Sizes are rounded up from the start of the note, so that 8-byte alignment holds.
        desc = (name + namesz + align - 1) & -align
        end = desc + descsz
        if end > size:
            raise ImageError(
                "n_descsz", offset + position, descsz, "the note must end inside its PT_NOTE"
            )
        if notes[name : name + namesz] == b"Xen\0":
            found.setdefault(kind, (offset + desc, notes[desc:end]))
        position = (end + align - 1) & -align


def _pvh_entry(notes: dict[int, tuple[int, bytes]]) -> int | None:
    if _XEN_ELFNOTE_PHYS32_ENTRY not in notes:
        return None
    at, desc = notes[_XEN_ELFNOTE_PHYS32_ENTRY]
    if len(desc) not in (4, 8):
        raise ImageError("n_descsz", at, len(desc), "must be 4 or 8 for PHYS32_ENTRY")
    value = int.from_bytes(desc, "little")
    if value >> 32:
        raise ImageError("XEN_ELFNOTE_PHYS32_ENTRY", at, value, "must fit 32 bits")
    return value


def _relocation(notes: dict[int, tuple[int, bytes]]) -> Relocation | None:
    """Read up to three numbers: alignment, lowest start, highest last byte."""
    if _XEN_ELFNOTE_PHYS32_RELOC not in notes:
        return None
    at, desc = notes[_XEN_ELFNOTE_PHYS32_RELOC]
    if len(desc) not in (0, 4, 8, 12):
        raise ImageError("n_descsz", at, len(desc), "must be 0, 4, 8 or 12 for PHYS32_RELOC")
    given = list(struct.unpack(f"<{len(desc) // 4}I", desc))
    alignment, minimum, maximum = given + _NO_LIMITS[len(given) :]
    if alignment & (alignment - 1) or not alignment:
        raise ImageError("XEN_ELFNOTE_PHYS32_RELOC", at, alignment, "must align to a power of two")
    return Relocation(alignment=alignment, minimum=minimum, maximum=maximum)
