"""Cursors over chains of any layout: exact, partial, split, zero-copy, and their accounts."""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from virtio_queue import EndOfChainError, Reader, Writer
from virtio_queue.testing.strategies import cuts
from vm_memory import GuestAddress, GuestMemory

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TEXT = bytes(range(200))
fixture_is_safe = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def two_regions() -> Iterator[GuestMemory]:
    """Neighbouring regions, so that a segment may span both."""
    ranges = [(GuestAddress(0), 0x1000), (GuestAddress(0x1000), 0x1000)]
    with GuestMemory.from_ranges(ranges) as memory:
        yield memory


def _place(memory: GuestMemory, pieces: list[bytes]) -> list[tuple[int, int]]:
    segments = []
    address = 0x1000 - 90
    for piece in pieces:
        memory.write(GuestAddress(address), piece)
        segments.append((address, len(piece)))
        address += len(piece) + 3
    return segments


@fixture_is_safe
@given(pieces=cuts(TEXT), sizes=st.lists(st.integers(0, 90), max_size=12))
def test_2_7_4_1_framing_does_not_matter_to_readers(
    two_regions: GuestMemory, pieces: list[bytes], sizes: list[int]
) -> None:
    """The device MUST NOT make assumptions about the arrangement of descriptors."""
    reader = Reader(two_regions, _place(two_regions, pieces))
    done = 0
    for size in sizes:
        assert reader.available == len(TEXT) - done
        data = reader.read(size)
        assert data == TEXT[done : done + size]
        done += len(data)
        assert reader.bytes_read == done
    assert reader.read(1000) == TEXT[done:]
    assert reader.read(1) == b""


@fixture_is_safe
@given(pieces=cuts(TEXT), sizes=st.lists(st.integers(0, 90), max_size=12))
def test_2_7_4_1_framing_does_not_matter_to_writers(
    two_regions: GuestMemory, pieces: list[bytes], sizes: list[int]
) -> None:
    """What is written lies in the elements one after the other, and counts."""
    segments = _place(two_regions, [bytes(len(piece)) for piece in pieces])
    writer = Writer(two_regions, segments)
    done = 0
    for size in sizes:
        done += writer.write(TEXT[done : done + size])
        assert (writer.bytes_written, writer.used_length) == (done, done)
    content = Reader(two_regions, segments).read(1000)
    assert content == TEXT[:done] + bytes(len(TEXT) - done)


@fixture_is_safe
@given(pieces=cuts(TEXT), start=st.integers(0, 200), offset=st.integers(0, 200))
def test_split_at_any_offset(
    two_regions: GuestMemory, pieces: list[bytes], start: int, offset: int
) -> None:
    """Both parts together are the whole, wherever the cursor stands and the cut falls."""
    reader = Reader(two_regions, _place(two_regions, pieces))
    reader.read(start)
    if offset > reader.available:
        with pytest.raises(EndOfChainError):
            reader.split_at(offset)
        return
    rest = reader.split_at(offset)
    assert reader.available == offset
    assert rest.bytes_read == 0
    assert reader.read(1000) == TEXT[start : start + offset]
    assert rest.read(1000) == TEXT[start + offset :]


def test_exact_reads_consume_all_or_nothing(memory: GuestMemory) -> None:
    """A chain that is too short leaves the cursor where it was."""
    memory.write(GuestAddress(0x1000), b"abcdef")
    reader = Reader(memory, [(0x1000, 2), (0x1002, 4)])
    for call in (reader.read_exact, reader.advance, reader.split_at):
        with pytest.raises(EndOfChainError) as caught:
            call(7)
        assert (caught.value.wanted, caught.value.available) == (7, 6)
    with pytest.raises(EndOfChainError):
        reader.split_at(-1)
    with pytest.raises(EndOfChainError):
        reader.write_to(-1, 7)
    assert reader.read_struct(struct.Struct("<HI")) == (0x6261, 0x66656463)


def test_exact_writes_write_all_or_nothing(memory: GuestMemory) -> None:
    """A chain that is too short takes nothing and counts nothing."""
    writer = Writer(memory, [(0x1000, 2), (0x1002, 4)])
    with pytest.raises(EndOfChainError):
        writer.write_exact(bytes(7))
    with pytest.raises(EndOfChainError):
        writer.fill(7)
    with pytest.raises(EndOfChainError):
        writer.advance(7)
    with pytest.raises(EndOfChainError):
        writer.read_from(-1, 7)
    assert writer.bytes_written == 0
    writer.write_struct(struct.Struct("<HI"), 0x6261, 0x66656463)
    assert memory.read(GuestAddress(0x1000), 6) == b"abcdef"


def test_2_7_8_2_used_length_stops_at_the_first_gap(memory: GuestMemory) -> None:
    """The device MUST have written `len` bytes beginning at the first writable buffer."""
    writer = Writer(memory, [(0x1000, 8), (0x2000, 8)])
    middle = writer.split_at(4)
    status = middle.split_at(11)
    status.write(b"S")
    assert writer.used_length == 0
    writer.write(b"abcd")
    assert writer.used_length == 4
    middle.fill(5, 0x55)
    assert writer.used_length == 9
    middle.write(bytes(6))
    assert writer.used_length == 16
    assert (middle.used_length, status.used_length) == (12, 1)


def test_splitting_twice_keeps_the_order_of_parts(memory: GuestMemory) -> None:
    """Parts count in the order of their bytes, in whatever order they were cut off."""
    writer = Writer(memory, [(0x1000, 9)])
    last = writer.split_at(6)
    middle = writer.split_at(3)
    last.write(b"333")
    writer.write(b"111")
    assert writer.used_length == 3
    middle.write(b"222")
    assert writer.used_length == 9


def test_slices_do_not_count_until_they_are_advanced_over(two_regions: GuestMemory) -> None:
    """Zero-copy views cover the segments, cut where regions end; `advance` is the account."""
    writer = Writer(two_regions, [(0xFF0, 0x20), (0x1800, 8)])
    views = writer.slices()
    assert [len(view) for view in views] == [16, 16, 8]
    views[1][:] = b"x" * 16
    assert writer.used_length == 0
    writer.advance(20)
    assert writer.used_length == 20
    assert [len(view) for view in writer.slices(15)] == [12, 3]
    reader = Reader(two_regions, [(0xFF0, 0x20)])
    reader.advance(10)
    assert b"".join(bytes(view) for view in reader.slices(8)) == bytes(6) + b"xx"


def test_files_and_guest_memory_exchange_bytes_directly(
    two_regions: GuestMemory, tmp_path: Path
) -> None:
    """Vectored I/O moves data at an offset or at the file's position, and counts what moved."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(10) + TEXT)
    fd = os.open(path, os.O_RDWR)
    try:
        writer = Writer(two_regions, [(0xFF0, 0x30), (0x1800, 300)])
        assert writer.read_from(fd, 100, 10) == 100
        assert writer.used_length == 100
        os.lseek(fd, 110, os.SEEK_SET)
        assert writer.read_from(fd, 200) == 100
        assert writer.used_length == 200
        reader = Reader(two_regions, [(0xFF0, 0x30), (0x1800, 300)])
        assert reader.write_to(fd, 50, 1000) == 50
        assert os.pread(fd, 100, 1000) == TEXT[:50]
        os.lseek(fd, 2000, os.SEEK_SET)
        assert reader.write_to(fd, 150) == 150
        assert reader.bytes_read == 200
        assert os.pread(fd, 200, 2000) == TEXT[50:]
    finally:
        os.close(fd)


def test_more_pieces_than_one_call_takes(memory: GuestMemory, tmp_path: Path) -> None:
    """A chain of more than IOV_MAX pieces is moved by several calls."""
    path = tmp_path / "disk"
    path.write_bytes(TEXT * 20)
    fd = os.open(path, os.O_RDWR)
    try:
        segments = [(0x1000 + 2 * at, 1) for at in range(3000)]
        writer = Writer(memory, segments)
        assert writer.read_from(fd, 3000, 0) == 3000
        assert Reader(memory, segments).write_to(fd, 3000, 8000) == 3000
        assert os.pread(fd, 3000, 8000) == (TEXT * 20)[:3000]
    finally:
        os.close(fd)


def test_a_failing_file_counts_nothing(memory: GuestMemory, tmp_path: Path) -> None:
    """An error of the first call is raised, and the cursor has not moved."""
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        writer = Writer(memory, [(0x1000, 10)])
        with pytest.raises(IsADirectoryError):
            writer.read_from(fd, 10, 0)
        assert writer.used_length == 0
        reader = Reader(memory, [(0x1000, 10)])
        with pytest.raises(OSError, match="Bad file descriptor"):
            reader.write_to(fd, 10, 0)
        assert reader.bytes_read == 0
    finally:
        os.close(fd)


def test_an_error_after_a_part_is_a_short_count(
    memory: GuestMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was transferred before an error is accounted for and reported."""
    calls: list[int] = []

    def flaky(fd: int, views: list[memoryview], offset: int) -> int:
        calls.append(offset)
        if len(calls) > 1:
            raise OSError("gone")
        return 3

    monkeypatch.setattr(os, "preadv", flaky)
    monkeypatch.setattr(os, "pwritev", flaky)
    writer = Writer(memory, [(0x1000, 10)])
    assert writer.read_from(0, 10, 5) == 3
    assert (writer.used_length, calls) == (3, [5, 8])
    calls.clear()
    assert Reader(memory, [(0x1000, 10)]).write_to(0, 10, 5) == 3


def test_a_file_that_takes_nothing_ends_the_transfer(
    memory: GuestMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A count of 0 is an end, not a reason to try forever."""
    monkeypatch.setattr(os, "pwritev", lambda fd, views, offset: 0)
    assert Reader(memory, [(0x1000, 10)]).write_to(0, 10, 0) == 0


def test_used_length_fits_the_used_ring() -> None:
    """A chain of 2**32 bytes written in full counts one byte less, which 2.7.8.2 allows."""
    with GuestMemory.from_ranges([(GuestAddress(0), 1 << 31)]) as memory:
        writer = Writer(memory, [(0, 1 << 31), (0, 1 << 31)])
        writer.advance(1 << 32)
        assert writer.used_length == 0xFFFF_FFFF
