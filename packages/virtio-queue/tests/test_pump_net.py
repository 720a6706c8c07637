"""The pump of network devices: what the twin in Python has no part in (see vmm-reference)."""

from __future__ import annotations

import os
import select
import socket
import struct
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from virtio_queue import ChainError, NetPump, Queue, UsageError
from virtio_queue.constants import F_EVENT_IDX
from virtio_queue.testing import Arena, SplitDriver, Used
from vm_memory import GuestAddress, GuestMemory

if TYPE_CHECKING:
    from collections.abc import Iterator

RX, TX = 0, 1
F_MRG_RXBUF = 1 << 15
PATIENCE = 60.0
LEAD = bytes(12)


class Bench:
    """A pair of queues under a pump, their driver, and the other end of the cable."""

    def __init__(self, stack: ExitStack, *, sockets: int = socket.SOCK_DGRAM) -> None:
        self.memory = stack.enter_context(GuestMemory.from_ranges([(GuestAddress(0), 1 << 20)]))
        arena = Arena(0x1000, 0xF_0000)
        self.drivers = [
            SplitDriver(self.memory, 16, features=F_EVENT_IDX, arena=arena) for _ in range(2)
        ]
        self.queues = [Queue(16) for _ in range(2)]
        for driver, queue in zip(self.drivers, self.queues, strict=True):
            driver.configure(queue)
        self.ours, self.wire = map(stack.enter_context, socket.socketpair(socket.AF_UNIX, sockets))
        self.ours.setblocking(False)
        self.wire.settimeout(PATIENCE)
        self.kicks, self.calls = ([os.eventfd(0) for _ in range(2)] for _ in range(2))
        for fd in (*self.kicks, *self.calls):
            stack.callback(os.close, fd)
        self.pump = NetPump(self.ours.fileno())
        self.pump.wire(self.kicks, self.calls)
        stack.callback(self.pump.stop)

    def start(self, features: int = F_MRG_RXBUF) -> None:
        self.pump.start(self.memory, self.queues, features)

    def post(self, *sizes: int) -> None:
        """Buffers for frames."""
        for size in sizes:
            self.drivers[RX].add([], [size])
        os.eventfd_write(self.kicks[RX], 1)

    def transmit(self, *pieces: bytes) -> None:
        self.drivers[TX].add(list(pieces), [])
        os.eventfd_write(self.kicks[TX], 1)

    def reap(self, queue: int, count: int) -> list[Used]:
        """Wait for so many used buffers."""
        used: list[Used] = []
        while len(used) < count:
            found = self.drivers[queue].reap() or self.drivers[queue].reap()
            if not found:
                ready, _, _ = select.select([self.calls[queue]], [], [], PATIENCE)
                assert ready, "an interrupt was lost"
                os.eventfd_read(self.calls[queue])
            used += found
        return used


@pytest.fixture
def bench() -> Iterator[Bench]:
    with ExitStack() as stack:
        yield Bench(stack)


def test_a_frame_outlasts_a_stop(bench: Bench) -> None:
    """One that found too few buffers keeps waiting; those taken for it are available again."""
    bench.start()
    bench.post(100)
    bench.wire.send(LEAD + b"a" * 200)
    bench.wire.send(LEAD + b"b" * 20)
    while not bench.pump.counters["chains"]:
        select.select([], [], [], 0.001)
    bench.pump.stop()
    assert bench.queues[RX].in_flight == ()
    bench.start()
    bench.post(112, 50)
    first, second, third = bench.reap(RX, 3)
    assert first.data[10:] + second.data == b"\2\0" + b"a" * 200
    assert third.data[12:] == b"b" * 20
    assert bench.pump.counters["received_frames"] == 2


def test_a_frame_is_forgotten(bench: Bench) -> None:
    """A new driver does not get what waited for the former one."""
    bench.start()
    bench.wire.send(LEAD + b"a" * 200)
    while select.select([bench.ours], [], [], 0)[0]:
        select.select([], [], [], 0.001)
    bench.pump.forget()  # without effect: it runs
    bench.pump.stop()
    bench.pump.forget()
    bench.start()
    bench.wire.send(LEAD + b"b" * 20)
    bench.post(500)
    (used,) = bench.reap(RX, 1)
    assert used.data[12:] == b"b" * 20


def test_a_full_cable_holds_frames_back(bench: Bench) -> None:
    """They stay in the ring until there is room, in order, and a stop loses none."""
    bench.ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    bench.start()
    frames = [bytes([n]) * 3000 for n in range(8)]
    for frame in frames:
        bench.transmit(LEAD, frame)
    assert bench.wire.recv(1 << 16) == LEAD + frames[0]
    bench.pump.stop()
    bench.start()
    for frame in frames[1:]:
        assert bench.wire.recv(1 << 16) == LEAD + frame
    assert len(bench.reap(TX, 8)) == 8
    assert bench.pump.counters["sent_bytes"] == 8 * 3000


def test_the_other_end_goes(bench: Bench) -> None:
    """What is sent is lost and counted; nothing turns round and round."""
    with ExitStack() as stack:
        stream = Bench(stack, sockets=socket.SOCK_SEQPACKET)
        stream.start()
        stream.wire.close()
        stream.transmit(LEAD, b"f" * 60)
        stream.reap(TX, 1)
        while stream.pump.counters["dropped_link"] < 2:
            select.select([], [], [], 0.001)
        spent = stream.pump.counters["dropped_link"]
        stream.transmit(LEAD, b"f" * 60)
        stream.reap(TX, 1)
        stream.pump.stop()
        assert stream.pump.counters["dropped_link"] == spent + 1
        assert stream.pump.counters["sent_frames"] == 0


def test_a_short_frame_of_the_host_is_dropped(bench: Bench) -> None:
    bench.start()
    bench.post(100)
    bench.wire.send(LEAD + bytes(13))
    bench.wire.send(LEAD + bytes(14))
    (used,) = bench.reap(RX, 1)
    assert used.length == 26
    assert bench.pump.counters["dropped_short"] == 1


def lead(flags: int = 0, gso: int = 0, size: int = 0, start: int = 0, offset: int = 0) -> bytes:
    """A header of the driver's (5.1.6): what it wants done with a frame."""
    return struct.pack("<BBHHHHH", flags, gso, 0, size, start, offset, 0)


CSUM, TSO4, TSO6, ECN, UFO = (1 << bit for bit in (0, 11, 12, 13, 14))


@pytest.mark.parametrize(
    ("features", "frame", "counter"),
    [
        (0, bytes(5), "dropped_no_header"),
        (0, LEAD + bytes(13), "dropped_short"),
        (0, LEAD + bytes(1 << 17), "dropped_long"),
        (0, lead(flags=1, start=14, offset=6) + bytes(60), "dropped_offload"),
        (CSUM, lead(flags=1, start=50, offset=9) + bytes(60), "dropped_header"),
        (CSUM, lead(flags=1, start=0xFFFF, offset=0xFFFF) + bytes(60), "dropped_header"),
        (CSUM | TSO4, lead(1, 1, 0, 14, 6) + bytes(60), "dropped_header"),
        (CSUM | TSO4, lead(0, 1, 40, 14, 6) + bytes(60), "dropped_header"),
        (CSUM | TSO4, lead(1, 2, 40, 14, 6) + bytes(60), "dropped_header"),
        (CSUM | TSO4, lead(1, 4, 40, 14, 6) + bytes(60), "dropped_offload"),
        (CSUM | TSO6, lead(1, 1, 40, 14, 6) + bytes(60), "dropped_offload"),
        (CSUM | TSO4, lead(1, 3, 40, 14, 6) + bytes(60), "dropped_offload"),
        (CSUM | TSO4, lead(1, 0x81, 40, 14, 6) + bytes(60), "dropped_offload"),
        (CSUM | ECN, lead(0, 0x80) + bytes(60), "dropped_offload"),
    ],
)
def test_what_a_driver_may_not_ask_is_dropped(
    bench: Bench, features: int, frame: bytes, counter: str
) -> None:
    """By the header's lies, the frame's length and what was negotiated; the next one goes out."""
    bench.start(features)
    bench.transmit(frame)
    bench.transmit(LEAD, b"f" * 60)
    assert bench.wire.recv(1 << 18) == LEAD + b"f" * 60
    bench.reap(TX, 2)
    dropped = {name: n for name, n in bench.pump.counters.items() if "dropped" in name and n}
    assert dropped == {counter: 1}


@pytest.mark.parametrize(
    ("features", "header"),
    [
        (CSUM, lead(flags=1, start=50, offset=8)),
        (CSUM | TSO4 | ECN, lead(1, 0x81, 40, 14, 6)),
        (CSUM | TSO6, lead(1, 4, 40, 14, 6)),
        (CSUM | UFO, lead(1, 3, 40, 14, 6)),
    ],
)
def test_what_was_negotiated_goes_out(bench: Bench, features: int, header: bytes) -> None:
    """With the header that the driver wrote."""
    bench.start(features)
    bench.transmit(header, b"f" * 60)
    assert bench.wire.recv(1 << 16) == header + b"f" * 60


def test_a_frame_that_no_buffer_holds_is_dropped(bench: Bench) -> None:
    """Without MRG_RXBUF a frame is one buffer's; one that is too long is lost, and counted."""
    bench.start(0)
    bench.post(100, 100)
    bench.wire.send(LEAD + b"a" * 200)
    bench.wire.send(LEAD + b"b" * 20)
    while not bench.pump.counters["received_frames"]:
        select.select([], [], [], 0.001)
    used = bench.reap(RX, 1)
    assert used[-1].data[12:] == b"b" * 20
    assert bench.pump.counters["dropped_no_room"] == 1


def test_a_frame_of_more_pieces_than_the_host_takes() -> None:
    """A thousand and more descriptors are gathered before they are sent."""
    with ExitStack() as stack:
        bench = Bench(stack)
        arena = Arena(0x1000, 0xF_0000)
        driver = bench.drivers[TX] = SplitDriver(bench.memory, 2048, arena=arena)
        queue = bench.queues[TX] = Queue(2048)
        driver.configure(queue)
        bench.start()
        bench.transmit(LEAD, *[bytes([n & 0xFF]) for n in range(1500)])
        assert bench.wire.recv(1 << 16) == LEAD + bytes(n & 0xFF for n in range(1500))


def test_a_malformed_chain_stops_it(bench: Bench) -> None:
    """The driver's chain before it is sent; then Python hears of it."""
    bench.transmit(LEAD, b"f" * 60)
    head = bench.drivers[TX].add([LEAD, b"g" * 60], [])
    at = bench.queues[TX].descriptor_area + 16 * head
    bench.memory.write(GuestAddress(at), b"\xff" * 8)
    bench.start()
    ready, _, _ = select.select([bench.pump.attention], [], [], PATIENCE)
    assert ready
    assert bench.wire.recv(1 << 16) == LEAD + b"f" * 60
    with pytest.raises(ChainError):
        bench.pump.take()
    assert not bench.pump.running


def test_what_can_not_be(bench: Bench) -> None:
    """A descriptor that blocks would hold the thread; a pair is two queues."""
    bench.ours.setblocking(True)
    with pytest.raises(UsageError, match="blocks"):
        NetPump(bench.ours.fileno())
    with pytest.raises(UsageError, match="1 queues"):
        bench.pump.start(bench.memory, bench.queues[:1], 0)
