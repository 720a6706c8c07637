"""Builders of valid images, byte by byte from the specifications."""

from __future__ import annotations

import os
import struct
from contextlib import contextmanager
from typing import TYPE_CHECKING

from linux_loader.e820 import E820Entry, E820Type

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = [
    "build_bzimage",
    "build_elf",
    "build_image",
    "build_multiboot",
    "build_multiboot2",
    "build_zboot",
    "compress",
    "image_file",
    "memory_map",
    "pvh_note",
    "reloc_note",
    "with_pe",
]


@contextmanager
def image_file(data: bytes) -> Iterator[int]:
    """Hold bytes in a file without a name; the value is its descriptor."""
    fd = os.memfd_create("image", os.MFD_CLOEXEC)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        yield fd
    finally:
        os.close(fd)


def memory_map(size: int) -> list[E820Entry]:
    """Return the map of a plain PC with `size` bytes of RAM (1 MiB or more) below 4 GiB."""
    return [
        E820Entry(0, 0x9FC00, E820Type.RAM),
        E820Entry(0x9FC00, 0x400, E820Type.RESERVED),
        E820Entry(0xE0000, 0x20000, E820Type.RESERVED),
        *([E820Entry(1 << 20, size - (1 << 20), E820Type.RAM)] if size > 1 << 20 else []),
    ]


def note(name: bytes, kind: int, desc: bytes, *, align: int = 4) -> bytes:
    """Return one ELF note, padded at its end."""
    data = struct.pack("<III", len(name), len(desc), kind) + name
    data = data.ljust(-(-len(data) // align) * align, b"\0") + desc
    return data.ljust(-(-len(data) // align) * align, b"\0")


def pvh_note(entry: int, *, size: int = 4, align: int = 4) -> bytes:
    """Return the note XEN_ELFNOTE_PHYS32_ENTRY with a number of `size` bytes."""
    return note(b"Xen\0", 18, entry.to_bytes(size, "little"), align=align)


def reloc_note(*numbers: int) -> bytes:
    """Return the note XEN_ELFNOTE_PHYS32_RELOC with up to three numbers of 32 bits."""
    return note(b"Xen\0", 19, struct.pack(f"<{len(numbers)}I", *numbers))


def build_elf(
    segments: Sequence[tuple[int, bytes] | tuple[int, bytes, int]],
    *,
    entry: int,
    notes: bytes = b"",
    note_align: int = 4,
    bits: int = 64,
    machine: int | None = None,
    kind: int = 2,
    virtual_offset: int = 0,
    page_aligned: bool = False,
) -> bytes:
    """Return an x86 ELF executable.

    Args:
        segments: physical address and bytes of each PT_LOAD, and the size in memory where it is
            larger.
        entry: e_entry.
        notes: what a PT_NOTE segment holds.
        note_align: its p_align.
        bits: 32 or 64.
        machine: e_machine; None for x86 of that width.
        kind: e_type.
        virtual_offset: added to the physical address to give p_vaddr.
        page_aligned: give each segment an offset that equals its address modulo a page.
    """
    wide = bits == 64
    header_size, entry_size = (64, 56) if wide else (52, 32)
    count = len(segments) + bool(notes)
    body = bytearray()
    start = header_size + count * entry_size
    table = b""

    def program(kind: int, data: bytes, address: int, memory: int, align: int) -> bytes:
        if page_aligned and kind == 1:
            body.extend(bytes((address - start - len(body)) % 4096))
        else:
            body.extend(bytes(-len(body) % 8))
        offset = start + len(body)
        body.extend(data)
        mask = (1 << bits) - 1
        virtual = address + virtual_offset & mask
        if wide:
            return struct.pack(
                "<IIQQQQQQ", kind, 7, offset, virtual, address, len(data), memory, align
            )
        return struct.pack("<8I", kind, offset, virtual, address, len(data), memory, 7, align)

    for address, data, *size in segments:
        table += program(1, data, address, size[0] if size else len(data), 4096)
    if notes:
        table += program(4, notes, 0, len(notes), note_align)
    ident = b"\x7fELF" + bytes([2 if wide else 1, 1, 1]) + bytes(9)
    if machine is None:
        machine = 62 if wide else 3
    fields = (kind, machine, 1, entry, header_size, 0, 0, header_size, entry_size, count, 0, 0, 0)
    header = ident + struct.pack("<HHIQQQIHHHHHH" if wide else "<HHIIIIIHHHHHH", *fields)
    return header + table + bytes(body)


def build_bzimage(
    code: bytes,
    *,
    payload: bytes = b"",
    protocol: int = 0x20F,
    setup_sects: int = 4,
    version: str = "6.1.0-test",
    loadflags: int = 1,
    code32_start: int = 0x100000,
    initrd_addr_max: int = 0x7FFFFFFF,
    kernel_alignment: int = 0x200000,
    relocatable: bool = True,
    xloadflags: int = 3,
    cmdline_size: int = 2047,
    pref_address: int = 0x1000000,
    init_size: int = 0x100000,
) -> bytes:
    """Return a boot image: setup sectors, `code`, then `payload`. Parameters are header fields."""
    body = (code + payload).ljust(-(-len(code + payload) // 16) * 16, b"\0")
    setup = bytearray(((setup_sects or 4) + 1) * 512)
    setup[0x1F1] = setup_sects
    struct.pack_into("<I", setup, 0x1F4, len(body) // 16)
    struct.pack_into("<H", setup, 0x1FE, 0xAA55)
    setup[0x200:0x202] = b"\xeb\x6a"
    struct.pack_into("<4sH", setup, 0x202, b"HdrS", protocol)
    if version:
        at = 0x400
        struct.pack_into("<H", setup, 0x20E, at - 0x200)
        setup[at : at + len(version) + 1] = version.encode() + b"\0"
    setup[0x211] = loadflags
    struct.pack_into("<I", setup, 0x214, code32_start)
    struct.pack_into("<I", setup, 0x22C, initrd_addr_max)
    struct.pack_into("<IBBHI", setup, 0x230, kernel_alignment, relocatable, 21, xloadflags, 0)
    struct.pack_into("<I", setup, 0x238, cmdline_size)
    struct.pack_into("<II", setup, 0x248, len(code) if payload else 0, len(payload))
    struct.pack_into("<QI", setup, 0x258, pref_address, init_size)
    return bytes(setup) + body


def build_multiboot(
    code: bytes,
    *,
    address: int = 0x100000,
    entry: int | None = None,
    flags: int = 3,
    memory: int | None = None,
    skip: int = 0,
    checksum: int | None = None,
) -> bytes:
    """Return a flat kernel whose Multiboot header tells by address fields where it goes.

    Args:
        code: what follows the header.
        address: where the header goes.
        entry: first instruction; None for the first byte of `code`.
        flags: besides bit 16.
        memory: size from the header on, with BSS; None for no BSS.
        skip: bytes of the file in front of the header, which are not loaded.
        checksum: another than the right one.
    """
    flags |= 1 << 16
    if checksum is None:
        checksum = -(0x1BADB002 + flags) & 0xFFFFFFFF
    header = struct.pack(
        "<8I12x4x",
        0x1BADB002,
        flags,
        checksum,
        address,
        address,
        address + 48 + len(code),
        0 if memory is None else address + memory,
        address + 48 if entry is None else entry,
    )
    return bytes(skip) + header + code


def build_multiboot2(
    code: bytes,
    *,
    address: int = 0x100000,
    tags: Sequence[tuple[int, int, bytes]] = (),
    addressed: bool = True,
    length: int | None = None,
) -> bytes:
    """Return a flat kernel with a Multiboot 2 header.

    Args:
        code: what follows the header, and where it starts.
        address: where the header goes.
        tags: type, flags and content of further tags.
        addressed: whether the address and entry tags are there.
        length: another header_length than the right one.
    """

    def tag(kind: int, flags: int, body: bytes) -> bytes:
        data = struct.pack("<HHI", kind, flags, 8 + len(body)) + body
        return data.ljust(-(-len(data) // 8) * 8, b"\0")

    middle = b"".join([tag(*item) for item in tags])
    size = 16 + (24 + 16 if addressed else 0) + len(middle) + 8
    if addressed:
        end = address + size + len(code)
        middle += tag(2, 0, struct.pack("<4I", address, address, end, 0))
        middle += tag(3, 0, struct.pack("<I", address + size))
    stated = size if length is None else length
    checksum = -(0xE85250D6 + stated) & 0xFFFFFFFF
    return struct.pack("<4I", 0xE85250D6, 0, stated, checksum) + middle + tag(0, 0, b"") + code


def build_image(
    architecture: str,
    code: bytes,
    *,
    text_offset: int = 0,
    image_size: int | None = None,
    flags: int = 0xA,
) -> bytes:
    """Return an Image of `arm64` or `riscv64`. Parameters are header fields.

    Args:
        architecture: which of them.
        code: what follows the header.
        text_offset: behind a 2 MiB boundary.
        image_size: None for the size of the file.
        flags: little-endian, 4 KiB pages, anywhere in RAM.
    """
    size = 64 + len(code) if image_size is None else image_size
    header = struct.pack("<8xQQQ", text_offset, size, flags)
    if architecture == "arm64":
        header = header.ljust(0x38, b"\0") + b"ARM\x64"
    else:
        header += struct.pack("<I12x8s", 2, b"RISCV\0\0\0") + b"RSC\x05"
    return header.ljust(64, b"\0") + code


def with_pe(
    image: bytes,
    machine: int,
    *,
    at: int = 0x40,
    entry: int = 0x1000,
    image_size: int | None = None,
    alignment: int = 0x1000,
    subsystem: int = 10,
    sections: Sequence[tuple[bytes, int, int, int, int]] | None = None,
) -> bytes:
    """Return an image with the PE header of an EFI application laid over its first bytes.

    Args:
        image: with room for it.
        machine: 0x8664, 0xAA64, 0x5064, or 0x14C, which gets a header of 32 bits.
        at: where the header begins.
        entry: AddressOfEntryPoint.
        image_size: SizeOfImage; None for the size of the file.
        alignment: SectionAlignment.
        subsystem: 10 for an application.
        sections: name, VirtualSize, VirtualAddress, SizeOfRawData, PointerToRawData of each; None
            for one over all of the file.
    """
    size = len(image) if image_size is None else image_size
    if sections is None:
        sections = [(b".text", size, 0, len(image), 0)]
    magic, optional = (0x10B, 96) if machine == 0x14C else (0x20B, 112)
    header = struct.pack("<4sHH12xHH", b"PE\0\0", machine, len(sections), optional, 0x206)
    fields = (magic, entry, alignment, 0x200, size, 0, subsystem)
    header += struct.pack("<H14xI12xII16xII4xH", *fields).ljust(optional, b"\0")
    header += b"".join([struct.pack("<8sIIII16x", *section) for section in sections])
    result = bytearray(image)
    result[:2] = b"MZ"
    struct.pack_into("<I", result, 0x3C, at)
    result[at : at + len(header)] = header
    return bytes(result)


def build_zboot(name: str, image: bytes) -> bytes:
    """Return an EFI zboot image: a PE header around an Image compressed by `name`."""
    payload = compress(name, image)
    kind = b"zstd22" if name == "zstd" else name.encode()
    header = struct.pack("<2s2x4sII8x32s", b"MZ", b"zimg", 64, len(payload), kind)
    return header.ljust(64, b"\0") + payload


def compress(name: str, data: bytes) -> bytes:
    """Compress as Linux's build does; the size of `data` follows in four bytes.

    Args:
        name: one of `linux_loader.decompress.COMPRESSIONS`.
        data: what to compress.
    """
    return _PACKERS[name](data) + len(data).to_bytes(4, "little")


def _gzip(data: bytes) -> bytes:
    import zlib

    packer = zlib.compressobj(wbits=31)
    # The gzip format ends with the size itself: leave it to `compress`.
    return (packer.compress(data) + packer.flush())[:-4]


def _bzip2(data: bytes) -> bytes:
    import bz2

    return bz2.compress(data)


def _xz(data: bytes) -> bytes:
    import lzma

    filters = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "preset": 1}]
    return lzma.compress(data, check=lzma.CHECK_CRC32, filters=filters)


def _lzma(data: bytes) -> bytes:
    import lzma

    return lzma.compress(data, format=lzma.FORMAT_ALONE, preset=1)


def _lz4(data: bytes) -> bytes:
    from lz4.block import compress as pack  # type: ignore[import-untyped]

    result = b"\x02\x21\x4c\x18"
    for offset in range(0, len(data) or 1, 8 << 20):
        block: bytes = pack(data[offset : offset + (8 << 20)], store_size=False)
        result += len(block).to_bytes(4, "little") + block
    return result


def _zstd(data: bytes) -> bytes:
    import zstandard

    return zstandard.ZstdCompressor(level=3, write_content_size=False).compress(data)


def _lzo(data: bytes) -> bytes:
    """Return an lzop file with an Adler-32 of what each block holds, as Linux's build writes."""
    import zlib

    from lzallright import LZOCompressor

    packer = LZOCompressor()
    header = struct.pack(">HHHBBIIIIB", 0x1030, 0x20A0, 0x0940, 1, 5, 1, 0o100644, 0, 0, 0)
    result = b"\x89LZO\0\r\n\x1a\n" + header + zlib.adler32(header).to_bytes(4, "big")
    for offset in range(0, len(data), 256 << 10):
        plain = data[offset : offset + (256 << 10)]
        block = packer.compress(plain)
        if len(block) >= len(plain):
            block = plain
        result += struct.pack(">III", len(plain), len(block), zlib.adler32(plain)) + block
    return result + bytes(4)


_PACKERS = {
    "gzip": _gzip,
    "bzip2": _bzip2,
    "xz": _xz,
    "lzma": _lzma,
    "lz4": _lz4,
    "zstd": _zstd,
    "lzo": _lzo,
}
