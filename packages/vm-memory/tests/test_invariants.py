"""The thirteen invariants of guest memory, each a named property, and the hostile values."""

from __future__ import annotations

import ast
import inspect
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import vm_memory
from vm_memory import (
    AddressError,
    Anonymous,
    DirtyBitmap,
    FilePrivate,
    FileShared,
    GuestAddress,
    GuestMemory,
    InvalidValueError,
    IommuMemory,
    Iotlb,
    Memfd,
    MemoryAccessError,
    Options,
    Permissions,
    RegionError,
    TranslationError,
    VmMemoryError,
)
from vm_memory._atomics import AtomicAccess
from vm_memory.testing import addresses_near, range_lists

A = GuestAddress


def test_i1_access_has_no_management() -> None:
    """I1: what only accesses memory has no way to create, insert, remove or close regions."""
    public = {name for name in dir(AtomicAccess) if not name.startswith("_")}
    assert not public & {"insert", "remove", "from_ranges", "close", "regions"}
    assert issubclass(GuestMemory, AtomicAccess)
    assert issubclass(IommuMemory, AtomicAccess)
    assert not {"insert", "remove", "from_ranges"} & set(dir(IommuMemory))


@given(range_lists(), st.integers(0, 3))
def test_i2_maps_do_not_change(ranges: list[tuple[GuestAddress, int]], which: int) -> None:
    """I2: inserting and removing make new maps; the old one is what it was."""
    memory = GuestMemory.from_ranges(ranges)
    before = memory.regions
    (extra,) = GuestMemory.from_ranges([(A(1 << 40), 8)]).regions
    assert memory.insert(extra).regions == (*before, extra)
    if which < len(ranges):
        smaller, region = memory.remove(*ranges[which])
        assert region is before[which]
        assert smaller.regions == (*before[:which], *before[which + 1 :])
    assert memory.regions is before


@given(st.lists(st.tuples(st.integers(-16, 200), st.integers(-1, 64)), max_size=4))
def test_i3_regions_are_sorted_disjoint_and_not_empty(ranges: list[tuple[int, int]]) -> None:
    """I3: exactly the lists of ranges that are so make a map; a map may have no region at all."""
    end = 0
    legal = True
    for start, size in ranges:
        legal = legal and start >= end and size > 0 and start % 8 == 0
        end = start + size
    guest = [(A(start), size) for start, size in ranges]
    if legal:
        memory = GuestMemory.from_ranges(guest)
        assert [(r.guest_address, r.size) for r in memory.regions] == ranges
        assert GuestMemory(memory.regions).regions == memory.regions
        if len(ranges) > 1:
            with pytest.raises(RegionError):
                GuestMemory(reversed(memory.regions))
    else:
        with pytest.raises(RegionError):
            GuestMemory.from_ranges(guest)


@given(st.data(), range_lists(), st.integers(0, 200))
def test_i4_a_hole_stops_an_access(
    data: st.DataObject, ranges: list[tuple[GuestAddress, int]], length: int
) -> None:
    """I4: partial forms stop at a hole, exact ones raise and do nothing, as does no first byte."""
    memory = GuestMemory.from_ranges(ranges)
    address = data.draw(addresses_near(ranges))
    there = {start + i for start, size in ranges for i in range(size)}
    count = 0
    while count < length and address + count in there:
        count += 1
    content = b"\xff" * length
    if count < length:
        with pytest.raises(MemoryAccessError):
            memory.write(address, content)
        assert all(not any(region.buffer) for region in memory.regions)
    if count or not length:
        assert len(memory.read_partial(address, length)) == count
        assert memory.write_partial(address, content) == count
    else:
        with pytest.raises(MemoryAccessError):
            memory.write_partial(address, content)
    assert sum(sum(region.buffer) for region in memory.regions) == 255 * count


def test_i5_reads_are_copies() -> None:
    """I5: what a read returns is the caller's own; only slices and views are the memory."""
    memory = GuestMemory.from_ranges([(A(0), 64)])
    before, record = memory.read(A(0), 8), memory.read_struct(A(0), "8s")
    memory.write(A(0), b"\xff" * 8)
    assert before == bytes(8) == record[0]


def test_i7_atomics_lie_in_one_region_and_are_aligned() -> None:
    """I7: an atomic that is misaligned or crosses regions is refused, and does nothing."""
    memory = GuestMemory.from_ranges([(A(0), 12), (A(16), 16)])
    joined = GuestMemory.from_ranges([(A(0), 4), (A(8), 4)])
    for address, size in ((1, 2), (2, 4), (4, 8), (8, 8), (17, 8), (12, 4)):
        with pytest.raises(MemoryAccessError):
            memory.atomic_fetch_add(A(address), size, 1)
    with pytest.raises(MemoryAccessError):
        joined.atomic_store(A(0), 8, 1)
    assert not any(memory.read(A(0), 12) + memory.read(A(16), 16))


@given(st.data(), range_lists(), st.integers(1, 200))
def test_i8_slices_have_the_length_asked_for(
    data: st.DataObject, ranges: list[tuple[GuestAddress, int]], length: int
) -> None:
    """I8: the pieces of a range add up to it, one for each region, or there are none."""
    memory = GuestMemory.from_ranges(ranges)
    address = data.draw(addresses_near(ranges))
    if memory.check_range(address, length):
        pieces = memory.slices(address, length)
        assert sum(map(len, pieces)) == length
        assert all(len(piece) and not piece.readonly for piece in pieces)
        assert [n for _, n in memory.iovecs(address, length)] == list(map(len, pieces))
    else:
        with pytest.raises(MemoryAccessError):
            memory.slices(address, length)


def test_i9_every_public_write_is_known_to_mark() -> None:
    """I9: each method that takes part in writing is in the list that test_dirty proves."""
    tested = Path(__file__).with_name("test_dirty.py").read_text()
    writers = [
        name for name in dir(GuestMemory)
        if name.startswith(("write_", "atomic_", "fill", "copy", "discard", "iovecs", "slices"))
        and not name.endswith(("_load", "_to_file"))
    ]  # fmt: skip
    same_path = {"write_record", "write_cdata", "write_u32_be", "write_u64_be"}
    missing = [n for n in writers if f".{n}(" not in tested and f'"{n}"' not in tested]
    assert set(missing) <= same_path


def test_i10_addresses_may_be_of_any_space() -> None:
    """I10: the same accessors serve guest-physical and I/O virtual addresses."""
    memory = GuestMemory.from_ranges([(A(0x1000), 0x1000)])
    tlb = Iotlb()
    tlb.set_mapping(0xFFFF_F000, 0x1000, 0x1000, Permissions.READ_WRITE)
    for space, address in ((memory, 0x1008), (IommuMemory(memory, tlb), 0xFFFF_F008)):
        space.write_u64(A(address), address)
        assert space.read_u64(A(address)) == address


def test_i11_nobody_can_force_a_host_address() -> None:
    """I11: where memory is mapped, no parameter of a backing or of options is an address or a flag.

    `Adopted` names an address, and maps nothing: see test_adopted.
    """
    kinds = (Anonymous, Memfd, FileShared, FilePrivate, Options)
    names = {field.name for kind in kinds for field in kind.__attrs_attrs__}
    names |= set(inspect.signature(GuestMemory.from_ranges).parameters)
    assert not {name for name in names if "address" in name or "flags" in name or "fixed" in name}
    one, other = (GuestMemory.from_ranges([(A(0), 1 << 20)]).regions[0] for _ in range(2))
    assert abs(one.host_address - other.host_address) >= 1 << 20


def test_i12_restricting_takes_effect_at_once() -> None:
    """I12: after an invalidation, or a mapping with less permission, nothing old is used."""
    memory = GuestMemory.from_ranges([(A(0), 0x2000)])
    tlb = Iotlb()
    view = IommuMemory(memory, tlb)
    steps: list[Callable[[], None]] = [
        lambda: tlb.set_mapping(0x4000, 0, 0x1000, Permissions.READ),
        lambda: tlb.invalidate_mapping(0x4100, 1),
        tlb.invalidate_all,
    ]
    for restrict in steps:
        tlb.set_mapping(0x4000, 0, 0x1000, Permissions.READ_WRITE)
        view.write(A(0x4100), b"x")
        restrict()
        with pytest.raises(TranslationError):
            view.write(A(0x4100), b"x")


@given(range_lists())
def test_i13_last_addresses_exist(ranges: list[tuple[GuestAddress, int]]) -> None:
    """I13: no region is empty, so each has a last address; an empty map has none."""
    memory = GuestMemory.from_ranges(ranges)
    for region in memory.regions:
        assert region.last_address == region.guest_address + region.size - 1
        assert memory.find_region(region.last_address) is region
    last = memory.last_address
    assert last == (memory.regions[-1].last_address if ranges else None)


ZEROS = os.open("/dev/zero", os.O_RDONLY | os.O_CLOEXEC)
NULL = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
HOSTILE = [
    sign * (1 << power) + by
    for power in (0, 3, 12, 31, 32, 47, 48, 52, 63, 64, 65, 128)
    for by in (-9, -8, -1, 0, 1, 8)
    for sign in (1, -1)
]
CALLS: list[Callable[[GuestMemory | IommuMemory, GuestAddress, int], object]] = [
    lambda m, a, n: m.read(a, n),
    lambda m, a, n: m.read_partial(a, n),
    lambda m, a, n: m.fill(a, n, 1),
    lambda m, a, n: m.copy(a, A(0x1000), n),
    lambda m, a, n: m.copy(A(0x1000), a, n),
    lambda m, a, n: m.slices(a, n),
    lambda m, a, _: m.write(a, b"abc"),
    lambda m, a, _: m.write_partial(a, b"abc"),
    lambda m, a, _: m.read_into(a, bytearray(3)),
    lambda m, a, _: [m.read_u8(a), m.read_u16(a), m.read_u32(a), m.read_u64(a)],
    lambda m, a, _: m.write_u8(a, 1),
    lambda m, a, _: m.write_u64(a, 1),
    lambda m, a, n: m.write_u32(a, n),
    lambda m, a, n: m.atomic_load(a, n),
    lambda m, a, n: m.atomic_fetch_add(a, 8, n),
    lambda m, a, n: m.atomic_store(a, 4, n),
    lambda m, a, n: m.scalar(a, n),
    lambda m, a, n: m.atomic_store(a, n, 1),
    lambda m, a, n: m.atomic_fetch_add(a, n, 1),
    lambda m, a, n: m.atomic_compare_exchange(a, n, 0, 1),
    lambda m, a, n: m.mark_dirty(a, n),
    lambda m, a, n: m.iovecs(a, n),
    lambda m, a, n: m.read_from_file(a, ZEROS, n, 0),
    lambda m, a, n: m.read_exact_from_file(a, ZEROS, n, 0),
    lambda m, a, n: m.write_all_to_file(a, NULL, n, 0),
    lambda m, a, n: m.write_to_file(a, NULL, 8, n),
    lambda m, a, _: m.read_struct(a, "<Q"),
]


@pytest.mark.parametrize("call", range(len(CALLS)))
@pytest.mark.parametrize("translated", [False, True])
def test_hostile_values(call: int, translated: bool) -> None:
    """Any address and length either works within memory or raises this package's exception."""
    memory = GuestMemory.from_ranges([(A(0x1000), 0x1000), (A((1 << 64) - 0x1000), 0x1000)])
    space: GuestMemory | IommuMemory = memory
    if translated:
        tlb = Iotlb()
        tlb.set_mapping(0, 0x1000, 0x800, Permissions.READ_WRITE)
        tlb.set_mapping((1 << 64) - 0x800, (1 << 64) - 0x1000, 0x800, Permissions.READ_WRITE)
        space = IommuMemory(memory, tlb, dirty=DirtyBitmap(1 << 20))
    for address in HOSTILE:
        for length in HOSTILE[::5]:
            try:
                CALLS[call](space, A(address), length)
            except (AddressError, InvalidValueError):
                continue
            if not translated:
                assert memory.check_range(A(address), 1) or length == 0
    assert memory.check_range(A(0x1000), 0x1000)


def test_the_stub_names_what_the_library_has() -> None:
    """`_native.pyi` and the compiled extension agree on every name."""
    stub = Path(vm_memory.__file__).with_name("_native.pyi").read_text()
    classes = {node.name: node for node in ast.parse(stub).body if isinstance(node, ast.ClassDef)}
    named = {n.name for n in classes["_Lib"].body if isinstance(n, ast.FunctionDef)}
    from vm_memory._native import lib

    assert named == set(dir(lib))


def test_every_exported_name_exists() -> None:
    """`__all__` and the lazy imports agree, and every error is in the one tree."""
    for name in vm_memory.__all__:
        value = getattr(vm_memory, name)
        if name.endswith("Error"):
            assert issubclass(value, VmMemoryError)
    assert dir(vm_memory) == vm_memory.__all__
    with pytest.raises(AttributeError):
        vm_memory.nothing  # noqa: B018
