"""Plans: no overlap, only RAM, and nothing but the plan is written."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from linux_loader import E820Entry, Format, ImageError, Placement, PlacementError, Plan, Protocol
from linux_loader.entry import TableState, protected_mode
from linux_loader.placement import FileRange, checked, highest_fit, lowest_fit
from linux_loader.source import Source
from vm_memory import Anonymous, GuestAddress, GuestMemory, Memfd

if TYPE_CHECKING:
    from pathlib import Path

SIZE = 1 << 20
MAP = (E820Entry(0, SIZE, 1),)
ENTRY = protected_mode(rip=0, gdt=TableState(0, 0))


def make_plan(*placements: Placement) -> Plan:
    return Plan(checked(placements, MAP), ENTRY, Format.ELF64, Protocol.PVH)


def memory() -> GuestMemory:
    return GuestMemory.from_ranges([(GuestAddress(0), SIZE)])


ranges = st.lists(st.tuples(st.integers(0, 100), st.integers(1, 30)), max_size=6)


@given(ranges)
def test_overlap_is_always_found(pieces: list[tuple[int, int]]) -> None:
    """A plan is accepted exactly when no byte belongs to two placements."""
    counted: dict[int, int] = {}
    for start, size in pieces:
        for byte in range(start, start + size):
            counted[byte] = counted.get(byte, 0) + 1
    placements = [Placement(str(index), *piece) for index, piece in enumerate(pieces)]
    if any(count > 1 for count in counted.values()):
        with pytest.raises(PlacementError, match="overlaps"):
            checked(placements, MAP)
    else:
        assert len(checked(placements, MAP)) == len(pieces)


@pytest.mark.parametrize(("address", "size"), [(SIZE - 1, 2), (SIZE, 1), (1 << 40, 1)])
def test_what_is_not_ram_is_refused(address: int, size: int) -> None:
    """A placement that ends outside RAM is an error that shows where RAM is; ROM may."""
    with pytest.raises(PlacementError, match="0x0-0xfffff"):
        checked([Placement("x", address, size)], MAP)
    assert checked([Placement("x", address, size, rom=True)], MAP)


ram = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), min_size=1, max_size=4)


@given(ram, ranges, st.integers(1, 20), st.integers(0, 90))
def test_highest_fit_is_the_highest(
    blocks: list[tuple[int, int]], used: list[tuple[int, int]], size: int, limit: int
) -> None:
    """Against trying every page: the same answer."""
    free = set()
    for start, length in blocks:
        free |= set(range(start, start + length))
    for start, length in used:
        free -= set(range(start, start + length))
    joined: list[tuple[int, int]] = []
    for page in sorted({page for start, length in blocks for page in range(start, start + length)}):
        if joined and joined[-1][1] == page:
            joined[-1] = (joined[-1][0], page + 1)
        else:
            joined.append((page, page + 1))
    taken = [(start, start + length) for start, length in used]
    everywhere = [page for page in range(200) if set(range(page, page + size)) <= free]
    fits = [page for page in everywhere if page + size <= limit]
    page = 4096

    def scaled(pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
        return [(start * page, stop * page) for start, stop in pairs]

    high = highest_fit(scaled(joined), scaled(taken), size * page, limit * page)
    assert high == (max(fits) * page if fits else None)
    low = lowest_fit(scaled(joined), scaled(taken), size * page, 0, page)
    assert low == (min(everywhere) * page if everywhere else None)


def test_only_the_plan_is_written() -> None:
    """Contents and zeros appear; every other byte keeps its value."""
    with memory() as guest:
        guest.fill(GuestAddress(0), SIZE, 0xAA)
        made = make_plan(
            Placement("a", 0x100, 8, b"1234", zero=True), Placement("b", 0x200, 8, b"56")
        )
        made.write(guest)
        data = guest.read(GuestAddress(0), SIZE)
        assert data[0x100:0x108] == b"1234\0\0\0\0"
        assert data[0x200:0x208] == b"56" + b"\xaa" * 6
        assert data.count(0xAA) == SIZE - 8 - 2


def test_memory_that_is_stated_fresh_is_not_cleared() -> None:
    """With `zeroed` nothing is filled: the caller's word is taken."""
    with memory() as guest:
        guest.fill(GuestAddress(0), SIZE, 0xAA)
        make_plan(Placement("a", 0x100, 8, b"1234", zero=True)).write(guest, zeroed=True)
        assert guest.read(GuestAddress(0x100), 8) == b"1234" + b"\xaa" * 4


def test_nothing_is_written_where_memory_is_missing() -> None:
    """A plan made for more memory than there is fails before its first byte."""
    made = make_plan(Placement("a", 0x100, 4, b"1234"), Placement("b", SIZE - 4, 4, b"5678"))
    with (
        GuestMemory.from_ranges([(GuestAddress(0), SIZE // 2)]) as guest,
        pytest.raises(PlacementError, match="b is"),
    ):
        made.write(guest)
    with GuestMemory.from_ranges([(GuestAddress(0), SIZE // 2)]) as guest:
        with pytest.raises(PlacementError):
            made.write(guest)
        assert guest.read(GuestAddress(0x100), 4) == bytes(4)


@pytest.mark.parametrize("skew", [0, 0x234, 1])
@pytest.mark.parametrize("shift", [0, 8])
@pytest.mark.parametrize("anonymous", [True, False])
@pytest.mark.parametrize("map_files", [True, False])
def test_mapped_and_copied_files_read_the_same(
    tmp_path: Path, skew: int, shift: int, anonymous: bool, map_files: bool
) -> None:
    """However a file's bytes get there, they are the same, with zeros behind and no more."""
    content = bytes((index * 7 + (index >> 8)) & 0xFF or 1 for index in range(200_000))
    path = tmp_path / "file"
    path.write_bytes(content)
    size = 150_001
    with (
        GuestMemory.from_ranges(
            [(GuestAddress(0), SIZE)], backing=Anonymous() if anonymous else Memfd()
        ) as guest,
        Source.open(path) as source,
    ):
        guest.fill(GuestAddress(0), SIZE, 0xAA)
        made = make_plan(
            Placement(
                "f",
                0x10000 + skew,
                160_000,
                FileRange(source=source, offset=skew + shift, size=size),
                zero=True,
            )
        )
        mapped = made.write(guest, map_files=map_files)
        got = guest.read(GuestAddress(0x10000 + skew), 160_000)
        assert got[:size] == content[skew + shift :][:size]
        assert got[size:] == bytes(160_000 - size)
        assert guest.read(GuestAddress(0x10000 + skew - 1), 1) == b"\xaa"
        assert guest.read(GuestAddress(0x10000 + skew + 160_000), 1) == b"\xaa"
        assert (mapped > 0) == (map_files and anonymous and not shift)
        guest.write(GuestAddress(0x10000 + skew), b"\0" * size)
    assert path.read_bytes() == content


@pytest.mark.parametrize("map_files", [True, False])
@pytest.mark.parametrize("size", [200_000, 48 * 4096])
def test_a_file_that_shrank_is_an_error(tmp_path: Path, size: int, map_files: bool) -> None:
    """A file cut between plan and write is refused, not mapped past its end."""
    path = tmp_path / "file"
    path.write_bytes(bytes(size))
    with memory() as guest, Source.open(path) as source:
        made = make_plan(
            Placement("f", 0x10000, size, FileRange(source=source, offset=0, size=size))
        )
        path.write_bytes(b"short")
        with pytest.raises(ImageError):
            made.write(guest, map_files=map_files)


def test_known_zeros_are_skipped_in_fresh_memory_only() -> None:
    """Where memory is stated fresh, ranges known to be zero are not written; elsewhere they are."""
    source = Source.of_bytes(b"a" * 100 + bytes(200) + b"b" * 100, "bytes")
    source.zeros = ((100, 300),)
    made = make_plan(Placement("f", 0x1000, 400, FileRange(source=source, offset=0, size=400)))
    for zeroed, middle in ((True, b"\xaa" * 200), (False, bytes(200))):
        with memory() as guest:
            guest.fill(GuestAddress(0), SIZE, 0xAA)
            made.write(guest, zeroed=zeroed)
            assert guest.read(GuestAddress(0x1000), 400) == b"a" * 100 + middle + b"b" * 100


def test_contents_cross_regions() -> None:
    """A placement may lie across two adjacent regions of guest memory."""
    half = SIZE // 2
    with GuestMemory.from_ranges([(GuestAddress(0), half), (GuestAddress(half), half)]) as guest:
        source = Source.of_bytes(b"abcdefgh", "bytes")
        make_plan(
            Placement("f", half - 4, 8, FileRange(source=source, offset=0, size=8)),
            Placement("g", 8, 4, b"data"),
        ).write(guest)
        assert guest.read(GuestAddress(half - 4), 8) == b"abcdefgh"


def test_a_plan_prints_as_a_table() -> None:
    """One line a placement, in the order of addresses."""
    made = make_plan(Placement("second", 0x2000, 16), Placement("first", 0x1000, 4096))
    assert str(made).splitlines() == [
        "0x000000001000-0x000000001fff        4,096 first",
        "0x000000002000-0x00000000200f           16 second",
    ]
    assert made.find("second").address == 0x2000
    with pytest.raises(KeyError):
        made.find("third")
