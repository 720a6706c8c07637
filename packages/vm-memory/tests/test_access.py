"""Bytes, scalars, atomics and slices."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import pytest

from vm_memory import (
    AddressError,
    ClosedError,
    GuestAddress,
    GuestMemory,
    InvalidValueError,
    Memfd,
    MemoryAccessError,
    Order,
    Permissions,
    VmMemoryError,
    fence,
)
from vm_memory.backing import Anonymous, Backing

A = GuestAddress


@pytest.fixture(params=[Anonymous(), Memfd()], ids=["anonymous", "memfd"])
def memory(request: pytest.FixtureRequest) -> GuestMemory:
    """Two adjacent regions, a hole of a page, and a third region of odd size."""
    backing: Backing = request.param
    return GuestMemory.from_ranges(
        [(A(0x1000), 0x1000), (A(0x2000), 0x1000), (A(0x4000), 100)], backing=backing
    )


def test_what_is_written_is_read(memory: GuestMemory) -> None:
    """Bytes come back from where they were put, and nothing else changes."""
    memory.write(A(0x1100), b"hello")
    assert memory.read(A(0x10FF), 7) == b"\0hello\0"
    assert memory.read(A(0x2000), 0x1000) == bytes(0x1000)


def test_access_spans_adjacent_regions(memory: GuestMemory) -> None:
    """The border between two adjacent regions is not visible."""
    data = os.urandom(64)
    memory.write(A(0x1FE0), data)
    assert memory.read(A(0x1FE0), 64) == data
    memory.write_u64(A(0x1FFC), 0x1122334455667788)
    assert memory.read_u64(A(0x1FFC)) == 0x1122334455667788
    assert memory.read(A(0x1FFC), 8) == (0x1122334455667788).to_bytes(8, "little")


def test_a_hole_stops_the_exact_forms_before_anything_happens(memory: GuestMemory) -> None:
    """An access that touches a hole raises and writes nothing."""
    with pytest.raises(MemoryAccessError, match="0x3000") as caught:
        memory.write(A(0x2FFF), b"xy")
    assert (caught.value.address, caught.value.length) == (0x2FFF, 2)
    assert memory.read(A(0x2FFF), 1) == b"\0"
    for address, length in ((0x2FFF, 2), (0x3000, 1), (0, 1), (0x4063, 2), (1 << 64, 1), (-1, 1)):
        assert not memory.check_range(A(address), length)
        for access in (memory.read, memory.slices, memory.fill):
            with pytest.raises(AddressError):
                access(A(address), length)


def test_partial_forms_stop_at_a_hole(memory: GuestMemory) -> None:
    """The partial forms transfer what lies in front of a hole, and raise when that is nothing."""
    assert memory.write_partial(A(0x2FFE), b"abcd") == 2
    assert memory.read_partial(A(0x2FFD), 100) == b"\0ab"
    with pytest.raises(MemoryAccessError):
        memory.read_partial(A(0x3000), 1)
    with pytest.raises(MemoryAccessError):
        memory.write_partial(A(0x3000), b"x")


def test_empty_access_is_legal_everywhere(memory: GuestMemory) -> None:
    """Nothing can be read, written and sliced at any address."""
    for address in (0, 0x1000, 0x3000, 1 << 63):
        assert memory.read(A(address), 0) == b""
        memory.write(A(address), b"")
        assert memory.slices(A(address), 0) == []
        assert memory.check_range(A(address), 0)
        assert memory.read_partial(A(address), 0) == b""


def test_negative_length_is_refused(memory: GuestMemory) -> None:
    """A negative length is the caller's mistake."""
    with pytest.raises(InvalidValueError):
        memory.read(A(0x1000), -1)
    assert not memory.check_range(A(0x1000), -1)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("address", [0x1000, 0x1001, 0x1003, 0x1FFF, 0x1FF8, 0x2010, 0x4058])
def test_scalars_are_little_endian(memory: GuestMemory, size: int, address: int) -> None:
    """Every scalar width works at every alignment, across regions too."""
    value = int.from_bytes(bytes(range(0xF1, 0xF1 + size)), "little")
    getattr(memory, f"write_u{8 * size}")(A(address), value)
    assert getattr(memory, f"read_u{8 * size}")(A(address)) == value
    assert memory.read(A(address), size) == value.to_bytes(size, "little")


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_scalars_are_checked(memory: GuestMemory, size: int) -> None:
    """A value that does not fit, or an address without memory, changes nothing."""
    read = getattr(memory, f"read_u{8 * size}")
    write = getattr(memory, f"write_u{8 * size}")
    for value in (-1, 1 << (8 * size)):
        with pytest.raises(InvalidValueError):
            write(A(0x1000), value)
    for address in (0x4064, 0x3001 - size, -size, 1 << 70, 0):
        with pytest.raises(MemoryAccessError):
            read(A(address))
        with pytest.raises(MemoryAccessError):
            write(A(address), 1)
    assert memory.read(A(0x1000), 8) == bytes(8)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_atomics(memory: GuestMemory, size: int) -> None:
    """Atomic accesses of all widths and legal orders see the same memory."""
    value = (1 << (8 * size)) - 2
    for order in (Order.RELAXED, Order.RELEASE, Order.SEQ_CST):
        memory.atomic_store(A(0x2000), size, value, order)
        value -= 1
    for order in (Order.RELAXED, Order.ACQUIRE, Order.SEQ_CST):
        assert memory.atomic_load(A(0x2000), size, order) == value + 1
    assert memory.read(A(0x2000), size) == (value + 1).to_bytes(size, "little")


def test_atomics_are_checked(memory: GuestMemory) -> None:
    """Misaligned atomics, illegal orders, sizes and values are refused."""
    with pytest.raises(MemoryAccessError, match="multiple of 4"):
        memory.atomic_load(A(0x1002), 4)
    with pytest.raises(MemoryAccessError):
        memory.atomic_load(A(0x3000), 8)
    with pytest.raises(MemoryAccessError, match="0x4064"):
        memory.atomic_store(A(0x4060), 8, 0)
    with pytest.raises(InvalidValueError):
        memory.atomic_load(A(0x1000), 3)
    with pytest.raises(InvalidValueError):
        memory.atomic_load(A(0x1000), 4, Order.RELEASE)
    with pytest.raises(InvalidValueError):
        memory.atomic_store(A(0x1000), 4, 0, Order.ACQUIRE)
    with pytest.raises(InvalidValueError):
        memory.atomic_store(A(0x1000), 1, 256)
    for order in Order:
        fence(order)
    fence()


def test_fill(memory: GuestMemory) -> None:
    """A fill crosses regions and stays within its range."""
    memory.fill(A(0x1FFF), 2, 0xAB)
    assert memory.read(A(0x1FFE), 4) == b"\0\xab\xab\0"
    with pytest.raises(InvalidValueError):
        memory.fill(A(0x1FFF), 2, 256)


def test_slices_are_the_memory_itself(memory: GuestMemory) -> None:
    """Slices can be handed to vectored I/O, and what arrives in them is in the memory."""
    with tempfile.TemporaryFile() as file:
        file.write(bytes(range(100)))
        file.flush()
        pieces = memory.slices(A(0x1FF0), 100, Permissions.WRITE)
        assert [len(piece) for piece in pieces] == [16, 84]
        assert os.preadv(file.fileno(), pieces, 0) == 100
    assert memory.read(A(0x1FF0), 100) == bytes(range(100))


@pytest.mark.parametrize(
    "data",
    [
        bytearray(b"abcd"),
        memoryview(b"abcd"),
        memoryview(bytearray(b"abcd")).cast("I"),
        memoryview(b"abcd").cast("b"),
    ],
)
def test_any_contiguous_buffer_can_be_written(
    memory: GuestMemory, data: bytearray | memoryview
) -> None:
    """What counts is the bytes of a buffer, not its format."""
    memory.write(A(0x1FFE), data)
    memory.write(A(0x1800), data)
    assert memory.read(A(0x1FFE), 4) == b"abcd" == memory.read(A(0x1800), 4)


def test_overlapping_write_from_the_memory_itself() -> None:
    """Writing a slice over itself, shifted, moves it."""
    memory = GuestMemory.from_ranges([(A(0), 0x1000)])
    memory.write(A(0), bytes(range(200)))
    memory.write(A(50), memory.slices(A(0), 200)[0])
    assert memory.read(A(50), 200) == bytes(range(200))


def test_closed_memory_refuses_and_slices_stay(memory: GuestMemory) -> None:
    """After closing every access raises, while slices taken before stay usable."""
    (piece,) = memory.slices(A(0x1000), 16)
    with memory:
        memory.write(A(0x1000), b"still here")
    memory.close()
    assert bytes(piece[:10]) == b"still here"
    piece[0] = 0xFF
    for access in (
        lambda: memory.read(A(0x1000), 1),
        lambda: memory.write(A(0x1000), b"x"),
        lambda: memory.read_u32(A(0x1000)),
        lambda: memory.read_partial(A(0x1000), 1),
        lambda: memory.remove(A(0x1000), 0x1000),
    ):
        with pytest.raises(ClosedError):
            access()
    assert memory.closed
    assert not memory.check_range(A(0x1000), 1)


def test_map_private_file() -> None:
    """A file is mapped where page alignment allows it; writes stay private."""
    memory = GuestMemory.from_ranges([(A(0), 0x8000), (A(0x8000), 0x1000)])
    content = os.urandom(0x2800)
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.flush()
        fd = file.fileno()
        assert memory.map_private_file(A(0x3000), fd, 0x1000, 0x2000)
        assert memory.read(A(0x3000), 0x1800) == content[0x1000:]
        assert memory.read(A(0x4800), 0x800) == bytes(0x800)
        memory.write(A(0x3000), b"private")
        assert os.pread(fd, 7, 0x1000) == content[0x1000:0x1007]
        assert not memory.map_private_file(A(0x3000), fd, 0x1001, 0x1000)
        assert not memory.map_private_file(A(0x3800), fd, 0, 0x1000)
        assert not memory.map_private_file(A(0x3000), fd, 0, 0x1001)
        assert not memory.map_private_file(A(0x3000), fd, 0, 0x4000)
        assert not memory.map_private_file(A(0x7000), fd, 0, 0x2000)
        with pytest.raises(MemoryAccessError):
            memory.map_private_file(A(0x9000), fd, 0, 0x1000)
        shared = GuestMemory.from_ranges([(A(0), 0x8000)], backing=Memfd())
        assert not shared.map_private_file(A(0), fd, 0, 0x1000)
    assert memory.read(A(0x3000), 7) == b"private"


def test_more_memory_than_the_host_has() -> None:
    """Memory is overcommitted: mapping 64 GiB costs nothing until it is touched."""
    memory = GuestMemory.from_ranges([(A(0), 3 << 30), (A(4 << 30), 61 << 30)])
    memory.write_u64(A((65 << 30) - 8), 42)
    assert memory.read_u64(A((65 << 30) - 8)) == 42


def test_impossible_size_says_what_the_host_has() -> None:
    """The host's refusal names the operation and the host's memory."""
    with pytest.raises(VmMemoryError, match="MemAvailable"):
        GuestMemory.from_ranges([(A(0), 1 << 47)])


def test_no_file_descriptor_leaks() -> None:
    """Files behind memory are closed when the memory is gone."""
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(10):
        memory = GuestMemory.from_ranges([(A(0), 0x1000), (A(0x1000), 0x1000)], backing=Memfd())
        assert memory.regions[0].fd is not None
        del memory
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_importing_the_boot_path_stays_light() -> None:
    """What a boot imports drags in nothing heavy."""
    import subprocess

    program = (
        "import sys, vm_memory; vm_memory.GuestMemory.from_ranges([(0, 4096)])\n"
        "print([m for m in ('asyncio', 'dataclasses', 'logging', 'cffi', 'mmap', 'socket', "
        "'pathlib', 'tempfile', 'random') if m in sys.modules])"
    )
    output = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path[:] = {sys.path!r}\n{program}"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert output.strip() == "[]"
