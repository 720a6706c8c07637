"""Guest memory in a file: what is written, how, and what its digests say."""

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st

from vm_memory import GuestAddress, GuestMemory
from vm_memory.errors import TransferError
from vmm_reference.state import memory as pages
from vmm_reference.state.format import FormatError, decode
from vmm_reference.state.memory import Algorithm, MemoryDigests, MemoryState, Source

MIB = 1 << 20
# Two regions side by side, and one that ends within a MiB.
REGIONS = ((0, 10 * MIB), (10 * MIB, 3 * MIB), (64 * MIB, MIB // 2 + 4096))
ZERO = bytes(4096)
TOTAL = sum(size for _, size in REGIONS)

spans = st.lists(
    st.tuples(st.integers(0, TOTAL // 4096 - 1), st.integers(1, 700), st.integers(1, 255)),
    max_size=6,
)


def model_of(written: list[tuple[int, int, int]]) -> bytes:
    """The file of such memory: first page in the file, pages and the byte that fills them."""
    model = bytearray(TOTAL)
    for first, count, byte in written:
        start, end = first * 4096, min((first + count) * 4096, TOTAL)
        model[start:end] = bytes([byte]) * (end - start)
    return bytes(model)


def memory_of(model: bytes) -> GuestMemory:
    """Memory whose file it is."""
    memory = GuestMemory.from_ranges([(GuestAddress(start), size) for start, size in REGIONS])
    place = 0
    for start, size in REGIONS:
        for offset in range(0, size, 4096):
            page = model[place + offset : place + offset + 4096]
            if page != ZERO:  # what is not touched need not be looked at
                memory.write(GuestAddress(start + offset), page)
        place += size
    return memory


def digests_of(model: bytes, algorithm: Algorithm = Algorithm.XXH3_128) -> MemoryDigests:
    """One a MiB of each region, none where all is zero."""
    found, place = [], 0
    for _, size in REGIONS:
        for start in range(place, place + size, MIB):
            chunk = model[start : min(start + MIB, place + size)]
            if chunk == bytes(len(chunk)):
                found.append("")
            elif algorithm is Algorithm.SHA256:
                found.append(hashlib.sha256(chunk).hexdigest())
            else:
                found.append(xxhash.xxh3_128(chunk).hexdigest())
        place += size
    return MemoryDigests(tuple(found), algorithm)


@pytest.fixture
def target(tmp_path: Path) -> Callable[[], int]:
    """Makes a new, open file."""

    def make() -> int:
        path = tmp_path / "memory"
        path.unlink(missing_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT)

    return make


def content(fd: int) -> bytes:
    """All of a file."""
    return os.pread(fd, os.fstat(fd).st_size, 0)


@settings(max_examples=25)
@given(spans, spans, st.sampled_from(Algorithm))
def test_the_file_is_the_memory_and_the_digests_are_its(
    tmp_path_factory: pytest.TempPathFactory,
    before: list[tuple[int, int, int]],
    after: list[tuple[int, int, int]],
    algorithm: Algorithm,
) -> None:
    """Whole, and then what has changed, to a base of any release: against a model that is bytes."""
    path = tmp_path_factory.getbasetemp() / "memory"
    path.unlink(missing_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    model = model_of(before)
    try:
        with memory_of(model) as memory:
            found = pages.store(memory, fd)
            assert content(fd) == model
            assert found == digests_of(model)
        later = model_of([*before, *after])
        ranges = []
        for page in range(TOTAL // 4096):
            at = page * 4096
            if model[at : at + 4096] != later[at : at + 4096]:
                place = 0
                for start, size in REGIONS:
                    if place <= at < place + size:
                        ranges.append((start + at - place, 4096))
                    place += size
        with memory_of(later) as memory:
            changed = pages.store(memory, fd, digests_of(model, algorithm), ranges)
            assert content(fd) == later
            # A MiB that has become zero has the digest of zeros, not none.
            zeros = {algorithm.digest(bytes(MIB)), algorithm.digest(bytes(MIB // 2 + 4096))}
            chunks = tuple("" if digest in zeros else digest for digest in changed.chunks)
            assert evolve(changed, chunks=chunks) == digests_of(later, algorithm)
    finally:
        os.close(fd)


@pytest.mark.parametrize("algorithm", Algorithm)
def test_what_was_changed_in_the_file_is_refused(
    target: Callable[[], int], algorithm: Algorithm
) -> None:
    """A bit of a page, a page that became a hole, and a hole that became a page."""
    model, fd = model_of(DATA), target()
    with memory_of(model) as memory:
        pages.store(memory, fd)
        source = Source(fd, MemoryState(pages.describe(memory)))
    digests = digests_of(model, algorithm)
    regions = [(GuestAddress(start), size) for start, size in REGIONS]
    with GuestMemory.from_ranges(regions) as memory:
        pages.load(memory, [source], digests)
        assert memory.read(GuestAddress(0), 8192) == model[:8192]
    bit = bytes([model[5000] ^ 0x10])
    for place, changed in ((5000, bit), (4096, ZERO), (650 * 4096, b"\1")):
        os.pwrite(fd, changed, place)
        with GuestMemory.from_ranges(regions) as memory, pytest.raises(FormatError, match="memory"):
            pages.load(memory, [source], digests)
        os.pwrite(fd, model[place : place + len(changed)], place)
    os.close(fd)


def test_digests_of_the_first_releases_are_read() -> None:
    """They were SHA-256, which nothing said."""
    old = b'{"sha256": ["' + b"0" * 64 + b'", ""], "version": 1}'
    found = decode(old, MemoryDigests, "digests")
    assert found == MemoryDigests(("0" * 64, ""), Algorithm.SHA256)
    with pytest.raises(FormatError, match=r"digests\.chunks"):
        decode(old.replace(b"1}", b"2}"), MemoryDigests, "digests")


DATA = [(0, 600, 1), (700, 1, 2), (2000, 900, 3)]


@pytest.mark.parametrize("when", ["opened", "written"])
def test_a_file_system_that_writes_through_its_cache_only_gets_the_same(
    target: Callable[[], int], monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """It says so when the file is opened for direct writes, or at the first of them."""
    model = model_of(DATA)
    fd, refused = target(), []
    real_open, real_write = os.open, GuestMemory.write_all_to_file

    def open_(path: str, flags: int, *mode: int) -> int:
        if flags & os.O_DIRECT and when == "opened":
            refused.append(path)
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_open(path, flags, *mode)

    def write(memory: GuestMemory, at: GuestAddress, file: int, length: int, offset: int) -> None:
        if file != fd:
            refused.append(hex(at))
            raise TransferError(at, length, 0, errno.EINVAL)
        real_write(memory, at, file, length, offset)

    with memory_of(model) as memory:
        monkeypatch.setattr(os, "open", open_)
        monkeypatch.setattr(GuestMemory, "write_all_to_file", write)
        found = pages.store(memory, fd)
        monkeypatch.undo()
    assert content(fd) == model
    assert found == digests_of(model)
    assert 1 <= len(refused) <= 2  # each of the two that write has tried once
    os.close(fd)


def test_a_disk_that_fails_is_told_and_nothing_waits(
    target: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever write it is, and also where it is the look for data."""
    model, fd = model_of(DATA), target()

    def fail(*_arguments: object, **_named: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with memory_of(model) as memory:
        for owner, name in ((GuestMemory, "write_all_to_file"), (pages, "data_ranges")):
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, fail)
                with pytest.raises(OSError, match="No space left"):
                    pages.store(memory, fd)
        pages.store(memory, fd)
    assert content(fd) == model
    os.close(fd)
