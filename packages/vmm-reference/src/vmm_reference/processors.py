"""Processors that come and go: their registers in the machine, and their place in ACPI."""

from __future__ import annotations

from .acpi import cpus
from .devices import pm
from .devices.cpus import PORT, SIZE, Cpus

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .board import Board

__all__ = ["add_processors", "set_processors"]


def add_processors(board: Board, count: int, most: int) -> Cpus:
    """Announce all processors that there may be.

    Args:
        board: that gets the registers; `board.cpus_changed` is told what the guest gives up.
        count: how many are there at first.
        most: how many there may be.
    """

    def ejected(_number: int) -> None:
        board.loop.call_soon(board.cpus_changed)

    registers = Cpus(count, most, lambda: board.tell(pm.EVENT_CPU), ejected)
    board.ports.add(PORT, SIZE, registers)
    board.announced.devices.append(lambda: cpus.processors(most))
    board.announced.events.append((pm.EVENT_CPU, cpus.NOTIFY_METHOD))
    return registers


def set_processors(board: Board, count: int) -> None:
    """Let processors come, or ask for those that are to go. On the loop."""
    registers = board.cpus
    assert registers is not None
    with board.ports.lock(registers):
        for number in range(count):
            registers.plug(number)
        for number in sorted(registers.present, reverse=True):
            if number >= count:
                registers.ask_for(number)
