from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtio_queue import Queue
from virtio_queue.testing import SplitDriver
from virtio_queue.testing.stateful import DeviceMachine
from vm_memory import GuestAddress, GuestMemory
from vmm_reference.backends.pumps import SocketPump
from vmm_reference.devices.offload import Offload
from vmm_reference.devices.states import StateError, VsockState
from vmm_reference.devices.vsock import model, packet
from vmm_reference.devices.vsock.connection import BUFFER
from vmm_reference.devices.vsock.model import FIRST_HOST_PORT, MAX_CONNECTIONS, MAX_REPLIES, Vsock
from vmm_reference.devices.vsock.packet import HEADER, Packet
from vmm_reference.devices.vsock.served import ServedVsock
from vmm_reference.testing import Bench

CID = 7
RX, TX, EVENTS = 0, 1, 2
REQUEST, RESPONSE, RST, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST = range(1, 8)


class Host:
    """The host's end of a stream, by hand."""

    def __init__(self) -> None:
        self.readable: Callable[[], object] = lambda: None
        self.writable: Callable[[], object] = lambda: None
        self.got = bytearray()
        self.room = 1 << 40
        self.outgoing = bytearray()
        self.ended = self.gone = self.broken = self.closed = self.shut = False
        self.port: int | None = None

    def send(self, data: bytes) -> int:
        if self.broken:
            raise BrokenPipeError
        taken = min(self.room, len(data))
        self.room -= taken
        self.got += data[:taken]
        return taken

    def receive(self, limit: int) -> bytes | None:
        if self.broken:
            raise ConnectionResetError
        data = bytes(self.outgoing[:limit])
        del self.outgoing[:limit]
        return data or (b"" if self.ended else None)

    def established(self, host_port: int) -> None:
        self.port = host_port

    def shutdown(self) -> None:
        self.shut = True

    def hung_up(self) -> bool:
        return self.gone

    def close(self) -> None:
        self.closed = True


class Guest(Bench):
    """A socket device on a bench, what listens on the host, and a driver that speaks packets."""

    def __init__(self, *, start: bool = True) -> None:
        self.listening: dict[int, Host] = {}
        self.vsock = Vsock(CID, self.listening.get, kick=lambda index: self.kick_later(index))
        super().__init__(self.vsock, start=start)
        self.settle()

    def tell(
        self, op: int, port: int = 1000, to: int = 80, data: bytes = b"", **fields: int
    ) -> None:
        """Send one packet."""
        values = {
            "src_cid": CID, "dst_cid": 2, "src_port": port, "dst_port": to, "len": len(data),
            "kind": 1, "op": op, "buf_alloc": 1 << 18,
        }  # fmt: skip
        header = HEADER.pack(*Packet(**values | fields))
        self.queue(TX).add([header, data] if data else [header])
        self.driver.kick(TX)
        self.settle()
        self.queue(TX).reap()

    def post(self, *sizes: int) -> None:
        """Give the device buffers."""
        for size in sizes or (4096,) * 16:
            self.queue(RX).add([], [size])
        self.driver.kick(RX)
        self.settle()

    def heard(self) -> list[tuple[Packet, bytes]]:
        """What came."""
        self.settle()
        packets = []
        for used in self.queue(RX).reap():
            if used.data:
                header = Packet(*HEADER.unpack_from(used.data))
                assert header.len == len(used.data) - HEADER.size
                assert (header.src_cid, header.dst_cid) == (2, CID)
                packets.append((header, used.data[HEADER.size :]))
        return packets

    def ops(self) -> list[int]:
        return [header.op for header, _ in self.heard()]

    def connected(self, port: int = 1000, to: int = 80) -> Host:
        """A connection that the guest made."""
        host = self.listening[to] = Host()
        self.tell(REQUEST, port, to)
        self.post()
        assert [(header.op, header.dst_port) for header, _ in self.heard()] == [(RESPONSE, port)]
        return host


@pytest.fixture
def guest() -> Iterator[Guest]:
    guest = Guest()
    yield guest
    guest.close()


# Connections.


def test_a_guest_connects_and_both_talk(guest: Guest) -> None:
    host = guest.connected()
    guest.tell(RW, data=b"hello")
    assert host.got == b"hello"
    host.outgoing += b"good day"
    host.readable()
    assert [(header.op, data) for header, data in guest.heard()] == [(RW, b"good day")]


def test_nobody_listens(guest: Guest) -> None:
    guest.tell(REQUEST, to=81)
    guest.post()
    ((header, _),) = guest.heard()
    assert (header.op, header.src_port, header.dst_port) == (RST, 81, 1000)
    assert guest.vsock.refused == {"nobody": 1}


def test_the_host_connects(guest: Guest) -> None:
    host = Host()
    host.outgoing += b"early"
    assert guest.vsock.open(host, 22)
    guest.post()
    ((header, _),) = guest.heard()
    assert (header.op, header.src_port, header.dst_port) == (REQUEST, FIRST_HOST_PORT, 22)
    guest.tell(RESPONSE, 22, FIRST_HOST_PORT)
    assert host.port == FIRST_HOST_PORT
    assert guest.heard()[0][1] == b"early"


def test_the_guest_refuses_the_host(guest: Guest) -> None:
    host = Host()
    guest.vsock.open(host, 22)
    guest.tell(RST, 22, FIRST_HOST_PORT)
    assert host.closed
    assert guest.vsock.refused == {"guest": 1}
    assert guest.vsock.connections == {}


def test_the_host_gives_up_before_the_guest_answers(guest: Guest) -> None:
    host = Host()
    guest.vsock.open(host, 22)
    host.gone = True
    host.readable()
    guest.post()
    assert guest.ops() == [REQUEST, RST]
    assert host.closed


def test_without_a_driver_nothing_opens() -> None:
    guest = Guest(start=False)
    assert not guest.vsock.open(Host(), 22)
    guest.close()


def test_a_connection_storm(guest: Guest) -> None:
    """Thousands of requests: as many as there is place for, the rest are refused, all answered."""
    guest.listening = {port: Host() for port in range(2000)}
    guest.vsock._connect = guest.listening.get
    answers: list[int] = []
    for port in range(1500):
        guest.tell(REQUEST, port, port)
        guest.post(64)
        answers += guest.ops()
    assert answers.count(RESPONSE) == len(guest.vsock.connections) == MAX_CONNECTIONS
    assert answers.count(RST) == 1500 - MAX_CONNECTIONS == guest.vsock.refused["full"]
    assert not guest.vsock.open(Host(), 5)
    for port in range(1500):
        guest.tell(RST, port, port)
    assert guest.vsock.connections == {}
    assert all(guest.listening[port].closed for port in range(MAX_CONNECTIONS))


def test_hostile_storm_without_buffers(guest: Guest) -> None:
    """A guest that never takes an answer is not heard any more, and costs a bounded amount."""
    for _ in range(1000):
        if guest.queue(TX).free:
            header = HEADER.pack(*Packet(CID, 2, 1, 2, 0, 1, REQUEST))
            guest.queue(TX).add([header])
            guest.driver.kick(TX)
            guest.settle()
            guest.queue(TX).reap()
    assert len(guest.vsock._replies) == MAX_REPLIES
    seen = 0
    while guest.vsock._replies:
        guest.post()
        seen += len(guest.heard())
        guest.queue(TX).reap()
    assert seen == guest.vsock.refused["nobody"] >= MAX_REPLIES
    assert guest.queue(TX).outstanding == {}


# Ends.


def test_half_close_by_the_guest(guest: Guest) -> None:
    """The host reads the end and can go on sending."""
    host = guest.connected()
    guest.tell(SHUTDOWN, flags=packet.SHUTDOWN_SEND)
    assert host.shut
    host.outgoing += b"answer"
    host.readable()
    assert guest.heard()[0][1] == b"answer"
    guest.tell(SHUTDOWN, flags=packet.SHUTDOWN_BOTH)
    assert guest.ops() == [RST]
    assert host.closed


def test_half_close_by_the_host(guest: Guest) -> None:
    """The guest reads the end and can go on sending."""
    host = guest.connected()
    host.outgoing += b"last words"
    host.ended = True
    host.readable()
    (_, words), (header, _) = guest.heard()
    assert words == b"last words"
    assert (header.op, header.flags) == (SHUTDOWN, packet.SHUTDOWN_SEND)
    guest.tell(RW, data=b"answer")
    assert host.got == b"answer"
    host.gone = True
    host.readable()
    ((header, _),) = guest.heard()
    assert (header.op, header.flags) == (SHUTDOWN, packet.SHUTDOWN_BOTH)
    assert host.closed
    assert guest.vsock.connections == {}


def test_what_was_sent_before_the_end_arrives(guest: Guest) -> None:
    """A slow host gets all of it, though the guest has closed and gone."""
    host = guest.connected()
    host.room = 3
    guest.tell(RW, data=b"all of it")
    guest.tell(SHUTDOWN, flags=packet.SHUTDOWN_BOTH)
    assert guest.ops() == [RST]
    assert (bytes(host.got), host.closed) == (b"all", False)
    host.room = 100
    host.writable()
    guest.settle()
    assert (bytes(host.got), host.shut, host.closed) == (b"all of it", True, True)
    assert guest.vsock.connections == {}


def test_the_host_breaks(guest: Guest) -> None:
    host = guest.connected()
    host.broken = True
    guest.tell(RW, data=b"x")
    assert guest.ops() == [RST]
    assert host.closed
    assert guest.vsock.resets == {"host": 1}
    guest.tell(RW, data=b"x")
    assert guest.ops() == [RST]


def test_the_host_breaks_while_it_is_read(guest: Guest) -> None:
    """Another stream that waits behind it has its turn all the same."""
    broken, well = guest.connected(1000, 80), guest.connected(1001, 81)
    broken.broken = True
    broken.readable()
    well.outgoing += b"well"
    well.readable()
    heard = [(header.dst_port, header.op, data) for header, data in guest.heard()]
    assert sorted(heard) == [(1000, RST, b""), (1001, RW, b"well")]
    assert broken.closed
    assert guest.vsock.resets == {"host": 1}


def test_ports_of_the_host_that_are_taken_are_not_given(guest: Guest) -> None:
    guest.connected(22, FIRST_HOST_PORT)
    assert guest.vsock.open(Host(), 22)
    assert [(h.op, h.src_port) for h, _ in guest.heard()] == [(REQUEST, FIRST_HOST_PORT + 1)]


# Credit.


def test_a_guest_that_asks_for_credit_is_answered(guest: Guest) -> None:
    guest.connected()
    guest.tell(RW, data=b"seven b")
    guest.tell(CREDIT_REQUEST)
    assert [(h.op, h.buf_alloc, h.fwd_cnt) for h, _ in guest.heard()] == [
        (CREDIT_UPDATE, BUFFER, 7)
    ]


def test_the_guest_is_told_of_room(guest: Guest) -> None:
    """5.10.6.3: a guest that has used half of its credit hears when the host has taken it."""
    host = guest.connected()
    host.room = 0
    for _ in range(4):
        guest.tell(RW, data=bytes(BUFFER // 4))
    assert guest.ops() == []
    host.room = BUFFER
    host.writable()
    ((header, _),) = guest.heard()
    assert (header.op, header.buf_alloc, header.fwd_cnt) == (CREDIT_UPDATE, BUFFER, BUFFER)


@pytest.mark.parametrize("window", [2, 4096, 128 << 10, 256 << 10, BUFFER, 1 << 30])
def test_a_guest_that_has_sent_what_it_would_take_itself_is_told_of_room(
    guest: Guest, window: int
) -> None:
    """Linux has no more on its way than its own buffer, whatever its credit; it waits then."""
    guest.connected()
    for _ in range(3):
        sent = 0
        while not (heard := guest.ops()):
            piece = min(window - sent, BUFFER, 60_000)
            assert piece, "the guest may send no more, and has not heard of room"
            guest.tell(RW, data=bytes(piece), buf_alloc=window)
            sent += piece
        assert heard == [CREDIT_UPDATE]


@pytest.mark.parametrize("sizes", [(BUFFER, 1), (BUFFER + 1,), (BUFFER - 1, 2)])
def test_hostile_guest_that_exceeds_its_credit(guest: Guest, sizes: tuple[int, ...]) -> None:
    host = guest.connected()
    host.room = 0
    for size in sizes:
        guest.tell(RW, data=bytes(size))
    assert guest.ops() == [RST]
    assert guest.vsock.resets == {"credit": 1}
    assert host.closed


def test_the_host_waits_for_credit(guest: Guest) -> None:
    """What the guest has no room for stays with the host; the guest is asked once."""
    host = guest.listening[80] = Host()
    guest.tell(REQUEST, buf_alloc=10)
    guest.post()
    host.outgoing += b"0123456789abcdef"
    host.readable()
    heard = guest.heard()
    assert [(header.op, data) for header, data in heard] == [
        (RESPONSE, b""), (RW, b"0123456789"), (CREDIT_REQUEST, b""),
    ]  # fmt: skip
    host.readable()
    assert guest.ops() == []
    guest.tell(CREDIT_UPDATE, buf_alloc=10, fwd_cnt=4)
    assert [data for header, data in guest.heard() if header.op == RW] == [b"abcd"]
    guest.tell(CREDIT_UPDATE, buf_alloc=10, fwd_cnt=14)
    assert guest.heard()[0][1] == b"ef"


@pytest.mark.parametrize("fwd_cnt", [1, 0xFFFFFFFF, 1 << 31])
def test_hostile_counters(guest: Guest, fwd_cnt: int) -> None:
    """A guest that claims to have read what was never sent gets no more than it has room for."""
    host = guest.listening[80] = Host()
    guest.tell(REQUEST, buf_alloc=16, fwd_cnt=fwd_cnt)
    guest.post()
    host.outgoing += bytes(1000)
    host.readable()
    assert sum(len(data) for _, data in guest.heard()) <= 16


def test_counters_wrap(guest: Guest) -> None:
    """Streams longer than 4 GiB: the counters come around."""
    host = guest.connected()
    connection = guest.vsock.connections[1000, 80]
    near = 0xFFFFFFF0
    connection._tx_cnt = connection._rx_cnt = connection.fwd_cnt = connection._told = near
    guest.tell(CREDIT_UPDATE, buf_alloc=4096, fwd_cnt=near)
    host.outgoing += bytes(100)
    host.readable()
    assert len(guest.heard()[0][1]) == 100
    guest.tell(CREDIT_UPDATE, buf_alloc=4096, fwd_cnt=(near + 100) & 0xFFFFFFFF)
    assert connection.credit == 4096
    guest.tell(RW, data=bytes(BUFFER // 3 * 2), buf_alloc=4096)
    ((header, _),) = guest.heard()
    assert header.fwd_cnt == (near + BUFFER // 3 * 2) & 0xFFFFFFFF


# Bad packets.


@pytest.mark.parametrize("length", [1, 43])
def test_hostile_header_that_is_too_short(guest: Guest, length: int) -> None:
    assert len(guest.send(TX, [bytes(length)])) == 1
    assert guest.vsock.dropped == {"header": 1}


@pytest.mark.parametrize(("length", "data"), [(1, b""), (0xFFFFFFFF, b"abc"), (5, b"abcd")])
def test_hostile_length(guest: Guest, length: int, data: bytes) -> None:
    """More is announced than there is: nothing of it is taken."""
    host = guest.connected()
    guest.tell(RW, data=data, len=length)
    assert guest.vsock.dropped == {"length": 1}
    assert host.got == b""


def test_hostile_payload_beyond_its_length_is_not_looked_at(guest: Guest) -> None:
    host = guest.connected()
    guest.tell(RW, data=b"abcd", len=2)
    assert host.got == b"ab"


@pytest.mark.parametrize("fields", [{"src_cid": 8}, {"dst_cid": 3}, {"dst_cid": 2 + (1 << 40)}])
def test_hostile_address(guest: Guest, fields: dict[str, int]) -> None:
    """A guest speaks for itself and to the host only."""
    guest.tell(REQUEST, 1000, 80, b"", **fields)
    guest.post()
    assert (guest.ops(), guest.vsock.dropped) == ([], {"cid": 1})


@pytest.mark.parametrize(
    "op", [0, RESPONSE, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST, 8, 0xFFFF]
)
def test_hostile_packet_for_no_connection(guest: Guest, op: int) -> None:
    """It is answered by a reset; a reset is answered by nothing."""
    guest.tell(op)
    guest.post()
    assert guest.ops() == [RST]
    guest.tell(RST)
    assert guest.ops() == []


@pytest.mark.parametrize("op", [0, REQUEST, RESPONSE, 8, 0xFFFF])
def test_hostile_packet_for_a_connection(guest: Guest, op: int) -> None:
    host = guest.connected()
    guest.tell(op)
    assert guest.ops() == [RST]
    assert host.closed
    assert guest.vsock.resets == {"protocol": 1}


@pytest.mark.parametrize("op", [REQUEST, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST])
def test_hostile_packet_before_the_answer(guest: Guest, op: int) -> None:
    host = Host()
    guest.vsock.open(host, 22)
    guest.tell(op, 22, FIRST_HOST_PORT)
    assert host.closed


def test_data_after_the_end(guest: Guest) -> None:
    guest.connected()
    guest.tell(SHUTDOWN, flags=packet.SHUTDOWN_SEND)
    guest.tell(RW, data=b"more")
    assert guest.ops() == [RST]


@pytest.mark.parametrize("kind", [0, 2, 0xFFFF])
def test_an_unknown_type_is_reset(guest: Guest, kind: int) -> None:
    """5.10.6.4.1: with the type of the packet."""
    guest.tell(REQUEST, kind=kind)
    guest.post()
    ((header, _),) = guest.heard()
    assert (header.op, header.kind) == (RST, kind)


def test_hostile_double_fetch_of_the_header(guest: Guest) -> None:
    """Item 12: the length that was checked is the one that is used."""
    host = guest.connected()
    header = HEADER.pack(*Packet(CID, 2, 1000, 80, 4, 1, RW, 0, 1 << 18))
    head = guest.queue(TX).add([header, b"data"])
    (address, _), _ = guest.queue(TX).outstanding[head].readable
    real = host.send

    def send(data: bytes) -> int:
        guest.queue(TX).write(address, HEADER.pack(*Packet(CID, 2, 1000, 80, 1 << 20, 1, RW)))
        return real(data)

    host.send = send  # type: ignore[method-assign]
    guest.driver.kick(TX)
    assert host.got == b"data"


def test_hostile_buffer_across_two_regions() -> None:
    """CVE-2019-18960: a packet that crosses from one region into another is whole, or refused."""
    regions = [(GuestAddress(0), 1 << 20), (GuestAddress(1 << 20), 1 << 20)]
    host = Host()
    guest = Guest(start=False)
    guest.memory.close()
    guest.memory = GuestMemory.from_ranges(regions)
    guest.device.memory = guest.driver.memory = guest.memory
    guest.driver.start()
    guest.listening[80] = host
    guest.post(*[4096] * 8)
    guest.tell(REQUEST)
    header = HEADER.pack(*Packet(CID, 2, 1000, 80, 6, 1, RW, 0, 1 << 18))
    queue = guest.queue(TX)
    assert isinstance(queue, SplitDriver)
    place = GuestAddress((1 << 20) - HEADER.size - 3)
    guest.memory.write(place, header + b"abcdef")
    queue.write_descriptor(0, place, HEADER.size + 6, 0)
    queue.make_available(0)
    queue.publish()
    guest.driver.kick(TX)
    assert host.got == b"abcdef"
    end = (2 << 20) - HEADER.size - 3
    guest.memory.write(GuestAddress(end), header + b"abc")
    queue.write_descriptor(0, end, HEADER.size + 6, 0)
    queue.make_available(0)
    queue.publish()
    guest.driver.kick(TX)
    assert guest.needs_reset
    assert host.got == b"abcdef"
    guest.close()


def test_hostile_buffers_that_are_too_small(guest: Guest) -> None:
    """A packet waits for a buffer that can hold it; those that can't are given back."""
    host = guest.connected()
    guest.post(*[44] * 10)
    guest.queue(RX).add([b"read only"])
    host.outgoing += b"data"
    host.readable()
    assert [data for _, data in guest.heard()] == [b"data"]
    assert guest.vsock.short_buffers == 0
    guest = Guest()
    guest.post(44, 10, 45)
    guest.tell(REQUEST)
    assert guest.ops() == [RST]
    assert guest.vsock.short_buffers == 2
    guest.close()


# Resets and states.


def test_reset_breaks_everything_off(guest: Guest) -> None:
    host = guest.connected()
    guest.driver.write_status(0)
    assert host.closed
    assert guest.vsock.connections == {}
    guest.driver.start()
    guest.tell(RW, data=b"x")
    guest.post()
    assert guest.ops() == [RST]


def test_a_restored_guest_hears_that_its_connections_are_gone(guest: Guest) -> None:
    """5.10.6.7: the event comes as soon as there is a buffer for it, and once."""
    guest.connected()
    other = Guest(start=False)
    moved = guest.moved_to(other.vsock)
    assert other.vsock.connections == {}
    for _ in range(2):
        moved.queue(EVENTS).add([], [8])
    moved.driver.kick(EVENTS)
    (used,) = moved.queue(EVENTS).reap()
    assert used.data == bytes(4)
    moved.close()
    other.close()


def test_an_event_buffer_was_there_before(guest: Guest) -> None:
    guest.queue(EVENTS).add([], [4])
    guest.driver.kick(EVENTS)
    other = Guest(start=False)
    moved = guest.moved_to(other.vsock)
    assert len(moved.queue(EVENTS).reap()) == 1
    moved.close()
    other.close()


def test_nonsense_is_refused() -> None:
    for cid in (0, 2, 0xFFFFFFFF, 1 << 33):
        with pytest.raises(ValueError, match="cid"):
            Vsock(cid, lambda port: None)
    with pytest.raises(StateError, match=r"VsockState\.cid"):
        VsockState(2, transport_reset=False)


def test_configuration_space(guest: Guest) -> None:
    assert struct.unpack("<Q", guest.config(0, 8)) == (CID,)
    guest.device.write_config(0, b"\xff" * 8)
    assert guest.config(0, 10) == bytes([CID]) + bytes(9)


# All that is sent arrives.

steps = st.lists(
    st.one_of(
        st.tuples(st.just("guest"), st.integers(0, 5000)),
        st.tuples(st.just("host"), st.integers(0, 5000)),
        st.tuples(st.just("take"), st.integers(0, 9000)),
        st.tuples(st.just("post"), st.integers(1, 9000)),
        st.tuples(st.just("read"), st.integers(0, 9000)),
    ),
    max_size=40,
)


@given(steps)
def test_streams_are_the_same_at_both_ends(steps: list[tuple[str, int]]) -> None:
    """A guest with a small buffer and a slow host: every byte arrives once, in order."""
    guest = Guest()
    host = guest.connected()
    host.room = 0
    room = 6000
    to_host = bytes(n % 251 for n in range(200_000))
    to_guest = bytes(n % 241 for n in range(200_000))
    sent = queued = acked = 0
    got = bytearray()
    read = 0

    def listen() -> None:
        nonlocal acked
        for header, data in guest.heard():
            assert header.op in (RW, CREDIT_UPDATE, CREDIT_REQUEST)
            got.extend(data)
            acked = header.fwd_cnt
            if header.op == CREDIT_REQUEST:
                guest.tell(CREDIT_UPDATE, buf_alloc=room, fwd_cnt=read)
        assert len(got) - read <= room

    guest.tell(CREDIT_UPDATE, buf_alloc=room, fwd_cnt=0)
    for what, amount in [*steps, *[("end", 0)] * 80]:
        if what in ("guest", "end"):
            amount = min(amount, BUFFER - (sent - acked))
            guest.tell(
                RW, data=to_host[sent : sent + amount], buf_alloc=room, fwd_cnt=read
            ) if amount else None
            sent += amount
        if what == "host":
            host.outgoing += to_guest[queued : queued + amount]
            queued += amount
            host.readable()
        if what in ("take", "end"):
            host.room = amount or 9000
            host.writable()
        if what in ("post", "end") and guest.queue(RX).free:
            guest.post(HEADER.size + (amount or 9000))
        listen()
        if what in ("read", "end"):
            read = min(len(got), read + (amount or 9000))
            guest.tell(CREDIT_UPDATE, buf_alloc=room, fwd_cnt=read)
        listen()
    assert host.got == to_host[:sent]
    assert got == to_guest[:queued]
    assert guest.vsock.resets == {}
    guest.close()


# Any driver.

packets = st.builds(
    lambda op, port, to, kind, length, data: HEADER.pack(
        CID, 2, port, to, len(data) if length is None else length, kind, op, 3, 1 << 16, 0
    ) + data,
    st.integers(0, 8), st.integers(0, 2), st.integers(0, 2), st.sampled_from([1, 1, 1, 2]),
    st.sampled_from([None, None, None, 0, 1 << 31]), st.binary(max_size=80),
)  # fmt: skip


class VsockMachine(DeviceMachine):
    """Any driver, and a host that listens and has something to say."""

    answers = False
    buffers = st.one_of(
        st.tuples(packets.map(lambda data: [data[:30], data[30:]]), st.just([])),
        st.tuples(st.just([]), st.lists(st.sampled_from([0, 4, 44, 45, 600]), min_size=1)),
    )

    def make_model(self, memory: GuestMemory) -> Vsock:
        def connect(port: int) -> Host | None:
            host = Host()
            host.outgoing += b"welcome" * 100
            return host if port else None

        return Vsock(CID, connect)

    def transplant(self, old: Any, new: Any) -> None:
        new.restore(old.save())


class Slot:
    """What a pump needs of a machine; its kicks are not heard, since it looks when it starts."""

    interrupt_word = None

    def __init__(self, stack: ExitStack) -> None:
        self.kicks = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(3)]
        for fd in self.kicks:
            stack.callback(os.close, fd)

    def take_kick(self, queue: int) -> int:
        return self.kicks[queue]

    def pump_call(self, queue: int) -> int:
        return -1


class Sockets:
    """Everybody listens on the host, but at port 0, and has something to say."""

    refused = 0

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack

    def connect(self, port: int) -> socket.socket | None:
        if port == 0:
            return None
        ours, host = socket.socketpair()
        self._stack.callback(host.close)
        host.send(b"welcome" * 100)
        return ours


class PumpedVsock(ServedVsock):
    """Lets its pump run for a moment after each kick; between them nothing changes by itself."""

    def activate(self, memory: GuestMemory, driver_features: int, queues: Sequence[Queue]) -> None:
        super().activate(memory, driver_features, queues)
        self.offload.stop()

    def process(self, queue_index: int) -> None:
        if queue_index == EVENTS:
            super().process(queue_index)
            return
        self.offload.go_on()
        try:
            for _ in range(3):
                time.sleep(0.0005)
                self.offload.attend(RX)
        finally:
            self.offload.stop()


class PumpedMachine(VsockMachine):
    """The same, with a thread of C that moves the packets."""

    def __init__(self) -> None:
        self.stack = ExitStack()
        super().__init__()

    def make_model(self, memory: GuestMemory) -> Vsock:
        pump = SocketPump(memory, CID, Sockets(self.stack))  # type: ignore[arg-type]
        self.stack.callback(pump.close)
        pump.connect(Slot(self.stack), range(2))  # type: ignore[arg-type]
        return PumpedVsock(CID, Offload("the pump", [(pump, range(2))]))

    def teardown(self) -> None:
        self.stack.close()
        super().teardown()


class PumpedOnPci(PumpedMachine):
    """And by the other registers."""

    pci = True


TestAnyDriver = VsockMachine.TestCase
TestAnyDriverAndAPump = PumpedMachine.TestCase
TestAnyDriverAndAPumpOnPci = PumpedOnPci.TestCase


def test_one_call_moves_a_bounded_number(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A guest that never stops sending leaves its neighbours their turn."""
    monkeypatch.setattr(model, "BUDGET", 4)
    guest.listening[80] = host = Host()
    guest.tell(REQUEST)
    for _ in range(10):
        header = HEADER.pack(*Packet(CID, 2, 1000, 80, 1, 1, RW, 0, 1 << 18))
        guest.queue(TX).add([header + b"x"])
    guest.driver.kick(TX)
    assert len(host.got) == 4
    while guest.vsock.unfinished:
        guest.device.process(TX)
    assert len(host.got) == 10
