"""The pump of block devices: what it does is what the plain-Python model does, to the byte."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import struct
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from virtio_queue import (
    BlockPump,
    ChainError,
    Limiter,
    PumpError,
    Queue,
    QueueStateError,
    TokenBucket,
    UsageError,
)
from virtio_queue.constants import F_EVENT_IDX, F_IN_ORDER, F_INDIRECT_DESC
from virtio_queue.pump_block import F_DISCARD, F_FLUSH, F_WRITE_ZEROES
from virtio_queue.testing import Arena, PackedDriver, SplitDriver, Used
from virtio_queue.testing.model import BlockModel
from vm_memory import GuestAddress, GuestMemory

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Engine = Literal["sync", "io_uring"]
Kind = type[SplitDriver] | type[PackedDriver]
ENGINES: list[Engine] = ["sync", "io_uring"]
KINDS: list[Kind] = [SplitDriver, PackedDriver]

SECTORS = 64
ALL = F_FLUSH | F_DISCARD | F_WRITE_ZEROES
IN, OUT, FLUSH, GET_ID, DISCARD, ZEROES = 0, 1, 4, 8, 11, 13
PATIENCE = 60.0


def header(kind: int, sector: int = 0) -> bytes:
    """A request's header."""
    return struct.pack("<IIQ", kind, 0, sector)


def segment(sector: int, sectors: int, flags: int = 0) -> bytes:
    """A segment of a discard or write zeroes request."""
    return struct.pack("<QII", sector, sectors, flags)


def pattern(seed: int = 0) -> bytes:
    """A disk whose sectors differ."""
    return b"".join(struct.pack("<II", seed, n) * 64 for n in range(SECTORS))


class Bench:
    """A disk under a pump, and its driver."""

    def __init__(
        self,
        stack: ExitStack,
        kind: Kind,
        engine: Engine,
        *,
        features: int = F_EVENT_IDX | F_INDIRECT_DESC,
        size: int = 64,
        limiter: Limiter | None = None,
        read_only: bool = False,
        file: int | None = None,
        dirty: int | None = None,
        max_discard: tuple[int, int] = (1 << 22, 64),
        max_write_zeroes: tuple[int, int] = (1 << 17, 1),
    ) -> None:
        # Buffers that cross from one region into the next one are cut.
        ranges = [(GuestAddress(0), 1 << 19), (GuestAddress(1 << 19), 3 << 19)]
        self.memory = stack.enter_context(GuestMemory.from_ranges(ranges, dirty_page_size=dirty))
        self.driver = kind(self.memory, size, features=features, arena=Arena(0x1000, 0x1F_0000))
        self.queue = Queue(size)
        self.driver.configure(self.queue)
        self.file = os.memfd_create("disk") if file is None else file
        stack.callback(os.close, self.file)
        os.pwrite(self.file, pattern(), 0)
        self.kick, self.interrupt = os.eventfd(0), os.eventfd(0)
        stack.callback(os.close, self.kick)
        stack.callback(os.close, self.interrupt)
        self.pump = BlockPump(
            self.file, sectors=SECTORS, identity=b"serial", engine=engine, limiter=limiter,
            read_only=read_only, max_discard=max_discard, max_write_zeroes=max_write_zeroes,
        )  # fmt: skip
        self.pump.wire([self.kick], [self.interrupt])
        stack.callback(self.pump.stop)

    def start(self, features: int = ALL) -> None:
        """Lend the queue to the pump."""
        self.pump.start(self.memory, [self.queue], features)

    def disk(self) -> bytes:
        """What is in the file."""
        return os.pread(self.file, SECTORS * 512, 0)

    def knock(self) -> None:
        """Kick if the device wants it."""
        if self.driver.kick_needed():
            os.eventfd_write(self.kick, 1)

    def reap(self, count: int) -> list[Used]:
        """Wait for so many used buffers."""
        used: list[Used] = []
        while len(used) < count:
            self.knock()
            found = self.driver.reap()
            if not found:
                ready, _, _ = select.select([self.interrupt], [], [], PATIENCE)
                assert ready, "an interrupt was lost"
                os.eventfd_read(self.interrupt)
            used += found
        return used

    def do(self, *readable: bytes, writable: Sequence[int] = (1,)) -> bytes:
        """One request: everything the device wrote, its status last."""
        self.driver.add(list(readable), list(writable))
        (used,) = self.reap(1)
        return used.data


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """What is closed after the test."""
    with ExitStack() as stack:
        yield stack


def _attention(pump: BlockPump) -> None:
    ready, _, _ = select.select([pump.attention], [], [], PATIENCE)
    assert ready, "nobody told Python"


# The model ------------------------------------------------------------------------------------


@st.composite
def _cut(draw: st.DrawFn, length: int) -> list[int]:
    """Lengths of pieces, some of them empty, that make up `length`."""
    places = sorted(draw(st.lists(st.integers(0, length), max_size=4)))
    return [b - a for a, b in zip([0, *places], [*places, length], strict=True)]


_SECTOR_NUMBERS = st.one_of(
    st.integers(0, SECTORS + 1), st.sampled_from([1 << 55, (1 << 55) - 1, (1 << 64) - 1, 1 << 63])
)
_LENGTHS = st.one_of(
    st.integers(0, 5).map(lambda n: n * 512), st.integers(0, 1100), st.just(SECTORS * 512)
)


@st.composite
def _request(draw: st.DrawFn) -> tuple[list[bytes], list[int]]:
    """A request, good or bad, in any layout."""
    kind = draw(st.sampled_from([IN, OUT, FLUSH, GET_ID, DISCARD, ZEROES]))
    head = header(kind, draw(_SECTOR_NUMBERS))
    payload, room = b"", 0
    if kind == IN:
        room = draw(_LENGTHS)
    elif kind == OUT:
        payload = draw(st.randoms(use_true_random=False)).randbytes(draw(_LENGTHS))
        room = draw(st.sampled_from([0, 0, 0, 7]))
    elif kind == GET_ID:
        room = draw(st.sampled_from([0, 1, 19, 20, 21, 600]))
    else:
        segments = draw(st.lists(
            st.tuples(_SECTOR_NUMBERS, st.sampled_from([0, 1, 2, 5, SECTORS, 1 << 31]),
                      st.sampled_from([0, 0, 0, 1, 2])), max_size=4))  # fmt: skip
        payload = b"".join(segment(*item) for item in segments)
        payload += draw(st.sampled_from([b"", b"", b"", b"x"]))
    whole = head + payload
    if draw(st.integers(0, 19)) == 0:
        whole = whole[: draw(st.integers(0, 16))]
    at, readable = 0, []
    for length in draw(_cut(len(whole))):
        readable.append(whole[at : at + length])
        at += length
    return readable, draw(_cut(room + 1))


@pytest.mark.parametrize("engine", ENGINES)
@settings(max_examples=150)
@given(
    requests=st.lists(_request(), min_size=1, max_size=12),
    kind=st.sampled_from(KINDS),
    features=st.sampled_from([0, F_EVENT_IDX, F_EVENT_IDX | F_INDIRECT_DESC | F_IN_ORDER]),
    negotiated=st.sampled_from([ALL, ALL, 0, F_FLUSH]),
    read_only=st.booleans(),
)
def test_requests_are_those_of_the_model(
    engine: Engine,
    requests: list[tuple[list[bytes], list[int]]],
    kind: Kind,
    features: int,
    negotiated: int,
    read_only: bool,
) -> None:
    """Status, data, used length, the disk, and the name of each refusal."""
    model = BlockModel(
        bytearray(pattern()), read_only, b"serial", bool(negotiated & F_FLUSH),
        bool(negotiated & F_DISCARD), bool(negotiated & F_WRITE_ZEROES),
        max_discard=(8, 3), max_write_zeroes=(SECTORS, 2),
    )  # fmt: skip
    with ExitStack() as stack:
        bench = Bench(
            stack, kind, engine, features=features, read_only=read_only,
            max_discard=(8, 3), max_write_zeroes=(SECTORS, 2),
        )  # fmt: skip
        bench.start(negotiated)
        refusals: dict[str, int] = {}
        # One after the other, where requests on the same sectors depend on each other.
        for readable, writable in requests:
            answer = model.serve(b"".join(readable), sum(writable))
            assert answer is not None
            indirect = bool(features & F_INDIRECT_DESC) and len(readable) % 2 == 0
            head = bench.driver.add(readable, writable, indirect=indirect)
            places = bench.driver.outstanding[head].writable
            (used,) = bench.reap(1)
            assert used.length == answer.length
            written = b"".join(bench.driver.read(*place) for place in places)
            assert written[-1] == answer.status
            assert written[:-1][: len(answer.data)] == answer.data
            if answer.counter:
                refusals[answer.counter] = refusals.get(answer.counter, 0) + 1
            assert bench.disk() == model.disk
        bench.pump.stop()
        counters = bench.pump.counters
        refused = {name: n for name, n in counters.items() if name.startswith("refused") and n}
        assert refused == refusals
        assert counters["chains"] == len(requests)
        assert counters["handed_over"] == 0
        assert bench.queue.in_flight == ()


@pytest.mark.parametrize("engine", ENGINES)
@settings(max_examples=40)
@given(
    kind=st.sampled_from(KINDS),
    features=st.sampled_from([0, F_EVENT_IDX, F_EVENT_IDX | F_INDIRECT_DESC | F_IN_ORDER]),
    plan=st.lists(st.tuples(st.booleans(), st.integers(1, 3)), min_size=1, max_size=60),
    stops=st.sets(st.integers(0, 59)),
)
def test_many_at_once(
    engine: Engine, kind: Kind, features: int, plan: list[tuple[bool, int]], stops: set[int]
) -> None:
    """Reads and writes of sectors of their own, in flight together, and stops in between."""
    with ExitStack() as stack:
        bench = Bench(stack, kind, engine, features=features, size=256)
        bench.start()
        expected = bytearray(pattern())
        reads: dict[int, bytes] = {}
        for number, (writes, _) in enumerate(plan):
            place = slice(512 * number, 512 * (number + 1))
            if writes:
                data = bytes([number]) * 512
                expected[place] = data
                bench.driver.add([header(OUT, number), data], [1])
            else:
                head = bench.driver.add([header(IN, number)], [512, 1])
                reads[head] = bytes(expected[place])
            bench.knock()
            if number in stops:
                bench.pump.stop()
                assert not bench.queue.lent
                state = bench.queue.save()
                bench.queue.restore(state, bench.memory)
                bench.start()
        used = bench.reap(len(plan))
        for item in used:
            assert item.data == reads.get(item.head, b"") + b"\0"
        assert bench.disk() == expected
        bench.pump.stop()
        assert bench.queue.in_flight == ()


# Single properties ----------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", KINDS)
def test_unknown_requests_are_for_python(stack: ExitStack, kind: Kind, engine: Engine) -> None:
    """`take` hands them out, `complete` gives them back, and a stop in between keeps them."""
    bench = Bench(stack, kind, engine)
    bench.start()
    bench.driver.add([header(99)], [4, 1])
    bench.knock()
    _attention(bench.pump)
    ((index, chain),) = bench.pump.take()
    assert (index, chain.writable_length) == (0, 5)
    assert bench.pump.take() == []
    with pytest.raises(UsageError, match="more than the chain"):
        bench.pump.complete(0, chain.head, 6)
    with pytest.raises(QueueStateError, match="was taken"):
        bench.pump.complete(0, chain.head + 1, 5)
    chain.writer(bench.memory).write(b"abcd\2")
    bench.pump.complete(0, chain.head, 5)
    assert bench.reap(1)[0].data == b"abcd\2"
    bench.driver.add([header(98)], [1])
    bench.knock()
    _attention(bench.pump)
    ((_, chain),) = bench.pump.take()
    bench.pump.stop()
    assert bench.queue.in_flight == (chain,)
    with pytest.raises(QueueStateError, match="does not run"):
        bench.pump.complete(0, chain.head, 1)
    bench.queue.add_used(bench.memory, chain.head, 0)
    assert len(bench.driver.reap()) == 1
    assert bench.pump.counters["handed_over"] == 2


def test_what_python_had_is_served_again(stack: ExitStack) -> None:
    """Chains in flight at a start are the pump's, however they were taken."""
    bench = Bench(stack, SplitDriver, "sync")
    for number in range(4):
        bench.driver.add([header(IN, number)], [512, 1])
    one = bench.queue.pop(bench.memory)
    batch = bench.queue.pop_batch(bench.memory, 2)
    assert one is not None
    assert len(batch) == 2
    bench.start()
    assert batch.outstanding == 0
    used = bench.reap(4)
    assert b"".join(item.data[:512] for item in used) == pattern()[:2048]
    bench.pump.stop()
    assert bench.pump.counters["chains"] == 1


def test_a_chain_without_room_for_a_status(stack: ExitStack) -> None:
    """5.2.6: it can't be answered; Python sees it."""
    bench = Bench(stack, SplitDriver, "sync")
    bench.start()
    bench.driver.add([header(IN)], [0])
    bench.knock()
    _attention(bench.pump)
    ((_, chain),) = bench.pump.take()
    assert chain.writable_length == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_a_malformed_chain_stops_the_pump(stack: ExitStack, engine: Engine) -> None:
    """`take` raises what `Queue.pop` would; the chains before it were served."""
    bench = Bench(stack, SplitDriver, engine)
    bench.start()
    bench.driver.add([header(IN)], [512, 1])
    assert isinstance(bench.driver, SplitDriver)
    bench.driver.write_descriptor(40, 1 << 50, 16)
    bench.driver.make_available(40)
    bench.driver.publish()
    bench.knock()
    bench.reap(1)
    _attention(bench.pump)
    with pytest.raises(ChainError) as caught:
        bench.pump.take()
    assert not bench.pump.running
    with pytest.raises(ChainError) as again:
        bench.queue.pop(bench.memory)
    assert caught.value.__reduce__() == again.value.__reduce__()


def test_a_bad_index_stops_the_pump(stack: ExitStack) -> None:
    """2.7.6.1: seen by the last look before it sleeps, or by the next one."""
    bench = Bench(stack, SplitDriver, "sync")
    assert isinstance(bench.driver, SplitDriver)
    bench.driver.set_avail_idx(500)
    bench.start()
    _attention(bench.pump)
    with pytest.raises(ChainError, match=r"2\.7\.6\.1"):
        bench.pump.take()


def test_a_lent_queue_is_nobody_elses(stack: ExitStack) -> None:
    """Every use of it says so; afterwards it is as before."""
    bench = Bench(stack, SplitDriver, "sync")
    state = bench.queue.save()
    bench.start()
    for use in (
        lambda: bench.queue.pop(bench.memory),
        lambda: bench.queue.pop_batch(bench.memory),
        lambda: bench.queue.add_used(bench.memory, 0, 0),
        lambda: bench.queue.needs_notification(bench.memory),
        lambda: bench.queue.enable_notifications(bench.memory),
        lambda: bench.queue.in_flight,
        lambda: bench.queue.save(),
        lambda: bench.queue.restore(state, bench.memory),
        lambda: bench.queue.reset(),
        lambda: bench.queue.disable(),
        lambda: bench.queue.lend(bench.memory),
    ):
        with pytest.raises(QueueStateError, match="stop the pump"):
            use()
    with pytest.raises(QueueStateError, match="runs already"):
        bench.start()
    with pytest.raises(QueueStateError, match="stop it first"):
        bench.pump.wire([], [])
    with pytest.raises(QueueStateError, match="stop it first"):
        bench.pump.set_file(bench.file)
    bench.pump.stop()
    bench.pump.stop()
    assert bench.queue.pop(bench.memory) is None
    bench.queue.reset()
    with pytest.raises(QueueStateError, match="not ready"):
        bench.start()
    assert not bench.pump.running


@pytest.mark.parametrize("engine", ENGINES)
def test_failures_of_the_host_have_names(stack: ExitStack, engine: Engine) -> None:
    """A file that ends early, one that can't be written, and one that is none."""
    bench = Bench(stack, SplitDriver, engine)
    os.ftruncate(bench.file, 512)
    bench.start()
    assert bench.do(header(IN, 1), writable=[512, 1]) == b""
    assert bench.pump.counters["last_errno"] == errno.EIO
    bench.pump.stop()
    gone = os.memfd_create("gone")
    bench.pump.set_file(gone)
    os.close(gone)
    bench.start()
    assert bench.do(header(IN), writable=[512, 1]) == b""
    assert bench.do(header(OUT), bytes(512)) == b"\1"
    assert bench.do(header(FLUSH)) == b"\1"
    assert bench.do(header(DISCARD), segment(0, 1)) == b"\1"
    assert bench.do(header(ZEROES), segment(0, 1)) == b"\1"
    assert bench.do(header(ZEROES), segment(0, 1, 1)) == b"\1"
    counters = bench.pump.counters
    names = {name: n for name, n in counters.items() if name.startswith("failed")}
    assert names == {
        "failed_reads": 2,
        "failed_writes": 1,
        "failed_flushes": 1,
        "failed_discards": 1,
        "failed_write_zeroes": 2,
    }


@pytest.mark.parametrize("engine", ENGINES)
def test_space_goes_back_to_the_host(stack: ExitStack, engine: Engine) -> None:
    """Discard and write zeroes with UNMAP free blocks; without it they are kept."""
    bench = Bench(stack, SplitDriver, engine)
    os.pwrite(bench.file, b"x" * (64 * 4096), 0)
    bench.pump.sectors = 512
    bench.start()
    before = os.fstat(bench.file).st_blocks
    assert bench.do(header(DISCARD), segment(0, 128), segment(256, 128)) == b"\0"
    after = os.fstat(bench.file).st_blocks
    assert after == before - 256
    assert bench.do(header(ZEROES), segment(128, 64, 1)) == b"\0"
    assert os.fstat(bench.file).st_blocks == after - 64
    assert bench.do(header(ZEROES), segment(0, 64)) == b"\0"
    assert os.pread(bench.file, 32768, 0) == bytes(32768)
    assert os.pread(bench.file, 512, 192 * 512) == b"x" * 512


@pytest.mark.parametrize("engine", ENGINES)
def test_on_a_file_system_with_blocks(stack: ExitStack, tmp_path: Path, engine: Engine) -> None:
    """Without a write-back cache, on whatever holds temporary files."""
    file = os.open(tmp_path / "disk", os.O_RDWR | os.O_CREAT | os.O_NONBLOCK)
    bench = Bench(stack, SplitDriver, engine, file=file)
    bench.pump.writeback = False
    assert not bench.pump.writeback
    bench.start()
    assert bench.do(header(OUT, 1), b"w" * 1024) == b"\0"
    assert bench.do(header(ZEROES), segment(2, 1)) == b"\0"
    assert bench.do(header(FLUSH)) == b"\0"
    assert bench.do(header(IN, 1), writable=[1024, 1]) == b"w" * 512 + bytes(513)


@pytest.mark.parametrize("engine", ENGINES)
def test_more_pieces_than_a_system_call_takes(stack: ExitStack, engine: Engine) -> None:
    """A read into 1,100 pieces is two calls (IOV_MAX is 1,024)."""
    bench = Bench(stack, SplitDriver, engine, size=2048)
    bench.start()
    pieces = [28] * 1097 + [4, 1]
    assert sum(pieces) == 60 * 512 + 1
    assert bench.do(header(IN), writable=pieces) == pattern()[: 60 * 512] + b"\0"


def _rings() -> set[int]:
    """Descriptors of io_uring that are open."""
    links = Path("/proc/self/fd").iterdir()
    return {int(entry.name) for entry in links if "[io_uring]" in os.path.realpath(entry)}


def test_a_ring_of_the_kernel_that_fails(stack: ExitStack) -> None:
    """What it refuses is done by system calls."""
    before = _rings()
    bench = Bench(stack, SplitDriver, "io_uring")
    (ring,) = _rings() - before
    os.dup2(bench.kick, ring)
    bench.start()
    assert bench.do(header(IN, 1), writable=[512, 1]) == pattern()[512:1024] + b"\0"
    assert bench.do(header(ZEROES), segment(1, 1)) == b"\0"
    assert bench.do(header(IN, 1), writable=[512, 1]) == bytes(513)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_long_batch_is_published_in_parts(stack: ExitStack, engine: Engine) -> None:
    """Eight chains make one publication, one decision about an interrupt."""
    bench = Bench(stack, SplitDriver, engine, size=256)
    for _ in range(70):
        bench.driver.add([header(GET_ID)], [20, 1])
    bench.start()
    assert {item.data for item in bench.reap(70)} == {b"serial".ljust(21, b"\0")}
    assert bench.pump.counters["publications"] == 9


def test_completions_that_wait_for_their_turn(stack: ExitStack) -> None:
    """2.7.9: a stop leaves them in the queue, and they go with the one they wait for."""
    bench = Bench(stack, SplitDriver, "sync", features=F_IN_ORDER, dirty=4096)
    bench.driver.add([header(99)], [1])
    bench.driver.add([header(IN)], [512, 1])
    bench.start()
    _attention(bench.pump)
    bench.pump.stop()
    (first,) = bench.queue.in_flight
    waiting = [chain.completed for chain in bench.queue.save().in_flight]
    assert waiting in ([None, 513], [None])
    bench.start()
    while bench.pump.counters["reads"] == 0:
        os.sched_yield()
    bench.pump.stop()
    assert [chain.completed for chain in bench.queue.save().in_flight] == [None, 513]
    bench.queue.add_used(bench.memory, first.head, 0)
    assert [item.length for item in bench.driver.reap()] == [0, 513]
    assert bench.queue.in_flight == ()


def test_the_disk_changes_while_it_runs(stack: ExitStack) -> None:
    """Its size at once, its file between a stop and a start."""
    bench = Bench(stack, SplitDriver, "sync")
    bench.start()
    assert bench.do(header(IN, SECTORS), writable=[512, 1]) == b""
    os.pwrite(bench.file, b"n" * 512, SECTORS * 512)
    bench.pump.sectors = SECTORS + 1
    assert bench.pump.sectors == SECTORS + 1
    assert bench.do(header(IN, SECTORS), writable=[512, 1]) == b"n" * 512 + b"\0"
    with tempfile.TemporaryFile() as other:
        other.write(b"o" * 512)
        other.flush()
        bench.pump.stop()
        bench.pump.set_file(other.fileno())
        bench.start()
        assert bench.do(header(IN), writable=[512, 1]) == b"o" * 512 + b"\0"
        bench.pump.stop()


@pytest.mark.parametrize("kind", KINDS)
def test_every_byte_it_writes_is_dirty(stack: ExitStack, kind: Kind) -> None:
    """Data, status and used ring, also where a request fails half-way or leaves a gap."""
    bench = Bench(stack, kind, "sync", dirty=4096)
    for readable, writable in (
        ([header(IN)], [16384, 5000, 1]),
        ([header(IN, 3)], [5000, 3192, 1]),
        ([header(GET_ID)], [30, 9000, 1]),
        ([header(99 << 8)[:8]], [9000, 1]),
    ):
        head = bench.driver.add(readable, writable)
        places = bench.driver.outstanding[head].writable
        before = (
            bench.memory.read(GuestAddress(0), 1 << 19),
            bench.memory.read(GuestAddress(1 << 19), 3 << 19),
        )
        for region in bench.memory.regions:
            assert region.dirty is not None
            region.dirty.harvest()
        bench.start()
        ready, _, _ = select.select([bench.interrupt], [], [], PATIENCE)
        assert ready
        os.eventfd_read(bench.interrupt)
        for region, old in zip(bench.memory.regions, before, strict=True):
            assert region.dirty is not None
            start = region.guest_address
            new = bench.memory.read(start, len(old))
            for page in range(0, len(old), 4096):
                if new[page : page + 4096] != old[page : page + 4096]:
                    assert region.dirty.is_dirty(page), (readable, places, page)
        bench.driver.reap()
        bench.pump.stop()


@pytest.mark.parametrize("engine", ENGINES)
def test_interrupts_can_go_elsewhere(stack: ExitStack, engine: Engine) -> None:
    """`set_interrupt` while it runs; the word of the transport gets its bit."""
    from virtio_queue._native import ffi

    bench = Bench(stack, SplitDriver, engine)
    word = ffi.new("uint32_t *")
    bench.pump.wire([bench.kick], [-1], word)
    bench.start()
    bench.driver.add([header(FLUSH)], [1])
    bench.knock()
    while not (used := bench.driver.reap()):
        os.sched_yield()
    assert used[0].data == b"\0"
    while not word[0]:
        os.sched_yield()
    assert word[0] == 1
    bench.pump.set_interrupt(0, bench.interrupt)
    assert bench.do(header(FLUSH)) == b"\0"
    assert bench.pump.thread_id > 0
    assert bench.pump.thread_id != os.getpid()


def test_arguments_out_of_range(stack: ExitStack) -> None:
    """Named, with the rule; no thread is started."""
    bench = Bench(stack, SplitDriver, "sync")
    with pytest.raises(UsageError, match="identity"):
        BlockPump(bench.file, sectors=1, identity=b"x" * 21)
    with pytest.raises(UsageError, match="engine"):
        BlockPump(bench.file, sectors=1, engine="async")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="max_discard"):
        BlockPump(bench.file, sectors=1, max_discard=(1, 257))
    with pytest.raises(UsageError, match="sectors"):
        BlockPump(bench.file, sectors=1 << 54)
    with pytest.raises(UsageError, match="neither a file nor a block device"):
        BlockPump(bench.kick, sectors=1)
    with pytest.raises(UsageError, match="2 kicks and 1 interrupts"):
        bench.pump.wire([1, 2], [3])
    with pytest.raises(UsageError, match="2 queues, and wired for 1"):
        bench.pump.start(bench.memory, [bench.queue] * 2, 0)
    bench.pump.wire([bench.kick] * 2, [-1] * 2)
    with pytest.raises(QueueStateError, match="a pump serves"):
        bench.pump.start(bench.memory, [bench.queue] * 2, 0)
    assert not bench.queue.lent
    for bucket in (TokenBucket(0, 1), TokenBucket(1, 0), TokenBucket(1, 1, -1)):
        with pytest.raises(UsageError, match="bandwidth"):
            Limiter(bucket)


def test_65_queues_are_too_many(stack: ExitStack) -> None:
    """All of them are their owner's again."""
    memory = stack.enter_context(GuestMemory.from_ranges([(GuestAddress(0), 1 << 20)]))
    queues = []
    arena = Arena(0x1000, 0xF_0000)
    for _ in range(65):
        driver = SplitDriver(memory, 2, arena=arena)
        queues.append(Queue(2))
        driver.configure(queues[-1])
    with tempfile.TemporaryFile() as file:
        pump = BlockPump(file.fileno(), sectors=1)
        pump.wire([-1] * 65, [-1] * 65)
        with pytest.raises(UsageError, match="at most 64"):
            pump.start(memory, queues, 0)
    assert not any(queue.lent for queue in queues)


def test_chains_in_flight_outside_of_memory(stack: ExitStack) -> None:
    """A smaller memory that holds the rings does not hold the chain."""
    bench = Bench(stack, SplitDriver, "sync")
    arena = bench.driver.arena
    arena.allocate(0x8_0000)
    bench.driver.add([header(IN)], [512, 1])
    chain = bench.queue.pop(bench.memory)
    small = stack.enter_context(GuestMemory.from_ranges([(GuestAddress(0), 1 << 19)]))
    with pytest.raises(UsageError, match="does not hold the chain"):
        bench.pump.start(small, [bench.queue], 0)
    assert bench.queue.in_flight == (chain,)
    bench.start()
    assert bench.reap(1)[0].data == pattern()[:512] + b"\0"


def test_a_pump_that_is_forgotten_gives_its_queues_back(stack: ExitStack) -> None:
    """Its thread ends before the rings go."""
    bench = Bench(stack, SplitDriver, "sync")
    pump = BlockPump(bench.file, sectors=SECTORS)
    pump.wire([bench.kick], [bench.interrupt])
    pump.start(bench.memory, [bench.queue], 0)
    del pump
    assert not bench.queue.lent


def test_without_io_uring(monkeypatch: pytest.MonkeyPatch, stack: ExitStack) -> None:
    """A host without it says so, and what to do."""
    import resource

    bench = Bench(stack, SplitDriver, "sync")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(bench.file)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 2, limits[1]))
    try:
        with pytest.raises(PumpError, match="use the engine 'sync'") as caught:
            BlockPump(bench.file, sectors=1, engine="io_uring")
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
        with pytest.raises(PumpError, match="limit of open files"):
            BlockPump(bench.file, sectors=1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert caught.value.errno == errno.EMFILE
    assert isinstance(caught.value, OSError)


@pytest.mark.parametrize("kind", KINDS)
def test_22_a_flood_leaves_nothing_behind(
    stack: ExitStack, kind: Kind, caplog: pytest.LogCaptureFixture
) -> None:
    """Thousands of refused requests: counted, not logged, and no more memory for them."""
    from virtio_queue._native import lib

    bench = Bench(stack, kind, "sync", size=16)
    bench.start()
    for _ in range(800):
        for _ in range(5):
            bench.driver.add([header(IN, 1 << 60)], [1])
        assert [used.data for used in bench.reap(5)] == [b"\1"] * 5
    assert bench.pump.counters["refused_range"] == 4000
    batches = 0
    while lib.vp_batch(bench.pump.handle, 0, batches):
        batches += 1
    assert batches <= 8
    assert not caplog.records
    bench.pump.stop()


# Limits ---------------------------------------------------------------------------------------


class ModelBucket:
    """`struct vp_bucket` in plain Python, on exact numbers."""

    def __init__(self, size: int, refill: int, burst: int, now: int) -> None:
        self.size, self.refill, self.burst = size, refill, burst
        self.budget, self.last = size, now

    def wait(self, now: int) -> int:
        """Nanoseconds until there is a token."""
        if not self.size or self.burst:
            return 0
        tokens = max(now - self.last, 0) * self.size // self.refill
        if tokens >= self.size - self.budget:
            self.budget, self.last = self.size, now
        else:
            self.budget += tokens
            self.last += -(-tokens * self.refill // self.size)
        if self.budget > 0:
            return 0
        needed = -(-(1 - self.budget) * self.refill // self.size)
        passed = max(now - self.last, 0)
        return needed - passed if needed > passed else 1

    def spend(self, tokens: int) -> None:
        """Take tokens, of the burst first."""
        burst = min(tokens, self.burst)
        self.burst -= burst
        if self.size:
            self.budget -= tokens - burst


_BUCKETS = st.none() | st.builds(
    TokenBucket, st.integers(1, 1 << 40), st.integers(1, 100_000), st.integers(0, 1 << 20)
)


@settings(max_examples=300)
@given(
    bandwidth=_BUCKETS,
    operations=_BUCKETS,
    steps=st.lists(
        st.tuples(st.integers(0, 1 << 34), st.integers(0, 1 << 32)), min_size=1, max_size=40
    ),
)
def test_limits_are_those_of_the_model(
    bandwidth: TokenBucket | None,
    operations: TokenBucket | None,
    steps: list[tuple[int, int]],
) -> None:
    """And over any stretch of time no more passes than the rate, a bucket and a request."""
    from virtio_queue._native import lib

    limiter = Limiter(bandwidth, operations)
    now = lib.vp_now()
    models = []
    for which, bucket in enumerate((bandwidth, operations)):
        size, refill, burst = 0, 1, 0
        if bucket is not None:
            size, refill = bucket.size, bucket.refill_ms * 1_000_000
            burst = bucket.one_time_burst
        lib.vp_limiter_set(limiter.handle, which, size, refill, burst, now)
        models.append(ModelBucket(size, refill, burst, now))
    start, passed, largest = now, 0, 0
    for pause, size in steps:
        now += pause
        waits = [models[0].wait(now) if size else 0, models[1].wait(now)]
        assert lib.vp_limiter_take(limiter.handle, size, now) == max(waits)
        if max(waits) == 0:
            models[0].spend(size)
            models[1].spend(1)
            passed += size
            largest = max(largest, size)
    if bandwidth is not None:
        rate = bandwidth.size * (now - start) // (bandwidth.refill_ms * 1_000_000)
        assert passed <= bandwidth.one_time_burst + bandwidth.size + rate + 1 + largest


@pytest.mark.parametrize("engine", ENGINES)
def test_limits_hold_and_change_while_it_runs(stack: ExitStack, engine: Engine) -> None:
    """Nothing passes an empty bucket; a stop gives back what waits, another limit lets it go."""
    limiter = Limiter(operations=TokenBucket(2, (1 << 32) - 1))
    bench = Bench(stack, SplitDriver, engine, limiter=limiter)
    bench.start()
    for number in range(5):
        bench.driver.add([header(IN, number)], [512, 1])
    assert len(bench.reap(2)) == 2
    while bench.pump.counters["throttled"] == 0:
        os.sched_yield()
    assert bench.driver.reap() == []
    bench.pump.stop()
    assert bench.queue.in_flight == ()
    state = bench.queue.save()
    assert state.next_avail == 2
    bench.start()
    while bench.pump.counters["throttled"] == 1:
        os.sched_yield()
    assert bench.driver.reap() == []
    limiter.set(TokenBucket(1 << 20, 1), None)
    os.eventfd_write(bench.kick, 1)
    bench.pump.stop()
    bench.start()
    assert len(bench.reap(3)) == 3


def test_a_limit_only_delays(stack: ExitStack) -> None:
    """1 MiB a second: what was asked for comes, a little later."""
    limiter = Limiter(TokenBucket(1024, 1))
    bench = Bench(stack, SplitDriver, "sync", limiter=limiter)
    bench.start()
    for _ in range(20):
        bench.driver.add([header(IN)], [4096, 1])
    assert {item.data[:-1] for item in bench.reap(20)} == {pattern()[:4096]}
    assert bench.pump.counters["throttled"] > 0


# Block devices --------------------------------------------------------------------------------


def _loop_device(stack: ExitStack, path: Path) -> int:
    """A block device over a file; skips where there is none to be had."""
    try:
        control = os.open("/dev/loop-control", os.O_RDWR)
        stack.callback(os.close, control)
        number = fcntl.ioctl(control, 0x4C82)  # LOOP_CTL_GET_FREE
        device = os.open(f"/dev/loop{number}", os.O_RDWR)
    except OSError as error:
        pytest.skip(f"no loop device: {error}")
    path.write_bytes(pattern())
    backing = os.open(path, os.O_RDWR)
    stack.callback(os.close, backing)
    fcntl.ioctl(device, 0x4C00, backing)  # LOOP_SET_FD
    detached = os.dup(device)
    stack.callback(os.close, detached)
    stack.callback(fcntl.ioctl, detached, 0x4C01)  # LOOP_CLR_FD
    return device


@pytest.mark.parametrize("engine", ENGINES)
def test_on_a_block_device(stack: ExitStack, tmp_path: Path, engine: Engine) -> None:
    """Its own ioctls do what fallocate does on files."""
    device = _loop_device(stack, tmp_path / "disk")
    bench = Bench(stack, SplitDriver, engine, file=device)
    bench.start()
    assert bench.do(header(OUT, 1), b"w" * 512) == b"\0"
    assert bench.do(header(ZEROES), segment(2, 1, 1)) == b"\0"
    assert bench.do(header(DISCARD), segment(8, 8)) == b"\0"
    assert bench.do(header(FLUSH)) == b"\0"
    assert bench.do(header(IN, 1), writable=[1024, 1]) == b"w" * 512 + bytes(513)
