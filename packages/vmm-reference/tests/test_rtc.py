from __future__ import annotations

import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm_reference.devices.rtc import Rtc
from vmm_reference.devices.states import RtcState, StateError

SECONDS, SECONDS_ALARM, MINUTES, MINUTES_ALARM, HOURS, HOURS_ALARM = range(6)
WEEKDAY, DAY, MONTH, YEAR, A, B, C, D, CENTURY = 6, 7, 8, 9, 10, 11, 12, 13, 0x32
SET, PIE, AIE, UIE, BINARY, H24 = 0x80, 0x40, 0x20, 0x10, 0x04, 0x02

UTC = datetime.UTC
NOON = datetime.datetime(2026, 11, 22, 12, 34, 56, tzinfo=UTC)


class Clock:
    """An RTC on a clock that stands until it is moved, with everything it says."""

    def __init__(self, now: float = NOON.timestamp()) -> None:
        self.now = now
        self.levels: list[bool] = []
        self.timers: list[float | None] = []
        self.rtc = Rtc(lambda: self.now, self.levels.append, timer=self.timers.append)

    def get(self, index: int) -> int:
        self.rtc.write(0, bytes([index]))
        return self.rtc.read(1, 1)[0]

    def put(self, index: int, value: int) -> None:
        self.rtc.write(0, bytes([index, value]))

    def time(self) -> datetime.datetime:
        """The registers, read as the format in register B says."""
        binary, h24 = self.get(B) & BINARY, self.get(B) & H24

        def number(index: int) -> int:
            value = self.get(index)
            assert binary or (value & 15 < 10 and value >> 4 < 10)
            return value if binary else (value >> 4) * 10 + (value & 15)

        hour = self.get(HOURS)
        if h24:
            hours = number(HOURS)
        else:
            twelve = hour & 0x7F if binary else (hour >> 4 & 7) * 10 + (hour & 15)
            assert 1 <= twelve <= 12
            hours = twelve % 12 + (12 if hour & 0x80 else 0)
        year = number(CENTURY) * 100 + number(YEAR)
        day = (number(DAY), hours, number(MINUTES), number(SECONDS))
        return datetime.datetime(year, number(MONTH), *day, tzinfo=UTC)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_pc_finds_what_it_expects(clock: Clock) -> None:
    """After power-on: 24 hours, BCD, divider running, valid memory, no update under way."""
    assert [clock.get(n) for n in (A, B, C, D)] == [0x26, 0x02, 0, 0x80]
    assert [hex(clock.get(n)) for n in (CENTURY, YEAR, MONTH, DAY, HOURS, MINUTES, SECONDS)] == [
        "0x20", "0x26", "0x11", "0x22", "0x12", "0x34", "0x56",
    ]  # fmt: skip
    assert clock.get(WEEKDAY) == 1  # a Sunday


@pytest.mark.parametrize("b", [0, BINARY, H24, BINARY | H24])
@given(st.datetimes(datetime.datetime(1970, 1, 1), datetime.datetime(9998, 12, 31)))
def test_time_reads_back_in_every_format(b: int, when: datetime.datetime) -> None:
    """BCD or binary, 12 or 24 hours: the registers show the clock's time."""
    when = when.replace(tzinfo=UTC, microsecond=0)
    clock = Clock(when.timestamp())
    clock.put(B, b)
    assert clock.time() == when
    assert clock.get(WEEKDAY) == when.isoweekday() % 7 + 1


@pytest.mark.parametrize("b", [0, BINARY, H24, BINARY | H24])
@given(st.datetimes(datetime.datetime(1970, 1, 1), datetime.datetime(9998, 12, 31)))
def test_setting_the_clock(b: int, when: datetime.datetime) -> None:
    """What the guest sets with updates halted is the time from which it goes on."""
    when = when.replace(tzinfo=UTC, microsecond=0)
    clock = Clock()
    clock.put(B, b | SET)

    def store(index: int, value: int, bits: int = 0) -> None:
        clock.put(index, bits | (value if b & BINARY else value // 10 << 4 | value % 10))

    store(CENTURY, when.year // 100)
    for index, value in (
        (YEAR, when.year % 100), (MONTH, when.month), (DAY, when.day),
        (MINUTES, when.minute), (SECONDS, when.second),
    ):  # fmt: skip
        store(index, value)
    if b & H24:
        store(HOURS, when.hour)
    else:
        store(HOURS, when.hour % 12 or 12, 0x80 if when.hour >= 12 else 0)
    clock.now += 5  # halted: this time does not pass
    assert clock.time() == when
    clock.put(B, b)
    assert clock.time() == when
    clock.now += 61
    assert clock.time() == when + datetime.timedelta(seconds=61)


def test_setting_one_register_while_the_clock_runs(clock: Clock) -> None:
    """A register of the time that is written without SET changes that part alone."""
    clock.put(HOURS, 0x07)
    assert clock.time() == NOON.replace(hour=7)
    clock.now += 1
    assert clock.time() == NOON.replace(hour=7, second=57)


def test_update_in_progress_warns_before_the_second_ends() -> None:
    """UIP shows in the last 244 µs before the time changes, so that a reader waits; else not."""
    clock = Clock(1000.5)
    assert not clock.get(A) & 0x80
    clock.now = 1000.9999
    assert clock.get(A) & 0x80
    clock.put(B, H24 | SET)
    assert not clock.get(A) & 0x80


def test_memory_keeps_bytes(clock: Clock) -> None:
    """Registers 14 to 127, the century apart, are memory; bit 7 of the index port is no address."""
    for index in range(14, 128):
        if index != CENTURY:
            clock.put(index | 0x80, index ^ 0x55)
    assert all(clock.get(n) == n ^ 0x55 for n in range(14, 128) if n != CENTURY)
    clock.put(D, 0)
    clock.put(C, 0xFF)
    assert (clock.get(D), clock.get(C)) == (0x80, 0)


def test_index_port_cannot_be_read_and_wide_accesses_are_split(clock: Clock) -> None:
    """Port 0x70 reads as an empty bus; a 16-bit write selects and fills, a 16-bit read reads."""
    clock.rtc.write(0, b"\x40\x99")
    assert clock.rtc.read(0, 2) == b"\xff\x99"
    assert clock.rtc.read(1, 4) == b"\x99\xff\0\xff"


# Alarm and update interrupts.


def test_update_ended_interrupt(clock: Clock) -> None:
    """With UIE each new second raises the line until register C is read; the timer says when."""
    clock.now += 0.25
    clock.put(B, H24 | UIE)
    assert (clock.levels, clock.rtc.deadline) == ([], NOON.timestamp() + 1)
    clock.rtc.expire()
    assert clock.levels == []
    clock.now = NOON.timestamp() + 1
    clock.rtc.expire()
    assert (clock.levels, clock.rtc.deadline) == ([True], None)
    assert (clock.get(C), clock.get(C)) == (0xD0, 0)
    assert (clock.levels, clock.rtc.deadline) == ([True, False], NOON.timestamp() + 2)
    clock.put(B, H24)
    assert clock.timers == [NOON.timestamp() + 1, None, NOON.timestamp() + 2, None]


def test_alarm(clock: Clock) -> None:
    """At the time in the alarm registers AF is set, and with AIE the line rises."""
    for index, value in ((HOURS_ALARM, 0x12), (MINUTES_ALARM, 0x36), (SECONDS_ALARM, 0x01)):
        clock.put(index, value)
    clock.put(B, H24 | AIE)
    due = NOON.timestamp() + 65
    assert clock.rtc.deadline == due
    clock.now = due - 1
    clock.rtc.expire()
    assert clock.levels == []
    clock.now = due
    clock.rtc.expire()
    assert clock.levels == [True]
    assert clock.get(C) == 0xF0
    assert clock.rtc.deadline == due + 86400


def test_alarm_that_passed_between_two_looks_is_not_missed(clock: Clock) -> None:
    """A late look at the clock still finds the alarm that came and went."""
    for index, value in ((HOURS_ALARM, 0xFF), (MINUTES_ALARM, 0xFF), (SECONDS_ALARM, 0x10)):
        clock.put(index, value)
    clock.now += 300
    assert clock.get(C) & 0x20
    clock.now += 10
    assert not clock.get(C) & 0x20


alarm = st.one_of(st.integers(0, 0x59), st.just(0xFF))


@given(alarm, alarm, alarm, st.integers(0, 86399), st.sampled_from([0, BINARY, H24, BINARY | H24]))
def test_next_alarm_agrees_with_trying_every_second(
    hour: int, minute: int, second: int, start: int, b: int
) -> None:
    """The deadline is the first of the coming 86,400 seconds whose registers match the alarm."""
    clock = Clock(float(start))
    for index, value in ((HOURS_ALARM, hour), (MINUTES_ALARM, minute), (SECONDS_ALARM, second)):
        clock.put(index, value)
    clock.put(B, b | AIE)
    expected = _try_every_second(start, hour, minute, second, b)
    assert clock.rtc.deadline == expected


def _try_every_second(start: int, hour: int, minute: int, second: int, b: int) -> float | None:
    def shown(value: int) -> int:
        return value if b & BINARY else value // 10 << 4 | value % 10

    def fits(register: int, value: int) -> bool:
        return register >= 0xC0 or _number(register, b) == value

    if hour < 0xC0 and not b & H24:
        hours = [h for h in range(24) if shown(h % 12 or 12) | (h // 12 << 7) == hour]
        hours += [0] if hour == 0 else []  # not a time, but what a chip takes for midnight
        if _number(hour, b) > 12:
            hours = [_number(hour, b)]
    else:
        hours = [h for h in range(24) if fits(hour, h)]
    for time in range(start + 1, start + 86401):
        h, m, s = time % 86400 // 3600, time // 60 % 60, time % 60
        if h in hours and fits(minute, m) and fits(second, s):
            return float(time)
    return None


def _number(register: int, b: int) -> int:
    return register if b & BINARY else (register >> 4) * 10 + (register & 15)


def test_setting_the_clock_stops_update_interrupts(clock: Clock) -> None:
    """SET clears UIE, as the data sheet says."""
    clock.put(B, H24 | UIE)
    clock.put(B, H24 | UIE | SET)
    assert (clock.get(B), clock.rtc.deadline) == (H24 | SET, None)


def test_clock_that_goes_back_raises_nothing(clock: Clock) -> None:
    """A host clock that is set back gives no interrupt, and the next second does."""
    clock.put(B, H24 | UIE)
    clock.now -= 100
    clock.rtc.expire()
    assert (clock.levels, clock.rtc.deadline) == ([], NOON.timestamp() - 99)


# The periodic interrupt and the second bank.


@pytest.mark.parametrize(
    ("rate", "hertz"), [(1, 256), (2, 128), (3, 8192), (6, 1024), (10, 64), (15, 2)]
)
def test_periodic_interrupt(rate: int, hertz: int) -> None:
    """The line rises with each tick that finds it low; PF is there without PIE too."""
    clock = Clock(1000.0)
    clock.put(A, 0x20 | rate)
    assert not clock.get(C)
    clock.now += 1 / hertz
    assert clock.get(C) == 0x40
    clock.put(B, H24 | PIE)
    for tick in range(2, 6):
        due = 1000 + tick / hertz
        assert clock.rtc.deadline == due
        clock.now = due
        clock.rtc.expire()
        assert clock.levels[-1]
        assert [clock.rtc.deadline] == [None]
        assert clock.get(C) & 0xE0 == 0xC0
    assert clock.levels == [True, False] * 4
    clock.put(A, 0x20)
    assert clock.rtc.deadline is None
    clock.now += 5
    assert not clock.get(C) & 0x40


@given(st.integers(1, 15), st.lists(st.floats(0, 3), min_size=1, max_size=20))
def test_ticks_against_counting_them(rate: int, steps: list[float]) -> None:
    """PF says whether the chain of dividers, counted from 1970, has made a step."""
    clock = Clock(100.0)
    clock.put(A, 0x20 | rate)
    clock.get(C)
    period = {1: 128, 2: 256}.get(rate, 1 << rate - 1)
    before = int(clock.now * 32768) // period
    for step in steps:
        clock.now += step
        count = int(clock.now * 32768) // period
        assert bool(clock.get(C) & 0x40) == (count > before)
        before = count


def test_periodic_interrupt_beside_the_others() -> None:
    """The timer is for what comes first; one look takes all flags."""
    clock = Clock(1000.0)
    clock.put(A, 0x2F)
    clock.put(B, H24 | UIE | PIE)
    assert clock.rtc.deadline == 1000.5
    clock.now = 1001.0
    clock.rtc.expire()
    assert clock.get(C) == 0xD0
    assert clock.rtc.deadline == 1001.5


def test_the_second_bank_is_memory(clock: Clock) -> None:
    """128 bytes behind two ports of their own; the first bank does not notice."""
    for index in range(128):
        clock.rtc.write(2, bytes([index, 255 - index]))
    for index in range(128):
        clock.rtc.write(2, bytes([index | 0x80]))
        assert clock.rtc.read(3, 1) == bytes([255 - index])
    assert clock.rtc.read(2, 2) == bytes([255, 128])
    assert clock.get(B) == H24


# Anything at all, and state.

steps = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, 4), st.binary(max_size=4)),
        st.tuples(st.just("read"), st.integers(0, 4), st.integers(0, 8)),
        st.tuples(st.just("put"), st.integers(0, 13), st.integers(0, 255)),
        st.tuples(st.just("sleep"), st.floats(-1e5, 1e7), st.just(0)),
    ),
    max_size=40,
)


@given(steps)
def test_nothing_raises_and_state_is_the_whole_device(
    steps: list[tuple[str, int, int | bytes]],
) -> None:
    """Any accesses and any time: answers have their width, the line alternates, state holds."""
    clock = Clock()
    for kind, number, value in steps:
        if kind == "write":
            assert isinstance(value, bytes)
            clock.rtc.write(number, value)
        elif kind == "read":
            assert isinstance(value, int)
            assert len(clock.rtc.read(number, value)) == value
        elif kind == "put":
            assert isinstance(value, int)
            clock.put(number, value)
        else:
            clock.now += number
            clock.rtc.expire()
        assert clock.levels == [n % 2 == 0 for n in range(len(clock.levels))]
        assert clock.rtc.interrupt_level == bool(clock.levels and clock.levels[-1])
        state = clock.rtc.save()
        twin = Clock(clock.now)
        twin.rtc.restore(state)
        assert twin.rtc.save() == state
        assert twin.rtc.interrupt_level == clock.rtc.interrupt_level
        assert twin.rtc.deadline == clock.rtc.deadline
        assert [twin.get(n) for n in range(128)] == [clock.get(n) for n in range(128)]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("index", 128),
        ("cmos", bytes(127)),
        ("offset", 1 << 63),
        ("updated", 0.5),
        ("version", 0),
        ("ticked", 1 << 63),
        ("bank", 128),
        ("more", bytes(129)),
    ],
)
def test_impossible_state_is_refused(field: str, value: object) -> None:
    """A state that no RTC can have is refused with the field's name."""
    values = {"index": 0, "cmos": bytes(128), "offset": 0, "updated": 0}
    values |= {"ticked": 0, "bank": 0, "more": bytes(128)}
    with pytest.raises(StateError, match=f"RtcState.{field}"):
        RtcState(**{**values, field: value})  # type: ignore[arg-type]
