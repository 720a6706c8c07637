from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm_reference.devices import states
from vmm_reference.devices.serial import Serial

DATA, IER, IIR, LCR, MCR, LSR, MSR, SCR = range(8)
FCR = IIR  # written
IIR_NONE = 0x01
THRE, TEMT, READY, CONNECTED = 0x20, 0x40, 0x60, 0xB0


class Port:
    """A UART with everything it says, and one-byte accesses."""

    def __init__(self, limit: int = 64) -> None:
        self.levels: list[bool] = []
        self.sent = b""
        self.rooms = 0
        self.uart = Serial(self.levels.append, self.transmit, room=self.room, limit=limit)

    def transmit(self, data: bytes) -> None:
        self.sent += data

    def room(self) -> None:
        self.rooms += 1

    def get(self, offset: int) -> int:
        return self.uart.read(offset, 1)[0]

    def put(self, offset: int, *values: int) -> None:
        for value in values:
            self.uart.write(offset, bytes([value]))


@pytest.fixture
def port() -> Port:
    return Port()


def test_registers_after_power_on(port: Port) -> None:
    """A fresh UART is idle, empty, without FIFO or interrupts, and its cable is connected."""
    assert [port.get(n) for n in range(8)] == [0, 0, 1, 0, 0, READY, 0xB0, 0]
    assert port.levels == []


def test_bytes_leave_in_order(port: Port) -> None:
    """What the guest writes to THR is given to the line, and the transmitter stays ready."""
    for value in b"hello":
        assert port.get(LSR) & READY == READY
        port.put(DATA, value)
    assert port.sent == b"hello"


def test_wide_access_takes_registers_in_turn(port: Port) -> None:
    """A wider access is split into bytes at rising addresses, as an 8-bit ISA card sees it."""
    port.uart.write(MCR, b"\x03\x00\x00\x77")
    assert port.uart.read(LCR, 4) == b"\x00\x03\x60\xb0"
    assert port.uart.read(SCR, 1) == b"\x77"


def test_divisor_latch_hides_data_and_ier(port: Port) -> None:
    """With DLAB set, offsets 0 and 1 are the divisor, and nothing is sent or enabled."""
    port.put(LCR, 0x80)
    assert (port.get(DATA), port.get(IER)) == (12, 0)
    port.put(DATA, 1)
    port.put(IER, 2)
    assert (port.get(DATA), port.get(IER)) == (1, 2)
    port.put(LCR, 3)
    assert (port.get(DATA), port.get(IER), port.sent, port.levels) == (0, 0, b"", [])


def test_unimplemented_bits_read_as_zero(port: Port) -> None:
    """IER and MCR have four and five bits; probes for larger UARTs find none."""
    port.put(IER, 0xFF)
    port.put(MCR, 0xFF)
    assert (port.get(IER), port.get(MCR)) == (0x0F, 0x1F)
    port.put(MCR, 0)
    port.put(IER, 0)
    port.put(IIR, 0xE7)  # a 16750 would show its 64-byte FIFO in bit 5
    assert port.get(IIR) == 0xC1


# Transmission by interrupt.


def test_enabling_thre_interrupt_raises_it_at_once(port: Port) -> None:
    """A driver that enables the transmitter's interrupt while it is empty gets one."""
    port.put(IER, 2)
    assert port.levels == [True]
    assert port.get(IIR) == 0x02
    assert port.levels == [True, False]
    assert port.get(IIR) == 0x01


def test_thre_interrupt_is_raised_again_by_every_enabling(port: Port) -> None:
    """Off and on again is a new interrupt, also after IIR has acknowledged the first."""
    port.put(IER, 2)
    port.get(IIR)
    port.put(IER, 0, 2)
    assert port.get(IIR) == 0x02


def test_rewriting_ier_does_not_raise_an_acknowledged_thre(port: Port) -> None:
    """Writing IER with the bit already set does not bring back what IIR has acknowledged."""
    port.put(IER, 2)
    port.get(IIR)
    port.put(IER, 3)
    assert port.get(IIR) == 0x01


def test_sending_by_interrupt_is_paced_by_the_host() -> None:
    """A handler goes on until it is a burst ahead; the host's progress is the next interrupt."""
    port = Port(limit=4096)
    port.put(IER, 2)
    sent = 0
    while port.get(IIR) == 0x02:
        port.put(DATA, *b"a whole FIFO....")
        sent += 16
        assert sent < 1000
    assert (sent, port.get(LSR) & READY) == (272, READY)
    assert port.levels == [True, False]
    port.uart.transmitted(10)
    assert port.levels == [True, False, True]
    assert (port.get(IIR), port.get(IIR)) == (0x02, 0x01)
    port.uart.transmitted(0)
    assert port.get(IIR) == 0x01
    port.uart.transmitted(262)
    assert port.levels == [True, False, True, False, True]


def test_a_handler_that_does_not_ask_is_told_by_the_host(port: Port) -> None:
    """Bytes that left without the guest having read IIR raise the interrupt when they are gone."""
    port.put(IER, 2)
    port.put(DATA, 1)
    assert port.levels == [True, False]
    port.uart.transmitted(1)
    assert port.levels == [True, False, True]


def test_each_byte_that_leaves_makes_an_edge() -> None:
    """A handler that looks at no register but writes the next byte gets an edge for each."""
    levels: list[bool] = []
    uart = Serial(levels.append, lambda data: uart.transmitted(len(data)))
    uart.write(IER, b"\x02")
    for value in b"abc":
        uart.write(DATA, bytes([value]))
    assert levels == [True, *[False, True] * 3]


def test_loopback_sends_at_once(port: Port) -> None:
    """In loopback there is no host to wait for: each byte leaves as it is written."""
    port.put(MCR, 0x10)
    port.put(IER, 2)
    port.put(DATA, *b"ab")
    assert port.levels == [True, False, True, False, True]


# Back-pressure.


def test_ready_means_room_for_a_whole_fifo(port: Port) -> None:
    """THRE goes when less than 16 bytes fit; those that a driver then sends at once all fit."""
    port.put(DATA, *bytes(48))
    assert port.get(LSR) & READY == READY
    port.put(DATA, *b"0123456789abcdef")
    assert port.uart.dropped == 0
    assert port.get(LSR) & READY == 0


def test_full_transmitter_withholds_its_interrupt(port: Port) -> None:
    """While the host takes nothing the guest sees no THRE; it comes when the bytes have gone."""
    port.put(DATA, *bytes(64))
    port.put(IER, 2)
    assert (port.levels, port.get(IIR)) == ([], 0x01)
    port.uart.transmitted(15)
    assert port.levels == []
    port.uart.transmitted(1)
    assert port.levels == [True]
    assert (port.get(LSR) & READY, port.get(IIR)) == (READY, 0x02)


def test_interrupt_goes_when_the_transmitter_fills(port: Port) -> None:
    """A driver that sends by interrupt stops getting them once the host is behind."""
    port.put(IER, 2)
    port.put(DATA, *bytes(64))
    assert port.levels[-1] is False
    port.uart.transmitted(64)
    assert port.levels[-1] is True


def test_byte_written_against_back_pressure_is_dropped_and_counted(port: Port) -> None:
    """A guest that ignores LSR loses the byte, and the loss can be read by the host."""
    port.put(DATA, *range(70))
    assert port.sent == bytes(range(64))
    assert port.uart.dropped == 6
    port.uart.transmitted(64)
    port.put(DATA, 1)
    assert (port.sent[64:], port.uart.dropped) == (b"\x01", 6)


def test_host_may_take_bytes_back_at_once() -> None:
    """`transmitted` may be called from within `transmit`: then the guest never waits."""
    sent = bytearray()

    def transmit(data: bytes) -> None:
        sent.extend(data)
        uart.transmitted(len(data))

    uart = Serial(lambda level: None, transmit, limit=32)
    uart.write(IER, b"\x02")
    for value in range(200):
        uart.write(DATA, bytes([value]))
    assert sent == bytes(range(200))
    assert uart.dropped == 0


@pytest.mark.parametrize("count", [-1, 1])
def test_taking_back_what_is_not_under_way_is_refused(port: Port, count: int) -> None:
    """`transmitted` counts: a caller's mistake is told, not stored."""
    with pytest.raises(ValueError, match="only 0 bytes are under way"):
        port.uart.transmitted(count)


def test_limit_must_hold_a_fifo_and_more() -> None:
    """A limit below 32 bytes is refused: THRE could never show."""
    with pytest.raises(ValueError, match="at least 32"):
        Port(limit=31)


# Reception.


def test_without_fifo_one_byte_is_taken(port: Port) -> None:
    """A 16450 has room for one byte; the host keeps the rest, and is told when to come back."""
    port.put(IER, 1)
    assert port.uart.receive(b"ab") == 1
    assert (port.uart.receive_space, port.rooms, port.get(IIR)) == (0, 0, 0x04)
    assert (port.get(DATA), port.rooms, port.levels) == (ord("a"), 1, [True, False])


def test_host_input_is_bounded(port: Port) -> None:
    """Whatever the host has, 16 bytes are taken (CVE-2020-27174 was a FIFO without a limit)."""
    port.put(IIR, 0x01)
    assert port.uart.receive(bytes(100_000)) == 16
    assert port.uart.receive(b"x") == 0
    port.get(DATA)
    assert (port.rooms, port.uart.receive_space) == (1, 1)


def test_room_is_told_once_and_only_when_asked_for(port: Port) -> None:
    """A host that was refused nothing is not called; one that was is called once."""
    port.put(IIR, 0x01)
    port.uart.receive(b"abc")
    port.get(DATA)
    assert port.rooms == 0
    port.uart.receive(bytes(20))
    port.get(DATA)
    port.get(DATA)
    assert port.rooms == 1


@pytest.mark.parametrize(("fcr", "level"), [(0x01, 1), (0x41, 4), (0x81, 8), (0xC1, 14)])
def test_trigger_level_and_timeout(port: Port, fcr: int, level: int) -> None:
    """At the trigger level IIR says data; below, the bytes have rested and it says timeout."""
    port.put(IIR, fcr)
    port.put(IER, 1)
    port.uart.receive(bytes(level))
    assert port.get(IIR) == 0xC4
    port.get(DATA)
    assert port.get(IIR) == (0xCC if level > 1 else 0xC1)
    for _ in range(level - 1):
        port.get(DATA)
    assert (port.get(IIR), port.levels) == (0xC1, [True, False])


def test_regression_input_pending_while_ier_is_masked(port: Port) -> None:
    """Input that came while IER was off raises the interrupt when IER comes back.

    printk turns IER off while it writes; a UART that raises interrupts only on arrival loses the
    byte (rust-vmm vm-superio #135).
    """
    port.put(IER, 1)
    port.put(IER, 0)
    port.uart.receive(b"x")
    assert port.levels == []
    port.put(IER, 1)
    assert port.levels == [True]
    port.put(IER, 0, 1)
    assert port.levels == [True, False, True]


def test_clearing_the_receive_fifo(port: Port) -> None:
    """FCR bit 1 and a change of FCR bit 0 empty the receiver and make room."""
    port.put(IIR, 0x01)
    port.put(IER, 1)
    port.uart.receive(bytes(20))
    port.put(IIR, 0x03)
    assert (port.get(LSR), port.levels, port.rooms) == (READY, [True, False], 1)
    port.uart.receive(b"ab")
    port.put(IIR, 0x00)
    assert (port.get(LSR), port.get(IIR)) == (READY, 0x01)


def test_break_arrives_with_its_byte(port: Port) -> None:
    """A break is a null byte; LSR shows it when the byte is next, and keeps it until read."""
    port.put(IIR, 0x01)
    port.put(IER, 5)
    port.uart.receive(b"a")
    assert port.uart.receive_break()
    assert port.get(LSR) == READY | 0x81  # an error is somewhere in the FIFO
    assert port.get(IIR) == 0xC4
    port.get(DATA)
    assert port.get(IIR) == 0xC6
    assert port.get(LSR) == READY | 0x99
    assert port.get(LSR) == READY | 0x01
    assert port.get(DATA) == 0


def test_break_needs_room_too(port: Port) -> None:
    """A break that does not fit is refused like a byte, and the host is told when it fits."""
    port.uart.receive(b"a")
    assert not port.uart.receive_break()
    port.get(DATA)
    assert port.rooms == 1


def test_guest_break_is_counted(port: Port) -> None:
    """LCR's break bit is counted where it goes from 0 to 1."""
    port.put(LCR, 0x43, 0x43, 0x03, 0x40)
    assert port.uart.breaks == 2


# Loopback and modem lines.


def test_loopback_joins_output_and_input(port: Port) -> None:
    """In loopback the guest reads what it writes, nothing is sent, and the host is cut off."""
    port.put(IIR, 0x01)
    port.put(MCR, 0x10)
    port.put(DATA, *b"loop")
    assert (port.uart.receive(b"x"), port.uart.receive_space, port.sent) == (0, 0, b"")
    assert bytes(port.get(DATA) for _ in range(4)) == b"loop"
    port.put(MCR, 0)
    assert port.rooms == 1


def test_loopback_overrun(port: Port) -> None:
    """A 17th byte in loopback is lost and shows as an overrun, which LSR clears."""
    port.put(IIR, 0x01)
    port.put(IER, 4)
    port.put(MCR, 0x10)
    port.put(DATA, *range(17))
    assert port.get(IIR) == 0xC6
    assert (port.get(LSR) & 0x02, port.get(LSR) & 0x02) == (0x02, 0)
    assert bytes(port.get(DATA) for _ in range(16)) == bytes(range(16))


def test_loopback_overrun_without_fifo_keeps_the_last(port: Port) -> None:
    """Without the FIFO an overrun replaces the byte that was not read."""
    port.put(MCR, 0x10)
    port.put(DATA, 1, 2)
    assert (port.get(LSR), port.get(DATA)) == (READY | 0x03, 2)


def test_loopback_break(port: Port) -> None:
    """In loopback the guest receives its own break."""
    port.put(MCR, 0x10)
    port.put(LCR, 0x43)
    assert (port.get(LSR), port.get(DATA), port.uart.breaks) == (READY | 0x19, 0, 0)


@pytest.mark.parametrize("mcr", range(16))
def test_loopback_maps_outputs_to_inputs(port: Port, mcr: int) -> None:
    """DTR, RTS, OUT1, OUT2 appear as DSR, CTS, RI, DCD: how Linux tells a UART from nothing."""
    port.put(MCR, 0x10 | mcr)
    msr = port.get(MSR)
    assert [msr >> n & 1 for n in (5, 4, 6, 7)] == [mcr >> n & 1 for n in range(4)]


def test_modem_changes_interrupt_until_msr_is_read(port: Port) -> None:
    """Each line that changed is marked; the ring indicator only where it ends."""
    port.put(MCR, 0x14)
    assert port.get(MSR) == 0x4B
    port.put(IER, 8)
    port.put(MCR, 0x10)
    assert port.get(IIR) == 0x00
    assert (port.get(MSR), port.get(MSR), port.get(IIR)) == (0x04, 0, 0x01)
    assert port.levels == [True, False]


def test_priority_of_causes(port: Port) -> None:
    """IIR names line errors before data, data before the transmitter, that before the modem."""
    port.put(MCR, 0x10)
    port.put(DATA, 1, 2)
    port.put(IER, 0x0F)
    seen = []
    for acknowledge in (LSR, DATA, None, MSR):
        seen.append(port.get(IIR))
        if acknowledge is not None:
            port.get(acknowledge)
    assert seen == [0x06, 0x04, 0x02, 0x00]
    assert port.get(IIR) == 0x01


# State.


def test_state_of_a_full_transmitter(port: Port) -> None:
    """Restored, a UART that was full is empty and says so: its bytes are the backend's."""
    port.put(DATA, *bytes(64))
    port.put(IER, 2)
    other = Port()
    other.uart.restore(port.uart.save())
    assert (other.levels, other.get(LSR) & READY, other.rooms) == ([True], READY, 1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("ier", 0x10), ("ier", -1), ("lcr", 256), ("mcr", True), ("received", bytes(17)),
        ("received", "a"), ("received_errors", b"\0\0"), ("overrun", None), ("version", 2),
    ],
)  # fmt: skip
def test_impossible_state_is_refused(port: Port, field: str, value: object) -> None:
    """A state that no UART can have is refused with the field's name."""
    field = {"overrun": "thr_empty_pending"}.get(field, field)
    values = {a.name: getattr(port.uart.save(), a.name) for a in states.SerialState.__attrs_attrs__}
    with pytest.raises(states.StateError, match=f"SerialState.{field}"):
        states.SerialState(**{**values, field: value})


# Anything at all.

operations = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, 8), st.binary(min_size=1, max_size=8)),
        st.tuples(st.just("read"), st.integers(0, 8), st.integers(0, 8)),
        st.tuples(st.just("receive"), st.just(0), st.binary(max_size=20)),
        st.tuples(st.just("break"), st.just(0), st.just(0)),
        st.tuples(st.just("transmitted"), st.integers(0, 64), st.just(0)),
    ),
    max_size=60,
)


class Model:
    """What bytes may be where, told without interrupts: the oracle of the next test."""

    def __init__(self) -> None:
        self.fifo = self.loop = self.dlab = False
        self.held = bytearray()
        self.sent = b""
        self.under_way = self.dropped = 0

    @property
    def depth(self) -> int:
        return 16 if self.fifo else 1

    def write(self, offset: int, value: int) -> None:
        if offset == DATA and not self.dlab:
            if self.loop:
                self.arrive(value)
            elif self.under_way < 64:
                self.sent += bytes([value])
                self.under_way += 1
            else:
                self.dropped += 1
        elif offset == IIR:
            if value & 2 or bool(value & 1) != self.fifo:
                self.held.clear()
            self.fifo = bool(value & 1)
        elif offset == MCR:
            self.loop = bool(value & 0x10)
        elif offset == LCR:
            self.dlab = bool(value & 0x80)

    def arrive(self, value: int) -> None:
        if len(self.held) < self.depth:
            self.held.append(value)
        elif not self.fifo:
            self.held[:] = bytes([value])


@given(operations)
def test_no_byte_is_lost_or_invented(steps: list[tuple[str, int, object]]) -> None:
    """Whatever comes, bytes keep their order, the line tells IIR, and state is the whole device."""
    port, model, lcr_break = Port(), Model(), False
    for kind, number, value in steps:
        if kind == "write":
            assert isinstance(value, bytes)
            port.uart.write(number, value)
            for n, byte in enumerate(value, number):
                if n == LCR:
                    if byte & 0x40 and not lcr_break and model.loop:
                        model.arrive(0)
                    lcr_break = bool(byte & 0x40)
                model.write(n, byte)
        elif kind == "read":
            assert isinstance(value, int)
            data = port.uart.read(number, value)
            assert len(data) == value
            if number == DATA and value and not model.dlab:
                assert data[0] == (model.held.pop(0) if model.held else 0)
        elif kind == "receive":
            assert isinstance(value, bytes)
            space = 0 if model.loop else model.depth - len(model.held)
            assert port.uart.receive_space == space
            assert port.uart.receive(value) == min(space, len(value))
            model.held += value[:space]
        elif kind == "break":
            fits = not model.loop and len(model.held) < model.depth
            assert port.uart.receive_break() == fits
            model.held += b"\0" * fits
        else:
            count = min(number, model.under_way)
            port.uart.transmitted(count)
            model.under_way -= count
        assert port.sent == model.sent
        assert port.uart.dropped == model.dropped
        assert port.levels == [n % 2 == 0 for n in range(len(port.levels))]
        state = port.uart.save()
        assert state.received == model.held
        assert state.transmitting == (model.under_way > 0)
        assert bool(port.uart.interrupt_level) >= bool(state.ier & 1 and model.held)
        twin = Port()
        twin.uart.restore(state)
        if not state.transmitting:
            assert twin.uart.save() == state
            assert twin.uart.interrupt_level == port.uart.interrupt_level
            assert port.uart.interrupt_level == (twin.get(IIR) & 1 == 0)
            twin.uart.restore(state)
            assert bool(twin.get(LSR) & 1) == bool(model.held)


class Served(Port):
    """A UART whose guest is served as kvm_ioctls.hot serves it while the UART is quiet."""

    AHEAD = 8

    def __init__(self) -> None:
        super().__init__()
        self.kept = b""
        self.told: tuple[bool, bool, int | None] = True, True, IIR_NONE
        self.uart = Serial(
            self.interrupt, self.transmit, room=self.room, limit=64,
            quiet=self.listen, ahead=self.AHEAD,
        )  # fmt: skip

    def interrupt(self, level: bool) -> None:
        # From here on the guest's handler runs, on another thread.
        assert not level or self.told[2] is None
        self.levels.append(level)

    def listen(self, quiet: bool, plain: bool, iir: int | None) -> None:
        assert (quiet, plain, iir) != self.told
        assert quiet or (not plain and iir is None)
        self.told = quiet, plain, iir

    def flush(self) -> None:
        kept, self.kept = self.kept, b""
        if kept:
            self.uart.posted(kept)

    def get(self, offset: int) -> int:
        quiet, _, iir = self.told
        if quiet and offset in (LSR, MSR):
            return READY if offset == LSR else CONNECTED
        if iir is not None and offset == IIR:
            return iir
        self.flush()
        return super().get(offset)

    def put(self, offset: int, *values: int) -> None:
        for value in values:
            if self.told[1] and offset == DATA and len(self.kept) < self.AHEAD:
                self.kept += bytes([value])
            else:
                self.flush()
                super().put(offset, value)


GUEST = st.tuples(
    st.sampled_from(["get", "put"]),
    st.sampled_from([DATA, DATA, DATA, LSR, LSR, MSR, IER, IIR, IIR, LCR, MCR, SCR]),
    st.sampled_from([0, 1, 2, 3, 0x10, 0x41, 0x80]),
)
HOST = st.tuples(st.sampled_from(["flush", "receive", "gone"]), st.integers(1, 20), st.just(0))


@given(st.lists(GUEST | HOST, max_size=80))
def test_a_guest_can_not_tell_that_it_is_served_without_the_uart(
    steps: list[tuple[str, int, int]],
) -> None:
    """Reads, the line's bytes and the interrupt are those of a UART that sees each access."""
    plain, served = Port(), Served()
    for what, number, value in steps:
        if what == "get":
            assert plain.get(number) == served.get(number)
        elif what == "put":
            plain.put(number, value)
            served.put(number, value)
        elif what == "flush":
            served.flush()
        elif what == "receive":
            served.flush()  # as the bytes are on the line, they were written before
            data = bytes(range(number))
            assert plain.uart.receive(data) == served.uart.receive(data)
        else:
            served.flush()
            count = min(number, plain.uart._under_way)
            plain.uart.transmitted(count)
            served.uart.transmitted(count)
        if not served.kept:
            assert plain.sent == served.sent
            assert plain.uart.interrupt_level == served.uart.interrupt_level
            assert plain.uart.save() == served.uart.save()
    served.flush()
    assert plain.sent == served.sent
    assert plain.uart.dropped == served.uart.dropped


def test_a_driver_that_sends_by_interrupt_is_served_once_it_has_taken_the_interrupt() -> None:
    """From IIR to the next IIR, which finds the transmitter empty again, the UART is not needed."""
    served = Served()
    served.put(IER, 0x02)
    assert (served.told, served.levels) == ((True, False, None), [True])
    for turn in range(1, 4):
        assert served.get(IIR) == 0x02
        assert served.told == (True, True, None)
        assert (served.get(LSR), served.get(MSR)) == (READY, CONNECTED)
        served.put(DATA, *bytes(Served.AHEAD))
        assert len(served.kept) == Served.AHEAD
        assert len(served.sent) == Served.AHEAD * (turn - 1)
    served.flush()
    served.uart.transmitted(len(served.sent))
    assert served.told == (True, False, None)
    assert served.levels == [True, False, True]


def test_a_driver_that_is_through_learns_that_there_is_no_interrupt_without_the_uart() -> None:
    """What IIR then reads as is told too, FIFO or not, while bytes are kept."""
    served = Served()
    for fifo, iir in ((0, IIR_NONE), (1, IIR_NONE | 0xC0)):
        served.put(FCR, fifo)
        served.put(IER, 0x07)
        assert not served.told[1]
        served.put(IER, 0x05)
        assert served.told == (True, True, iir)
        served.put(DATA, 1)
        assert (served.get(IIR), served.kept) == (iir, b"\1")
        served.flush()
