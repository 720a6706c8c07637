"""A PC's own devices on their ports: serial port, clock, keyboard controller, power, panic.

What they need of the machine is given to them here: interrupt lines, the host's clock, and the I/O
loop for the alarm.
"""

from __future__ import annotations

import time

from . import layout
from .acpi import tables
from .devices import pm
from .devices.cmos import cmos
from .devices.i8042 import I8042
from .devices.pm import PowerManagement
from .devices.pvpanic import Pvpanic
from .devices.rtc import Rtc
from .devices.serial import Serial
from .outcome import Outcome

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .board import Board
    from .config import MachineConfig

__all__ = ["LegacyDevices"]

_KEYBOARD_IRQ, _MOUSE_IRQ = 1, 12


class LegacyDevices:
    """The devices, on the board's ports.

    Args:
        board: with its platform; it gets the devices.
        config: what the clock's memory tells firmware.
        transmit: takes the serial port's output.
        room: told that the serial port takes input again after it refused some.
    """

    def __init__(
        self,
        board: Board,
        config: MachineConfig,
        *,
        transmit: Callable[[bytes], None],
        room: Callable[[], None],
    ) -> None:
        self._board = board
        ports, vm = board.ports, board.vm

        def line(gsi: int) -> Callable[[bool], None]:
            return lambda level: vm.irq_line(gsi, level)

        self.serial = Serial(line(layout.SERIAL_IRQ), transmit, room=room)
        ports.add(layout.SERIAL_PORT, 8, self.serial)
        self._rtc_deadline: float | None = None
        self._rtc = Rtc(
            time.time,
            line(tables.RTC_GSI),
            timer=self._rtc_timer,
            memory=cmos(config.memory, config.cpus),
        )
        ports.add(tables.RTC_PORT, 4, self._rtc)
        self.i8042 = I8042(
            lambda: board.end(Outcome.RESET, ""), line(_KEYBOARD_IRQ), line(_MOUSE_IRQ)
        )
        ports.add(0x60, 1, self.i8042)
        ports.add(0x64, 1, self.i8042, offset=4)
        self.power = PowerManagement(
            power_off=lambda: board.end(Outcome.POWER_OFF, ""),
            reset=lambda: board.end(Outcome.RESET, ""),
            interrupt=line(tables.POWER_GSI),
        )
        ports.add(pm.PORT, pm.SIZE, self.power)
        self._pvpanic = Pvpanic(self._panicked)
        ports.add(tables.PVPANIC_PORT, 1, self._pvpanic)

    def parts(self) -> dict[str, Any]:
        """Those with state, by name."""
        return {
            "serial": self.serial,
            "rtc": self._rtc,
            "i8042": self.i8042,
            "power": self.power,
            "pvpanic": self._pvpanic,
        }

    def metrics(self) -> dict[str, dict[str, int]]:
        """Counters by the devices' names."""
        return {"serial": {"dropped": self.serial.dropped, "breaks": self.serial.breaks}}

    def _rtc_timer(self, when: float | None) -> None:
        """Call the clock's `expire` at that time; a deadline that has moved meanwhile is stale."""
        self._rtc_deadline = when
        loop = self._board.loop
        if when is not None:
            loop.call_soon(
                lambda: loop.call_later(when - time.time(), lambda: self._rtc_expired(when))
            )

    def _rtc_expired(self, when: float) -> None:
        if self._rtc_deadline == when:
            with self._board.ports.lock(self._rtc):
                self._rtc.expire()

    def _panicked(self, event: int) -> None:
        if event & 1:
            self._board.end(Outcome.GUEST_PANIC, "")
