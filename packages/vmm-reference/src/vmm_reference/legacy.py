"""A PC's own devices on their ports: serial port, clock, keyboard controller, power, panic.

What they need of the machine is given to them here: interrupt lines, the host's clock, and the I/O
loop for the alarm. What a serial port's driver does for each character is served in C while the
port is quiet.
"""

from __future__ import annotations

import os
import time

from kvm_ioctls.hot import HotExits

from . import layout
from .acpi import tables
from .devices import pm
from .devices.cmos import cmos
from .devices.i8042 import I8042, SYSTEM_CONTROL_PORT, SystemControl
from .devices.pm import PowerManagement
from .devices.pvpanic import Pvpanic
from .devices.rtc import Rtc
from .devices.serial import CONNECTED, DATA, IDLE, IIR_FCR, IIR_NONE, LSR, Serial
from .loop import ONESHOT, READ
from .outcome import Outcome

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from kvm_ioctls.hot import Declaration, PostedWrite

    from .board import Board
    from .config import MachineConfig

__all__ = ["LegacyDevices"]

_KEYBOARD_IRQ, _MOUSE_IRQ = 1, 12
_PCI_PORTS, _PCI_PORTS_SIZE = 0xCF8, 8
_DELAY_PORT = 0x80
_KEPT = 1024  # bytes that a guest may send to the console before Python sees the first of them
_GATHER = 0.004  # seconds after which it sees them at the latest


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

        self.serial = Serial(
            line(layout.SERIAL_IRQ), transmit, room=room, quiet=self._quiet, ahead=_KEPT
        )
        ports.add(layout.SERIAL_PORT, 8, self.serial)
        self._serial_lock = ports.lock(self.serial)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.hot = HotExits(self._posted, room=_KEPT, wake=self._wake)
        at = layout.SERIAL_PORT
        status = bytes([IDLE, CONNECTED])  # LSR, and MSR behind it
        self._status = self.hot.answer(at + LSR, status, pio=True, size=1)
        self._data = self.hot.post(at + DATA, pio=True, size=1)
        self._iir = self.hot.answer(at + IIR_FCR, bytes([IIR_NONE]), pio=True, size=1)
        self._iir_value = IIR_NONE
        board.loop.add(self._wake, READ | ONESHOT, self._woken)
        self._absent: tuple[Declaration, ...] = ()
        if config.transport != "pci" and config.firmware is None:
            # A kernel looks there for each device that there could be: nobody, without Python.
            self._absent = (
                self.hot.answer(_PCI_PORTS, bytes([0xFF] * _PCI_PORTS_SIZE), pio=True),
                self.hot.ignore(_PCI_PORTS, _PCI_PORTS_SIZE, pio=True),
            )
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
        self._system_control = SystemControl(lambda: board.end(Outcome.RESET, ""))
        ports.add(SYSTEM_CONTROL_PORT, 1, self._system_control)
        # The port of power-on self tests: kernels write there to let time pass.
        self._delay = self.hot.ignore(_DELAY_PORT, pio=True)
        self.power = PowerManagement(
            power_off=lambda: board.end(Outcome.POWER_OFF, ""),
            reset=lambda: board.end(Outcome.RESET, ""),
            interrupt=line(tables.POWER_GSI),
        )
        ports.add(pm.PORT, pm.SIZE, self.power)
        self._pvpanic = Pvpanic(self._panicked)
        ports.add(tables.PVPANIC_PORT, 1, self._pvpanic)

    def close(self) -> None:
        """Give the descriptor back. On the loop, or when it does not run; after the vCPUs."""
        self._board.loop.remove(self._wake)
        os.close(self._wake)
        self._wake = -1

    def _quiet(self, status: bool, data: bool, iir: int | None) -> None:
        # A driver that sends by interrupt changes it four times for a few characters.
        if self._status.enabled != status:
            self._status.enabled = status
        if self._data.enabled != data:
            self._data.enabled = data
        if iir is not None and iir != self._iir_value:
            self._iir.answer(bytes([iir]))
            self._iir_value = iir
        if self._iir.enabled != (iir is not None):
            self._iir.enabled = iir is not None

    def _woken(self, _events: int) -> None:
        # It is signalled again for each FIFO of a driver that sends by interrupt. So it is not
        # looked at again before a while has passed in which the guest sent nothing.
        self._board.loop.call_later(_GATHER, self._flush)

    def _flush(self) -> None:
        if self._wake < 0:  # closed meanwhile
            return
        try:
            os.eventfd_read(self._wake)
        except BlockingIOError:
            self._board.loop.modify(self._wake, READ | ONESHOT)
            return
        self.hot.flush()
        self._board.loop.call_later(_GATHER, self._flush)

    def _posted(self, writes: list[PostedWrite]) -> None:
        with self._serial_lock:
            self.serial.posted(bytes([write.data for write in writes]))

    def parts(self) -> dict[str, Any]:
        """Those with state, by name."""
        return {
            "serial": self.serial,
            "rtc": self._rtc,
            "i8042": self.i8042,
            "power": self.power,
            "pvpanic": self._pvpanic,
            "system-control": self._system_control,
        }

    def absent(self) -> tuple[int, int]:
        """How many reads and writes of ports that nobody has the buses did not see."""
        reads, writes = [declaration.count for declaration in self._absent] or (0, 0)
        return reads, writes

    def metrics(self) -> dict[str, dict[str, int]]:
        """Counters by the devices' names; `served` are accesses that Python did not see."""
        served = sum([declaration.count for declaration in (self._status, self._data, self._iir)])
        counters = {"dropped": self.serial.dropped, "breaks": self.serial.breaks, "served": served}
        found = {"serial": counters}
        for name, part in self.parts().items():
            if hasattr(part, "metrics"):
                found[name] = part.metrics()
        return found

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
