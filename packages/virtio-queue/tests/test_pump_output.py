"""The pump of output: bytes in order, a window for a slow reader, what is lost and what waits."""

from __future__ import annotations

import fcntl
import os
import select
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from virtio_queue import ChainError, OutputPump, Queue, QueueStateError, UsageError
from virtio_queue.constants import F_EVENT_IDX
from virtio_queue.testing import Arena, PackedDriver, SplitDriver
from vm_memory import GuestAddress, GuestMemory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PATIENCE = 60.0
SIZE, RAM = 64, 8 << 20
WINDOW = 256 << 10


def wait_until(condition: Callable[[], object]) -> None:
    while not condition():
        select.select([], [], [], 0.001)


class Bench:
    """A queue under a pump, its driver, and a pipe."""

    def __init__(
        self, stack: ExitStack, *, lossy: bool, kind: type[SplitDriver | PackedDriver] = SplitDriver
    ) -> None:
        self.memory = stack.enter_context(GuestMemory.from_ranges([(GuestAddress(0), RAM)]))
        self.driver = kind(
            self.memory, SIZE, features=F_EVENT_IDX, arena=Arena(0x1000, RAM - 0x1000)
        )
        self.queue = Queue(SIZE)
        self.driver.configure(self.queue)
        self.there, self.ours = os.pipe2(os.O_NONBLOCK)
        self.kick, self.call = os.eventfd(0), os.eventfd(0)
        for fd in (self.ours, self.kick, self.call):
            stack.callback(os.close, fd)
        self.reader = stack.enter_context(os.fdopen(self.there, "rb", buffering=0))
        self.room = fcntl.fcntl(self.ours, fcntl.F_GETPIPE_SZ)
        self.pump = OutputPump(self.ours, lossy=lossy)
        self.pump.wire([self.kick], [self.call])
        stack.callback(self.pump.stop)

    def start(self) -> None:
        self.pump.start(self.memory, [self.queue])

    def say(self, *pieces: bytes) -> None:
        self.driver.add(list(pieces), [])
        os.eventfd_write(self.kick, 1)

    def reap(self, count: int) -> None:
        """Wait for so many used buffers."""
        while count:
            used = self.driver.reap()
            if not used:
                ready, _, _ = select.select([self.call], [], [], PATIENCE)
                assert ready, "an interrupt was lost"
                os.eventfd_read(self.call)
            count -= len(used)
        assert count == 0

    def read(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            ready, _, _ = select.select([self.there], [], [], PATIENCE)
            assert ready, f"{len(data)} of {count} bytes came"
            data += self.reader.read(count - len(data)) or b""
        return data


@pytest.fixture(params=[True, False], ids=["lossy", "waiting"])
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    with ExitStack() as stack:
        yield Bench(stack, lossy=request.param)


@pytest.fixture
def waiting() -> Iterator[Bench]:
    with ExitStack() as stack:
        yield Bench(stack, lossy=False)


@settings(max_examples=60, deadline=None)
@given(
    plan=st.lists(
        st.lists(st.sampled_from([0, 1, 16, 4096, 70_000]), min_size=1, max_size=4)
        | st.sampled_from(["stop", "read"]),
        max_size=24,
    ),
    kind=st.sampled_from([SplitDriver, PackedDriver]),
)
def test_bytes_arrive_in_order(plan: list[list[int] | str], kind: type[SplitDriver]) -> None:
    """However they are cut, over stops, and whatever the reader does; none is lost or doubled."""
    with ExitStack() as stack:
        bench = Bench(stack, lossy=False, kind=kind)
        bench.start()
        said, heard, chains = bytearray(), bytearray(), 0
        for step in plan:
            if isinstance(step, list):
                if chains == 12:
                    continue
                pieces = [bytes([len(said) + n & 0xFF]) * size for n, size in enumerate(step)]
                if not any(step):
                    pieces.append(b"x")
                said += b"".join(pieces)
                bench.say(*pieces)
                chains += 1
            elif step == "stop":
                bench.pump.stop()
                if left := bench.pump.take_window():
                    bench.pump.fill_window(left)
                bench.start()
            else:
                heard += bench.reader.read(100_000) or b""
        heard += bench.read(len(said) - len(heard))
        assert heard == said
        bench.reap(chains)
        bench.pump.stop()
        assert bench.pump.counters["sent_bytes"] == len(said)
        assert bench.pump.counters["dropped_bytes"] == 0
        assert bench.queue.in_flight == ()


def test_a_driver_is_held_up_by_nobody() -> None:
    """Lossy output is used at once: a pipe and the window take some, the rest is counted."""
    with ExitStack() as stack:
        bench = Bench(stack, lossy=True)
        bench.start()
        for n in range(8):
            bench.say(bytes([n]) * (64 << 10))
        bench.reap(8)
        kept = bench.room + WINDOW
        assert bench.pump.counters["dropped_bytes"] == (8 * 64 << 10) - kept
        assert bench.pump.counters["sent_bytes"] == kept
        expected = b"".join(bytes([n]) * (64 << 10) for n in range(8))[:kept]
        assert bench.read(kept) == expected


def test_output_waits_for_who_reads(waiting: Bench) -> None:
    """Behind a full window the chain under way stays in flight, and a stop keeps its place."""
    waiting.start()
    for n in range(8):
        waiting.say(bytes([n]) * (64 << 10))
    kept = waiting.room + WINDOW
    wait_until(lambda: waiting.pump.counters["sent_bytes"] == kept)
    waiting.reap(5)
    assert not waiting.driver.reap()
    waiting.say(b"end")
    waiting.pump.stop()
    left = waiting.pump.take_window()
    assert len(left) == WINDOW
    assert waiting.pump.take_window() == b""
    offset = waiting.pump.offset
    assert [chain.readable_length for chain in waiting.queue.in_flight][:1] in ([], [64 << 10])
    waiting.pump.fill_window(left)
    waiting.pump.offset = offset
    waiting.start()
    everything = b"".join(bytes([n]) * (64 << 10) for n in range(8)) + b"end"
    assert waiting.read(len(everything)) == everything
    waiting.reap(4)


def test_a_place_in_a_chain_of_a_saved_device(waiting: Bench) -> None:
    """What was taken of the chain in flight is not written again; the next one is whole."""
    waiting.say(b"0123456789")
    waiting.say(b"next")
    chain = waiting.queue.pop(waiting.memory)
    assert chain is not None
    waiting.pump.offset = 4
    waiting.start()
    assert waiting.read(10) == b"456789next"
    waiting.reap(2)
    assert waiting.pump.offset == 0


def test_a_reader_that_goes(bench: Bench) -> None:
    """A broken pipe loses what follows, counted; the driver gets its buffers back."""
    bench.start()
    bench.say(b"heard")
    assert bench.read(5) == b"heard"
    bench.reader.close()
    bench.say(b"unheard")
    bench.say(b"neither")
    bench.reap(3)
    assert bench.pump.counters["dropped_bytes"] == 14
    assert bench.pump.counters["sent_bytes"] == 5


def test_a_malformed_chain_stops_it(bench: Bench) -> None:
    """What came before is written; then Python hears of it."""
    bench.say(b"before")
    head = bench.driver.add([b"bad"], [])
    bench.memory.write(GuestAddress(bench.queue.descriptor_area + 16 * head), b"\xff" * 8)
    bench.start()
    assert select.select([bench.pump.attention], [], [], PATIENCE)[0]
    assert bench.read(6) == b"before"
    with pytest.raises(ChainError):
        bench.pump.take()
    assert not bench.pump.running


def test_what_can_not_be(bench: Bench) -> None:
    bench.pump.fill_window(b"first ")
    with pytest.raises(UsageError, match="room for 262138"):
        bench.pump.fill_window(bytes(WINDOW))
    with pytest.raises(UsageError, match="0 queues"):
        bench.pump.start(bench.memory, [])
    bench.start()
    assert bench.read(6) == b"first "
    for call in (bench.pump.take_window, lambda: bench.pump.fill_window(b"x")):
        with pytest.raises(QueueStateError, match="stop it first"):
            call()
    os.set_blocking(bench.ours, True)
    with pytest.raises(UsageError, match="blocks"):
        OutputPump(bench.ours, lossy=True)
