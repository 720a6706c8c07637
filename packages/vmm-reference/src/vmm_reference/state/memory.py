"""Guest memory to a sparse file and back: whole or only what changed, with a digest a MiB.

The file has the regions one behind the other. Pages that are zero are holes in a whole one; in a
difference the ranges say which pages count, and everything else is the base's. Digests are those
of the memory as it was, whatever part of it a file holds, so that they also prove a chain of
differences. They guard against disks and networks, not against who can write the manifest as well.
Threads write, read and compute digests: none of that holds Python's lock.
"""

from __future__ import annotations

import enum
import errno
import hashlib
import os
import threading
from bisect import bisect_right
from contextlib import suppress
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

import attrs

from vm_memory import GuestAddress, GuestMemory
from vm_memory.looking import data_ranges

from .format import FormatError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from types import TracebackType
    from typing import Self

__all__ = [
    "CHUNK", "Algorithm", "MemoryDigests", "MemoryState", "RegionState", "Source", "load", "store",
]  # fmt: skip

T = TypeVar("T")

CHUNK = 1 << 20
PAGE = 4096
_READING = min(max(len(os.sched_getaffinity(0)), 2), 4)  # threads
_NICE = 10
_WRITING = 2  # threads: while one writes, the other looks for what is next
_BLOCK = 8 << 20  # bytes that are written at once, at most
_LONG = 256 << 10  # bytes that are worth to go to the disk on their own
_WINDOW = 64 << 20  # bytes that are looked through before anything of them is written
_NONE: Any = object()


def _whole(_state: object, field: attrs.Attribute[int], value: int) -> None:
    if not 0 <= value < 1 << 63 or value % PAGE:
        raise ValueError(f"{field.name} is {value:#x}, must be whole pages")


@attrs.frozen
class RegionState:
    """Where a region of RAM lies.

    Attributes:
        guest_address: of its first byte.
        size: bytes.
        file_offset: where the memory's file has it.
    """

    guest_address: int = attrs.field(validator=_whole)
    size: int = attrs.field(validator=_whole)
    file_offset: int = attrs.field(validator=_whole)


@attrs.frozen
class MemoryState:
    """What of the memory is in the file.

    Attributes:
        regions: all RAM.
        ranges: (guest address, bytes) of what counts, sorted; None if all does.
    """

    regions: tuple[RegionState, ...]
    ranges: tuple[tuple[int, int], ...] | None = None
    version: int = 1

    def __attrs_post_init__(self) -> None:
        end = place = 0
        for region in self.regions:
            if region.guest_address < end or region.file_offset != place or not region.size:
                raise ValueError("regions must be sorted, one behind the other in the file")
            end = region.guest_address + region.size
            place += region.size
        end = 0
        for address, length in self.ranges or ():
            inside = any(
                r.guest_address <= address < address + length <= r.guest_address + r.size
                for r in self.regions
            )
            if address < end or (address | length) % PAGE or not inside:
                raise ValueError(f"the range {address:#x}+{length:#x} is no pages of a region")
            end = address + length


class Algorithm(enum.Enum):
    """How digests are made.

    Attributes:
        XXH3_128: sees what happens to data by itself, at the speed of memory.
        SHA256: what the first releases wrote, at half the speed of a fast disk.
    """

    XXH3_128 = "xxh3_128"
    SHA256 = "sha256"

    def digest(self, data: memoryview | bytes) -> str:
        """Of some data, in hexadecimal digits."""
        if self is Algorithm.SHA256:
            return hashlib.sha256(data).hexdigest()
        import xxhash  # which a restore that proves nothing does without

        return xxhash.xxh3_128_hexdigest(data)


@attrs.frozen
class MemoryDigests:
    """The digest of each MiB of each region in turn.

    Attributes:
        chunks: in hexadecimal digits; empty text for one that is all zero.
        algorithm: of all of them.
        version: of this form; 2, in 1 all were SHA-256.
    """

    chunks: tuple[str, ...]
    algorithm: Algorithm = Algorithm.XXH3_128
    version: int = 2

    @classmethod
    def upgrade(cls, _version: int, fields: dict[str, object]) -> dict[str, object]:
        """What a release wrote that knew SHA-256 alone."""
        fields["chunks"] = fields.pop("sha256")
        return fields | {"algorithm": Algorithm.SHA256.name}


@attrs.frozen
class Source:
    """A memory's file and what it holds."""

    fd: int
    state: MemoryState


def describe(memory: GuestMemory) -> tuple[RegionState, ...]:
    """The regions as they lie in a file."""
    found, place = [], 0
    for region in memory.regions:
        found.append(RegionState(region.guest_address, region.size, place))
        place += region.size
    return tuple(found)


def store(
    memory: GuestMemory,
    fd: int,
    digests: MemoryDigests | None = None,
    ranges: Iterable[tuple[int, int]] | None = None,
) -> MemoryDigests:
    """Write memory to a file, which gets the size of all regions.

    Args:
        memory: what to write.
        fd: the file, where what is not written is a hole, or was written by an earlier call.
        digests: what an earlier call or snapshot gave; those of what is written now are replaced.
        ranges: sorted, whole pages, to write whatever they hold; None writes all but zeros.

    Returns:
        The digests of all memory.

    Raises:
        OSError: the file can't be written, in whole.
    """
    regions = describe(memory)
    chunks = list(_chunks(regions))
    starts = [start for start, _, _ in chunks]
    os.ftruncate(fd, sum(region.size for region in regions))
    algorithm = Algorithm.XXH3_128 if digests is None else digests.algorithm
    found = [""] * len(chunks) if digests is None else list(digests.chunks)
    begun = SimpleQueue[int | None]()

    def pieces() -> Iterator[tuple[int, int, int]]:
        told = -1
        for piece in _pieces(regions, _full(memory) if ranges is None else ranges):
            address, count, _ = piece
            first = bisect_right(starts, address) - 1
            last = bisect_right(starts, address + count - 1) - 1
            for number in range(max(first, told + 1), last + 1):
                begun.put(number)
            told = last
            yield piece

    def digest(number: int) -> None:
        start, length, _ = chunks[number]
        found[number] = _digest(algorithm, memory, start, length)

    with _File(memory, fd) as file:
        write = _shared(file.write, pieces())

        def write_all(failed: list[BaseException]) -> None:
            try:
                write(failed)
            finally:
                begun.put(None)

        digest_some = _shared(digest, iter(begun.get, None))

        def digest_all(failed: list[BaseException]) -> None:
            # The guest and the disk come first.
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
            digest_some(failed)

        _all(*[write_all] * _WRITING, digest_all)  # one keeps up with any disk
    return MemoryDigests(tuple(found), algorithm)


class _File:
    """Writes memory to a file, long pieces directly to the disk; usable as a context manager.

    That saves a copy of all, and leaves the host's page cache to others. What is short, and all
    where the file system can't do it, goes through the cache.
    """

    def __init__(self, memory: GuestMemory, fd: int) -> None:
        self._memory, self._fd = memory, fd
        self._direct: int | None = None
        with suppress(OSError):
            flags = os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC
            self._direct = os.open(f"/proc/self/fd/{fd}", flags)
        self._able = self._direct is not None

    def write(self, piece: tuple[int, int, int]) -> None:
        """Guest address, length and place in the file; from any thread."""
        address, count, place = GuestAddress(piece[0]), piece[1], piece[2]
        if self._able and self._direct is not None and count >= _LONG:
            try:
                self._memory.write_all_to_file(address, self._direct, count, place)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._able = False  # a page is not aligned enough for this disk
            else:
                return
        self._memory.write_all_to_file(address, self._fd, count, place)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._direct is not None:
            os.close(self._direct)


def load(
    memory: GuestMemory, sources: Sequence[Source], digests: MemoryDigests | None = None
) -> None:
    """Read memory, which is new, from a whole file and the differences to it, oldest first.

    Args:
        memory: of the regions that all sources have.
        sources: the first may lack ranges, or not: what comes later counts.
        digests: of the result; None does not look.

    Raises:
        FormatError: a chunk's digest is another.
        OSError: a file can't be read, or ends too early.
    """
    if not sources:
        return
    chunks = list(_chunks(describe(memory)))
    if digests is not None and len(digests.chunks) != len(chunks):
        rule = f"must be {len(chunks)} for this memory"
        raise FormatError("digests.chunks", len(digests.chunks), rule)
    tables = [None if s.state.ranges is None else list(s.state.ranges) for s in sources]

    def work(number: int) -> None:
        start, length, place = chunks[number]
        filled = False
        for source, table in zip(sources, tables, strict=True):
            pieces = (
                _data(source.fd, start, length, place)
                if table is None
                else _clip(table, start, length)
            )
            for address, count in pieces:
                filled = True
                memory.read_exact_from_file(
                    GuestAddress(address), source.fd, count, place + address - start
                )
        if digests is None:
            return
        wanted = digests.chunks[number]
        if wanted or filled:
            digest = _digest(digests.algorithm, memory, start, length)
            if digest != (wanted or digests.algorithm.digest(bytes(length))):
                raise FormatError(f"memory at {start:#x}", digest, f"must be {wanted or 'zeros'}")

    _all(*[_shared(work, range(len(chunks)))] * _READING)


def _chunks(regions: Iterable[RegionState], size: int = CHUNK) -> Iterator[tuple[int, int, int]]:
    """Guest address, length and place in the file of each chunk."""
    for region in regions:
        for start in range(0, region.size, size):
            length = min(size, region.size - start)
            yield region.guest_address + start, length, region.file_offset + start


def _full(memory: GuestMemory) -> Iterator[tuple[int, int]]:
    """The ranges that are not all zero; a little is looked at before the first is there."""
    for start, length, _ in _chunks(describe(memory), _WINDOW):
        yield from data_ranges(memory, within=[(start, length)])


def _pieces(
    regions: Iterable[RegionState], ranges: Iterable[tuple[int, int]]
) -> Iterator[tuple[int, int, int]]:
    """Sorted ranges, cut into blocks: guest address, length and place in the file of each."""
    blocks = list(_chunks(regions, _BLOCK))
    starts = [start for start, _, _ in blocks]
    for address, count in ranges:
        at, end = int(address), address + count
        while at < end:
            start, length, place = blocks[bisect_right(starts, at) - 1]
            until = min(end, start + length)
            yield at, until - at, place + at - start
            at = until


def _clip(ranges: list[tuple[int, int]], start: int, length: int) -> Iterator[tuple[int, int]]:
    """The parts of sorted ranges that lie within one chunk."""
    index = max(bisect_right(ranges, (start, 0)) - 1, 0)
    for address, count in ranges[index:]:
        if address >= start + length:
            return
        low, high = max(address, start), min(address + count, start + length)
        if low < high:
            yield low, high - low


def _data(fd: int, start: int, length: int, place: int) -> Iterator[tuple[int, int]]:
    """The parts of a chunk that the file has data for; a file that is too short is told."""
    position, end = place, place + length
    while position < end:
        try:
            position = os.lseek(fd, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno != 6 or os.fstat(fd).st_size < end:  # ENXIO: a hole up to the end
                raise
            return
        if position >= end:
            return
        until = min(os.lseek(fd, position, os.SEEK_HOLE), end)
        yield start + position - place, until - position
        position = until


def _digest(algorithm: Algorithm, memory: GuestMemory, start: int, length: int) -> str:
    region = memory.find_region(GuestAddress(start))
    assert region is not None
    offset = start - region.guest_address
    return algorithm.digest(region.buffer[offset : offset + length])


def _shared(work: Callable[[T], None], items: Iterable[T]) -> Callable[[list[BaseException]], None]:
    """A job for several threads at once: each does one item after another, until one has failed."""
    waiting, lock = iter(items), threading.Lock()

    def work_off(failed: list[BaseException]) -> None:
        while not failed:
            with lock:
                item = next(waiting, _NONE)
            if item is _NONE:
                return
            work(item)

    return work_off


def _all(*jobs: Callable[[list[BaseException]], None]) -> None:
    """Do all jobs, the first on this thread, each other on its own; the first error ends all.

    They are given the list that has the error then. It is raised in the end.
    """
    errors: list[BaseException] = []

    def run(job: Callable[[list[BaseException]], None]) -> None:
        try:
            job(errors)
        except BaseException as error:
            errors.append(error)

    first, *others = jobs
    threads = [threading.Thread(target=run, args=(job,)) for job in others]
    for thread in threads:
        thread.start()
    run(first)
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
