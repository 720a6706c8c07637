"""PE headers: what firmware reads to start a kernel by itself, and which lies are refused."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from linux_loader import ImageError, inspect
from linux_loader.pe import PeImage, PeSection, parse_pe
from linux_loader.source import Source
from linux_loader.testing import (
    build_bzimage,
    build_image,
    build_zboot,
    compress,
    image_file,
    lies,
    with_pe,
)

FILE = bytes(0x2000)
SECTIONS = [(b".text", 0x800, 0x1000, 0x800, 0x1000), (b".data", 0x3000, 0x1800, 0x400, 0x1800)]
AT = 0x40
OPTIONAL = AT + 24
TABLE = OPTIONAL + 112
ARM64, RISCV64, X86_64, I386 = 0xAA64, 0x5064, 0x8664, 0x14C


def parse(data: bytes) -> PeImage | None:
    return parse_pe(Source.of_bytes(data, "image"))


@pytest.mark.parametrize(
    ("machine", "name"),
    [(ARM64, "arm64"), (RISCV64, "riscv64"), (X86_64, "x86_64"), (I386, "i386")],
)
def test_headers_are_read_as_written(machine: int, name: str) -> None:
    """Machine, entry, size, alignment and sections, whichever width the header has."""
    data = with_pe(FILE, machine, entry=0x1010, image_size=0x5000, sections=SECTIONS)
    assert parse(data) == PeImage(
        machine=name,
        entry=0x1010,
        image_size=0x5000,
        section_alignment=0x1000,
        sections=(
            PeSection(".text", 0x1000, 0x800, 0x1000, 0x800),
            PeSection(".data", 0x1800, 0x3000, 0x1800, 0x400),
        ),
    )


@pytest.mark.parametrize(
    ("offset", "value", "field"),
    [
        (AT + 4, b"\x64\x86"[::-1], "Machine"),
        (AT + 6, b"\0\0", "NumberOfSections"),
        (AT + 6, b"\xff\xff", "NumberOfSections"),
        (AT + 20, b"\x6f\0", "SizeOfOptionalHeader"),
        (AT + 20, b"\xff\xff", "section table"),
        (OPTIONAL, b"\x0b\x01", "Magic"),
        (OPTIONAL + 16, bytes(4), "AddressOfEntryPoint"),
        (OPTIONAL + 16, struct.pack("<I", 0x5000), "AddressOfEntryPoint"),
        (OPTIONAL + 32, bytes(4), "SectionAlignment"),
        (OPTIONAL + 36, b"\x03", "FileAlignment"),
        (OPTIONAL + 56, bytes(4), "AddressOfEntryPoint"),
        (OPTIONAL + 60, struct.pack("<I", 0x2001), "SizeOfHeaders"),
        (OPTIONAL + 68, b"\x03", "Subsystem"),
        (TABLE + 8, b"\xff" * 4, "VirtualAddress"),
        (TABLE + 12, b"\xff" * 4, "VirtualAddress"),
        (TABLE + 8, struct.pack("<I", 0x801), "VirtualAddress"),
        (TABLE + 16, b"\xff" * 4, "PointerToRawData"),
        (TABLE + 20, b"\xff" * 4, "PointerToRawData"),
    ],
)
def test_each_lie_is_named(offset: int, value: bytes, field: str) -> None:
    """The error names the field that lies, in the words of the specification."""
    data = bytearray(with_pe(FILE, ARM64, image_size=0x5000, sections=SECTIONS))
    data[offset : offset + len(value)] = value
    with pytest.raises(ImageError) as caught:
        parse(bytes(data))
    assert caught.value.field == field


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"MZ",
        bytes(64),
        b"MZ" + bytes(62),
        b"MZ".ljust(0x3C, b"\0") + b"\xff\xff\xff\xff",
        b"MZ".ljust(0x3C, b"\0") + b"\x40\0\0\0" + b"PE\0\0",
    ],
)
def test_what_has_no_such_header_is_told_apart(data: bytes) -> None:
    """No header is no fault, and where its place is a lie there is none."""
    assert parse(data) is None


@given(lies(st.just(with_pe(FILE, RISCV64, image_size=0x5000, sections=SECTIONS)), within=0x110))
def test_a_lie_is_parsed_or_refused(data: bytes) -> None:
    """Whatever is changed, what is accepted lies inside the file and the image."""
    try:
        image = parse(data)
    except ImageError:
        return
    if image is not None:
        end = 0
        for section in image.sections:
            assert end <= section.address
            end = section.address + section.memory_size
            assert end <= image.image_size
            assert not section.file_size or section.offset + section.file_size <= len(data)
        assert 0 < image.entry < image.image_size


KERNEL = build_image("arm64", bytes(0x2000))


@pytest.mark.parametrize(
    ("image", "machine"),
    [
        (with_pe(KERNEL, ARM64), "arm64"),
        (with_pe(build_image("riscv64", bytes(0x2000)), RISCV64), "riscv64"),
        (with_pe(build_bzimage(bytes(0x2000)), X86_64), "x86_64"),
        (with_pe(build_zboot("gzip", KERNEL).ljust(0x2000, b"\0"), ARM64, at=0x1800), "arm64"),
    ],
    ids=["arm64", "riscv64", "bzimage", "zboot"],
)
def test_inspect_tells_of_the_stub(image: bytes, machine: str) -> None:
    """Of every kind of image that firmware can start, beside the protocols of our own."""
    with image_file(image) as fd:
        found = inspect(fd)
    assert found.efi is not None
    assert (found.efi.machine, found.efi.entry) == (machine, 0x1000)
    assert f"entry efi: 0x1000 of {len(image):#x} ({machine})" in str(found)


@pytest.mark.parametrize("image", [KERNEL, compress("gzip", with_pe(KERNEL, ARM64))])
def test_inspect_tells_of_no_stub(image: bytes) -> None:
    """Without a header there is none, and inside a compressed file firmware finds none."""
    with image_file(image) as fd:
        assert inspect(fd).efi is None


def test_inspect_refuses_a_broken_stub() -> None:
    """As any other header of the image."""
    with image_file(with_pe(KERNEL, ARM64, entry=0)) as fd, pytest.raises(ImageError):
        inspect(fd)
