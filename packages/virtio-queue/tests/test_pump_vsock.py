"""The pump of socket devices: streams beside a plain model of them, and hostile guests."""

from __future__ import annotations

import os
import random
import resource
import select
import socket
import struct
import time
from collections import Counter
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from virtio_queue import ChainError, PumpError, Queue, QueueStateError, UsageError, VsockPump
from virtio_queue.constants import F_EVENT_IDX
from virtio_queue.testing import Arena, PackedDriver, SplitDriver
from vm_memory import GuestAddress, GuestMemory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CID, HOST = 7, 2
RX, TX = 0, 1
REQUEST, RESPONSE, RST, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST = range(1, 8)
RCV, SEND, BOTH = 1, 2, 3
HEADER = struct.Struct("<QQIIIHHIII")
BUFFER = 384 << 10
SIZE, RAM = 64, 8 << 20
PATIENCE = 60.0


class Packet(NamedTuple):
    """What the guest heard of one connection."""

    op: int
    flags: int
    buf_alloc: int
    fwd_cnt: int
    data: bytes
    kind: int


class Guest:
    """Two queues under a pump, and a driver that speaks packets."""

    def __init__(
        self, stack: ExitStack, kind: type[SplitDriver | PackedDriver] = SplitDriver
    ) -> None:
        self.memory = stack.enter_context(GuestMemory.from_ranges([(GuestAddress(0), RAM)]))
        arena = Arena(0x1000, RAM - 0x1000)
        self.drivers = [kind(self.memory, SIZE, features=F_EVENT_IDX, arena=arena) for _ in "rt"]
        self.queues = [Queue(SIZE) for _ in "rt"]
        for driver, queue in zip(self.drivers, self.queues, strict=True):
            driver.configure(queue)
        self.kicks, self.calls = ([os.eventfd(0, os.EFD_NONBLOCK) for _ in "rt"] for _ in "kc")
        for fd in (*self.kicks, *self.calls):
            stack.callback(os.close, fd)
        self.pump = VsockPump(CID)
        self.pump.wire(self.kicks, self.calls)
        stack.callback(self.pump.forget)
        stack.callback(self.pump.stop)
        self.sizes = [4096]
        self.posted = 0
        self.stack = stack
        self.ends: dict[int, socket.socket] = {}  # who listens on the host, by port
        self.heard: dict[tuple[int, int], list[Packet]] = {}

    def start(self) -> None:
        self.pump.start(self.memory, self.queues)

    def post(self, count: int = 16) -> None:
        """Have so many buffers for packets in the ring."""
        while self.posted < count:
            size = self.sizes[0]
            self.sizes = [*self.sizes[1:], size]
            self.drivers[RX].add([], [44, size - 44] if size > 200 else [size])
            self.posted += 1
        os.eventfd_write(self.kicks[RX], 1)

    def tell(self, op: int, port: int, to: int, data: bytes = b"", **fields: int) -> None:
        """Send one packet; the pump has taken it when this returns."""
        values = {
            "src_cid": CID, "dst_cid": HOST, "src_port": port, "dst_port": to, "len": len(data),
            "kind": 1, "op": op, "flags": 0, "buf_alloc": 1 << 18, "fwd_cnt": 0,
        }  # fmt: skip
        header = HEADER.pack(*(values | fields).values())
        self.send([header, data] if data else [header])

    def send(self, pieces: list[bytes]) -> None:
        self.drivers[TX].add(pieces, [])
        os.eventfd_write(self.kicks[TX], 1)
        self.until(lambda: self.drivers[TX].reap(), "a packet to be taken")

    def hear(self) -> None:
        """Take what came, post as many buffers again, and answer what Python is asked."""
        for used in self.drivers[RX].reap():
            self.posted -= 1
            if used.data:
                header = HEADER.unpack_from(used.data)
                src_cid, dst_cid, host_port, guest_port, length, kind, op, flags, *credit = header
                assert (src_cid, dst_cid, length) == (HOST, CID, len(used.data) - HEADER.size)
                packet = Packet(op, flags, credit[0], credit[1], used.data[HEADER.size :], kind)
                self.heard.setdefault((guest_port, host_port), []).append(packet)
        self.post()
        if self.pump.running:
            assert self.pump.take() == []
        for guest_port, host_port in self.pump.asked():
            if host_port in self.ends:
                self.pump.accept(guest_port, host_port, self.ends.pop(host_port).detach())
            else:
                self.pump.refuse(guest_port, host_port)

    def until(self, condition: Callable[[], object], what: str) -> None:
        """Go on as a guest does until something is so."""
        end = time.monotonic() + PATIENCE
        while True:
            self.hear()
            if condition():
                return
            assert time.monotonic() < end, f"waited for {what}; heard {self.heard}"
            fds = [*self.calls, self.pump.attention]
            ready, _, _ = select.select(fds, [], [], 0.002)
            for fd in ready:
                if fd in self.calls:
                    os.eventfd_read(fd)

    def pair(self, room: int = 0) -> tuple[socket.socket, socket.socket]:
        """The pump's end and the host's; `room` makes the former take little."""
        ours, host = socket.socketpair()
        self.stack.callback(ours.close)
        self.stack.callback(host.close)
        if room:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, room)
        host.setblocking(False)
        return ours, host

    def ops(self, port: int, to: int) -> list[int]:
        return [packet.op for packet in self.heard.get((port, to), [])]

    def wait_for(self, op: int, port: int, to: int) -> Packet:
        """The first packet with an operation; those up to it are forgotten."""
        self.until(lambda: op in self.ops(port, to), f"operation {op} of {port}, {to}")
        packets = self.heard[port, to]
        at = self.ops(port, to).index(op)
        self.heard[port, to] = packets[at + 1 :]
        return packets[at]

    def counters(self, *prefixes: str) -> dict[str, int]:
        found = self.pump.counters
        return {name: n for name, n in found.items() if n and name.startswith(prefixes)}


class Stream:
    """A connection as the specification has it: what was said, and what must come of it."""

    def __init__(self, port: int, to: int, host: socket.socket, window: int) -> None:
        self.port, self.to, self.host = port, to, host
        self.over = False
        # From the guest: what it sent, what the host has, and what the guest knows to be gone.
        self.sent, self.arrived = bytearray(), bytearray()
        self.buf_alloc, self.fwd_cnt = BUFFER, 0
        # To the guest: what the host wrote, what came, what the guest has used, and may be sent.
        self.written, self.came = bytearray(), bytearray()
        self.consumed, self.window, self.limit = 0, window, window
        self.guest_shut = 0
        self.host_shut = False
        self.flags: list[int] = []  # of each SHUTDOWN that came
        self.updates = self.requests = 0
        self.reset = False

    @property
    def room(self) -> int:
        """What the guest may send."""
        return self.buf_alloc - (len(self.sent) - self.fwd_cnt)

    def digest(self, packets: list[Packet]) -> None:
        """Take what came."""
        for packet in packets:
            assert not self.reset, f"{packet} behind a reset"
            if packet.op == RST:
                self.reset = True
                continue
            assert 0 <= packet.fwd_cnt - self.fwd_cnt <= len(self.sent) - self.fwd_cnt
            self.buf_alloc, self.fwd_cnt = packet.buf_alloc, packet.fwd_cnt
            if packet.op == RW:
                assert not self.flags, "data behind the end"
                self.came += packet.data
                assert len(self.came) <= self.limit, "more than there was credit for"
            elif packet.op == SHUTDOWN:
                self.flags.append(packet.flags)
            elif packet.op == CREDIT_REQUEST:
                self.requests += 1
            else:
                assert packet.op == CREDIT_UPDATE
                self.updates += 1
        packets.clear()


class Streams(RuleBasedStateMachine):
    """Guest and host do what they like; every byte arrives, once, in order, within the credit."""

    streams: Bundle[Stream] = Bundle("streams")

    @initialize(
        kind=st.sampled_from([SplitDriver, PackedDriver]),
        sizes=st.lists(st.sampled_from([20, 45, 300, 4096, 70_000]), min_size=1, max_size=4),
    )
    def begin(self, kind: type[SplitDriver | PackedDriver], sizes: list[int]) -> None:
        self.stack = ExitStack()
        self.guest = Guest(self.stack, kind)
        self.guest.sizes = sizes if max(sizes) > 44 else [*sizes, 100]
        self.guest.start()
        self.counts: Counter[str] = Counter()
        self.number = 0
        self.alive: list[Stream] = []

    def teardown(self) -> None:
        if not hasattr(self, "guest"):
            return
        with self.stack:
            self.guest.until(lambda: self.guest.pump.connections == len(self.alive), "all ends")
            self.guest.pump.stop()
            assert self.guest.counters("refused", "reset", "dropped") == self.counts
            self.guest.pump.forget()
            assert self.guest.pump.connections == 0
            for stream in self.alive:
                with suppress(BlockingIOError, ConnectionResetError):
                    while self.take(stream, 1 << 20):
                        pass
                stream.host.close()
            assert self.guest.queues[TX].in_flight == ()

    # What has to be after each step.

    def settle(self, stream: Stream) -> None:
        """Wait for all that must come to the guest, and look that nothing else does."""
        heard = self.guest.heard.setdefault((stream.port, stream.to), [])

        def done() -> bool:
            stream.digest(heard)
            if stream.guest_shut & RCV:
                return True
            if len(stream.came) < min(len(stream.written), stream.limit):
                return False
            if len(stream.written) > stream.limit:
                return stream.requests > 0  # it asks for more
            if not stream.host_shut:
                return True
            if stream.guest_shut & SEND and stream.arrived == stream.sent:
                return BOTH in stream.flags
            return bool(stream.flags)

        self.guest.until(done, f"all of {vars(stream)}")
        assert not stream.reset
        if not stream.guest_shut & RCV:
            assert stream.came == stream.written[: len(stream.came)]
        if BOTH in stream.flags:
            assert stream.guest_shut == SEND
            self.finish(stream)

    def finish(self, stream: Stream) -> None:
        """The guest is through with it: the host gets what was sent, and the end."""
        stream.over = True
        self.alive.remove(stream)
        end = time.monotonic() + PATIENCE
        while True:
            assert time.monotonic() < end, f"waited for the end of {vars(stream)}"
            try:
                if not self.take(stream, 1 << 20):
                    break
            except BlockingIOError:
                select.select([stream.host], [], [], 0.01)
            except ConnectionResetError:  # what it had written was not all read
                break
        assert stream.arrived == stream.sent
        stream.host.close()

    def lose(self, stream: Stream, counter: str) -> None:
        """It is broken off: what arrives is the beginning of what was sent."""
        self.counts[counter] += 1
        heard = self.guest.heard.setdefault((stream.port, stream.to), [])
        self.guest.until(lambda: heard and heard[-1].op == RST, f"the reset of {vars(stream)}")
        stream.digest(heard)
        if not stream.guest_shut & RCV:
            assert stream.came == stream.written[: len(stream.came)]
        stream.over = True
        self.alive.remove(stream)
        stream.host.close()

    def take(self, stream: Stream, count: int) -> int:
        """The host reads."""
        data = stream.host.recv(count)
        stream.arrived += data
        assert stream.arrived == stream.sent[: len(stream.arrived)]
        return len(data)

    def data(self, count: int) -> bytes:
        self.number += 1
        return random.Random(self.number).randbytes(count)

    def tell(self, stream: Stream, op: int, data: bytes = b"", **fields: int) -> None:
        stream.requests = 0
        stream.limit = max(len(stream.came), stream.consumed + stream.window)
        credit = {"buf_alloc": stream.window, "fwd_cnt": stream.consumed}
        self.guest.tell(op, stream.port, stream.to, data, **(credit | fields))

    # How connections begin.

    windows = st.sampled_from([0, 1, 100, 5000, 1 << 16, 1 << 18])

    @rule(target=streams, window=windows, room=st.sampled_from([0, 1, 4096]))
    def guest_connects(self, window: int, room: int) -> Stream:
        self.number += 1
        ours, host = self.guest.pair(room)
        stream = Stream(self.number, 80, host, window)
        self.guest.ends[80] = ours
        self.tell(stream, REQUEST)
        self.guest.wait_for(RESPONSE, stream.port, stream.to)
        self.alive.append(stream)
        return stream

    @rule(target=streams, window=windows, early=st.integers(0, 5000))
    def host_connects(self, window: int, early: int) -> Stream:
        """What the host writes at once waits until the guest agrees."""
        self.number += 1
        ours, host = self.guest.pair()
        stream = Stream(1024, 1 << 30 | self.number, host, window)
        host.send(data := self.data(early))
        stream.written += data
        greeting = b"OK %d\n" % stream.to
        assert self.guest.pump.connect(stream.port, stream.to, ours.detach(), greeting)
        self.guest.wait_for(REQUEST, stream.port, stream.to)
        self.tell(stream, RESPONSE)
        assert host.recv(100) == greeting
        self.alive.append(stream)
        self.settle(stream)
        return stream

    @rule(answer=st.sampled_from(["no", "nonsense", "too late"]))
    def host_is_refused(self, answer: str) -> None:
        self.number += 1
        ours, host = self.guest.pair()
        port, to = 1024, 1 << 30 | self.number
        assert self.guest.pump.connect(port, to, ours.detach())
        self.guest.wait_for(REQUEST, port, to)
        if answer == "too late":
            host.close()
            self.counts["reset_host"] += 1
        else:
            self.guest.tell(RST if answer == "no" else RW, port, to)
            self.counts["refused_guest" if answer == "no" else "reset_protocol"] += 1
            host.setblocking(True)
            host.settimeout(PATIENCE)
            assert host.recv(1) == b""
            host.close()
        if answer != "no":
            self.guest.wait_for(RST, port, to)

    @rule()
    def nobody_listens(self) -> None:
        self.number += 1
        self.guest.tell(REQUEST, self.number, 81)
        self.guest.wait_for(RST, self.number, 81)
        self.counts["refused_nobody"] += 1

    # What happens to those that there are.

    @rule(stream=streams, count=st.sampled_from([0, 1, 1000, 30_000, 65_536, 200_000]))
    def guest_sends(self, stream: Stream, count: int) -> None:
        if stream.over:
            return
        if stream.guest_shut & SEND:
            self.tell(stream, RW, b"more")
            self.lose(stream, "reset_protocol")
            return
        data = self.data(min(count, stream.room))
        stream.sent += data
        self.tell(stream, RW, data)
        self.settle(stream)

    @rule(stream=streams, count=st.sampled_from([1, 10_000, 100_000]))
    def host_writes(self, stream: Stream, count: int) -> None:
        if stream.over or stream.host_shut:
            return
        data = self.data(count)
        try:
            stream.written += data[: stream.host.send(data)]
        except BrokenPipeError:
            assert stream.guest_shut & RCV
        except BlockingIOError:
            pass
        else:
            assert not stream.guest_shut & RCV
        self.settle(stream)

    @rule(stream=streams, count=st.sampled_from([1, 5000, 1 << 20]))
    def host_reads(self, stream: Stream, count: int) -> None:
        if not stream.over:
            with suppress(BlockingIOError):
                self.take(stream, count)
            self.settle(stream)

    @rule(stream=streams)
    def host_reads_all(self, stream: Stream) -> None:
        """Then the guest knows of room enough, also if it sends no more than it takes itself."""
        if stream.over:
            return

        def done() -> bool:
            with suppress(BlockingIOError):
                self.take(stream, 1 << 20)
            stream.digest(self.guest.heard.setdefault((stream.port, stream.to), []))
            window = min(BUFFER, stream.window)
            enough = max(window // 2, window - (1 << 16), 1)
            return stream.arrived == stream.sent and BUFFER - stream.room < enough

        self.guest.until(done, f"the host to have {vars(stream)}")
        self.settle(stream)

    @rule(stream=streams, part=st.floats(0, 1), window=windows)
    def guest_reads(self, stream: Stream, part: float, window: int) -> None:
        if not stream.over:
            stream.consumed += int(part * (len(stream.came) - stream.consumed))
            stream.window = window
            self.tell(stream, CREDIT_UPDATE)
            self.settle(stream)

    @rule(stream=streams)
    def guest_asks(self, stream: Stream) -> None:
        if not stream.over:
            updates = stream.updates
            self.tell(stream, CREDIT_REQUEST)
            self.settle(stream)
            heard = self.guest.heard[stream.port, stream.to]

            def answered() -> bool:
                stream.digest(heard)
                return stream.updates > updates

            self.guest.until(answered, f"the credit of {vars(stream)}")

    @rule(stream=streams, flags=st.sampled_from([0, RCV, SEND, BOTH]))
    def guest_shuts(self, stream: Stream, flags: int) -> None:
        if stream.over:
            return
        stream.guest_shut |= flags
        self.tell(stream, SHUTDOWN, flags=flags)
        if stream.guest_shut == BOTH:
            heard = self.guest.heard.setdefault((stream.port, stream.to), [])
            self.guest.until(lambda: heard and heard[-1].op == RST, "the answer")
            stream.digest(heard)
            self.finish(stream)
        else:
            self.settle(stream)

    @rule(stream=streams)
    def host_shuts(self, stream: Stream) -> None:
        if not stream.over and not stream.host_shut:
            stream.host_shut = True
            stream.host.shutdown(socket.SHUT_WR)
            self.settle(stream)

    @rule(stream=consumes(streams))
    def guest_resets(self, stream: Stream) -> None:
        if not stream.over:
            self.tell(stream, RST)
            self.finish(stream)

    @rule(stream=consumes(streams))
    def host_closes(self, stream: Stream) -> None:
        """With nothing unread, a stream ends in peace when the guest has room for the rest."""
        if not stream.over:
            self.host_reads_all(stream)
        if stream not in self.alive:
            return
        stream.host.close()
        stream.over = True
        self.alive.remove(stream)
        if len(stream.written) > stream.limit and not stream.guest_shut & RCV:
            stream.window = 1 << 20
            self.tell(stream, CREDIT_UPDATE)
        heard = self.guest.heard[stream.port, stream.to]

        def done() -> bool:
            stream.digest(heard)
            return BOTH in stream.flags

        self.guest.until(done, f"the end of {vars(stream)}")
        if not stream.guest_shut & RCV:
            assert stream.came == stream.written

    @rule(stream=consumes(streams), how=st.sampled_from(["credit", "protocol", "request", "kind"]))
    def guest_breaks_a_rule(self, stream: Stream, how: str) -> None:
        if stream.over:
            return
        if how == "credit":
            self.tell(stream, RW, bytes(BUFFER + 1))
            self.lose(stream, "reset_protocol" if stream.guest_shut & SEND else "reset_credit")
            return
        op = {"protocol": 99, "request": REQUEST, "kind": RW}[how]
        self.tell(stream, op, kind=2 if how == "kind" else 1)
        self.lose(stream, "reset_protocol")

    @rule(
        fields=st.sampled_from([
            ("dropped_cid", {"src_cid": 8}), ("dropped_cid", {"dst_cid": 1}),
            ("dropped_length", {"len": 5}), ("dropped_length", {"len": 0xFFFFFFFF}),
            ("dropped_unknown", {}), ("dropped_unknown", {"kind": 2}),
        ]),
        op=st.sampled_from([RESPONSE, RW, SHUTDOWN, CREDIT_REQUEST, 0, 99]),
    )  # fmt: skip
    def guest_sends_nonsense(self, fields: tuple[str, dict[str, int]], op: int) -> None:
        counter, values = fields
        if (counter, op) != ("dropped_unknown", SHUTDOWN):  # it crosses an end of the host's
            self.counts[counter] += 1
        self.guest.tell(op, 9999, 9, b"", **values)
        if counter == "dropped_unknown":
            assert self.guest.wait_for(RST, 9999, 9).kind == values.get("kind", 1)

    @rule()
    def guest_sends_half_a_header(self) -> None:
        self.counts["dropped_header"] += 1
        self.guest.send([bytes(43)])

    @rule()
    def the_pump_rests(self) -> None:
        self.guest.pump.stop()
        assert self.guest.queues[TX].in_flight == ()
        self.guest.start()

    @invariant()
    def nothing_grows(self) -> None:
        if hasattr(self, "guest"):
            assert self.guest.pump.connections <= 1023


def test_streams() -> None:
    run_state_machine_as_test(
        Streams,
        settings=settings(
            deadline=None, stateful_step_count=30, suppress_health_check=list(HealthCheck)
        ),
    )


# What a state machine would not come to.


@pytest.fixture(params=[SplitDriver, PackedDriver], ids=["split", "packed"])
def guest(request: pytest.FixtureRequest) -> Iterator[Guest]:
    with ExitStack() as stack:
        guest = Guest(stack, request.param)
        guest.start()
        yield guest


def connect(guest: Guest, port: int = 1000, room: int = 0, **fields: int) -> socket.socket:
    """A connection that the guest began; returns the host's end."""
    guest.ends[80], host = guest.pair(room)
    guest.tell(REQUEST, port, 80, b"", **fields)
    guest.wait_for(RESPONSE, port, 80)
    return host


def test_a_megabyte_both_ways(guest: Guest) -> None:
    """In packets that the guest has room for, by credit that comes and goes."""
    data = random.Random(1).randbytes(1 << 20)
    host = connect(guest)
    there, back, sent, fwd_cnt = bytearray(), bytearray(), 0, 0
    left = data

    def go_on() -> bool:
        nonlocal sent, fwd_cnt, left
        for packet in guest.heard.pop((1000, 80), []):
            back.extend(packet.data)
            fwd_cnt = packet.fwd_cnt
        if part := data[sent : sent + min(50_000, BUFFER - (sent - fwd_cnt))]:
            sent += len(part)
            guest.tell(RW, 1000, 80, part, fwd_cnt=len(back))
        else:
            guest.tell(CREDIT_UPDATE, 1000, 80, fwd_cnt=len(back))
        with suppress(BlockingIOError):
            there.extend(host.recv(1 << 20))
        with suppress(BlockingIOError):
            left = left[host.send(left) :]
        return len(there) == len(back) == len(data)

    guest.until(go_on, "a megabyte both ways")
    assert there == back == data
    assert guest.counters("received", "sent") == {
        "received_bytes": len(data), "sent_bytes": len(data),
    }  # fmt: skip


def test_what_the_host_does_not_take_is_kept(guest: Guest) -> None:
    """Up to the credit; a stop loses none of it, nor does a guest that goes."""
    host = connect(guest, room=1)
    data = random.Random(2).randbytes(BUFFER)
    for at in range(0, BUFFER, 1 << 16):
        guest.tell(RW, 1000, 80, data[at : at + (1 << 16)])
    guest.pump.stop()
    guest.start()
    guest.tell(SHUTDOWN, 1000, 80, flags=BOTH)
    guest.wait_for(RST, 1000, 80)
    assert guest.pump.connections == 1
    guest.tell(REQUEST, 1000, 81)  # its name is free again
    guest.wait_for(RST, 1000, 81)
    host.setblocking(True)
    host.settimeout(PATIENCE)
    got = b""
    while part := host.recv(1 << 16):
        got += part
    assert got == data
    guest.until(lambda: guest.pump.connections == 0, "the end")


def test_a_host_that_goes_with_data_on_its_way(guest: Guest) -> None:
    """Such a connection is reset; so is one whose host's end has gone before the guest sends."""
    host = connect(guest, room=1)
    guest.tell(RW, 1000, 80, bytes(BUFFER))
    host.close()
    guest.wait_for(RST, 1000, 80)
    host = connect(guest, 1001, buf_alloc=0)
    host.send(b"no room for that")
    host.close()
    guest.wait_for(CREDIT_REQUEST, 1001, 80)
    guest.tell(RW, 1001, 80, b"nobody hears that", buf_alloc=0)
    guest.wait_for(RST, 1001, 80)
    connect(guest, 1002, room=1)
    host = connect(guest, 1003, room=1)
    guest.tell(RW, 1003, 80, bytes(BUFFER))
    guest.tell(RST, 1003, 80)
    host.close()
    guest.until(lambda: guest.pump.connections == 1, "the end of what nobody takes")
    assert guest.counters("reset") == {"reset_host": 2}


@pytest.mark.parametrize("window", [1, 1000, 100_000, 1 << 18])
def test_a_guest_that_has_no_more_on_its_way_than_it_takes(guest: Guest, window: int) -> None:
    """Linux limits itself so: it hears of room whenever all it has sent is taken."""
    host = connect(guest, buf_alloc=window)
    sent, fwd_cnt = 0, 0
    for _ in range(3):
        while size := min(1 << 16, window - (sent - fwd_cnt)):
            guest.tell(RW, 1000, 80, bytes(size), buf_alloc=window)
            sent += size
        fwd_cnt = guest.wait_for(CREDIT_UPDATE, 1000, 80).fwd_cnt
        assert fwd_cnt <= sent
        with suppress(BlockingIOError):
            host.recv(1 << 20)


@pytest.mark.parametrize(
    ("packets", "told"), [(1, []), (2, [2]), (3, [3]), (4, [4]), (5, [2, 5]), (6, [2, 6])]
)
def test_a_window_that_is_full_is_told_of_once(guest: Guest, packets: int, told: list[int]) -> None:
    """Where it is there already; where there is more, the guest hears of half, and may go on."""
    size, window = 1 << 14, 1 << 16
    host = connect(guest, room=1 << 20, buf_alloc=window)
    guest.pump.stop()
    header = HEADER.pack(CID, HOST, 1000, 80, size, 1, RW, 0, window, 0)
    for _ in range(packets):
        guest.drivers[TX].add([header, bytes(size)], [])
    guest.start()
    guest.tell(CREDIT_REQUEST, 1000, 80, buf_alloc=window)
    guest.until(lambda: len(guest.ops(1000, 80)) > len(told), "what it is told, and its answer")
    heard = [(packet.op, packet.fwd_cnt) for packet in guest.heard[1000, 80]]
    assert heard == [(CREDIT_UPDATE, count * size) for count in (*told, packets)]
    assert len(host.recv(1 << 20, socket.MSG_WAITALL)) == packets * size


others = st.sampled_from(["credit", "length", "cid", "end"])
bursts = st.lists(
    st.lists(
        st.one_of(
            st.tuples(
                st.just("data"), st.integers(0, 1), st.sampled_from([0, 1, 999, 4096, 60_000])
            ),
            st.tuples(others, st.integers(0, 1), st.just(9)),
        ),
        min_size=1,
        max_size=SIZE // 2,
    ),
    min_size=1,
    max_size=3,
)


@settings(deadline=None, max_examples=300)
@given(
    kind=st.sampled_from([SplitDriver, PackedDriver]),
    bursts=bursts,
    room=st.sampled_from([0, 1]),
    window=st.sampled_from([0, 1, 5000, 1 << 18]),
)
def test_packets_that_come_together(
    kind: type[SplitDriver | PackedDriver],
    bursts: list[list[tuple[str, int, int]]],
    room: int,
    window: int,
) -> None:
    """Of two streams, and among what is ignored: each gets its own, whether or not it has room.

    Data belong to RW alone; what others carry is not looked at.
    """
    with ExitStack() as stack:
        guest = Guest(stack, kind)
        guest.start()
        hosts = [connect(guest, 1000 + n, room, buf_alloc=window) for n in range(2)]
        sent, came, ended = (bytearray(), bytearray()), (bytearray(), bytearray()), set()
        dropped: Counter[str] = Counter()

        def arrived() -> bool:
            guest.drivers[TX].reap()
            for host, data in zip(hosts, came, strict=True):
                with suppress(BlockingIOError):
                    data.extend(host.recv(1 << 20))
            return came == sent

        for burst in bursts:
            guest.pump.stop()
            given = [0, 0]
            for what, number, size in burst:
                data = random.Random(len(sent[number])).randbytes(size)
                op = {"credit": CREDIT_UPDATE, "end": SHUTDOWN}.get(what, RW)
                if op == RW and (number in ended or given[number] + size > BUFFER):
                    continue
                if what == "data":
                    sent[number].extend(data)
                    given[number] += size
                elif what == "end":
                    ended.add(number)
                else:
                    dropped[f"dropped_{what}"] += what != "credit"
                length = size + (what == "length")
                cid = CID + (what == "cid")
                header = HEADER.pack(cid, HOST, 1000 + number, 80, length, 1, op, SEND, window, 0)
                guest.drivers[TX].add([header, data] if data else [header], [])
            guest.start()
            guest.until(arrived, f"{[len(data) for data in sent]}, not {[*map(len, came)]}")
        guest.tell(CREDIT_REQUEST, 1000, 80)  # all before that is taken
        assert guest.counters("sent", "dropped", "reset", "refused") == +dropped | (
            {"sent_bytes": total} if (total := sum(map(len, sent))) else {}
        )
        assert [host.recv(1, socket.MSG_PEEK) for number, host in enumerate(hosts)
                if number in ended] == [b""] * len(ended)  # fmt: skip


def test_counters_that_make_no_sense_are_no_credit(guest: Guest) -> None:
    """A guest that says it has read what it was never sent gets nothing until it makes sense."""
    host = connect(guest, fwd_cnt=1 << 31)
    host.send(b"data")
    guest.wait_for(CREDIT_REQUEST, 1000, 80)
    guest.tell(CREDIT_UPDATE, 1000, 80, fwd_cnt=1)
    guest.wait_for(CREDIT_REQUEST, 1000, 80)
    guest.tell(CREDIT_UPDATE, 1000, 80, fwd_cnt=0, buf_alloc=0xFFFFFFFF)
    assert guest.wait_for(RW, 1000, 80).data == b"data"


@pytest.fixture
def many_files() -> Iterator[None]:
    """As many open files as the host lets anybody have."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limits[1] < 4096:
        pytest.skip("the host gives a process fewer than 4096 files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1], limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.usefixtures("many_files")
def test_a_storm_of_connections(guest: Guest) -> None:
    """1023 are let in, asked for by the guest or by the host; the rest is refused and counted."""
    hosts = []
    for number in range(1000):
        ours, host = guest.pair()
        hosts.append(host)
        guest.ends[number] = ours
        guest.tell(REQUEST, number, number)
    for number in range(30):
        ours, host = guest.pair()
        assert guest.pump.connect(5, 1 << 30 | number, ours.detach())
    guest.until(lambda: guest.counters("refused"), "the first that is too much")
    guest.until(lambda: guest.counters("refused") == {"refused_full": 7}, "all that are too much")
    guest.tell(REQUEST, 7, 7777)
    guest.wait_for(RST, 7, 7777)
    assert guest.pump.connections == 1023
    guest.until(
        lambda: all(guest.ops(n, n) == [RESPONSE] for n in range(1000)), "a thousand answers"
    )
    for number, host in enumerate(hosts):
        host.send(b"%d" % number)
    guest.until(lambda: all(len(guest.heard[n, n]) == 2 for n in range(1000)), "a thousand words")
    assert all(guest.heard[n, n][1].data == b"%d" % n for n in range(1000))
    guest.pump.stop()
    guest.pump.forget()
    assert guest.pump.connections == 0
    assert all(host.recv(1) == b"" for host in hosts)


def test_a_guest_that_takes_nothing_is_not_heard_for_long(guest: Guest) -> None:
    """Behind 256 resets, or 256 questions to Python, its packets wait in their ring."""
    with ExitStack() as stack:
        deaf = Guest(stack, type(guest.drivers[0]))
        deaf.start()
        for first, op in ((0, RW), (1000, REQUEST)):
            sent = done = 0
            header = [CID, HOST, 0, 9, 0, 1, op, 0, 0, 0]
            while sent < 256 + SIZE // 2:
                if sent - done < SIZE // 2:
                    header[2] = first + sent
                    deaf.drivers[TX].add([HEADER.pack(*header)], [])
                    os.eventfd_write(deaf.kicks[TX], 1)
                    sent += 1
                else:
                    select.select([deaf.calls[TX]], [], [], 0.01)
                done += len(deaf.drivers[TX].reap())
            assert done <= 256
            if op == RW:  # they are answered when there is room for answers, the others by Python
                deaf.until(lambda sent=sent: len(deaf.heard) == sent, "all resets")  # type: ignore[misc]
                assert deaf.counters("dropped") == {"dropped_unknown": sent}
                deaf.heard.clear()
            else:
                deaf.until(lambda sent=sent: len(deaf.heard) == sent, "all refusals")  # type: ignore[misc]
                assert deaf.counters("refused") == {"refused_nobody": sent}
            deaf.drivers[TX].reap()


def test_what_python_wants_while_the_pump_rests(guest: Guest) -> None:
    """Is done when it goes on; orders are bounded, and a reset closes what they hold."""
    guest.pump.stop()
    ours, host = guest.pair()
    assert guest.pump.connect(5, 1 << 30, ours.detach(), b"hello\n")
    again, other = guest.pair()
    assert guest.pump.connect(5, 1 << 30, again.detach())  # the name is taken
    guest.pump.accept(6, 6, (late := guest.pair())[0].detach())  # nobody asks for it any more
    guest.start()
    guest.wait_for(REQUEST, 5, 1 << 30)
    for closed in (other, late[1]):
        closed.setblocking(True)
        closed.settimeout(PATIENCE)
        assert closed.recv(1) == b""
    assert guest.counters("refused") == {"refused_full": 1}
    guest.tell(RESPONSE, 5, 1 << 30)
    assert host.recv(100) == b"hello\n"
    guest.pump.stop()
    ends = [guest.pair() for _ in range(2)]
    for number in range(512):
        assert guest.pump.connect(5, number, os.dup(ends[0][0].fileno()))
    assert not guest.pump.connect(5, 512, ends[1][0].fileno())
    for number in range(513):  # more answers than there can be questions
        guest.pump.accept(6, number, os.dup(ends[0][0].fileno()))
    ends[0][0].close()
    guest.pump.forget()
    assert host.recv(1) == b""
    assert ends[0][1].recv(1) == b""
    with pytest.raises(BlockingIOError):
        ends[1][1].recv(1)


def test_a_malformed_chain_stops_it(guest: Guest) -> None:
    """Connections stay until the device is reset."""
    host = connect(guest)
    guest.pump.stop()
    guest.drivers[TX].add([bytes(44)], [])
    at = guest.queues[TX].descriptor_area
    for offset in range(0, 16 * SIZE, 16):
        guest.memory.write(GuestAddress(at + offset), b"\xff" * 8)
    guest.start()
    ready, _, _ = select.select([guest.pump.attention], [], [], PATIENCE)
    assert ready
    with pytest.raises(ChainError):
        guest.pump.take()
    assert not guest.pump.running
    assert guest.pump.connections == 1
    guest.pump.forget()
    assert host.recv(1) == b""


def test_a_host_without_descriptors() -> None:
    """Two are a pump's, and one more is a socket pump's."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    first = os.dup(0)
    os.close(first)
    resource.setrlimit(resource.RLIMIT_NOFILE, (first + 2, limits[1]))
    try:
        with pytest.raises(PumpError, match="raise the limit of open files"):
            VsockPump(CID)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_what_can_not_be(guest: Guest) -> None:
    with pytest.raises(UsageError, match="2 is not from 3"):
        VsockPump(2)
    with pytest.raises(QueueStateError, match="the pump runs"):
        guest.pump.forget()
    guest.pump.stop()
    with pytest.raises(UsageError, match="1 queues"):
        guest.pump.start(guest.memory, guest.queues[:1])
    with pytest.raises(UsageError, match="33 bytes"):
        guest.pump.connect(1, 2, 3, bytes(33))
