"""Dirty bitmaps against a set of page numbers, and what marks them."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vm_memory import (
    DirtyBitmap,
    GuestAddress,
    GuestMemory,
    InvalidValueError,
    MemoryAccessError,
    Permissions,
)
from vm_memory.transfer import receive_message

A = GuestAddress
NULL = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)


def runs(pages: set[int], page_size: int, size: int) -> list[tuple[int, int]]:
    """The plain twin of the harvest in C: runs of pages as offset and length in bytes."""
    result: list[tuple[int, int]] = []
    for page in sorted(pages):
        start, end = page * page_size, min((page + 1) * page_size, size)
        if result and sum(result[-1]) == start:
            start = result.pop()[0]
        result.append((start, end - start))
    return result


def touched(offset: int, length: int, page_size: int, size: int) -> set[int]:
    """The pages of a range of bytes."""
    end = min(offset + length, size)
    return set(range(offset // page_size, -(-end // page_size))) if end > offset else set()


SIZES = st.one_of(st.integers(0, 700), st.sampled_from([63, 64, 65, 127, 128, 4096, 64 * 64]))
MARKS = st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 3000)), max_size=12)


@given(SIZES, st.sampled_from([1, 2, 8, 64]), MARKS, MARKS, MARKS)
def test_marks_and_clears_against_a_set(
    size: int,
    page_size: int,
    marks: list[tuple[int, int]],
    clears: list[tuple[int, int]],
    later: list[tuple[int, int]],
) -> None:
    """Marking, clearing, counting, looking and harvesting agree with a set of pages."""
    bitmap = DirtyBitmap(size, page_size)
    pages: set[int] = set()
    for offset, length in marks:
        bitmap.mark(offset, length)
        pages |= touched(offset, length, page_size, size)
    for offset, length in clears:
        bitmap.clear(offset, length)
        pages -= touched(offset, length, page_size, size)
    for offset, length in later:
        bitmap.mark(offset, length)
        pages |= touched(offset, length, page_size, size)
    assert bitmap.count() == len(pages)
    assert all(bitmap.is_dirty(i) == (i // page_size in pages) for i in range(0, size, page_size))
    assert not bitmap.is_dirty(size)
    assert not bitmap.is_dirty(-1)
    assert bitmap.ranges() == runs(pages, page_size, size)
    words = bitmap.copy().take_words()
    assert len(words) == 8 * -(-size // (64 * page_size))
    assert {i for i in range(8 * len(words)) if words[i // 8] >> i % 8 & 1} == pages
    batches = [pair for batch in bitmap.copy().batches(capacity=34)
               for pair in zip(batch[::2], batch[1::2], strict=True)]  # fmt: skip
    assert sum(length for _, length in batches) == sum(n for _, n in bitmap.ranges())
    assert bitmap.harvest() == runs(pages, page_size, size)
    assert bitmap.count() == 0


@given(
    SIZES,
    st.sampled_from([1, 4, 16]),
    st.integers(0, 600),
    st.binary(max_size=64),
    st.sampled_from([1, 4, 16]),
)
def test_merge_against_a_set(
    size: int, page_size: int, offset: int, data: bytes, other_size: int
) -> None:
    """Another bitmap, of any page size at any offset, adds the pages that it touches."""
    data = data[: len(data) // 8 * 8]
    bitmap = DirtyBitmap(size, page_size)
    bitmap.merge(data, offset, other_size)
    expected: set[int] = set()
    for bit in range(8 * len(data)):
        if data[bit // 8] >> bit % 8 & 1:
            expected |= touched(offset + bit * other_size, other_size, page_size, size)
    assert bitmap.harvest() == runs(expected, page_size, size)


def test_a_dense_bitmap_comes_in_bounded_batches() -> None:
    """Alternate dirty pages give the most ranges; every batch keeps its bound."""
    bitmap = DirtyBitmap(100_000, 1)
    bitmap.merge(b"\x55" * 12_504, 0, 1)
    batches = [len(batch) // 2 for batch in bitmap.batches(capacity=100)]
    assert sum(batches) == 50_000
    assert max(batches) <= 100
    assert bitmap.count() == 0


def test_a_part_can_be_harvested() -> None:
    """Harvesting a range takes the words that it touches and leaves the others."""
    bitmap = DirtyBitmap(64 * 4, 1)
    bitmap.mark(0, 256)
    taken = [tuple(batch) for batch in bitmap.batches(offset=70, length=10)]
    assert taken == [(64, 64)]
    assert bitmap.ranges() == [(0, 64), (128, 128)]


def test_bitmap_values_are_checked() -> None:
    """Impossible sizes, negative offsets and broken words are refused; huge ones are clipped."""
    for size, page in ((-1, 1), (1, 0), (1, 3), (1, -4), (1 << 64, 4096)):
        with pytest.raises(InvalidValueError):
            DirtyBitmap(size, page)
    bitmap = DirtyBitmap(1 << 20)
    for call in (
        lambda: bitmap.mark(-1, 1),
        lambda: bitmap.mark(0, -1),
        lambda: bitmap.clear(-1),
        lambda: bitmap.merge(b"1234567"),
        lambda: bitmap.merge(b"12345678", -1),
        lambda: bitmap.merge(b"12345678", 0, 3),
        lambda: bitmap.merge(b"12345678", 0, 1 << 70),
        lambda: list(bitmap.batches(capacity=33)),
        lambda: list(bitmap.batches(capacity=1 << 60)),
        lambda: bitmap.slice_at(-1),
        lambda: bitmap.slice_at(1).mark(-1, 1),
    ):
        with pytest.raises(InvalidValueError):
            call()
    bitmap.mark(1 << 70, 1)
    bitmap.mark((1 << 64) - 1, 1)
    assert bitmap.count() == 0
    bitmap.mark((1 << 20) - 1, 1 << 70)
    bitmap.mark(0, 1)
    assert bitmap.ranges() == [(0, 4096), ((1 << 20) - 4096, 4096)]
    assert repr(bitmap) == "<DirtyBitmap 2 of 256 pages>"
    assert bitmap.copy(2 << 20).count() == 2
    assert bitmap.copy(4096).ranges() == [(0, 4096)]


def test_slices_share_the_marks() -> None:
    """A slice, and a slice of it, mark what they are a part of."""
    bitmap = DirtyBitmap(100, 1)
    part = bitmap.slice_at(10).slice_at(5)
    part.mark(1, 2)
    assert bitmap.ranges() == [(16, 2)]
    assert part.is_dirty(2)
    assert not part.is_dirty(3)
    assert not part.is_dirty(-1)


def test_no_mark_is_lost_between_threads() -> None:
    """While threads mark, another harvests: every mark is seen in exactly one harvest or more."""
    bitmap = DirtyBitmap(4096, 1)
    seen: set[int] = set()
    done = threading.Event()

    def mark(start: int) -> None:
        for offset in range(start, 4096, 4):
            bitmap.mark(offset, 1)

    def harvest() -> None:
        while not done.is_set():
            for offset, length in bitmap.harvest():
                seen.update(range(offset, offset + length))

    harvester = threading.Thread(target=harvest)
    harvester.start()
    markers = [threading.Thread(target=mark, args=(start,)) for start in range(4)]
    for thread in markers:
        thread.start()
    for thread in markers:
        thread.join()
    done.set()
    harvester.join()
    for offset, length in bitmap.harvest():
        seen.update(range(offset, offset + length))
    assert seen == set(range(4096))


def test_a_mark_is_taken_once_whoever_harvests() -> None:
    """Of two harvesters that race with the marks and each other, one takes each mark made once."""
    pages = 1 << 16
    bitmap = DirtyBitmap(pages, 1)
    taken: list[tuple[int, int]] = []
    done = threading.Event()

    def harvest() -> None:
        last = False
        while not last:
            last = done.is_set()
            for batch in bitmap.batches(capacity=34):
                taken.extend(zip(batch[::2].tolist(), batch[1::2].tolist(), strict=True))

    def mark(step: int, start: int, length: int) -> None:
        for offset in range(start, pages, step):
            bitmap.mark(offset, length)

    harvesters = [threading.Thread(target=harvest) for _ in range(2)]
    # Of each word single bits, both of its ends, runs, and a run that reaches into the next one.
    markers = [
        threading.Thread(target=mark, args=(64, start, length))
        for start, length in ((0, 1), (3, 1), (5, 1), (9, 1), (20, 30), (55, 1), (62, 2))
    ]
    markers.append(threading.Thread(target=mark, args=(128, 57, 4)))
    for thread in harvesters + markers:
        thread.start()
    for thread in markers:
        thread.join()
    done.set()
    for thread in harvesters:
        thread.join()
    seen = sorted(page for offset, length in taken for page in range(offset, offset + length))
    words = {0, 3, 5, 9, *range(20, 50), 55, 62, 63}
    assert seen == [
        page for page in range(pages) if page % 64 in words or page % 128 in range(57, 61)
    ]
    assert bitmap.count() == 0


WORDS = st.sampled_from(
    [0, 1, 1 << 63, 1 << 40, 0x21 << 30, 0x15 << 9, 3 << 62, 7 << 20, (1 << 64) - 1]
)


@given(st.lists(WORDS, min_size=1, max_size=20), st.booleans())
def test_words_of_single_bits_and_runs_side_by_side(words: list[int], clear: bool) -> None:
    """Single bits have a way of their own; beside runs and at the ends of words it is the same."""
    data = b"".join([word.to_bytes(8, "little") for word in words])
    bitmap = DirtyBitmap(64 * len(words) * 8, 8)
    bitmap.merge(data, 0, 8)
    pages = {i for i in range(8 * len(data)) if data[i // 8] >> i % 8 & 1}
    found = bitmap.harvest() if clear else bitmap.ranges()
    assert found == runs(pages, 8, bitmap.size)
    assert bitmap.count() == (0 if clear else len(pages))


def tracked() -> GuestMemory:
    """Two adjacent regions of four pages each, clean."""
    return GuestMemory.from_ranges([(A(0), 0x4000), (A(0x4000), 0x4000)], dirty_page_size=4096)


def receive(memory: GuestMemory) -> None:
    """Receive 3 of at most 8 bytes."""
    import socket

    one, other = socket.socketpair()
    with one, other:
        one.send(b"abc")
        assert receive_message(memory, A(0x3FFE), 8, other)[0] == 3


def transfer(memory: GuestMemory) -> None:
    """Read 3 of at most 0x3000 bytes from a file."""
    with tempfile.TemporaryFile() as file:
        file.write(b"abc")
        file.flush()
        assert memory.read_from_file(A(0x3FFE), file, 0x3000, 0) == 3


def store(memory: GuestMemory) -> None:
    """Write two scalars through accessors."""
    memory.scalar(A(0x3FFC), 4).store(1)
    memory.scalar(A(0x4000), 4).store(1)


def calls(*steps: tuple[object, ...]) -> Callable[[GuestMemory], object]:
    """Several methods by name, one after the other."""

    def run(memory: GuestMemory) -> None:
        for name, *arguments in steps:
            getattr(memory, str(name))(*arguments)

    return run


WRITES: list[Callable[[GuestMemory], object]] = [
    lambda m: m.write(A(0x3FFE), b"abc"),
    lambda m: m.write(A(0x3FFE), memoryview(bytearray(4)).cast("I")),
    lambda m: m.write_partial(A(0x3FFE), b"abc"),
    lambda m: m.fill(A(0x3FFF), 2),
    lambda m: m.copy(A(0x3FFF), A(0), 2),
    lambda m: m.slices(A(0x3FFF), 2, Permissions.WRITE),
    lambda m: m.slices(A(0x3FFF), 2),
    lambda m: m.iovecs(A(0x3FFF), 2),
    lambda m: m.write_u64(A(0x3FFF), 1),
    lambda m: m.write_u16_be(A(0x3FFF), 1),
    lambda m: m.write_struct(A(0x3FFF), ">I", 1),
    lambda m: m.mark_dirty(A(0x3FFF), 2),
    calls(("merge_dirty", 0x3000, b"\1" + bytes(7)), ("merge_dirty", 0x4000, b"\1" + bytes(7))),
    calls(("write_u8", 0x3FFF, 1), ("write_u16", 0x4000, 1)),
    calls(("write_u32", 0x3FFC, 1), ("write_u64", 0x4000, 1)),
    calls(("atomic_store", 0x3FFC, 4, 1), ("atomic_exchange", 0x4000, 8, 1)),
    calls(("atomic_fetch_or", 0x3FFC, 4, 1), ("atomic_fetch_and", 0x4000, 8, 1)),
    calls(("atomic_fetch_add", 0x3FFC, 4, 1), ("atomic_fetch_xor", 0x4000, 8, 1)),
    calls(
        ("atomic_compare_exchange", 0x3FFC, 4, 0, 1), ("atomic_compare_exchange", 0x4000, 4, 0, 1)
    ),
    store,
    lambda m: m.discard(A(0x3FFF), 2),
    transfer,
    receive,
]


@pytest.mark.parametrize("write", WRITES)
def test_every_way_to_write_marks(write: Callable[[GuestMemory], object]) -> None:
    """Whatever writes marks the pages that it wrote to, and no others."""
    memory = tracked()
    write(memory)
    assert memory.is_dirty(A(0x3000))
    assert memory.is_dirty(A(0x4FFF))
    assert list(memory.harvest_dirty(clear=False)) == [(0x3000, 0x2000)]
    assert list(memory.harvest_dirty()) == [(0x3000, 0x2000)]
    assert list(memory.harvest_dirty()) == []


def test_reading_and_failing_mark_nothing() -> None:
    """Reads, refused writes, failed exchanges and the raw views leave the bitmap clean."""
    memory = tracked()
    memory.read(A(0), 0x8000)
    memory.slices(A(0), 0x8000, Permissions.READ)
    memory.read_into(A(0), bytearray(10))
    memory.atomic_compare_exchange(A(0), 4, 1, 2)
    memory.atomic_load(A(0), 4)
    memory.write_all_to_file(A(0), NULL, 0x8000)
    with pytest.raises(MemoryAccessError):
        memory.write(A(0x7FFF), b"ab")
    with pytest.raises(InvalidValueError):
        memory.write_u8(A(0), 256)
    memory.regions[0].buffer[0] = 1
    memory.regions[0].u64[0] = 1
    assert list(memory.harvest_dirty()) == []


def test_untracked_memory_is_never_dirty() -> None:
    """Without a page size nothing is tracked, and asking is harmless."""
    memory = GuestMemory.from_ranges([(A(0), 4096)])
    memory.write(A(0), b"x")
    memory.mark_dirty(A(0), 1)
    assert not memory.is_dirty(A(0))
    assert not memory.is_dirty(A(1 << 40))
    assert list(memory.harvest_dirty()) == []
    with pytest.raises(MemoryAccessError):
        memory.merge_dirty(A(0), bytes(8))
    with pytest.raises(InvalidValueError):
        GuestMemory.from_ranges([(A(0), 4096)], dirty_page_size=1000)
