"""Address arithmetic and maps of regions."""

from __future__ import annotations

import pickle

import pytest

from vm_memory import (
    AddressError,
    ClosedError,
    GuestAddress,
    GuestMemory,
    InvalidValueError,
    MappingError,
    MemoryAccessError,
    RegionError,
)
from vm_memory.address import (
    align_down,
    align_up,
    checked_add,
    checked_sub,
    is_aligned,
    offset_from,
)

A = GuestAddress


def test_arithmetic_at_the_edges() -> None:
    """Checked arithmetic raises exactly where 64 bits end."""
    assert checked_add(A((1 << 64) - 2), 1) == (1 << 64) - 1
    assert checked_sub(A(1), 1) == 0
    assert align_up(A(0), 4096) == 0
    assert align_up(A(1), 4096) == 4096
    assert align_down(A(4097), 4096) == 4096
    assert is_aligned(8192, 4096)
    for call in (
        lambda: checked_add(A((1 << 64) - 1), 1),
        lambda: checked_sub(A(0), 1),
        lambda: offset_from(A(1), A(2)),
        lambda: align_up(A((1 << 64) - 1), 2),
        lambda: align_up(A(0), 3),
        lambda: align_down(A(0), 0),
        lambda: is_aligned(0, -2),
    ):
        with pytest.raises(InvalidValueError):
            call()


@pytest.mark.parametrize(
    "ranges",
    [
        [(0, 0)],
        [(0, -1)],
        [(0x1000, 0x1000), (0, 0x1000)],
        [(0, 0x1000), (0xFF8, 0x1000)],
        [(0, 0x1000), (0, 0x1000)],
        [(4, 0x1000)],
        [((1 << 64) - 0x1000, 0x1001)],
        [(-8, 0x1000)],
        [(0, (1 << 47) + 1)],
    ],
)
def test_impossible_maps_are_refused(ranges: list[tuple[GuestAddress, int]]) -> None:
    """Empty, unsorted, overlapping, misaligned and overflowing ranges make no map."""
    with pytest.raises(RegionError) as caught:
        GuestMemory.from_ranges(ranges)
    assert (caught.value.guest_address, caught.value.size) == ranges[-1]


def test_the_last_address_can_be_used() -> None:
    """A region may end with the address space."""
    memory = GuestMemory.from_ranges([(A((1 << 64) - 0x1000), 0x1000)])
    memory.write(A((1 << 64) - 1), b"x")
    assert memory.last_address == (1 << 64) - 1
    assert not memory.check_range(A((1 << 64) - 1), 2)
    with pytest.raises(MemoryAccessError):
        memory.read(A((1 << 64) - 1), 2)


def test_insert_and_remove_make_new_maps() -> None:
    """Maps are values: insert and remove leave the old one as it was, and share its memory."""
    first = GuestMemory.from_ranges([(A(0), 0x1000), (A(0x2000), 0x1000)])
    (extra,) = GuestMemory.from_ranges([(A(0x1000), 0x1000)]).regions
    full = first.insert(extra)
    assert [r.guest_address for r in full.regions] == [0, 0x1000, 0x2000]
    assert len(first.regions) == 2
    full.write(A(0xFFF), b"abc")
    assert first.read(A(0xFFF), 1) == b"a"
    rest, removed = full.remove(A(0), 0x1000)
    assert removed is first.regions[0]
    assert [r.guest_address for r in rest.regions] == [0x1000, 0x2000]
    with pytest.raises(RegionError):
        full.insert(extra)
    for address, size in ((0x1000, 0xFFF), (0x1008, 0x1000), (0x9000, 1), (-8, 8)):
        with pytest.raises(RegionError):
            full.remove(A(address), size)
    empty, _ = GuestMemory.from_ranges([(A(0), 0x1000)]).remove(A(0), 0x1000)
    assert empty.regions == ()
    assert empty.last_address is None
    with pytest.raises(MemoryAccessError):
        empty.read(A(0), 1)


def test_lookup_and_holes() -> None:
    """Regions are found by any address in them; what lies between is listed."""
    memory = GuestMemory.from_ranges([(A(0x1000), 0x1000), (A(0x2000), 8), (A(0x8000), 0x1000)])
    one, two, three = memory.regions
    assert memory.find_region(A(0xFFF)) is None
    assert memory.find_region(A(0x1FFF)) is one
    assert memory.find_region(A(0x2007)) is two
    assert memory.find_region(A(0x2008)) is None
    assert memory.find_region(A(0x8FFF)) is three
    assert memory.find_region(A(0x9000)) is None
    assert memory.holes() == [(0, 0x1000), (0x2008, 0x5FF8)]
    assert memory.holes(0x2000, 0xA000) == [(0x2008, 0x5FF8), (0x9000, 0x1000)]
    assert memory.holes(0x3000, 0x4000) == [(0x3000, 0x1000)]
    assert memory.size == 0x2008
    assert one.last_address == 0x1FFF
    assert "0x1000+0x1000" in repr(memory)
    assert "0x1000" in repr(one)


def test_closing_one_map_leaves_the_other() -> None:
    """A region lives as long as any map that has it."""
    first = GuestMemory.from_ranges([(A(0), 0x1000)])
    (extra,) = GuestMemory.from_ranges([(A(0x1000), 0x1000)]).regions
    second = first.insert(extra)
    first.close()
    second.write(A(0), b"alive")
    assert second.read(A(0), 5) == b"alive"
    with pytest.raises(ClosedError):
        first.insert(extra)


@pytest.mark.parametrize(
    "error",
    [
        AddressError(1, 2, "rule"),
        MemoryAccessError(1, 2, "rule"),
        RegionError(1, 2, "rule"),
        InvalidValueError("field", 3, "rule"),
        ClosedError(),
        MappingError("mmap", 12, "hint"),
    ],
)
def test_errors_can_be_pickled(error: Exception) -> None:
    """An exception crosses process borders with its fields and message."""
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)
