"""The clock and CMOS memory of a PC: a Motorola MC146818A at ports 0x70 and 0x71.

The guest's time is the clock that the machine hands in, plus a whole number of seconds that changes
when the guest sets its clock. The periodic interrupt ticks by the same clock. A tick that comes
while an earlier one has not been looked at is part of it, as on the chip. Behind ports 0x72 and
0x73 are 128 bytes more, as chipsets have them.
"""

from __future__ import annotations

from time import gmtime
from types import MappingProxyType

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from .states import RtcState

__all__ = ["CENTURY", "Rtc"]

SIZE = 128

SECONDS, SECONDS_ALARM, MINUTES, MINUTES_ALARM, HOURS, HOURS_ALARM = range(6)
WEEKDAY, DAY, MONTH, YEAR = range(6, 10)
A, B, C, D = range(0x0A, 0x0E)
CENTURY = 0x32  # as the FADT tells the guest

TIME = (SECONDS, MINUTES, HOURS, DAY, MONTH, YEAR, CENTURY)  # what the guest sets it by

A_UIP = 0x80
A_START = 0x26  # the divider of a 32768 Hz crystal, and the rate a PC's BIOS leaves
A_RATE = 0x0F
B_SET, B_PERIODIC, B_ALARM, B_UPDATE, B_BINARY, B_24H = 0x80, 0x40, 0x20, 0x10, 0x04, 0x02
C_IRQ, C_PERIODIC, C_ALARM, C_UPDATE = 0x80, 0x40, 0x20, 0x10
D_VALID = 0x80
HOURS_PM = 0x80
DONT_CARE = 0xC0  # an alarm register from here on matches everything

UPDATE_WARNING = 244e-6  # seconds by which UIP comes before the time changes
DAY_SECONDS = 86400
CRYSTAL = 32768  # Hz


class Rtc:
    """A real-time clock with 114 bytes of memory, and 128 more.

    Args:
        clock: seconds since 1970-01-01 00:00 UTC, with a fraction.
        interrupt: is given the level of the interrupt output, each time that it changes.
        timer: is given the time, on `clock`, at which `expire` should next be called, or None.
            Without it, interrupts come only when the guest looks at the clock.
        memory: what the registers that are no clock hold at first, by index.

    Example:
        >>> rtc = Rtc(clock=lambda: 1767225599.0, interrupt=lambda level: None)
        >>> def register(n):
        ...     rtc.write(0, bytes([n]))
        ...     return rtc.read(1, 1).hex()
        >>> [register(n) for n in (0x32, 9, 8, 7, 4, 2, 0)]
        ['20', '25', '12', '31', '23', '59', '59']
    """

    def __init__(
        self,
        clock: Callable[[], float],
        interrupt: Callable[[bool], None],
        *,
        timer: Callable[[float | None], None] | None = None,
        memory: Mapping[int, int] = MappingProxyType({}),
    ) -> None:
        self._clock = clock
        self._interrupt = interrupt
        self._timer = timer
        self._line = False
        self._deadline: float | None = None
        self._index = 0
        self._cmos = bytearray(SIZE)
        for index, value in memory.items():
            self._cmos[index] = value
        self._cmos[A], self._cmos[B], self._cmos[D] = A_START, B_24H, D_VALID
        self._bank = 0
        self._more = bytearray(SIZE)
        self._offset = 0
        self._shown: dict[int, int] = {}  # what _fields gave, and for what
        self._shown_for: tuple[int, int] | None = None
        self.interrupts = 0
        self._updated = self._now()
        self._ticked = self._ticks()

    # What the guest does.

    def read(self, offset: int, length: int) -> bytes:
        """Offset 1 is the register that was selected, 3 that of the second bank.

        Offsets 0 and 2 can only be written.
        """
        if offset == 1 and length == 1:
            return self._read().to_bytes()
        values = bytearray(b"\xff" * length)
        for at in range(length):
            if offset + at == 1:
                values[at] = self._read()
            elif offset + at == 3:
                values[at] = self._more[self._bank]
        return bytes(values)

    def write(self, offset: int, data: bytes) -> None:
        """Offset 0 selects a register (bit 7 masks NMI on a PC, not here), offset 1 fills it.

        Offsets 2 and 3 do so in the second bank.
        """
        for value in data:
            if offset == 0:
                self._index = value % SIZE
            elif offset == 1:
                self._write(self._index, value)
            elif offset == 2:
                self._bank = value % SIZE
            elif offset == 3:
                self._more[self._bank] = value
            offset += 1

    # What the host does.

    @property
    def deadline(self) -> float | None:
        """When `expire` is due, on the clock that was handed in; None where nothing can come."""
        return self._deadline

    def expire(self) -> None:
        """The deadline has come: raise what is due. Too early or without need it does no harm."""
        self._settle()

    @property
    def interrupt_level(self) -> bool:
        """The level of the interrupt output."""
        return self._line

    # State.

    def metrics(self) -> dict[str, int]:
        """Interrupts of all kinds, and seconds by which the guest's clock is ahead."""
        return {"interrupts": self.interrupts, "ahead_seconds": self._offset}

    def save(self) -> RtcState:
        """Everything but the clock itself."""
        from .states import RtcState

        return RtcState(
            self._index,
            bytes(self._cmos),
            self._offset,
            self._updated,
            self._ticked,
            self._bank,
            bytes(self._more),
        )

    def restore(self, state: RtcState) -> None:
        """Become the clock that `state` was saved from.

        It shows the time of the clock that this one was given, so the guest's time jumps as that
        did; an alarm that the jump skipped is due at once.
        """
        self._index = state.index
        self._cmos = bytearray(state.cmos)
        self._cmos[A] &= ~A_UIP & 0xFF
        self._cmos[D] = D_VALID
        self._bank, self._more = state.bank, bytearray(state.more)
        self._offset, self._updated, self._ticked = state.offset, state.updated, state.ticked
        self._settle()

    # The registers.

    def _read(self) -> int:
        index = self._index
        if index == A:
            return self._cmos[A] | (A_UIP if self._about_to_update() else 0)
        if index == C:
            self._settle()
            value = self._cmos[C]
            self._cmos[C] = 0
            self._settle()
            return value
        if (index in TIME or index == WEEKDAY) and not self._cmos[B] & B_SET:
            return self._fields(self._now())[index]
        return self._cmos[index]

    def _write(self, index: int, value: int) -> None:
        if index in (C, D):
            return
        self._settle()
        if index == A:
            self._cmos[A] = value & ~A_UIP
        elif index == B:
            self._write_b(value)
        elif index in TIME and not self._cmos[B] & B_SET:
            self._freeze()
            self._cmos[index] = value
            self._set_time()
        else:
            self._cmos[index] = value
        self._settle()

    def _write_b(self, value: int) -> None:
        before = self._cmos[B]
        if value & ~before & B_SET:
            self._freeze()
        if value & B_SET:
            value &= ~B_UPDATE  # setting the clock ends the wish to hear of updates
        # The new format is taken first: what was written while updates were off is in it.
        self._cmos[B] = value
        if before & ~value & B_SET:
            self._set_time()

    # The time.

    def _now(self) -> int:
        """The guest's time in whole seconds since 1970."""
        return int(self._clock() // 1) + self._offset

    def _ticks(self) -> int:
        """Periods of the crystal since 1970."""
        return int(self._clock() * CRYSTAL // 1)

    def _period(self) -> int:
        """Ticks of the crystal from one periodic interrupt to the next; 0 where there are none."""
        rate = self._cmos[A] & A_RATE
        return 1 << (rate + 6 if rate in (1, 2) else rate - 1) if rate else 0

    def _about_to_update(self) -> bool:
        return self._clock() % 1 >= 1 - UPDATE_WARNING and not self._cmos[B] & B_SET

    def _freeze(self) -> None:
        """Put the time into the registers, where the guest may change it."""
        for index, value in self._fields(self._now()).items():
            self._cmos[index] = value

    def _fields(self, seconds: int) -> dict[int, int]:
        """The registers of a time, in the format that register B asks for.

        A guest reads one after the other, and all of them twice: they are kept for a second.
        """
        b = self._cmos[B] & (B_24H | B_BINARY)
        if self._shown_for == (seconds, b):
            return self._shown
        now = gmtime(seconds)
        hour, afternoon = now.tm_hour, 0
        if not b & B_24H:
            hour, afternoon = hour % 12 or 12, HOURS_PM if hour >= 12 else 0
        values = {
            SECONDS: now.tm_sec,
            MINUTES: now.tm_min,
            HOURS: hour,
            WEEKDAY: (now.tm_wday + 1) % 7 + 1,
            DAY: now.tm_mday,
            MONTH: now.tm_mon,
            YEAR: now.tm_year % 100,
            CENTURY: now.tm_year // 100 % 100,
        }
        if not b & B_BINARY:
            values = {index: value // 10 << 4 | value % 10 for index, value in values.items()}
        values[HOURS] |= afternoon
        self._shown, self._shown_for = values, (seconds, b)
        return values

    def _decode(self, index: int) -> int:
        """A register's number; whatever the guest wrote there gives one, sensible or not."""
        value = self._cmos[index]
        afternoon = 0
        if index in (HOURS, HOURS_ALARM) and not self._cmos[B] & B_24H:
            afternoon = 12 if value & HOURS_PM else 0
            value &= ~HOURS_PM
        if not self._cmos[B] & B_BINARY:
            value = (value >> 4) * 10 + (value & 15)
        if index in (HOURS, HOURS_ALARM) and not self._cmos[B] & B_24H:
            value = value % 12 + afternoon if value <= 12 else value
        return value

    def _set_time(self) -> None:
        """Go on from the time in the registers; a date that does not exist is counted through."""
        second, minute, hour, day, month, year, century = map(self._decode, TIME)
        days = _days_since_1970(century * 100 + year, month) + day - 1
        guest = ((days * 24 + hour) * 60 + minute) * 60 + second
        self._offset += guest - self._now()
        self._updated = guest

    # Flags and interrupts.

    def _settle(self) -> None:
        """Bring flags, interrupt output and timer up to the present."""
        now, b = self._now(), self._cmos[B]
        flags = self._cmos[C] & (C_PERIODIC | C_ALARM | C_UPDATE)
        ticks, period = self._ticks(), self._period()
        if period and ticks // period > self._ticked // period:
            flags |= C_PERIODIC
        self._ticked = ticks
        if now > self._updated and not b & B_SET:
            flags |= C_UPDATE
            alarm = self._next_alarm()
            if alarm is not None and alarm <= now:
                flags |= C_ALARM
        self._updated = now
        level = bool(flags & b)
        self._cmos[C] = flags | (C_IRQ if level else 0)
        if level != self._line:
            self._line = level
            self.interrupts += level
            self._interrupt(level)
        self._arm()

    def _arm(self) -> None:
        b, due = self._cmos[B], None
        if not self._line and not b & B_SET:
            if b & B_UPDATE:
                due = self._updated + 1
            elif b & B_ALARM:
                due = self._next_alarm()
        deadline = None if due is None else float(due - self._offset)
        period = self._period()
        if not self._line and b & B_PERIODIC and period:
            tick = (self._ticked // period + 1) * period / CRYSTAL
            deadline = tick if deadline is None else min(tick, deadline)
        if deadline != self._deadline:
            self._deadline = deadline
            if self._timer is not None:
                self._timer(deadline)

    def _next_alarm(self) -> int | None:
        """The first second after the last update that the alarm registers match."""
        wanted = []
        for index, count in ((HOURS_ALARM, 24), (MINUTES_ALARM, 60), (SECONDS_ALARM, 60)):
            anything = self._cmos[index] >= DONT_CARE
            value = -1 if anything else self._decode(index)
            if value >= count:
                return None
            wanted.append(value)
        hour, minute, second = wanted
        time = self._updated + 1
        while True:  # at most 24 hours, 60 minutes and two steps of seconds
            of_day = time % DAY_SECONDS
            if hour >= 0 and of_day // 3600 != hour:
                time += 3600 - of_day % 3600
            elif minute >= 0 and of_day // 60 % 60 != minute:
                time += 60 - of_day % 60
            elif second >= 0 and of_day % 60 != second:
                time += (second - of_day) % 60
            else:
                return time


def _days_since_1970(year: int, month: int) -> int:
    """Days from 1970-01-01 to the first of a month (Gregorian; months past 12 are later years)."""
    year, month = year + (month - 1) // 12, (month - 1) % 12 + 1
    # Counted in years that begin in March, so that the leap day is the last of its year.
    year -= month < 3
    months = (month - 3) % 12
    return year * 365 + year // 4 - year // 100 + year // 400 + (153 * months + 2) // 5 - 719468
