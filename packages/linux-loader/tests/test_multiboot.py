"""Multiboot 1 and 2: kernels find memory map, modules and command line as specified."""

from __future__ import annotations

import struct
from functools import partial

import pytest

from linux_loader import (
    E820Entry,
    Format,
    ImageError,
    Loaded,
    LoaderError,
    PlacementError,
    Protocol,
    Screen,
    load,
)
from linux_loader.testing import (
    build_elf,
    build_multiboot,
    build_multiboot2,
    image_file,
    memory_map,
    pvh_note,
)
from vm_memory import GuestAddress, GuestMemory

SIZE = 32 << 20
CODE = b"\xf4" * 100
aligned_elf = partial(build_elf, page_aligned=True)
SCREEN = Screen(0xE0000000, 640, 480)


def boot(kernel: bytes, size: int = SIZE, **arguments) -> tuple[GuestMemory, Loaded]:  # type: ignore[no-untyped-def]
    guest = GuestMemory.from_ranges([(GuestAddress(0), size)])
    with image_file(kernel) as fd:
        return guest, load(guest, fd, memory_map=memory_map(size), **arguments)


def read(guest: GuestMemory, form: str, address: int) -> tuple[int, ...]:
    return struct.unpack(form, guest.read(GuestAddress(address), struct.calcsize(form)))


def string(guest: GuestMemory, address: int) -> bytes:
    return guest.read(GuestAddress(address), 256).split(b"\0")[0]


@pytest.mark.parametrize("skip", [0, 4, 8192 - 48])
def test_a_flat_kernel_goes_where_its_header_says(skip: int) -> None:
    """Bytes, BSS and entry follow the address fields; what precedes the header is left out."""
    guest = GuestMemory.from_ranges([(GuestAddress(0), SIZE)])
    guest.fill(GuestAddress(0x200000), 0x3000, 0xAA)
    with image_file(build_multiboot(CODE, address=0x200000, memory=0x2000, skip=skip)) as fd:
        loaded = load(guest, fd, memory_map=memory_map(SIZE))
    assert (loaded.format, loaded.protocol) == (Format.MULTIBOOT, Protocol.MULTIBOOT)
    assert loaded.entry.rip == 0x200030
    assert guest.read(GuestAddress(0x200030), 100) == CODE
    assert guest.read(GuestAddress(0x200094), 0x2000 - 0x94 + 1) == bytes(0x2000 - 0x94) + b"\xaa"


def test_multiboot_information() -> None:
    """EAX holds the magic, EBX the structure: memory, map, command line, modules, name."""
    with image_file(b"first") as one, image_file(b"second!") as two:
        guest, loaded = boot(
            build_multiboot(CODE), cmdline="debug", initrd=[one, two], screen=SCREEN
        )
    state = loaded.entry
    assert state.rax == 0x2BADB002
    assert (state.cr0, state.cs.db, state.rflags) == (0x11, 1, 2)
    flags, lower, upper, _, cmdline, count, modules = read(guest, "<7I", state.rbx)
    assert flags == 0x1 | 0x4 | 0x8 | 0x40 | 0x200 | 0x1000
    assert (lower, upper) == (0x9FC00 >> 10, 31 << 10)
    assert string(guest, cmdline) == b"debug"
    assert count == 2
    for index, content in enumerate((b"first", b"second!")):
        start, end, name, _ = read(guest, "<4I", modules + 16 * index)
        assert start % 4096 == 0
        assert guest.read(GuestAddress(start), end - start) == content
        assert string(guest, name).startswith(b"file descriptor")
    length, address = read(guest, "<II", state.rbx + 44)
    entries = []
    while length:
        size, *entry = read(guest, "<IQQI", address)
        entries.append(E820Entry(*entry))
        address += size + 4
        length -= size + 4
    assert entries == memory_map(SIZE)
    (name,) = read(guest, "<I", state.rbx + 64)
    assert string(guest, name) == b"linux-loader"
    assert read(guest, "<QIIIBB6B", state.rbx + 88)[:6] == (0xE0000000, 2560, 640, 480, 32, 1)


def tags(guest: GuestMemory, address: int) -> dict[int, list[bytes]]:
    """Walk the information of version 2 as a kernel does."""
    total, _ = read(guest, "<II", address)
    result: dict[int, list[bytes]] = {}
    position = address + 8
    while True:
        kind, size = read(guest, "<II", position)
        result.setdefault(kind, []).append(guest.read(GuestAddress(position + 8), size - 8))
        position += -(-size // 8) * 8
        if not kind:
            assert position == address + total
            return result


def test_multiboot2_information() -> None:
    """EAX holds the magic, EBX the tags: command line, modules, memory, map, framebuffer."""
    with image_file(b"module") as one:
        guest, loaded = boot(build_multiboot2(CODE), cmdline="debug", initrd=one, screen=SCREEN)
    assert (loaded.format, loaded.protocol) == (Format.MULTIBOOT, Protocol.MULTIBOOT2)
    assert loaded.entry.rax == 0x36D76289
    found = tags(guest, loaded.entry.rbx)
    assert guest.read(GuestAddress(loaded.entry.rip), 100) == CODE
    assert found[1] == [b"debug\0"]
    assert found[2] == [b"linux-loader\0"]
    start, end = struct.unpack_from("<II", found[3][0])
    assert guest.read(GuestAddress(start), end - start) == b"module"
    assert struct.unpack("<II", found[4][0]) == (0x9FC00 >> 10, 31 << 10)
    assert struct.unpack_from("<II", found[6][0]) == (24, 0)
    table = [E820Entry(*item[:3]) for item in struct.iter_unpack("<QQII", found[6][0][8:])]
    assert table == memory_map(SIZE)
    assert struct.unpack_from("<QIIIBB", found[8][0]) == (0xE0000000, 2560, 640, 480, 32, 1)


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("newer", [True, False])
def test_an_elf_kernel_with_a_header(bits: int, newer: bool) -> None:
    """An ELF file with a Multiboot header and no PVH note starts by Multiboot, at e_entry."""
    header = (
        build_multiboot2(b"", addressed=False)
        if newer
        else struct.pack("<III", 0x1BADB002, 0, -0x1BADB002 & 0xFFFFFFFF)
    )
    image = aligned_elf([(0x100000, header + CODE)], entry=0x100000 + len(header), bits=bits)
    _, loaded = boot(image)
    assert loaded.protocol is (Protocol.MULTIBOOT2 if newer else Protocol.MULTIBOOT)
    assert loaded.entry.rip == 0x100000 + len(header)
    with_note = aligned_elf(
        [(0x100000, header + CODE)],
        entry=0x100000,
        bits=bits,
        notes=pvh_note(0x100010),
        page_aligned=True,
    )
    _, loaded = boot(with_note)
    assert loaded.protocol is Protocol.PVH
    _, loaded = boot(with_note, protocol=Protocol.MULTIBOOT2 if newer else Protocol.MULTIBOOT)
    assert loaded.entry.rip == 0x100000


def test_an_entry_tag_outdoes_elf() -> None:
    """The entry address tag is where an ELF kernel starts."""
    header = build_multiboot2(b"", addressed=False, tags=[(3, 0, struct.pack("<I", 0x100040))])
    _, loaded = boot(aligned_elf([(0x100000, header + CODE)], entry=0x100000, bits=32))
    assert loaded.entry.rip == 0x100040


def test_a_protocol_without_its_header_is_refused() -> None:
    """Asking an image for Multiboot that has no header is an error."""
    for protocol in (Protocol.MULTIBOOT, Protocol.MULTIBOOT2):
        with pytest.raises(ImageError, match="no such header"):
            boot(aligned_elf([(0x100000, CODE)], entry=0x100000), protocol=protocol)


@pytest.mark.parametrize(
    ("image", "field"),
    [
        (build_multiboot(CODE, checksum=1), "kernel"),
        (build_multiboot(CODE, entry=0x90000), "entry_addr"),
        (build_multiboot(CODE, memory=20), "bss_end_addr"),
        (build_multiboot(CODE)[:60], "load_end_addr"),
        (build_multiboot(CODE)[:20], "header_addr"),
        (build_multiboot(CODE, flags=8), "flags"),
        (build_multiboot2(CODE, length=16), "header_length"),
        (build_multiboot2(CODE, length=40000), "header_length"),
        (build_multiboot2(CODE, length=32), "size"),
        (build_multiboot2(CODE, length=24), "size"),
        (build_multiboot2(CODE, tags=[(99, 0, b"")]), "type"),
        (build_multiboot2(CODE, tags=[(7, 0, b"")]), "type"),
        (build_multiboot2(CODE, tags=[(1, 0, struct.pack("<I", 15))]), "mbi_tag_types"),
        (build_multiboot2(CODE, tags=[(2, 0, bytes(4))]), "size"),
        (build_multiboot2(CODE, tags=[(3, 0, b"")]), "size"),
        (build_multiboot2(CODE, addressed=False), "kernel"),
    ],
)
def test_broken_headers_are_refused(image: bytes, field: str) -> None:
    """Headers that lie, or demand what there is not, are errors with the field's name."""
    with pytest.raises(ImageError) as caught:
        boot(image)
    assert caught.value.field == field


def test_optional_tags_are_passed_over() -> None:
    """A tag marked optional is no demand."""
    optional = [(99, 1, b""), (1, 1, struct.pack("<I", 15)), (5, 1, bytes(12))]
    _, loaded = boot(build_multiboot2(CODE, tags=optional))
    assert loaded.protocol is Protocol.MULTIBOOT2


@pytest.mark.parametrize(
    "image", [build_multiboot(CODE, flags=4), build_multiboot2(CODE, tags=[(5, 0, bytes(12))])]
)
def test_a_demanded_framebuffer_must_be_given(image: bytes) -> None:
    """A kernel that demands a framebuffer gets the one there is, or is refused."""
    with pytest.raises(LoaderError, match="framebuffer"):
        boot(image)
    boot(image, screen=SCREEN)


def test_modules_without_room_are_refused() -> None:
    """The error tells which module and where RAM is; entropy has no place here."""
    with image_file(bytes(4 << 20)) as big, pytest.raises(PlacementError, match="module"):
        boot(build_multiboot(CODE), 4 << 20, initrd=big)
    for image in (build_multiboot(CODE), build_multiboot2(CODE)):
        with pytest.raises(LoaderError, match="Multiboot cannot"):
            boot(image, rng_seed=b"x")
