"""The pump of network devices: what the twin in Python has no part in (see vmm-reference)."""

from __future__ import annotations

import os
import select
import socket
import struct
from contextlib import ExitStack
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from virtio_queue import ChainError, Limiter, NetPump, Queue, TokenBucket, UsageError
from virtio_queue.constants import F_EVENT_IDX
from virtio_queue.testing import Arena, SplitDriver, Used
from vm_memory import GuestAddress, GuestMemory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

RX, TX = 0, 1
F_MRG_RXBUF = 1 << 15
PATIENCE = 60.0
LEAD = bytes(12)


class Bench:
    """A pair of queues under a pump, their driver, and the other end of the cable."""

    def __init__(
        self,
        stack: ExitStack,
        *,
        sockets: int = socket.SOCK_DGRAM,
        link: Literal["tap", "datagrams", "stream"] = "tap",
    ) -> None:
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
        self.pump = NetPump(self.ours.fileno(), link)
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
            found = self.drivers[queue].reap()
            if not found:
                ready, _, _ = select.select([self.calls[queue]], [], [], PATIENCE)
                assert ready, "an interrupt was lost"
                os.eventfd_read(self.calls[queue])
            used += found
        return used


def wait_until(condition: Callable[[], object]) -> None:
    while not condition():
        select.select([], [], [], 0.001)


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


# Sockets.


@pytest.fixture
def stream() -> Iterator[Bench]:
    """A pump whose frames are behind their lengths."""
    with ExitStack() as stack:
        yield Bench(stack, sockets=socket.SOCK_STREAM, link="stream")


def sized(frame: bytes) -> bytes:
    return len(frame).to_bytes(4, "big") + frame


def read_frames(wire: socket.socket, count: int) -> list[bytes]:
    """So many frames of a stream."""
    frames: list[bytes] = []
    with wire.makefile("rb") as file:
        while len(frames) < count:
            frames.append(file.read(int.from_bytes(file.read(4), "big")))
    return frames


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.sampled_from([14, 60, 1514, 9000, 65553]), min_size=1, max_size=8),
    cuts=st.lists(st.integers(1, 70_000), max_size=6),
    stops=st.booleans(),
)
def test_frames_over_a_stream(sizes: list[int], cuts: list[int], stops: bool) -> None:
    """Both ways, in order, however the stream is cut and over stops; the header is zeros."""
    with ExitStack() as stack:
        bench = Bench(stack, sockets=socket.SOCK_STREAM, link="stream")
        bench.start()
        frames = [bytes([n + 1]) * size for n, size in enumerate(sizes)]
        data = b"".join(map(sized, frames))
        places = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
        parts = [data[a:b] for a, b in pairwise(places)]
        got = b""
        for frame in frames:
            bench.post(1 << 17)
            while not (used := bench.drivers[RX].reap()):
                if parts:
                    bench.wire.setblocking(False)
                    try:
                        parts[0] = parts[0][bench.wire.send(parts[0]) :]
                    except BlockingIOError:
                        select.select([], [bench.wire], [], 0.01)
                    if not parts[0]:
                        del parts[0]
                        if stops:
                            bench.pump.stop()
                            bench.start()
                else:
                    select.select([bench.calls[RX]], [], [], 0.01)
            (each,) = used
            assert each.data[:12] == bytes(10) + b"\1\0"
            assert each.data[12:] == frame
            bench.transmit(LEAD, frame)
            bench.wire.setblocking(True)
            bench.wire.settimeout(PATIENCE)
            while len(got) < len(sized(frame)):
                got += bench.wire.recv(1 << 17)
            assert got == sized(frame)
            got = b""
        bench.pump.stop()
        assert bench.pump.counters["received_frames"] == len(frames)


def test_a_full_stream_cuts_frames(stream: Bench) -> None:
    """What it has taken a part of comes whole, without another kick, and a stop loses nothing."""
    stream.ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    stream.start()
    frames = [bytes([n]) * (3000 + n) for n in range(8)]
    for frame in frames:
        stream.transmit(LEAD, frame)
    (first,) = read_frames(stream.wire, 1)
    stream.pump.stop()
    stream.start()
    assert [first, *read_frames(stream.wire, 7)] == frames
    assert len(stream.reap(TX, 8)) == 8
    assert stream.pump.counters["sent_frames"] == 8


@pytest.mark.parametrize("data", [b"\xff\xff\xff\xff", sized(bytes(65554)), b""])
def test_a_stream_that_ends_or_lies(stream: Bench, data: bytes) -> None:
    """Nothing more is read of one that can't be cut into frames; it is counted once."""
    stream.start()
    stream.post(100)
    if data:
        stream.wire.sendall(data)
    else:
        stream.wire.shutdown(socket.SHUT_WR)
    wait_until(lambda: stream.pump.counters["dropped_link"])
    stream.pump.stop()
    assert stream.pump.counters["dropped_link"] == 1
    assert stream.pump.counters["received_frames"] == 0


def end_of_cable(stack: ExitStack, folder: Path) -> Bench:
    """A pump whose own address is `a`, and which sends to `b`."""
    bench = Bench(stack, link="datagrams")
    mine = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
    mine.bind(f"{folder}/a")
    mine.setblocking(False)
    bench.pump = NetPump(mine.fileno(), "datagrams", f"{folder}/b")
    stack.callback(bench.pump.stop)
    bench.pump.wire(bench.kicks, bench.calls)
    bench.start()
    return bench


def test_two_ends_of_a_cable(tmp_path: Path) -> None:
    """Frames to an end that is away are lost and counted; it may come, go and come again."""
    with ExitStack() as stack:
        a = end_of_cable(stack, tmp_path)
        for away, come in ((1, 1), (2, 2)):
            a.transmit(LEAD, b"lost" * 20)
            wait_until(lambda away=away: a.pump.counters["dropped_away"] == away)  # type: ignore[misc]
            a.reap(TX, 1)
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
                other.bind(f"{tmp_path}/b")
                other.settimeout(PATIENCE)
                a.transmit(LEAD, b"s" * 60, b"ent")
                assert other.recv(1 << 16) == b"s" * 60 + b"ent"
                a.reap(TX, 1)
                other.connect(f"{tmp_path}/a")
                a.post(200)
                other.send(b"answer".ljust(60))
                (used,) = a.reap(RX, 1)
                assert used.data == bytes(10) + b"\1\0" + b"answer".ljust(60)
                other.send(b"short")
                wait_until(
                    lambda come=come: a.pump.counters["dropped_short"] == come  # type: ignore[misc]
                )
            (tmp_path / "b").unlink()
        assert a.pump.counters["sent_frames"] == 4


def test_a_cable_that_is_pulled_with_frames_in_it(tmp_path: Path) -> None:
    """An end that goes without having read is no end of ours; too long a datagram is dropped."""
    with ExitStack() as stack:
        a = end_of_cable(stack, tmp_path)
        a.post(200)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
            other.bind(f"{tmp_path}/b")
            a.transmit(LEAD, b"unread" * 20)
            a.reap(TX, 1)
        (tmp_path / "b").unlink()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
            other.bind(f"{tmp_path}/b")
            a.transmit(LEAD, b"to whom it is now" * 4)
            a.reap(TX, 1)
            other.connect(f"{tmp_path}/a")
            other.send(bytes(70_000))
            other.send(b"whole".ljust(60))
        (used,) = a.reap(RX, 1)
        assert used.data[12:] == b"whole".ljust(60)
        assert a.pump.counters["dropped_long"] == 1
        assert a.pump.counters["dropped_link"] == 0


def test_a_stream_that_goes_with_half_a_frame(stream: Bench) -> None:
    """The rest is nobody's any more, and each frame after it is lost and counted."""
    stream.ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    stream.start()
    for n in range(6):
        stream.transmit(LEAD, bytes([n]) * 9000)
    assert stream.wire.recv(100)
    stream.wire.close()
    stream.reap(TX, 6)
    sent = stream.pump.counters["sent_frames"]
    wait_until(lambda: stream.pump.counters["dropped_link"] >= 7 - sent)  # reading ended too
    assert sent < 6


# What a driver wants, and what it may.

GROUP, STRANGER, ME = (bytes.fromhex(n) for n in ("01005e000001", "020000000099", "0200000000fe"))
BROADCAST = b"\xff" * 6
TAGS = (b"\0\5", b"\xf0\7", b"\x0f\xff")
ADDRESSES = st.sampled_from([GROUP, STRANGER, ME, BROADCAST, bytes.fromhex("33330000000a")])


def wanted(frame: bytes, rules: dict[str, Any]) -> bool:
    """The same in plain Python: 5.1.6.5.1 to 5.1.6.5.3."""
    promiscuous, all_groups, all_stations, no_groups, no_stations, no_broadcast = (
        bool(rules["modes"] >> bit & 1) for bit in range(6)
    )
    if promiscuous:
        return True
    target = frame[:6]
    tagged = frame[12:14] == b"\x81\0" and len(frame) >= 16
    if tagged and int.from_bytes(frame[14:16], "big") & 0xFFF not in rules["vlans"]:
        return False
    if target == BROADCAST:
        return not no_broadcast
    if target[0] & 1:
        return not no_groups and (all_groups or target in rules["multicast"])
    known = target == rules["mac"] or target in rules["unicast"]
    return not no_stations and (all_stations or known)


@settings(max_examples=80, deadline=None)
@given(
    rules=st.fixed_dictionaries(
        {
            "mac": st.just(ME),
            "modes": st.integers(0, 63) | st.sampled_from([0, 2, 4]),
            "unicast": st.lists(ADDRESSES, max_size=3),
            "multicast": st.lists(ADDRESSES, max_size=3),
            "vlans": st.sets(st.sampled_from([0, 1, 5, 7, 8, 4095]), max_size=4),
        }
    ),
    frames=st.lists(
        st.tuples(
            ADDRESSES,
            st.sampled_from(
                [b"\x08\0", b"\x81\0\0\5", b"\x81\0\xf0\7", b"\x81\0\x0f\xff", b"\x81\0"]
            ),
            st.sampled_from([0, 46]),
        ),
        min_size=1,
        max_size=10,
    ),
)
def test_only_frames_that_are_wanted(
    rules: dict[str, Any], frames: list[tuple[bytes, bytes, int]]
) -> None:
    """As the plain rules have it, and the rest is counted."""
    with ExitStack() as stack:
        bench = Bench(stack)
        bench.pump.set_filter(**rules)
        bench.start()
        sent = [target + b"\2source"[:6] + kind + bytes(rest) for target, kind, rest in frames]
        passing = [frame for frame in sent if wanted(frame, rules)]
        last = ME + b"source" + b"\x08\0last"
        bench.post(*[200] * (len(passing) + 1))
        for frame in sent:
            bench.wire.send(LEAD + frame)
        wait_until(lambda: not select.select([bench.ours], [], [], 0)[0])
        bench.pump.stop()  # what was read is dealt with
        bench.pump.clear_filter()
        bench.start()
        bench.wire.send(LEAD + last)
        used = bench.reap(RX, len(passing) + 1)
        assert [each.data[12:] for each in used] == [*passing, last]
        assert bench.pump.counters["dropped_filtered"] == len(sent) - len(passing)


def test_limits_hold_both_ways() -> None:
    """A frame without a token waits, a stop changes nothing, and a lifted limit lets it through."""
    with ExitStack() as stack:
        bench = Bench(stack)
        rare = TokenBucket(1, 1_000_000_000)
        receive, send = Limiter(operations=rare), Limiter(operations=rare)
        bench.pump.limit(receive, send)
        bench.start()
        bench.post(200, 200)
        for _ in range(2):
            bench.wire.send(LEAD + b"r" * 60)
            bench.transmit(LEAD, b"s" * 60)
        assert bench.wire.recv(1 << 16) == LEAD + b"s" * 60
        bench.reap(RX, 1)
        bench.reap(TX, 1)
        wait_until(lambda: bench.pump.counters["throttled"] == 2)
        bench.pump.stop()
        assert not bench.drivers[RX].reap()
        assert not bench.drivers[TX].reap()
        bench.start()
        bench.pump.limit(None, None)
        bench.reap(RX, 1)
        bench.reap(TX, 1)
        assert bench.wire.recv(1 << 16) == LEAD + b"s" * 60
        assert bench.pump.counters["sent_frames"] == bench.pump.counters["received_frames"] == 2


@pytest.mark.parametrize(
    ("rules", "field"),
    [
        ({"mac": b"short"}, "mac"), ({"unicast": [ME] * 65}, "unicast"),
        ({"multicast": [b""]}, "multicast"), ({"vlans": [4096]}, "vlans"),
    ],
)  # fmt: skip
def test_filters_that_can_not_be(bench: Bench, rules: dict[str, Any], field: str) -> None:
    with pytest.raises(UsageError, match=field):
        bench.pump.set_filter(**{"mac": ME, **rules})


def test_links_that_can_not_be(bench: Bench) -> None:
    with pytest.raises(UsageError, match="'radio' is none of tap, datagrams, stream"):
        NetPump(bench.ours.fileno(), "radio")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="107 are the most"):
        NetPump(bench.ours.fileno(), "datagrams", "/" * 108)
