from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtio_queue.constants import F_EVENT_IDX, F_VERSION_1
from virtio_queue.errors import ActivationError
from virtio_queue.testing.stateful import DeviceMachine
from vm_memory import GuestMemory
from vmm_reference.devices.limiter import Limiter, TokenBucket
from vmm_reference.devices.net import features, model
from vmm_reference.devices.net.model import Net
from vmm_reference.devices.states import NetState, StateError
from vmm_reference.testing import Bench

MAC = bytes.fromhex("0200000000fe")
OTHER = bytes.fromhex("020000000001")
BROADCAST = b"\xff" * 6
OFFLOADS = features.HOST_OFFLOADS | features.GUEST_OFFLOADS
RX, TX, CONTROL = 0, 1, 2
ALL = (1 << 64) - 1


class Wire:
    """A link in memory."""

    def __init__(self, *, vnet_header: bool = True, queues: int = 1) -> None:
        self.vnet_header = vnet_header
        self.offloads = OFFLOADS if vnet_header else 0
        self.queues = queues
        self.sent: list[bytes] = []
        self.incoming: list[deque[bytes]] = [deque() for _ in range(queues)]
        self.room = ALL
        self.broken = False
        self.told: list[int] = []

    def send(self, queue: int, pieces: Sequence[bytes | memoryview]) -> bool:
        if self.broken:
            raise OSError(5, "gone")
        if self.room == 0:
            return False
        self.room -= 1
        self.sent.append(b"".join(bytes(piece) for piece in pieces))
        return True

    def receive(self, queue: int) -> bytes | None:
        if self.broken:
            raise OSError(5, "gone")
        return self.incoming[queue].popleft() if self.incoming[queue] else None

    def set_offloads(self, offloads: int) -> None:
        if self.broken:
            raise OSError(5, "gone")
        self.told.append(offloads)

    def set_queues(self, pairs: int) -> None:
        self.told.append(-pairs)


def header(
    flags: int = 0, gso: int = 0, gso_size: int = 0, start: int = 0, offset: int = 0
) -> bytes:
    return features.HEADER.pack(flags, gso, 0, gso_size, start, offset, 0)


def frame(
    size: int = 60, target: bytes = MAC, source: bytes = OTHER, kind: bytes = b"\x08\0"
) -> bytes:
    start = target + source + kind
    return start + bytes(n & 0xFF for n in range(size - len(start)))


OUT = frame(target=OTHER, source=MAC)


class Net1(Bench):
    """A network device on a bench, and its wire."""

    def __init__(self, wire: Wire | None = None, features: int = ALL, **options: Any) -> None:
        self.wire = wire or Wire()
        self.net = Net(self.wire, MAC, kick=lambda index: self.kick_later(index), **options)
        super().__init__(self.net, features=features)

    def arrive(self, *frames: bytes) -> None:
        """Frames come from the host, with a header where the wire has them."""
        lead = header() if self.wire.vnet_header else b""
        self.wire.incoming[0].extend(lead + each for each in frames)
        self.net.readable(0)
        self.settle()

    def post(self, *sizes: int) -> None:
        """Buffers for frames."""
        for size in sizes:
            self.queue(RX).add([], [size])
        self.driver.kick(RX)
        self.settle()

    def received(self) -> list[bytes]:
        """Frames that arrived, without headers; merged buffers put together."""
        frames = []
        used = deque(self.queue(RX).reap())
        while used:
            first = used.popleft().data
            if not first:
                frames.append(b"")
                continue
            (count,) = struct.unpack_from("<H", first, 10)
            frames.append(first[12:] + b"".join(used.popleft().data for _ in range(count - 1)))
        return frames

    def command(self, kind: int, command: int, data: bytes = b"") -> bool:
        (used,) = self.send(CONTROL, [bytes([kind, command]), data], [1])
        return used.data == b"\0"


@pytest.fixture
def bench() -> Iterator[Net1]:
    bench = Net1()
    yield bench
    bench.close()


# Sending.


@pytest.mark.parametrize("cut", [1, 5, 12, 13, 40])
def test_a_frame_goes_out_however_it_is_cut(bench: Net1, cut: int) -> None:
    whole = header() + OUT
    (used,) = bench.send(TX, [whole[:cut], whole[cut:]])
    assert used.length == 0
    assert bench.wire.sent == [whole]
    assert (bench.net.sent, bench.net.sent_bytes, bench.net.dropped) == (1, 60, {})


def test_a_wire_without_headers_gets_frames_alone() -> None:
    bench = Net1(Wire(vnet_header=False))
    assert bench.device.driver_features & OFFLOADS == 0
    bench.send(TX, [header(), OUT])
    assert bench.wire.sent == [OUT]
    bench.close()


@pytest.mark.parametrize("length", [0, 1, 11])
def test_hostile_chain_shorter_than_its_header(bench: Net1, length: int) -> None:
    """Item 15: a chain that has no whole header is dropped and given back."""
    (used,) = bench.send(TX, [bytes(length)] if length else [], [] if length else [4])
    assert used.length == 0
    assert (bench.wire.sent, bench.net.dropped) == ([], {"no header": 1})


def test_hostile_frame_of_more_than_64_kib(bench: Net1) -> None:
    """Item 15: what no link carries is dropped before anything of it is read."""
    bench.send(TX, [header(), frame(features.MAX_FRAME + 1, source=MAC)])
    assert bench.net.dropped == {"long": 1}
    bench.send(TX, [header(), frame(features.MAX_FRAME, source=MAC)])
    assert len(bench.wire.sent[0]) == features.MAX_FRAME + 12


def test_hostile_frame_shorter_than_an_ethernet_header(bench: Net1) -> None:
    bench.send(TX, [header(), bytes(13)])
    assert bench.net.dropped == {"short": 1}


def test_a_spoofed_source_address_is_counted(bench: Net1) -> None:
    """Item 15: a guest may be a bridge, so its frames pass; whoever minds sees the count."""
    bench.send(TX, [header(), frame(source=OTHER)])
    assert (bench.net.sent, bench.net.spoofed) == (1, 1)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (header(1, 1, 0, 34, 16), "header"),  # no size of segments
        (header(0, 1, 1448), "header"),  # without a checksum to fill in
        (header(1, 2, 1448), "header"),  # no such type
        (header(1, 5, 1448), "header"),
        (header(1, 0, 0, 0xFFFF, 0xFFFF), "header"),
        (header(1, 0, 0, 50, 9), "header"),
        (header(1, 0x80, 0), "offload"),
    ],
)
def test_hostile_header(bench: Net1, bad: bytes, reason: str) -> None:
    """Item 15: what the specification forbids in a header drops the frame."""
    bench.send(TX, [bad, OUT])
    assert (bench.wire.sent, bench.net.dropped) == ([], {reason: 1})


@pytest.mark.parametrize("asked", [header(1, 0, 0, 34, 16), header(1, 1, 1448, 34, 16)])
def test_hostile_offload_that_was_not_negotiated(asked: bytes) -> None:
    """Item 15: a driver that accepted no offloads gets none."""
    bench = Net1(features=ALL & ~OFFLOADS)
    bench.send(TX, [asked, OUT])
    assert (bench.wire.sent, bench.net.dropped) == ([], {"offload": 1})
    bench.close()


@pytest.mark.parametrize(
    ("gso", "feature"),
    [(1, features.F_HOST_TSO4), (4, features.F_HOST_TSO6), (3, features.F_HOST_UFO)],
)
def test_hostile_segmentation_that_was_not_negotiated(gso: int, feature: int) -> None:
    """Item 15: each kind of segmentation is one feature; a checksum alone allows none."""
    for without, sent in ((feature, 0), (0, 1)):
        bench = Net1(features=ALL & ~without)
        bench.send(TX, [header(1, gso, 1000, 34, 16), OUT])
        assert len(bench.wire.sent) == sent
        assert bench.net.dropped == ({} if sent else {"offload": 1})
        bench.close()


def test_hostile_double_fetch_of_the_header(bench: Net1) -> None:
    """Item 12: the header that was checked is the one that is sent."""
    good = header()
    head = bench.queue(TX).add([good, OUT])
    (address, _), _ = bench.queue(TX).outstanding[head].readable
    real = bench.wire.send

    def send(queue: int, pieces: Sequence[bytes | memoryview]) -> bool:
        bench.queue(TX).write(address, header(1, 1, 1, 0xFFFF, 0xFFFF))
        return real(queue, pieces)

    bench.wire.send = send  # type: ignore[method-assign]
    bench.driver.kick(TX)
    assert bench.wire.sent == [good + OUT]


def test_a_full_link_makes_frames_wait(bench: Net1) -> None:
    """Without room nothing is lost or sent twice; the order stays."""
    bench.wire.room = 2
    frames = [frame(60 + n, source=MAC) for n in range(5)]
    for each in frames:
        bench.queue(TX).add([header(), each])
    bench.driver.kick(TX)
    assert len(bench.queue(TX).reap()) == 2
    bench.wire.room = 10
    bench.net.writable(0)
    bench.settle()
    assert [each[12:] for each in bench.wire.sent] == frames
    assert len(bench.queue(TX).reap()) == 3


def test_a_broken_link_loses_frames_and_says_so(bench: Net1) -> None:
    bench.wire.broken = True
    assert len(bench.send(TX, [header(), OUT])) == 1
    bench.post(2000)
    assert bench.net.dropped == {"link": 2}
    assert not bench.needs_reset


def test_a_link_that_refuses_needs_a_reset() -> None:
    wire = Wire()
    wire.broken = True
    model = Net(wire, MAC)
    bench = Bench(model, start=False)
    with pytest.raises(AssertionError, match=r"3\.1\.1"):
        bench.driver.start()
    assert bench.needs_reset
    with pytest.raises(ActivationError, match="gone"):
        model.activate(bench.memory, 0, bench.device.queues)
    bench.close()


# Receiving.


def test_a_frame_arrives(bench: Net1) -> None:
    bench.post(2000)
    bench.arrive(frame())
    assert bench.received() == [frame()]
    assert (bench.net.received, bench.net.received_bytes) == (1, 60)
    assert bench.interrupts


def test_frames_wait_for_buffers_in_order(bench: Net1) -> None:
    frames = [frame(60 + n) for n in range(5)]
    bench.arrive(*frames)
    assert bench.received() == []
    bench.post(*[100] * 5)
    assert bench.received() == frames


def test_a_long_frame_is_merged_of_small_buffers(bench: Net1) -> None:
    """5.1.6.4: num_buffers says how many; each but the last is full."""
    bench.post(*[1000] * 3)
    bench.arrive(frame(5000))
    assert bench.received() == []
    bench.post(*[1000] * 3)
    assert bench.received() == [frame(5000)]


def test_a_waiting_frame_takes_no_time(bench: Net1) -> None:
    """Too few buffers are no reason to be called again before the driver has made more."""
    bench.post(1000)
    bench.arrive(frame(5000))
    assert not bench.net.unfinished
    bench.queue(RX).add([], [100])
    assert bench.queue(RX).kick_needed()


def test_hostile_frame_larger_than_all_buffers() -> None:
    """Item 15: a ring full of buffers that are too small loses the frame, not the device."""
    bench = Net1()
    size = bench.queue(RX).size
    bench.post(*[20] * size)
    bench.arrive(frame(20 * size + 1), frame(60))
    got = bench.received()
    assert got == [b""] * size
    assert bench.net.dropped == {"no room": 1}
    bench.post(100)
    assert bench.received() == [frame(60)]
    bench.close()


@pytest.mark.parametrize("size", [0, 1, 11, 60])
def test_hostile_buffer_smaller_than_a_frame_without_merging(size: int) -> None:
    """Item 15: without MRG_RXBUF a frame that does not fit one buffer is lost (5.1.6.3.1)."""
    bench = Net1(features=ALL & ~features.F_MRG_RXBUF)
    if size:
        bench.post(size)
    else:
        bench.queue(RX).add([b"read only"], [])
        bench.driver.kick(RX)
    bench.arrive(frame(61))
    assert bench.received() == [b""]
    assert bench.net.dropped == {"no room": 1}
    bench.post(12 + 61)
    bench.arrive(frame(61))
    assert bench.received() == [frame(61)]
    bench.close()


def test_without_headers_from_the_wire_there_are_zeros() -> None:
    bench = Net1(Wire(vnet_header=False))
    bench.queue(RX).add([], [100])
    bench.driver.kick(RX)
    bench.arrive(frame())
    (used,) = bench.queue(RX).reap()
    assert used.data == bytes(10) + b"\1\0" + frame()
    bench.close()


@given(st.lists(st.integers(60, 9000), max_size=8), st.lists(st.integers(13, 5000), max_size=40))
def test_frames_are_the_same_whatever_the_buffers(sizes: list[int], buffers: list[int]) -> None:
    """Merged or not, early or late: what arrives is what came, as far as there are buffers."""
    bench = Net1(features=F_VERSION_1 | F_EVENT_IDX | features.F_MRG_RXBUF)
    frames = [frame(size) for size in sizes]
    half = len(buffers) // 2
    bench.post(*buffers[:half])
    bench.arrive(*frames)
    bench.post(*buffers[half:])
    got = bench.received()
    assert got == frames[: len(got)]
    rest, model = list(buffers), 0
    for size in sizes:  # how many a driver with these buffers gets
        needed = size + 12
        while rest and needed > 0:
            needed -= rest.pop(0)
        if needed > 0:
            break
        model += 1
    assert len(got) == model
    bench.close()


def test_06_cve_2020_16843_ingress_without_buffers_keeps_one_frame() -> None:
    """CVE-2020-16843: heavy traffic before and without buffers neither freezes nor piles up."""
    bench = Net1()
    bench.wire.incoming[0].extend(header() + frame() for _ in range(1000))
    for _ in range(50):
        bench.net.readable(0)
        bench.settle()
    assert len(bench.wire.incoming[0]) == 999
    for _ in range(10):
        bench.post(*[100] * 100)
        assert len(bench.received()) == 100
    assert bench.net.received == 1000
    bench.close()


def test_hostile_guest_frames_without_end_share_the_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One call moves a bounded number of frames and says that there are more."""
    monkeypatch.setattr(model, "BUDGET", 4)
    bench = Net1()
    for _ in range(10):
        bench.queue(TX).add([header(), OUT])
    bench.driver.kick(TX)
    counts = [len(bench.wire.sent)]
    while bench.net.unfinished:
        bench.device.process(TX)
        counts.append(len(bench.wire.sent))
    assert counts == [4, 8, 10]
    bench.close()


# Control.


def test_filters_follow_what_the_driver_says(bench: Net1) -> None:
    """Own address and broadcast pass; the rest as the control queue has it."""
    group, stranger = bytes.fromhex("01005e000001"), bytes.fromhex("020000000099")
    tagged = frame(kind=b"\x81\0\0\x05")

    def passes(each: bytes) -> bool:
        bench.post(200)
        before = bench.net.received
        bench.arrive(each)
        bench.queue(RX).reap()
        return bench.net.received > before

    assert passes(frame())
    assert passes(frame(target=BROADCAST))
    assert not passes(frame(target=group))
    assert not passes(frame(target=stranger))
    assert not passes(tagged)
    assert bench.command(2, 0, b"\x05\0")
    assert passes(tagged)
    assert bench.command(2, 1, b"\x05\0")
    assert not passes(tagged)
    table = b"\1\0\0\0" + stranger + b"\1\0\0\0" + group
    assert bench.command(1, 0, table)
    assert passes(frame(target=group))
    assert passes(frame(target=stranger))
    for mode, value in ((3, group), (4, stranger), (5, BROADCAST)):  # NOMULTI, NOUNI, NOBCAST
        assert bench.command(0, mode, b"\1")
        assert not passes(frame(target=value))
        assert bench.command(0, mode, b"\0")
        assert passes(frame(target=value))
    assert bench.command(1, 0, bytes(8))
    assert not passes(frame(target=group))
    assert bench.command(0, 1, b"\1")
    assert passes(frame(target=group))
    assert bench.command(0, 0, b"\1")
    assert passes(frame(target=stranger))
    assert bench.net.dropped["filtered"] == 8


def test_an_address_is_set(bench: Net1) -> None:
    assert bench.command(1, 1, OTHER)
    assert bench.config(0, 6) == OTHER
    bench.driver.write_status(0)
    assert bench.config(0, 6) == MAC


def test_offloads_are_set(bench: Net1) -> None:
    assert bench.wire.told == [features.GUEST_OFFLOADS, -1]
    assert bench.command(5, 0, struct.pack("<Q", features.F_GUEST_CSUM))
    assert bench.wire.told[-1] == features.F_GUEST_CSUM
    assert not bench.command(5, 0, struct.pack("<Q", 1 << 40))


def test_announce_until_it_is_acknowledged(bench: Net1) -> None:
    with bench.device.config_change():
        bench.net.announce()
    assert bench.config(6, 2) == b"\3\0"
    assert bench.command(3, 0)
    assert bench.config(6, 2) == b"\1\0"


def test_the_cable_is_pulled(bench: Net1) -> None:
    with bench.device.config_change():
        bench.net.link_up = False
    assert bench.config(6, 2) == b"\0\0"


@pytest.mark.parametrize(
    ("kind", "command", "data"),
    [
        (0, 0, b""), (0, 0, b"\1\1"), (0, 6, b"\1"), (0, 255, b"\1"), (1, 0, b""),
        (1, 0, b"\xff\xff\xff\xff"), (1, 0, b"\1\0\0\0" + MAC), (1, 0, bytes(9)),
        (1, 1, b"short"), (1, 1, b"longer than it"), (2, 0, b"\0\x10"), (2, 2, b"\0\0"),
        (2, 0, b"\0"), (3, 1, b""), (3, 0, b"\0"), (4, 0, b"\2\0"), (4, 0, b"\0\0"),
        (5, 0, bytes(7)), (9, 0, b""),
    ],
)  # fmt: skip
def test_hostile_command(bench: Net1, kind: int, command: int, data: bytes) -> None:
    """What a command breaks, it is refused for, and nothing has changed."""
    before = bench.net.save()
    assert not bench.command(kind, command, data)
    assert bench.net.save() == before


def test_hostile_table_of_addresses(bench: Net1) -> None:
    """More addresses than are kept: all of that kind pass, and memory is bounded."""
    many = struct.pack("<I", 5000) + MAC * 5000 + struct.pack("<I", 0)
    assert bench.command(1, 0, many)
    assert bench.net.control.unicast == []
    bench.post(100)
    bench.arrive(frame(target=bytes.fromhex("020000000077")))
    assert bench.net.received == 1


def test_a_command_without_room_for_an_answer(bench: Net1) -> None:
    bench.queue(CONTROL).add([b"\0\0\1"])
    bench.driver.kick(CONTROL)
    (used,) = bench.queue(CONTROL).reap()
    assert used.length == 0


def test_queue_pairs() -> None:
    """5.1.6.5.5: pairs beyond the first carry frames once the driver wants them."""
    wire = Wire(queues=4)
    bench = Net1(wire, pairs=4)
    assert bench.config(8, 2) == b"\4\0"
    wire.incoming[3].append(header() + frame())
    bench.queue(6).add([], [200])
    bench.driver.kick(6)
    assert bench.queue(6).reap() == []
    (used,) = bench.send(8, [b"\4\0", b"\4\0"], [1])
    assert used.data == b"\0"
    assert wire.told[-1] == -4
    assert len(bench.queue(6).reap()) == 1
    bench.send(7, [header(), OUT])
    assert wire.sent == [header() + OUT]
    for bad in (0, 5, 0xFFFF):
        (used,) = bench.send(8, [b"\4\0", struct.pack("<H", bad)], [1])
        assert used.data == b"\1"
    bench.close()


def test_control_is_the_third_queue_without_mq() -> None:
    """5.1.2: its place depends on what was negotiated, not on what is offered."""
    bench = Net1(Wire(queues=2), pairs=2, features=ALL & ~features.F_MQ)
    assert bench.command(0, 0, b"\1")
    bench.close()


# Limits, resets, states.


class Clock:
    def __init__(self) -> None:
        self.now = 0
        self.calls: list[tuple[int, Any]] = []

    def limiter(self, size: int) -> Limiter:
        return Limiter(
            lambda: self.now,
            lambda wait, call: self.calls.append((self.now + wait, call)),
            bandwidth=TokenBucket(size, 1000),
        )

    def advance(self, seconds: float) -> None:
        self.now += int(seconds * 1e9)
        due, self.calls = self.calls, []
        for when, call in due:
            if when <= self.now:
                call()
            else:
                self.calls.append((when, call))


def test_limits_hold_both_ways_and_change_while_running() -> None:
    """A second carries the bucket's worth; a limit that is lifted holds nothing back."""
    clock = Clock()
    bench = Net1(rx_limiter=clock.limiter(600), tx_limiter=clock.limiter(1200))
    bench.post(*[100] * 100)
    bench.arrive(*[frame(60)] * 50)
    for _ in range(50):
        bench.queue(TX).add([header(), OUT])
    bench.driver.kick(TX)
    assert (bench.net.received, bench.net.sent) == (10, 20)
    for second in range(1, 3):
        clock.advance(1)
        bench.settle()
        assert bench.net.received <= 10 + 11 * second
        assert 20 * second <= bench.net.sent <= 20 + 21 * second
    assert bench.net.rx_limiter is not None
    bench.net.rx_limiter.bandwidth = None
    bench.net.tx_limiter = None
    clock.advance(1)
    bench.settle()
    assert (bench.net.received, bench.net.sent) == (50, 50)
    bench.close()


def test_reset_forgets_everything(bench: Net1) -> None:
    bench.command(0, 0, b"\1")
    bench.command(2, 0, b"\5\0")
    bench.arrive(frame(3000))
    fresh = Net(Wire(), MAC).save()
    bench.driver.write_status(0)
    assert bench.net.save() == fresh
    bench.driver.start()
    bench.post(5000)
    assert bench.received() == []
    bench.arrive(frame())
    assert bench.received() == [frame()]


def test_it_goes_on_elsewhere_with_a_frame_that_waited(bench: Net1) -> None:
    """Filters, a waiting frame and the buffers taken for it move; nothing is lost or doubled."""
    bench.command(0, 1, b"\1")
    bench.command(5, 0, struct.pack("<Q", features.F_GUEST_CSUM))
    bench.post(1000, 1000)
    bench.arrive(frame(3000))
    wire = Wire()
    other = Net1(wire)
    moved = bench.moved_to(other.net)
    assert other.net.save() == bench.net.save()
    assert wire.told[-2:] == [features.F_GUEST_CSUM, -1]
    for _ in range(2):
        moved.queue(RX).add([], [1000])
    moved.driver.kick(RX)
    data = b"".join(used.data for used in moved.queue(RX).reap())
    assert data[12:] == frame(3000)
    moved.close()
    other.close()


def test_hostile_states() -> None:
    state = Net(Wire(), MAC).save()
    with pytest.raises(StateError, match=r"NetState\.pairs: 1 must be 2"):
        Net(Wire(queues=2), MAC, pairs=2).restore(state)
    for field, value in (
        ("mac", b"five!"), ("vlans", (4096,)), ("unicast", (MAC,) * 65), ("unicast", (b"x",)),
        ("active_pairs", 2), ("waiting", ()), ("offloads", -1), ("rx_limiter", 5),
    ):  # fmt: skip
        values = {item.name: getattr(state, item.name) for item in attrs.fields(NetState)}
        with pytest.raises(StateError, match=rf"NetState\.{field}"):
            NetState(**values | {field: value})


@pytest.mark.parametrize(
    ("mac", "options", "field"),
    [(b"short", {}, "mac"), (b"\1\0\0\0\0\1", {}, "mac"), (bytes(6), {}, "mac"),
     (MAC, {"mtu": 67}, "mtu"), (MAC, {"mtu": 65536}, "mtu"), (MAC, {"pairs": 2}, "pairs")],
)  # fmt: skip
def test_nonsense_is_refused(mac: bytes, options: dict[str, int], field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}: "):
        Net(Wire(), mac, **options)  # type: ignore[arg-type]


# Any driver.

chunks = st.sampled_from([0, 1, 11, 12, 13, 60, 1500])
commands = st.builds(
    lambda kind, command, data: bytes([kind, command]) + data,
    st.integers(0, 6), st.integers(0, 3), st.binary(max_size=20),
)  # fmt: skip


class NetMachine(DeviceMachine):
    """Any driver, and a wire with something on it now and then."""

    answers = False
    buffers = st.one_of(
        st.tuples(
            st.one_of(commands, st.builds(lambda n: header() + bytes(n), chunks)).map(
                lambda data: [data]
            ),
            st.sampled_from([[], [1]]),
        ),
        st.tuples(st.just([]), st.lists(chunks, min_size=1, max_size=4)),
    )

    def make_model(self, memory: GuestMemory) -> Net:
        wire = Wire(queues=2)
        for pair in (0, 1):
            wire.incoming[pair].extend(header() + frame(60 + 700 * n, BROADCAST) for n in range(9))
        return Net(wire, MAC, pairs=2, mtu=1500)

    def transplant(self, old: Any, new: Any) -> None:
        new.restore(old.save())


TestAnyDriver = NetMachine.TestCase
TestAnyDriver.__doc__ = "Whatever a driver does, the device and its neighbours survive."


class PciNetMachine(NetMachine):
    pci = True


TestAnyPciDriver = PciNetMachine.TestCase
