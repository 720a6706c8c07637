"""Network frames in Python and by the pump in C: the same on the wire and in the guest."""

from __future__ import annotations

import os
import select
import socket
from collections import deque
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from virtio_queue import NetPump, Queue
from virtio_queue.constants import F_EVENT_IDX, F_INDIRECT_DESC
from virtio_queue.testing import Arena, PackedDriver, SplitDriver
from vm_memory import GuestAddress, GuestMemory
from vmm_reference.devices.net import features as net
from vmm_reference.devices.net.model import Net

RX, TX = 0, 1
SIZE = 16
MAC = bytes.fromhex("0200000000fe")
FEATURES = F_EVENT_IDX | F_INDIRECT_DESC
PATIENCE = 60.0
ALL = net.HOST_OFFLOADS | net.F_MRG_RXBUF

Kind = type[SplitDriver] | type[PackedDriver]
Step = tuple[str, Any]

HEADERS = st.builds(
    net.HEADER.pack,
    st.sampled_from([0, 0, 1, 1, 2, 0xFF]),
    st.sampled_from([0, 0, 1, 3, 4, 5, 0x80, 0x81, 0x84]),
    st.integers(0, 99),
    st.sampled_from([0, 1, 1400]),
    st.integers(0, 70) | st.just(0xFFFF),
    st.integers(0, 20) | st.just(0xFFFF),
    st.integers(0, 3),
)


class Wire:
    """A link in memory."""

    vnet_header, offloads, queues = True, net.HOST_OFFLOADS, 1

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.incoming: deque[bytes] = deque()

    def send(self, queue: int, pieces: Sequence[bytes | memoryview]) -> bool:
        self.sent.append(b"".join(bytes(piece) for piece in pieces))
        return True

    def receive(self, queue: int) -> bytes | None:
        return self.incoming.popleft() if self.incoming else None

    def set_offloads(self, offloads: int) -> None:
        pass

    def set_queues(self, pairs: int) -> None:
        pass


@st.composite
def sends(draw: st.DrawFn) -> Step:
    """A frame, good or bad, in pieces."""
    size = draw(st.integers(0, 90) | st.sampled_from([13, 14, 1500, net.MAX_FRAME, 66000]))
    whole = draw(HEADERS) + draw(st.binary(max_size=90)).ljust(size, b"f")[:size]
    whole = whole[: draw(st.sampled_from([len(whole)] * 9 + [5, 11, 12]))]
    places = sorted(draw(st.lists(st.integers(0, len(whole)), max_size=3)))
    ends = zip([0, *places], [*places, len(whole)], strict=True)
    return "send", [whole[a:b] for a, b in ends]


STEPS = st.lists(
    sends()
    | st.tuples(st.just("post"), st.lists(st.sampled_from([0, 11, 12, 40, 200, 1526]), max_size=5))
    | st.tuples(st.just("arrive"), st.sampled_from([14, 26, 60, 300, 1500])),
    max_size=14,
)


class Side:
    """A memory, and a driver of two queues."""

    def __init__(self, kind: Kind) -> None:
        self.memory = GuestMemory.from_ranges([(GuestAddress(0), 1 << 21)])
        arena = Arena(0x1000, 0x1F_0000)
        self.drivers = [kind(self.memory, SIZE, features=FEATURES, arena=arena) for _ in range(2)]
        self.queues = [Queue(SIZE) for _ in range(2)]
        for driver, queue in zip(self.drivers, self.queues, strict=True):
            driver.configure(queue)

    def do(self, step: Step) -> int:
        """The driver's part; which queue has got something, or -1."""
        what, value = step
        if what == "send":
            self.drivers[TX].add(value, [])
            return TX
        if what == "post":
            for size in value:
                if len(self.drivers[RX].outstanding) < SIZE:
                    self.drivers[RX].add([], [size]) if size else self.drivers[RX].add([b"r"], [])
            return RX
        return -1

    def reap(self, queue: int) -> list[tuple[int, bytes]]:
        return [(used.length, used.data) for used in self.drivers[queue].reap()]


class Native(Side):
    """Served by the pump."""

    def __init__(self, kind: Kind, features: int) -> None:
        super().__init__(kind)
        self.ours, self.wire = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.ours.setblocking(False)
        self.wire.setblocking(False)
        self.ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self.kicks, self.calls = ([os.eventfd(0, os.EFD_NONBLOCK) for _ in "12"] for _ in "12")
        self.pump = NetPump(self.ours.fileno())
        self.pump.wire(self.kicks, self.calls)
        self.features = features

    def start(self) -> None:
        self.pump.start(self.memory, self.queues, self.features)

    def wait(self, queue: int, count: int) -> list[tuple[int, bytes]]:
        """So many used buffers."""
        used: list[tuple[int, bytes]] = []
        while len(used) < count:
            found = self.reap(queue)
            if not found:
                ready, _, _ = select.select([self.calls[queue]], [], [], PATIENCE)
                assert ready, "an interrupt was lost"
                os.eventfd_read(self.calls[queue])
            used += found
        return used

    def close(self) -> None:
        self.pump.stop()
        self.ours.close()
        self.wire.close()
        self.memory.close()
        for fd in (*self.kicks, *self.calls):
            os.close(fd)


def arrived(size: int, number: int) -> bytes:
    """A frame from the host, with its header."""
    return net.HEADER.pack(1, 0, 0, 0, 2, 4, 9) + bytes([number]) * size


@settings(max_examples=150, deadline=None)
@given(
    plan=STEPS,
    kind=st.sampled_from([SplitDriver, PackedDriver]),
    declined=st.sampled_from([0, net.F_MRG_RXBUF, net.F_HOST_UFO, net.F_HOST_ECN, net.F_CSUM]),
    stops=st.booleans(),
)
def test_frames_of_any_kind(plan: list[Step], kind: Kind, declined: int, stops: bool) -> None:
    """What is on the wire, what is in the buffers and their used lengths, and what is counted."""
    wire, python = Wire(), Side(kind)
    model = Net(wire, MAC)
    features = ALL & ~declined
    for feature, needed in net.NEEDS.items():
        if not features & needed:
            features &= ~feature
    model.activate(python.memory, features, python.queues)
    native = Native(kind, features)
    native.start()
    try:
        for number, step in enumerate(plan):
            if stops:
                native.pump.stop()
            before = len(wire.sent)
            assert python.do(step) == native.do(step)
            if step[0] == "arrive":
                wire.incoming.append(arrived(step[1], number))
                native.wire.send(arrived(step[1], number))
            for queue in (TX, RX):
                model.process(queue)
            if stops:
                native.start()
            for kick in native.kicks:
                os.eventfd_write(kick, 1)
            for queue in (TX, RX):
                used = python.reap(queue)
                assert native.wait(queue, len(used)) == used
            for sent in wire.sent[before:]:
                assert native.wire.recv(1 << 17) == sent
        native.pump.stop()
        assert not native.reap(RX)
        with pytest.raises(BlockingIOError):
            native.wire.recv(1)
        counted = native.pump.counters
        lost = {f"dropped_{reason.replace(' ', '_')}": n for reason, n in model.dropped.items()}
        assert lost == {k: n for k, n in counted.items() if k.startswith("dropped") and n}
        assert counted["sent_frames"] == model.sent
        assert counted["sent_bytes"] == model.sent_bytes
        assert counted["received_frames"] == model.received
        assert counted["received_bytes"] == model.received_bytes
    finally:
        native.close()
        python.memory.close()


@pytest.mark.parametrize("first", [0, 1, 10, 11])
def test_07_cve_2021_3748_a_count_that_finds_no_room(first: int) -> None:
    """The number of merged buffers goes into the first one only if it holds a header."""
    native = Native(SplitDriver, ALL)
    native.start()
    try:
        native.do(("post", [first, 1526]))
        os.eventfd_write(native.kicks[RX], 1)
        native.wire.send(arrived(60, 1))
        native.wire.send(arrived(60, 2))
        lost, (length, data) = native.wait(RX, 2)
        assert lost == (0, b"")
        assert (length, data[10:12], data[12:]) == (72, b"\1\0", b"\2" * 60)
        assert native.pump.counters["dropped_no_room"] == 1
    finally:
        native.close()
