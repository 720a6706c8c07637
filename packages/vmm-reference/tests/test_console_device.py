from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtio_queue.testing import SplitDriver
from virtio_queue.testing.stateful import DeviceMachine
from vm_memory import GuestMemory
from vmm_reference.devices.console import model
from vmm_reference.devices.console.model import CONTROL, WINDOW, Console, PortSpec
from vmm_reference.devices.states import ConsoleState, StateError
from vmm_reference.testing import Bench

RX, TX, CONTROL_RX, CONTROL_TX, RX1, TX1 = range(6)
READY, ADD, REMOVE, PORT_READY, CONSOLE, RESIZE, OPEN, NAME = range(8)
PORTS = (PortSpec(console=True), PortSpec(console=False, name="org.agent"))


class Guest(Bench):
    """A console and a port, the host's end by hand, and a driver."""

    def __init__(self, ports: tuple[PortSpec, ...] = PORTS, **options: Any) -> None:
        self.output = [bytearray() for _ in ports]
        self.gone = True  # whether output is gone at once
        self.late: list[tuple[int, int]] = []
        self.rooms: list[int] = []
        self.console = Console(
            ports, self._sent, room=self.rooms.append, kick=lambda index: self.kick_later(index)
        )
        super().__init__(self.console, **options)
        self.settle()

    def _sent(self, port: int, data: bytes) -> None:
        self.output[port] += data
        if self.gone:
            self.late.append((port, len(data)))

    def settle(self) -> None:
        while self.pending or self.late:
            while self.late:
                self.console.transmitted(*self.late.pop(0))
            super().settle()

    def control(self, port: int, event: int, value: int = 1) -> None:
        self.send(CONTROL_TX, [CONTROL.pack(port, event, value)])

    def told(self) -> list[tuple[int, int, int, bytes]]:
        """What the device says, with buffers for it."""
        messages: list[tuple[int, int, int, bytes]] = []
        while True:
            self.queue(CONTROL_RX).add([], [64])
            self.driver.kick(CONTROL_RX)
            self.settle()
            used = self.queue(CONTROL_RX).reap()
            messages += [(*CONTROL.unpack_from(each.data), each.data[8:]) for each in used]
            if not used:
                return messages

    def up(self) -> Guest:
        """As Linux does."""
        self.control(0xFFFFFFFF, READY)
        for port, event, _, _ in self.told():
            assert event == ADD
            self.control(port, PORT_READY)
        self.told()
        return self

    def type(self, port: int, data: bytes) -> int:
        with self.device.lock:
            taken = self.console.receive(port, data)
            self.device.notify_used()
        return taken


@pytest.fixture
def guest() -> Iterator[Guest]:
    guest = Guest()
    yield guest
    guest.close()


def test_the_guest_is_told_of_its_ports(guest: Guest) -> None:
    """5.3.6.2: ports are added, and introduced once the driver has made them."""
    guest.console.resize(132, 43)
    guest.control(0xFFFFFFFF, READY)
    assert guest.told() == [(0, ADD, 1, b""), (1, ADD, 1, b"")]
    guest.control(0, PORT_READY)
    assert guest.told() == [
        (0, CONSOLE, 1, b""), (0, RESIZE, 0, b"\x2b\0\x84\0"), (0, OPEN, 1, b""),
    ]  # fmt: skip
    guest.control(1, PORT_READY)
    assert guest.told() == [(1, NAME, 1, b"org.agent\0"), (1, OPEN, 1, b"")]
    assert guest.config(0, 8) == b"\x84\0\x2b\0\2\0\0\0"


def test_output_and_input(guest: Guest) -> None:
    guest.up()
    (used,) = guest.send(TX, [b"hello ", b"world"])
    assert (bytes(guest.output[0]), used.length) == (b"hello world", 0)
    guest.send(TX1, [b"agent"])
    assert guest.output[1] == b"agent"
    for size in (3, 0, 10):
        guest.queue(RX).add([], [size])
    assert guest.type(0, b"typed") == 5
    assert b"".join(used.data for used in guest.queue(RX).reap()) == b"typed"
    assert (guest.console.sent, guest.console.received) == (16, 5)


def test_input_waits_for_buffers(guest: Guest) -> None:
    """What does not fit stays with the host, which hears when there is room."""
    guest.up()
    guest.queue(RX).add([], [3])
    assert guest.type(0, b"typed") == 3
    guest.rooms.clear()
    guest.queue(RX).add([], [3])
    assert guest.queue(RX).kick_needed()
    guest.driver.kick(RX)
    assert guest.rooms == [0]
    assert guest.type(0, b"ed") == 2


def test_a_port_that_nobody_has_open_takes_no_input(guest: Guest) -> None:
    guest.up()
    guest.queue(RX1).add([], [10])
    assert guest.type(1, b"x") == 0
    guest.rooms.clear()
    guest.control(1, OPEN)
    assert guest.rooms == [1]
    assert guest.type(1, b"x") == 1
    guest.control(1, OPEN, 0)
    guest.queue(RX1).add([], [10])
    assert guest.type(1, b"x") == 0


def test_a_driver_without_multiport_has_the_first_port() -> None:
    guest = Guest(features=~model.F_MULTIPORT & ((1 << 64) - 1))
    guest.send(TX, [b"plain"])
    guest.queue(RX).add([], [10])
    assert guest.type(0, b"typed") == 5
    assert guest.type(1, b"typed") == 0
    assert guest.output[0] == b"plain"
    guest.close()


def test_an_emergency_needs_no_queue() -> None:
    """5.3.5: a character written to the configuration space, by a kernel that knows little else."""
    guest = Guest(start=False)
    guest.driver.add_status(1)
    guest.driver.add_status(2)
    for character in b"Oops":
        guest.device.write_config(8, bytes([character, 0, 0, 0]))
    guest.device.write_config(0, b"\1\1\1\1")
    assert guest.output[0] == b"Oops"
    assert guest.config(0, 4) == bytes(4)
    guest.close()


def test_a_full_host_holds_a_port_back_and_not_a_console(guest: Guest) -> None:
    """A program waits; a kernel, which would spin, loses what can't be kept, and it is counted."""
    guest.up()
    guest.gone = False
    for queue, index in ((TX, 0), (TX1, 1)):
        for _ in range(6):
            guest.queue(queue).add([bytes(WINDOW // 4)])
        guest.driver.kick(queue)
        assert len(guest.output[index]) == WINDOW
    assert len(guest.queue(TX).reap()) == 6
    assert guest.console.dropped == WINDOW // 2
    assert len(guest.queue(TX1).reap()) == 4
    guest.console.transmitted(1, 1000)
    guest.settle()
    assert len(guest.output[1]) == WINDOW + 1000
    assert guest.queue(TX1).reap() == []
    guest.console.transmitted(1, WINDOW)
    guest.settle()
    assert len(guest.queue(TX1).reap()) == 2
    assert len(guest.output[1]) == WINDOW * 3 // 2


def test_the_other_console_works_while_one_is_full(guest: Guest) -> None:
    """A neighbour is not starved by a port that nobody reads."""
    guest.up()
    guest.gone = False
    guest.queue(TX1).add([bytes(WINDOW + 1)])
    guest.driver.kick(TX1)
    guest.gone = True
    guest.send(TX, [b"still here"])
    assert guest.output[0] == b"still here"


def test_hostile_buffer_of_gigabytes() -> None:
    """A chain that shows the same page a thousand times costs one window, not its length."""
    guest = Guest(memory=4 << 20)
    guest.gone = False
    guest.up()
    queue = guest.queue(TX1)
    assert isinstance(queue, SplitDriver)
    table = queue.arena.allocate(16 * 1000, align=16)
    for number in range(1000):
        entry = (1 << 20).to_bytes(8, "little") + (1 << 20).to_bytes(4, "little")
        flags = (1 if number < 999 else 0).to_bytes(2, "little") + (number + 1).to_bytes(
            2, "little"
        )
        queue.write(table + 16 * number, entry + flags)
    queue.write_descriptor(0, table, 16 * 1000, 4)
    queue.make_available(0)
    queue.publish()
    guest.driver.kick(TX1)
    assert len(guest.output[1]) == WINDOW
    guest.driver.write_status(0)
    guest.close()


def test_one_call_moves_a_bounded_amount(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "BUDGET", 1000)
    guest.up()
    for _ in range(4):
        guest.queue(TX).add([bytes(600)])
    guest.driver.kick(TX)
    assert 0 < len(guest.output[0]) <= 1000
    while guest.console.unfinished:
        guest.device.process(TX)
    assert len(guest.output[0]) == 2400


@pytest.mark.parametrize(
    ("port", "event", "value"),
    [
        (2, PORT_READY, 1),
        (0xFFFFFFFF, OPEN, 1),
        (0, ADD, 1),
        (0, 8, 1),
        (0, RESIZE, 1),
        (0, 0xFFFF, 0),
    ],
)
def test_hostile_control_message(guest: Guest, port: int, event: int, value: int) -> None:
    before = guest.console.save()
    guest.control(port, event, value)
    assert guest.console.refused == 1
    assert guest.console.save() == before


def test_hostile_short_control_message(guest: Guest) -> None:
    guest.send(CONTROL_TX, [b"1234567"])
    guest.send(CONTROL_TX, [], [8])
    assert guest.console.refused == 2


def test_hostile_flood_of_control_messages(guest: Guest) -> None:
    """A driver that asks for ever and never listens makes the device keep a bounded number."""
    for _ in range(1000):
        guest.control(0, READY)
        guest.control(0, PORT_READY)
        guest.control(1, PORT_READY)
    assert len(guest.console._messages) == 6
    assert len(guest.told()) == 6


def test_hostile_buffer_for_a_message(guest: Guest) -> None:
    """One that is too small is given back, and the message waits for another."""
    guest.control(0, READY)
    assert [used.length for used in guest.send(CONTROL_RX, [], [7])] == [0]
    assert guest.told()[0] == (0, ADD, 1, b"")


def test_the_host_leaves_and_comes(guest: Guest) -> None:
    """5.3.6.2: the guest hears of it; what it sends to nobody is counted."""
    guest.up()
    guest.console.set_open(1, False)
    assert guest.told() == [(1, OPEN, 0, b"")]
    guest.send(TX1, [b"lost"])
    assert (bytes(guest.output[1]), guest.console.dropped) == (b"", 4)
    guest.console.set_open(1, True)
    guest.console.set_open(1, True)
    assert guest.told() == [(1, OPEN, 1, b"")]


def test_resize_while_running(guest: Guest) -> None:
    guest.up()
    interrupts = guest.interrupts
    with guest.device.config_change():
        guest.console.resize(80, 25)
    assert guest.interrupts > interrupts
    assert guest.told() == [(0, RESIZE, 0, b"\x19\0\x50\0")]
    assert guest.config(0, 4) == b"\x50\0\x19\0"


def test_reset_forgets_the_driver(guest: Guest) -> None:
    guest.up()
    guest.gone = False
    guest.queue(TX1).add([bytes(WINDOW + 1)])
    guest.driver.kick(TX1)
    guest.control(0, READY)
    guest.driver.write_status(0)
    assert guest.console.save() == Guest().console.save()
    guest.console.transmitted(1, WINDOW)
    guest.driver.start()
    guest.up()
    guest.send(TX1, [b"again"])
    assert guest.output[1][-5:] == b"again"


def test_it_goes_on_elsewhere_in_the_middle_of_a_buffer(guest: Guest) -> None:
    """What the host had is not sent again; messages that waited still come."""
    guest.up()
    guest.gone = False
    data = bytes(n % 251 for n in range(WINDOW + 5000))
    guest.queue(TX1).add([data])
    guest.driver.kick(TX1)
    guest.control(1, OPEN)
    guest.console.resize(1, 2)
    other = Guest(start=False)
    moved = guest.moved_to(other.console)
    other.settle()
    assert guest.output[1] + other.output[1] == data
    assert len(moved.queue(TX1).reap()) == 1
    assert moved.queue(CONTROL_RX).reap()[0].data[:8] == CONTROL.pack(0, RESIZE, 0)
    moved.close()
    other.close()


def test_hostile_states(guest: Guest) -> None:
    state = guest.console.save()
    with pytest.raises(StateError, match=r"ConsoleState\.ports: 2 must be 1"):
        Console(PORTS[:1], lambda port, data: None).restore(state)
    bad: list[tuple[str, Any]]
    bad = [("ready", (True,)), ("offsets", (-1, 0)), ("messages", (b"short",))]
    for field, value in bad:
        with pytest.raises(StateError, match=rf"ConsoleState\.{field}"):
            attrs.evolve(state, **{field: value})
    far = attrs.evolve(state, offsets=(1 << 32, 1 << 32))
    fresh = Console(PORTS, lambda port, data: None)
    fresh.restore(far)
    assert fresh.save() == state
    assert isinstance(state, ConsoleState)


def test_nonsense_is_refused() -> None:
    for ports in ((), PORTS * 16):
        with pytest.raises(ValueError, match="ports"):
            Console(ports, lambda port, data: None)


@given(
    st.lists(st.binary(max_size=5000), max_size=10),
    st.lists(st.integers(1, 9000), max_size=10),
)
def test_all_that_a_port_is_given_goes_out_in_order(chunks: list[bytes], gone: list[int]) -> None:
    """Whatever the window and the pace of the host."""
    guest = Guest().up()
    guest.gone = False
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "WINDOW", 4096)
        for chunk in chunks:
            guest.queue(TX1).add([chunk])
        guest.driver.kick(TX1)
        for amount in [*gone, *[4096] * 20]:
            assert guest.console._ports[1].outstanding <= 4096
            guest.console.transmitted(1, min(amount, guest.console._ports[1].outstanding))
            guest.settle()
    assert guest.output[1] == b"".join(chunks)
    assert len(guest.queue(TX1).reap()) == len(chunks)
    guest.close()


messages = st.builds(CONTROL.pack, st.integers(0, 3), st.integers(0, 9), st.integers(0, 1))


class ConsoleMachine(DeviceMachine):
    """Any driver."""

    answers = False
    buffers = st.one_of(
        st.tuples(
            st.one_of(messages, st.binary(max_size=40)).map(lambda data: [data]), st.just([])
        ),
        st.tuples(st.just([]), st.lists(st.sampled_from([0, 1, 8, 40]), min_size=1, max_size=3)),
    )

    def make_model(self, memory: GuestMemory) -> Console:
        return Console(PORTS, lambda port, data: None)

    def transplant(self, old: Any, new: Any) -> None:
        new.restore(old.save())


TestAnyDriver = ConsoleMachine.TestCase
