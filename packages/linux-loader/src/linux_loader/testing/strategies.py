"""Hypothesis strategies: valid images, and the same with one lie in them."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from hypothesis import strategies as st

from linux_loader.cmdline import Cmdline
from linux_loader.decompress import COMPRESSIONS
from linux_loader.testing.images import (
    build_bzimage,
    build_elf,
    build_multiboot,
    build_multiboot2,
    compress,
    pvh_note,
    reloc_note,
)

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn, SearchStrategy

__all__ = ["bzimages", "cmdlines", "elf_images", "lies", "multiboot_images"]

_EDGES = (0, 1, 2, 3, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


@st.composite
def elf_images(draw: DrawFn, *, bits: int | None = None, pvh: bool | None = None) -> bytes:
    """Valid executables of one to four segments between 1 MiB and 16 MiB."""
    if bits is None:
        bits = draw(st.sampled_from([64, 32]))
    if pvh is None:
        pvh = draw(st.booleans())
    segments: list[tuple[int, bytes, int]] = []
    address = 1 << 20
    for _ in range(draw(st.integers(1, 4))):
        address += draw(st.integers(0, 0x3000))
        data = draw(st.binary(min_size=1, max_size=64)) * draw(st.sampled_from([1, 3, 300]))
        size = len(data) + draw(st.sampled_from([0, 1, 0x1000, 0x4321]))
        segments.append((address, data, size))
        address += size
    first = segments[0][0]
    notes = pvh_note(first, size=draw(st.sampled_from([4, 8]))) if pvh else b""
    if draw(st.booleans()):
        notes += reloc_note(*draw(st.sampled_from([(), (4096,), (4096, 0, 0xFFFFFFFF)])))
    return build_elf(
        segments,
        entry=first,
        bits=bits,
        kind=draw(st.sampled_from([2, 3])),
        notes=notes,
        virtual_offset=draw(st.sampled_from([0, 0xC0000000, 0xFFFFFFFF80000000])),
        page_aligned=draw(st.booleans()),
    )


@st.composite
def bzimages(draw: DrawFn) -> bytes:
    """Valid boot images of every protocol version from 2.00, with or without a payload."""
    payload, kernel = b"", b""
    protocol = draw(st.integers(0x200, 0x20F))
    if protocol >= 0x208 and draw(st.booleans()):
        kernel = draw(elf_images(bits=64))
        payload = compress(draw(st.sampled_from(COMPRESSIONS)), kernel)
    return build_bzimage(
        draw(st.binary(min_size=16, max_size=64)).ljust(0x220, b"\x90"),
        payload=payload,
        protocol=protocol,
        setup_sects=draw(st.sampled_from([0, 4, 5, 39])),
        relocatable=draw(st.booleans()),
        xloadflags=draw(st.integers(0, 3)),
        kernel_alignment=1 << draw(st.integers(12, 24)),
        pref_address=draw(st.sampled_from([0x100000, 0x200000, 0x1000000])),
        # What is unpacked must have room there; 0 says nothing.
        init_size=draw(st.one_of(st.just(0), st.integers(max(len(kernel), 1), 0x200000))),
    )


@st.composite
def multiboot_images(draw: DrawFn) -> bytes:
    """Valid Multiboot kernels of either version, flat or inside an ELF file."""
    code = draw(st.binary(min_size=1, max_size=200))
    if draw(st.booleans()):
        image = build_multiboot2(code, tags=[(5, 1, bytes(12)), (6, 0, b"")])
        if draw(st.booleans()):
            header = build_multiboot2(b"", addressed=False)
            image = build_elf(
                [(0x100000, header + code)],
                entry=0x100000 + len(header),
                bits=32,
                page_aligned=True,
            )
        return image
    if draw(st.booleans()):
        header = struct.pack("<III", 0x1BADB002, 3, -(0x1BADB002 + 3) & 0xFFFFFFFF)
        return build_elf([(0x100000, header + code)], entry=0x10000C, bits=32)
    memory = draw(st.sampled_from([None, 0x1000, 0x10000]))
    return build_multiboot(code, memory=memory, skip=draw(st.sampled_from([0, 4, 4096])))


@st.composite
def lies(draw: DrawFn, images: SearchStrategy[bytes], *, within: int = 1024) -> bytes:
    """Images with one lie: a number among the first bytes changed, or the end cut off.

    Args:
        draw: given by Hypothesis.
        images: valid ones.
        within: how many bytes from the beginning may be changed.
    """
    image = bytearray(draw(images))
    if draw(st.integers(0, 4)) == 0:
        return bytes(image[: draw(st.integers(0, len(image)))])
    width = draw(st.sampled_from([1, 2, 4, 8]))
    offset = draw(st.integers(0, max(0, min(within, len(image)) - width)))
    value = draw(st.one_of(st.sampled_from(_EDGES), st.integers(0, (1 << width * 8) - 1)))
    image[offset : offset + width] = (value & (1 << width * 8) - 1).to_bytes(width, "little")
    return bytes(image)


@st.composite
def cmdlines(draw: DrawFn) -> Cmdline:
    """Command lines with parameters, flags and arguments for init."""
    plain = st.text("abcxyz019_.-,/:+", min_size=1, max_size=8).filter(lambda text: text != "--")
    value = st.text("abc 019=.-/:@", max_size=10)
    line = Cmdline()
    for _ in range(draw(st.integers(0, 4))):
        if draw(st.booleans()):
            line = line.with_flag(draw(plain))
        else:
            line = line.with_parameter(draw(plain), *draw(st.lists(value, min_size=1, max_size=3)))
    if draw(st.booleans()):
        line = line.with_init(*draw(st.lists(plain, min_size=1, max_size=3)))
    return line
