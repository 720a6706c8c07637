"""Modules of memory that come and go: in the machine's RAM, in registers, and in ACPI."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vm_memory import GuestAddress

from .acpi import modules as acpi
from .devices import modules as device
from .devices import pm
from .errors import ConfigError
from .layout import BLOCK
from .ram import MODULES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .board import Board

__all__ = ["Modules"]

_EJECT_REQUEST = 3  # of an event


class Modules:
    """The slots of a board.

    Args:
        board: that gets them.
        modules: offset in the area and size of the module in each slot, size 0 in an empty one.

    Attributes:
        registers: what the guest sees of them.
        refusals: slots whose module the guest has refused to give up, with its status.
    """

    def __init__(self, board: Board, modules: Sequence[tuple[int, int]]) -> None:
        self._board = board
        self._start, self._size = board.ram.areas[MODULES]
        self.refusals: dict[int, int] = {}
        present = {
            slot: (self._start + offset, size)
            for slot, (offset, size) in enumerate(modules)
            if size
        }
        self.registers = device.Modules(
            present, lambda: board.tell(pm.EVENT_MEMORY), self._ejected, self._told
        )
        for address, size in present.values():
            board.ram.show(address, size)
        board.ports.add(device.PORT, device.SIZE, self.registers)
        board.announced.devices.append(acpi.memory_devices)
        board.announced.events.append((pm.EVENT_MEMORY, acpi.NOTIFY_METHOD))
        board.announced.memory.append((self._start, self._size, 0))

    def add(self, size: int) -> int:
        """Put a module into a free slot and tell the guest; returns the slot. On the loop.

        Raises:
            ConfigError: there is no slot, or no space for it.
        """
        if type(size) is not int or size < BLOCK or size % BLOCK:
            raise ConfigError("memory", f"{size} bytes", "must be a multiple of 128M")
        present = self.registers.present
        with self._board.ports.lock(self.registers):
            slot = next((n for n in range(device.SLOTS) if n not in present), None)
            if slot is None:
                rule = f"must go into one of {device.SLOTS} slots, which are full"
                raise ConfigError("memory", f"{size} bytes", rule)
            address = self._free(size)
            self._board.ram.show(address, size)
            self.registers.plug(slot, address, size)
        return slot

    def ask_for(self, slot: int) -> None:
        """Ask the guest to give a module up. On the loop.

        Raises:
            ConfigError: there is none in the slot.
        """
        if slot not in self.registers.present:
            known = ", ".join(map(str, sorted(self.registers.present))) or "none"
            raise ConfigError("slot", slot, f"has no module; slots that have one are {known}")
        self.refusals.pop(slot, None)
        with self._board.ports.lock(self.registers):
            self.registers.ask_for(slot)

    def has(self, slot: int) -> bool:
        """Whether a slot has a module, which the guest has not given up."""
        with self._board.ports.lock(self.registers):
            return slot in self.registers.present

    def where(self) -> tuple[tuple[int, int], ...]:
        """As `modules` of the arguments, but as it is now."""
        present = self.registers.present
        found = [(0, 0)] * (max(present, default=-1) + 1)
        for slot, (address, size) in present.items():
            found[slot] = address - self._start, size
        return tuple(found)

    def _free(self, size: int) -> int:
        """Where a module fits: the first gap."""
        at = self._start
        for address, length in sorted(self.registers.present.values()):
            if address - at >= size:
                break
            at = address + length
        if at + size > self._start + self._size:
            raise ConfigError("memory", f"{size} bytes", "must fit below max_memory")
        return at

    def _ejected(self, address: int, size: int) -> None:
        """The guest has given a module up. On a vCPU's thread, which holds the registers."""
        self._board.ram.hide(address)
        self._board.memory.discard(GuestAddress(address), size)
        self._board.loop.call_soon(self._board.modules_changed)

    def _told(self, slot: int, event: int, status: int) -> None:
        """What came of an event. On a vCPU's thread."""
        if event == _EJECT_REQUEST and status not in (device.SUCCESS, device.IN_PROGRESS):
            self.refusals[slot] = status
            self._board.loop.call_soon(self._board.modules_changed)
