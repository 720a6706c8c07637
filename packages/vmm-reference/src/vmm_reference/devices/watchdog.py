"""A hardware watchdog that ACPI describes: the WDAT table of Microsoft's Hardware Watchdog Timers.

Four registers of 32 bits at ports 0x620 to 0x62F: the time from which it counts down, what is left
of it, control (bit 0: it runs), and one to begin anew. A guest that does not write the last in
time is reset. Time stands still while the machine does. Linux drives it by `wdat_wdt`.
"""

from __future__ import annotations

import time
from struct import pack
from typing import TYPE_CHECKING, ClassVar

import attrs

from vmm_reference.deviceconfig import DeviceConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm_reference.wiring import Wiring

    from .states import WatchdogState

__all__ = ["MAX_COUNT", "MIN_COUNT", "PERIOD", "PORT", "SIZE", "Timer", "Watchdog", "build", "wdat"]

PORT, SIZE = 0x660, 16
COUNTDOWN, LEFT, CONTROL, RESET = 0, 4, 8, 12
RUNNING = 1

PERIOD = 100  # milliseconds that a count stands for
MIN_COUNT, MAX_COUNT = 10, 6000
_DEFAULT_COUNT = 600

# Actions and instructions of a WDAT table.
_RESET, _GET_LEFT, _GET_COUNTDOWN, _SET_COUNTDOWN = 1, 4, 5, 6
_GET_RUNNING, _SET_RUNNING, _GET_STOPPED, _SET_STOPPED = 8, 9, 10, 11
_READ_VALUE, _READ_COUNTDOWN, _WRITE_VALUE, _WRITE_COUNTDOWN = 0, 1, 2, 3
_ALL = 0xFFFFFFFF


class Watchdog:
    """Counts down while it runs, and ends the guest at zero.

    Args:
        clock: seconds on a clock that does not go back.
        timer: is given when `expire` is to be called, on that clock, or None for never.
        expired: called when the guest has not begun anew in time.

    Attributes:
        fired: whether that has happened.
        starts: how often the guest started it.
        renewals: how often it began anew.
        refused: writes that are of no whole register, or of one that can't be written.

    Example:
        >>> now = [0.0]
        >>> dog = Watchdog(lambda: now[0], lambda when: None, lambda: print("reset"))
        >>> dog.write(COUNTDOWN, (20).to_bytes(4, "little"))
        >>> dog.write(CONTROL, (RUNNING).to_bytes(4, "little"))
        >>> now[0] = 1.5
        >>> int.from_bytes(dog.read(LEFT, 4), "little")
        5
        >>> now[0] = 2.0
        >>> dog.expire()
        reset
    """

    def __init__(
        self,
        clock: Callable[[], float],
        timer: Callable[[float | None], None],
        expired: Callable[[], None],
    ) -> None:
        self._clock, self._timer, self._expired = clock, timer, expired
        self._count = _DEFAULT_COUNT
        self._deadline: float | None = None  # where it runs and time passes
        self._left: float | None = None  # where it runs and time stands still
        self.fired = False
        self.starts = self.renewals = self.refused = 0

    @property
    def running(self) -> bool:
        """Whether it counts."""
        return self._deadline is not None or self._left is not None

    def read(self, offset: int, length: int) -> bytes:
        """The registers."""
        registers = pack("<IIII", self._count, self._counts_left(), int(self.running), 0)
        return registers[offset : offset + length].ljust(length, b"\xff")

    def write(self, offset: int, data: bytes) -> None:
        """The registers, whole ones only."""
        if len(data) != 4 or offset not in (COUNTDOWN, CONTROL, RESET):
            self.refused += 1
            return
        value = int.from_bytes(data, "little")
        if offset == COUNTDOWN:
            self._count = min(max(value, MIN_COUNT), MAX_COUNT)
            if self.running:
                self._begin()
        elif offset == CONTROL and bool(value & RUNNING) != self.running:
            if value & RUNNING:
                self.starts += 1
                self._begin()
            else:
                self._deadline = self._left = None
                self._timer(None)
        elif offset == RESET and self.running:
            self.renewals += 1
            self._begin()

    def metrics(self) -> dict[str, int]:
        """What the guest did with it, and whether it ended the guest."""
        return {
            "starts": self.starts,
            "renewals": self.renewals,
            "expirations": int(self.fired),
            "refused_writes": self.refused,
        }

    def expire(self) -> None:
        """Time has passed; sooner than it should be, or too late, does nothing."""
        if self._deadline is not None and self._clock() >= self._deadline:
            self._deadline = None
            self.fired = True
            self._expired()

    def stop_time(self) -> None:
        """The machine stands still."""
        if self._deadline is not None:
            self._left = max(self._deadline - self._clock(), 0.0)
            self._deadline = None
            self._timer(None)

    def start_time(self) -> None:
        """The machine goes on."""
        if self._left is not None:
            self._deadline = self._clock() + self._left
            self._left = None
            self._timer(self._deadline)

    def save(self) -> WatchdogState:
        """Its registers, and what is left in milliseconds."""
        from .states import WatchdogState

        return WatchdogState(
            count=self._count, left=self._milliseconds_left() if self.running else None
        )

    def restore(self, state: WatchdogState) -> None:
        """Take up what was saved; time goes on from there."""
        self._count = state.count
        self._deadline = None
        self._left = None if state.left is None else state.left / 1000
        self._timer(None)
        self.start_time()

    def _begin(self) -> None:
        if self._left is not None:
            self._left = self._count * PERIOD / 1000
        else:
            self._deadline = self._clock() + self._count * PERIOD / 1000
            self._timer(self._deadline)

    def _milliseconds_left(self) -> int:
        if self._left is not None:
            return round(self._left * 1000)
        if self._deadline is not None:
            return max(round((self._deadline - self._clock()) * 1000), 0)
        return 0

    def _counts_left(self) -> int:
        return -(-self._milliseconds_left() // PERIOD)


def wdat() -> bytes:
    """The body of the table that describes it."""

    def entry(action: int, instruction: int, offset: int, value: int, mask: int) -> bytes:
        # A generic address structure (ACPI 6.4, 5.2.3.2): 32 bits of I/O space.
        register = pack("<BBBBQ", 1, 32, 0, 3, PORT + offset)
        return pack("<BBH", action, instruction, 0) + register + pack("<II", value, mask)

    entries = (
        entry(_RESET, _WRITE_VALUE, RESET, 1, _ALL),
        entry(_GET_LEFT, _READ_COUNTDOWN, LEFT, 0, _ALL),
        entry(_GET_COUNTDOWN, _READ_COUNTDOWN, COUNTDOWN, 0, _ALL),
        entry(_SET_COUNTDOWN, _WRITE_COUNTDOWN, COUNTDOWN, 0, _ALL),
        entry(_GET_RUNNING, _READ_VALUE, CONTROL, RUNNING, RUNNING),
        entry(_SET_RUNNING, _WRITE_VALUE, CONTROL, RUNNING, RUNNING),
        entry(_GET_STOPPED, _READ_VALUE, CONTROL, 0, RUNNING),
        entry(_SET_STOPPED, _WRITE_VALUE, CONTROL, 0, RUNNING),
    )
    # Not a PCI device; enabled, and it stops while the machine sleeps.
    head = pack("<IHBBB3x", 32, 0xFF, 0xFF, 0xFF, 0xFF)
    head += pack("<IIIB3xI", PERIOD, MAX_COUNT, MIN_COUNT, 0x81, len(entries))
    return head + b"".join(entries)


@attrs.frozen
class Timer(DeviceConfig):
    """A watchdog: a guest that has asked for it and then hangs is reset."""

    kind: ClassVar[str] = "watchdog"


def build(config: Timer, wiring: Wiring) -> Watchdog:
    """The watchdog, its ports, its table and its timer."""
    from vmm_reference.outcome import Outcome

    wanted: list[float | None] = [None]

    def expired(when: float) -> None:
        if wanted[0] == when:
            with wiring.ports.lock(dog):
                dog.expire()

    def timer(when: float | None) -> None:
        wanted[0] = when
        if when is not None:
            loop = wiring.loop
            loop.call_soon(lambda: loop.call_later(when - time.monotonic(), lambda: expired(when)))

    dog = Watchdog(time.monotonic, timer, lambda: wiring.end(Outcome.RESET, "the watchdog expired"))
    wiring.ports.add(PORT, SIZE, dog)
    wiring.on_close(lambda: wiring.ports.remove(PORT))
    wiring.table(b"WDAT", wdat())
    wiring.keep(dog)

    def stop() -> None:
        with wiring.ports.lock(dog):
            dog.stop_time()

    def go() -> None:
        with wiring.ports.lock(dog):
            dog.start_time()

    wiring.on_pause(stop, go)
    return dog
