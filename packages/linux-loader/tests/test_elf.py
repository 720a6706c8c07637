"""ELF executables: what is read from their headers, and which lies are refused."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from linux_loader import ImageError
from linux_loader.elf import parse_elf
from linux_loader.source import Source
from linux_loader.testing import build_elf, elf_images, lies, pvh_note
from linux_loader.testing.images import note

CODE = (0x100000, b"\xf4" * 64)


def parse(data: bytes):  # type: ignore[no-untyped-def]
    return parse_elf(Source.of_bytes(data, "image"))


@pytest.mark.parametrize("bits", [32, 64])
def test_headers_are_read_as_written(bits: int) -> None:
    """Both classes give the same segments, entry and machine that were written."""
    image = parse(
        build_elf([(0x100000, b"abcd", 0x2000), (0x200000, b"x")], entry=0x100002, bits=bits)
    )
    assert (image.bits, image.entry, image.pvh_entry) == (bits, 0x100002, None)
    assert image.machine == {64: 62, 32: 3}[bits]
    first, second = image.segments
    assert (first.address, first.file_size, first.memory_size) == (0x100000, 4, 0x2000)
    assert (second.address, second.file_size, second.memory_size) == (0x200000, 1, 1)


@given(elf_images())
def test_every_valid_image_parses(data: bytes) -> None:
    """No image of the strategy is refused, and each segment's bytes lie inside the file."""
    image = parse(data)
    assert all(item.offset + item.file_size <= len(data) for item in image.segments)


@given(lies(elf_images(), within=512))
def test_a_lie_is_parsed_or_refused(data: bytes) -> None:
    """Whatever is changed, the outcome is an image inside the file, or an ImageError."""
    try:
        image = parse(data)
    except ImageError:
        return
    assert all(item.offset + item.file_size <= len(data) for item in image.segments)


@given(st.binary(max_size=200))
def test_noise_behind_the_magic_is_refused(noise: bytes) -> None:
    """Random headers never raise anything but ImageError."""
    with pytest.raises(ImageError):
        parse(b"\x7fELF" + noise)


@pytest.mark.parametrize(
    ("offset", "value", "field"),
    [
        (4, b"\x03", "EI_CLASS"),
        (4, b"\x01", "e_phentsize"),
        (5, b"\x02", "EI_DATA"),
        (6, b"\x00", "EI_VERSION"),
        (16, b"\x01\x00", "e_type"),
        (18, b"\xb7\x00", "e_machine"),
        (18, b"\x03\x00", "EI_CLASS"),
        (20, b"\x02", "e_version"),
        (24, b"\x00" * 8, "e_entry"),
        (32, b"\xff" * 8, "e_phoff"),
        (54, b"\x20\x00", "e_phentsize"),
        (56, b"\x00\x00", "e_phnum"),
        (56, b"\xff\xff", "e_phnum"),
        (64, b"\x00", "e_phnum"),
        (64 + 8, b"\xff" * 8, "p_offset"),
        (64 + 24, b"\xff" * 8, "p_paddr"),
        (64 + 32, b"\x00\x01", "p_filesz"),
        (64 + 40, b"\x00" * 8, "p_memsz"),
        (64 + 40, b"\xff" * 8, "p_paddr"),
    ],
)
def test_each_lie_is_named(offset: int, value: bytes, field: str) -> None:
    """The error names the field that lies, in the words of the specification."""
    data = bytearray(build_elf([CODE], entry=0x100000))
    data[offset : offset + len(value)] = value
    with pytest.raises(ImageError) as caught:
        parse(bytes(data))
    assert caught.value.field == field


def test_a_virtual_entry_becomes_physical() -> None:
    """An e_entry written as a virtual address is translated by its segment."""
    base = 0xFFFFFFFF80000000
    data = build_elf([CODE], entry=base + 0x100008, virtual_offset=base)
    assert parse(data).entry == 0x100008


@pytest.mark.parametrize("align", [0, 1, 4, 8])
@pytest.mark.parametrize("size", [4, 8])
def test_the_pvh_note_is_found_behind_others(align: int, size: int) -> None:
    """The note is found whatever its alignment and width, behind notes of odd sizes."""
    real = 8 if align == 8 else 4
    notes = (
        note(b"GNU\0", 3, b"12345", align=real)
        + note(b"", 18, b"", align=real)
        + note(b"Xenon\0", 18, b"\0" * 4, align=real)
        + pvh_note(0x100010, size=size, align=real)
    )
    data = build_elf([CODE], entry=0x100000, notes=notes, note_align=align)
    assert parse(data).pvh_entry == 0x100010


@pytest.mark.parametrize(
    ("notes", "field"),
    [
        (pvh_note(0x100000, size=3), "n_descsz"),
        (pvh_note(1 << 32, size=8), "XEN_ELFNOTE_PHYS32_ENTRY"),
        (pvh_note(0x200000), "XEN_ELFNOTE_PHYS32_ENTRY"),
        (struct.pack("<III", 4, 0xFFFFFFFF, 18) + b"Xen\0" + bytes(8), "n_descsz"),
        (struct.pack("<III", 0xFFFFFFFF, 4, 18) + b"Xen\0" + bytes(8), "n_descsz"),
    ],
)
def test_a_broken_pvh_note_is_refused(notes: bytes, field: str) -> None:
    """A note that ends outside its segment or names a place outside the image is an error."""
    with pytest.raises(ImageError) as caught:
        parse(build_elf([CODE], entry=0x100000, notes=notes))
    assert caught.value.field == field


def test_a_huge_note_segment_is_not_read() -> None:
    """A PT_NOTE of more than 1 MiB is refused before its bytes are read."""
    data = build_elf([CODE], entry=0x100000, notes=bytes((1 << 20) + 4))
    with pytest.raises(ImageError, match="PT_NOTE"):
        parse(data)


def test_an_empty_segment_is_left_out() -> None:
    """A PT_LOAD without memory takes no room."""
    image = parse(build_elf([CODE, (0x300000, b"")], entry=0x100000))
    assert len(image.segments) == 1
