"""Memory that somebody else mapped: used as our own, and never unmapped."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import pickle
import weakref
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vm_memory import (
    Adopted,
    BackingLostError,
    ClosedError,
    GuestAddress,
    GuestMemory,
    InvalidValueError,
    Options,
    Order,
)
from vm_memory._table import NativeTable

A = GuestAddress
PAGE = 4096
_MADV_DONTFORK = 10
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Theirs:
    """Memory that is unmapped when this object is gone: what is used then ends the process."""

    def __init__(self, pages: int = 4, flags: int = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) -> None:
        """Map pages."""
        self.length = pages * PAGE
        rights = mmap.PROT_READ | mmap.PROT_WRITE
        address = _libc.mmap(None, self.length, rights, flags, -1, 0)
        assert address not in (None, ctypes.c_void_p(-1).value)
        self.address = int(address)

    def backing(self) -> Adopted:
        """All of it, with this object as the owner."""
        return Adopted(self.address, self.length, self)

    def bytes(self, offset: int, length: int) -> bytes:
        """What is there, read without the library."""
        return ctypes.string_at(self.address + offset, length)

    def __del__(self) -> None:
        """Unmap it."""
        _libc.munmap(self.address, self.length)


def test_every_access_reaches_it() -> None:
    """Bytes, scalars, atomics, slices, files and marks do what they do in memory of our own."""
    theirs = Theirs()
    ranges = [(A(0x1000), PAGE), (A(0x2000), 2 * PAGE + 100)]
    memory = GuestMemory.from_ranges(ranges, backing=theirs.backing(), dirty_page_size=PAGE)
    memory.write(A(0x1FFC), b"across a border")
    assert theirs.bytes(PAGE - 4, 15) == b"across a border"
    memory.write_u32(A(0x3000), 0xCAFE)
    assert memory.atomic_fetch_add(A(0x3000), 4, 2, Order.SEQ_CST) == 0xCAFE
    assert theirs.bytes(2 * PAGE, 4) == b"\x00\xcb\x00\x00"
    (piece,) = memory.slices(A(0x4000), 100)
    piece[:3] = b"end"
    assert theirs.bytes(3 * PAGE, 3) == b"end"
    read, write = os.pipe()
    try:
        memory.write_all_to_file(A(0x1FFC), write, 15)
        memory.read_exact_from_file(A(0x1100), read, 15)
    finally:
        os.close(read)
        os.close(write)
    assert theirs.bytes(0x100, 15) == b"across a border"
    assert list(memory.harvest_dirty()) == [(A(0x1000), 3 * PAGE + 100)]
    assert not memory.check_range(A(0x4000), 101)
    assert memory.regions[1].backing == theirs.backing()
    assert memory.regions[0].fd is None


def test_nothing_is_mapped_changed_or_unmapped() -> None:
    """The kernel has the same mapping at the place before, meanwhile and afterwards."""
    theirs = Theirs(flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)  # which joins no neighbour

    def there() -> list[str]:
        lines = Path("/proc/self/maps").read_text().splitlines()
        return [line for line in lines if line.startswith(f"{theirs.address:x}-")]

    before = there()
    assert len(before) == 1
    memory = GuestMemory.from_ranges([(A(0), 2 * PAGE)], backing=theirs.backing())
    memory.fill(A(0), 2 * PAGE, 1)
    assert there() == before
    del memory
    gc.collect()
    assert there() == before
    assert theirs.bytes(0, 1) == b"\x01"


@pytest.mark.parametrize("kind", [mmap.MAP_PRIVATE, mmap.MAP_SHARED])
def test_discarding_clears_what_is_the_regions_and_nothing_behind_it(kind: int) -> None:
    """The rest of the last page belongs to its owner still, whatever was mapped how."""
    theirs = Theirs(flags=kind | mmap.MAP_ANONYMOUS)
    memory = GuestMemory.from_ranges([(A(0), 2 * PAGE + 8)], backing=theirs.backing())
    memory.fill(A(0), 2 * PAGE + 8, 0xFF)
    ctypes.memset(theirs.address + 2 * PAGE + 8, 0xEE, 8)
    memory.discard(A(0), 2 * PAGE + 8)
    assert theirs.bytes(0, 2 * PAGE + 8) == bytes(2 * PAGE + 8)
    assert theirs.bytes(2 * PAGE + 8, 8) == b"\xee" * 8


def test_no_file_is_mapped_over_it(tmp_path: Path) -> None:
    """Where our own memory would be replaced by a mapping, the caller copies."""
    theirs = Theirs()
    path = tmp_path / "file"
    path.write_bytes(b"x" * PAGE)
    memory = GuestMemory.from_ranges([(A(0), PAGE)], backing=theirs.backing())
    with path.open("rb") as file:
        assert not memory.map_private_file(A(0), file.fileno(), 0, PAGE)
    assert memory.read(A(0), PAGE) == bytes(PAGE)


@pytest.mark.parametrize(
    ("address", "length", "message"),
    [
        (0, PAGE, "host_address is 0: must be a multiple of the page size, as 0x1000 or 0x2000"),
        (-PAGE, PAGE, "host_address is -4096: must be a multiple of the page size"),
        (0x1001, PAGE, "host_address is 4097: must be a multiple of the page size, as 0x1000"),
        (PAGE, 0, "length is 0: must be at least 1 byte"),
        (PAGE, -1, "length is -1: must be at least 1 byte"),
        (1 << 63, (1 << 63) + 1, "must not pass 2\\*\\*64 from host address 0x8000000000000000"),
        (1 << 64, 1, "must not pass 2\\*\\*64"),
    ],
)
def test_impossible_places_are_refused(address: int, length: int, message: str) -> None:
    """Before anything is asked of the kernel: the rule, and the nearest legal value."""
    with pytest.raises(InvalidValueError, match=message):
        Adopted(address, length, None)


def test_what_is_not_mapped_as_guest_memory_must_be_is_refused() -> None:
    """Nothing there, a gap, memory that is read-only, and more regions than memory."""
    hole, theirs = Theirs(8), Theirs(8)
    _libc.munmap(hole.address + 2 * PAGE, PAGE)
    _libc.mprotect(theirs.address + 6 * PAGE, PAGE, mmap.PROT_READ)
    whole = [(A(0), 8 * PAGE)]

    def adopt(backing: Adopted, ranges: list[tuple[GuestAddress, int]]) -> None:
        GuestMemory.from_ranges(ranges, backing=backing)

    with pytest.raises(InvalidValueError, match="nothing is mapped at 0x1000"):
        adopt(Adopted(PAGE, PAGE, None), [(A(0), PAGE)])
    with pytest.raises(
        InvalidValueError, match=f"nothing is mapped at {hole.address + 2 * PAGE:#x}"
    ):
        adopt(hole.backing(), whole)
    with pytest.raises(InvalidValueError, match="is mapped r--p; guest memory must be readable"):
        adopt(theirs.backing(), whole)
    adopt(Adopted(theirs.address, 6 * PAGE, theirs), [(A(0), PAGE + 1), (A(1 << 20), 4 * PAGE)])
    with pytest.raises(InvalidValueError, match="the regions need 24577 bytes, each from a page"):
        adopt(Adopted(theirs.address, 6 * PAGE, theirs), [(A(0), PAGE + 1), (A(1 << 20), 16385)])
    backing = Adopted(theirs.address, PAGE, theirs)
    with pytest.raises(InvalidValueError, match=r"options is .* its owner's business"):
        GuestMemory.from_ranges([(A(0), PAGE)], backing=backing, options=Options())
    _libc.mmap(hole.address + 2 * PAGE, PAGE, 3, 0x22 | 0x10, -1, 0)  # for its owner to unmap


@pytest.mark.parametrize("buffer", [b"x" * 8192, 5, memoryview(bytearray(64))[::2]])
def test_what_shows_no_memory_is_refused(buffer: object) -> None:
    """Read-only, without the buffer protocol, not contiguous."""
    with pytest.raises(InvalidValueError, match=r"buffer is .*: cannot be used"):
        Adopted.from_buffer(buffer)


def test_an_mmap_cannot_be_closed_under_us() -> None:
    """The view that `from_buffer` takes keeps it open for as long as the memory is used."""
    theirs = mmap.mmap(-1, 2 * PAGE)
    memory = GuestMemory.from_ranges([(A(0), PAGE)], backing=Adopted.from_buffer(theirs))
    (piece,) = memory.slices(A(0), 8)
    memory.close()
    with pytest.raises(BufferError):
        theirs.close()
    piece[:] = b"still in"
    assert theirs[:8] == b"still in"
    del memory, piece
    theirs.close()


OPERATIONS = ["slice", "cast", "iovec", "scalar", "region", "table", "insert",
              "close", "forget", "collect", "cycle", "fork"]  # fmt: skip


@given(st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 1 << 16)), max_size=30))
def test_the_owner_lives_exactly_as_long_as_a_way_to_its_memory(
    steps: list[tuple[str, int]],
) -> None:
    """In any order of closing, forgetting and collecting; and what is left can be used."""
    theirs = Theirs()
    owner = weakref.ref(theirs)
    maps = [GuestMemory.from_ranges([(A(0), 3 * PAGE)], backing=theirs.backing())]
    # Everything that must keep the memory, besides the maps that are open.
    ways: list[object] = []
    del theirs
    for name, number in steps:
        memory = maps[number % len(maps)] if maps else None
        if name == "forget" and ways:
            ways.pop(number % len(ways))
        elif name == "collect":
            gc.collect()
        elif memory is None or memory.closed:
            continue
        elif name == "close":
            memory.close()
            maps.remove(memory)
        elif name == "cycle":
            cycle(memory)
        elif name == "insert":
            extra = GuestMemory.from_ranges([(A(1 << 20), PAGE)]).regions
            maps.append(GuestMemory([memory.regions[0], *extra[-1:]]))
        elif name == "fork":
            in_child(memory)
        else:
            ways += way(name, memory, number)
        memory = None
        use(maps, ways, number)
        assert (owner() is not None) == bool(maps or ways)
    maps.clear()
    ways.clear()
    assert owner() is None


def cycle(memory: GuestMemory) -> None:
    """Leave a region to the collector."""
    ring: list[object] = [memory.regions[0]]
    ring.append(ring)
    del ring
    gc.collect()


def use(maps: list[GuestMemory], ways: list[object], number: int) -> None:
    """Write by every way; what is gone would end the process."""
    for memory in maps:
        memory.write_u8(A(number % PAGE), number & 0xFF)
    for thing in ways:
        if isinstance(thing, memoryview):
            thing[-1] = number & 0xFF


def way(name: str, memory: GuestMemory, number: int) -> list[object]:
    """Something that refers to a memory and must keep its owner."""
    address = A(number % PAGE & ~7)
    if name == "slice":
        return list(memory.slices(address, 2 * PAGE))
    if name == "cast":
        return [memory.regions[0].buffer.cast("Q")[1:].cast("B")]
    if name == "iovec":
        return [memory.iovecs(A(0), PAGE)]
    if name == "scalar":
        return [memory.scalar(address, 8)]
    if name == "region":
        return [memory.regions[0].at(A(1 << 30))]
    if name == "table":
        return [NativeTable(memory.regions)]
    return []


def in_child(memory: GuestMemory) -> None:
    """Write and collect in a child: it has a copy, and its end touches nothing of the parent."""
    before = memory.read(A(0), 8)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            memory.write(A(0), b"children")
            memory.close()
            gc.collect()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    assert memory.read(A(0), 8) == before


def test_c_code_alone_keeps_the_owner() -> None:
    """A reference that only C holds, as a device's thread does, is one like any other."""
    theirs = Theirs()
    owner = weakref.ref(theirs)
    memory = GuestMemory.from_ranges([(A(0), PAGE)], backing=theirs.backing())
    table = memory._native().pointer
    table.retain(table)
    del theirs, memory
    gc.collect()
    assert owner() is not None
    assert int.from_bytes(owner().bytes(0, 4)) == 0  # type: ignore[union-attr]
    table.release(table)
    assert owner() is None


def test_the_last_page_of_a_cut_file_reads_as_zeros(tmp_path: Path) -> None:
    """A file behind somebody else's mapping may be truncated as any other, and is told of."""
    path = tmp_path / "file"
    path.write_bytes(b"x" * 2 * PAGE)
    with path.open("r+b") as file:
        theirs = mmap.mmap(file.fileno(), 2 * PAGE)
        memory = GuestMemory.from_ranges([(A(0), 2 * PAGE)], backing=Adopted.from_buffer(theirs))
        (region,) = memory.regions
        assert region.fragile
        file.truncate(PAGE)
        assert memory.read(A(0), 4) == b"xxxx"
        with pytest.raises(BackingLostError, match="has lost pages"):
            memory.read(A(PAGE), 4)
    assert region.lost
    assert theirs[PAGE : PAGE + 4] == bytes(4)


def test_what_children_do_not_have_is_closed_in_them() -> None:
    """The kernel is asked whether a child of fork will have it."""
    theirs = Theirs()
    assert _libc.madvise(theirs.address, theirs.length, _MADV_DONTFORK) == 0
    memory = GuestMemory.from_ranges([(A(0), PAGE)], backing=theirs.backing())
    memory.write(A(0), b"here")
    (piece,) = memory.slices(A(0), 4)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            assert bytes(piece) == bytes(4)
            with pytest.raises(ClosedError):
                memory.read(A(0), 4)
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    assert memory.read(A(0), 4) == b"here"


def test_huge_pages_are_recognised(hugepages: int) -> None:
    """Their size is asked of the kernel, and a place within one is refused."""
    assert hugepages
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40000 | 21 << 26  # MAP_HUGETLB, of 2 MiB
    theirs = Theirs(1024, flags)
    memory = GuestMemory.from_ranges([(A(0), 2 << 20)], backing=theirs.backing())
    assert memory.regions[0].page_size == 2 << 20
    memory.write(A(PAGE), b"huge")
    assert theirs.bytes(PAGE, 4) == b"huge"
    backing = Adopted(theirs.address + PAGE, PAGE, theirs)
    with pytest.raises(InvalidValueError, match="must be a multiple of the huge page, as"):
        GuestMemory.from_ranges([(A(0), PAGE)], backing=backing)


def test_it_is_a_value() -> None:
    """Equal by place; the owner is nobody's business."""
    assert Adopted(PAGE, 8, "one") == Adopted(PAGE, 8, "other") != Adopted(PAGE, 9, "one")
    assert "owner" not in repr(Adopted(PAGE, 8, "one"))
    assert pickle.loads(pickle.dumps(Adopted(PAGE, 8, "one"))) == Adopted(PAGE, 8, "one")
