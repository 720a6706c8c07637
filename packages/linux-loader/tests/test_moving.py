"""Images put elsewhere: those that say that they can be, by as much as they allow."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from linux_loader import ImageError, LoaderError, PlacementError, Plan, Protocol, load, plan
from linux_loader.testing import (
    build_bzimage,
    build_elf,
    build_multiboot,
    compress,
    image_file,
    memory_map,
    pvh_note,
    reloc_note,
)
from linux_loader.testing.images import note
from vm_memory import GuestAddress, GuestMemory

SIZE = 64 << 20
MAP = memory_map(SIZE)
BASE = 0x1000000
MIB = 1 << 20
CODE = bytes(range(256)) * 20
DYN = build_elf([(BASE, CODE, 0x3000)], entry=BASE + 16, kind=3, notes=pvh_note(BASE + 32))
FIXED = build_elf([(BASE, CODE)], entry=BASE, notes=pvh_note(BASE + 32))


def moved(
    image: bytes, offset: int, protocol: Protocol | None = None, *, own: bool = False
) -> Plan:
    """The plan of an image at an offset; `own`: by its own decompressor."""
    with image_file(image) as fd:
        return plan(fd, memory_map=MAP, offset=offset, protocol=protocol, kaslr=own)


def relocatable(*numbers: int, kind: int = 2) -> bytes:
    """A kernel with both of Xen's notes."""
    return build_elf(
        [(BASE, CODE), (BASE + 0x10000, CODE, 0x8000)],
        entry=BASE,
        kind=kind,
        notes=pvh_note(BASE + 32) + reloc_note(*numbers),
    )


def boot_image(*, relocatable: bool = True) -> bytes:
    """A boot image around a kernel that is linked for fixed addresses."""
    payload = compress("gzip", FIXED)
    return build_bzimage(bytes(0x400), payload=payload, pref_address=BASE, relocatable=relocatable)


@pytest.mark.parametrize("protocol", [Protocol.PVH, Protocol.LINUX64, Protocol.LINUX32])
@pytest.mark.parametrize("offset", [0x1000, -0x800000, 32 * MIB])
def test_segments_and_entries_move_together(protocol: Protocol, offset: int) -> None:
    """What a position-independent image has at an address, it has so many bytes further."""
    here, there = moved(DYN, 0, protocol), moved(DYN, offset, protocol)
    assert there.entry.rip == here.entry.rip + offset
    assert there.find("kernel segment 0").address == BASE + offset
    others = [[item for item in made.placements if item.name != "kernel segment 0"]
              for made in (here, there)]  # fmt: skip
    assert [item.address for item in others[0]] == [item.address for item in others[1]]


def test_the_bytes_arrive_where_the_plan_says() -> None:
    """And nothing is where the image was linked for."""
    with GuestMemory.from_ranges([(GuestAddress(0), SIZE)]) as memory, image_file(DYN) as fd:
        load(memory, fd, memory_map=MAP, offset=0x200000)
        assert memory.read(GuestAddress(BASE + 0x200000), len(CODE)) == CODE
        assert memory.read(GuestAddress(BASE), len(CODE)) == bytes(len(CODE))


@given(st.integers(-(1 << 33), 1 << 33))
def test_any_offset_moves_or_is_refused(offset: int) -> None:
    """Into RAM that is free, at the image's alignment, or not at all."""
    try:
        made = moved(DYN, offset)
    except LoaderError:
        return
    assert offset % 4096 == 0
    assert made.entry.rip == BASE + 32 + offset
    assert 0 <= made.find("kernel segment 0").address < SIZE


def test_an_image_linked_for_its_addresses_stays() -> None:
    """ET_EXEC without a note cannot be moved, and is told so by field and rule."""
    with pytest.raises(
        ImageError, match=r"^e_type at offset 0x10 is 0x2: .*XEN_ELFNOTE_PHYS32_REL"
    ):
        moved(FIXED, 0x200000)
    assert moved(FIXED, 0).entry.rip == BASE + 32


@pytest.mark.parametrize(
    ("offset", "message"),
    [
        (0x1000, r"must move the image to a multiple of 0x400000, as 0x0 does"),
        (0x7FF000, r"must move the image to a multiple of 0x400000, as 0x400000 does"),
        (-0x400000, r"must leave the image, 0x1000000-0x1017fff, within 0x1000000-0x27fffff"),
        (24 * MIB, r"within 0x1000000-0x27fffff"),
    ],
)
def test_the_note_limits_where_a_kernel_goes(offset: int, message: str) -> None:
    """Alignment, lowest start and highest last byte are those of PHYS32_RELOC."""
    image = relocatable(0x400000, BASE, 0x27FFFFF)
    with pytest.raises(LoaderError, match=message) as caught:
        moved(image, offset)
    assert (caught.value.field, caught.value.value) == ("offset", offset)
    for protocol in (None, Protocol.LINUX64):
        made = moved(image, 20 * MIB, protocol)
        assert made.find("kernel segment 1").address == BASE + 0x10000 + 20 * MIB
        assert made.entry.rip == BASE + 20 * MIB + (32 if protocol is None else 0)


def test_numbers_that_the_note_leaves_out_have_defaults() -> None:
    """2 MiB, 0 and 4 GiB."""
    for numbers in ((), (2 * MIB,), (2 * MIB, 0)):
        assert moved(relocatable(*numbers), -14 * MIB).entry.rip == 2 * MIB + 32
        with pytest.raises(LoaderError, match="a multiple of 0x200000"):
            moved(relocatable(*numbers), 0x1000)


@pytest.mark.parametrize(
    ("notes", "field"),
    [
        (reloc_note(0), "XEN_ELFNOTE_PHYS32_RELOC"),
        (reloc_note(3), "XEN_ELFNOTE_PHYS32_RELOC"),
        (reloc_note(1, 2, 3, 4), "n_descsz"),
        (note(b"Xen\0", 19, bytes(5)), "n_descsz"),
    ],
)
def test_a_note_that_lies_is_refused(notes: bytes, field: str) -> None:
    """Whether or not the image is to be moved."""
    image = build_elf([(BASE, CODE)], entry=BASE, notes=notes)
    with pytest.raises(ImageError) as caught:
        moved(image, 0)
    assert caught.value.field == field


def test_a_lie_about_alignment_counts_when_the_image_moves() -> None:
    """p_align must be a power of two for the move to keep it."""
    image = bytearray(DYN)
    image[64 + 48 : 64 + 56] = (0x3000).to_bytes(8, "little")
    assert moved(bytes(image), 0).entry.rip == BASE + 32
    with pytest.raises(ImageError, match="p_align is 0x3000: must be a power of two"):
        moved(bytes(image), 0x3000)


def test_a_boot_image_answers_for_its_kernel() -> None:
    """Its header says whether the kernel inside may be moved, and to which places."""
    image = boot_image()
    made = moved(image, 0x400000)
    assert (made.protocol, made.entry.rip) == (Protocol.LINUX64, BASE + 0x400000)
    assert made.find("kernel segment 0").address == BASE + 0x400000
    for offset, message in (
        (0x1000, "must move the image to a multiple of 0x200000"),
        (-0x200000, "within 0x1000000-0xffffffff"),
    ):
        with pytest.raises(LoaderError, match=message):
            moved(image, offset)
    with pytest.raises(ImageError, match=r"relocatable_kernel at offset 0x234 is 0x0"):
        moved(boot_image(relocatable=False), 0x200000)
    with pytest.raises(ImageError, match="XEN_ELFNOTE_PHYS32_RELOC is None"):
        moved(image, 0x200000, Protocol.PVH)


def test_a_kernel_of_32_bits_needs_its_own_decompressor_to_move() -> None:
    """Inside the boot image it is linked for its addresses; the image itself is not."""
    kernel = build_elf([(BASE, CODE)], entry=BASE, bits=32)
    image = build_bzimage(
        bytes(0x400), payload=compress("gzip", kernel), pref_address=BASE, xloadflags=0
    )
    with pytest.raises(ImageError, match="e_type"):
        moved(image, 0x200000)
    assert moved(image, 0x200000, own=True).entry.rip == BASE + 0x200000


def test_a_boot_images_own_code_moves_from_its_preferred_address() -> None:
    """By whole alignments, upwards, within RAM and below 4 GiB."""
    image = boot_image()
    made = moved(image, 0x600000, own=True)
    assert made.find("kernel").address == BASE + 0x600000
    assert made.entry.rip == BASE + 0x600200
    for offset in (-0x200000, 0x1000):
        with pytest.raises(LoaderError, match=r"multiple of kernel_alignment \(0x200000\)"):
            moved(image, offset, own=True)
    with pytest.raises(PlacementError, match="must lie in RAM"):
        moved(image, SIZE, own=True)
    with pytest.raises(LoaderError, match="below 4 GiB"):
        moved(image, (4 << 30) - BASE, own=True)
    with pytest.raises(ImageError, match="relocatable_kernel"):
        moved(boot_image(relocatable=False), 0x200000, own=True)


def test_other_images_are_where_they_say() -> None:
    """Multiboot headers and firmware name their places."""
    with pytest.raises(LoaderError, match="offset is 0x1000: moves ELF and boot images only"):
        moved(build_multiboot(CODE), 0x1000)
    header = b"\x02\xb0\xad\x1b" + bytes(4) + b"\xfe\x4f\x52\xe4"
    image = build_elf([(BASE, header + CODE)], entry=BASE + 12, bits=32, kind=3)
    with pytest.raises(LoaderError, match="a multiboot kernel goes where its header says"):
        moved(image, 0x1000, Protocol.MULTIBOOT)


def test_a_moved_image_overlaps_nothing() -> None:
    """The plan refuses a place that the loader's own tables have."""
    with pytest.raises(PlacementError, match=r"overlaps|must lie in RAM"):
        moved(DYN, 0x7000 - BASE)
