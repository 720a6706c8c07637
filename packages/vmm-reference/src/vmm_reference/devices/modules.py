"""Modules of memory that come and go while the machine runs, as the guest's ACPI asks about them.

Our own layout, for the AML of `vmm_reference.acpi.modules`; offsets from `PORT`:

| offset | register | |
|---|---|---|
| 0 | up | number plus 1 of a slot whose module has come, or 0; reading takes it off the list |
| 1 | down | number plus 1 of a slot whose module is to be given up, or 0; likewise |
| 2 | eject | written by the guest: number plus 1 of a slot whose module it has given up |
| 32 a slot, from 32 on | slot | what is in it |

A slot, offsets from its start:

| offset | bytes | register | |
|---|---|---|---|
| 0, 8, 16 | 8 each | first, last, length | guest addresses, bytes; 0 in an empty slot |
| 24 | 1 | present | 1 or 0 |
| 25 | 1 | source | written: the event that a status is about, `_OST` (6.3.5) |
| 26 | 1 | status | written: the status; 0 is success |
"""

from __future__ import annotations

from struct import pack
from typing import TYPE_CHECKING

from .changes import DOWN, UP, Changes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from .states import ModulesState

__all__ = ["DOWN", "EJECT", "PORT", "SIZE", "SLOT", "SLOTS", "SLOT_SIZE", "UP", "Modules"]

SLOTS = 16
PORT, SIZE = 0x6C0, 32 + 32 * SLOTS
EJECT, SLOT, SLOT_SIZE = 2, 32, 32

SUCCESS, IN_PROGRESS = 0, 0x84  # of a status (table 6.46)

_SOURCE, _STATUS = 25, 26


class Modules:
    """The registers.

    Args:
        present: first address and size of the module in each slot that has one.
        notify: tells the guest's ACPI to look.
        ejected: called with first address and size of a module that the guest has given up.
        told: called with slot, event and status when the guest says what came of an event.

    Attributes:
        present: as it is now.
        refused: ejections of what was not there.
        failed: statuses of the guest's that were no success.
    """

    def __init__(
        self,
        present: Mapping[int, tuple[int, int]],
        notify: Callable[[], object],
        ejected: Callable[[int, int], object],
        told: Callable[[int, int, int], object] = lambda _slot, _event, _status: None,
    ) -> None:
        self.present = dict(present)
        self._ejected, self._told = ejected, told
        self._changes = Changes(notify)
        self._sources = bytearray(SLOTS)
        self.refused = self.failed = 0

    def plug(self, slot: int, address: int, size: int) -> None:
        """A module comes into an empty slot."""
        self.present[slot] = address, size
        self._changes.come(slot)

    def ask_for(self, slot: int) -> None:
        """A module is to be given up; the guest may take its time, or never do it."""
        if slot in self.present:
            self._changes.ask_for(slot)

    def read(self, offset: int, length: int) -> bytes:
        """Bytes at rising offsets."""
        return bytes([self._read(offset + n) for n in range(length)])

    def write(self, offset: int, data: bytes) -> None:
        """Only `eject`, `source` and `status` can be written."""
        for at, value in enumerate(data, offset):
            slot, register = divmod(at - SLOT, SLOT_SIZE)
            if at == EJECT and value - 1 in self.present:
                self._ejected(*self._forget(value - 1))
            elif at == EJECT:
                self.refused += 1
            elif at >= SLOT and register == _SOURCE:
                self._sources[slot] = value
            elif at >= SLOT and register == _STATUS:
                self.failed += value not in (SUCCESS, IN_PROGRESS)
                self._told(slot, self._sources[slot], value)

    def metrics(self) -> dict[str, int]:
        """Bytes of all modules, and what did not go well."""
        size = sum(size for _, size in self.present.values())
        return {"bytes": size, "refused": self.refused, "failed": self.failed}

    def save(self) -> ModulesState:
        """What is where, and what the guest has not looked at yet."""
        from .states import ModulesState

        slots = tuple((slot, *where) for slot, where in sorted(self.present.items()))
        return ModulesState(slots, tuple(self._changes.up), tuple(self._changes.down))

    def restore(self, state: ModulesState) -> None:
        """Take over what was saved; what the guest has not looked at is told again.

        Raises:
            StateError: it has other modules than this machine.
        """
        from .states import StateError

        own = self.save().present
        if state.present != own:
            raise StateError("ModulesState.present", state.present, f"must be {own}")
        self._changes.restore(state.up, state.down)

    def _forget(self, slot: int) -> tuple[int, int]:
        self._changes.forget(slot)
        return self.present.pop(slot)

    def _read(self, offset: int) -> int:
        if offset in (UP, DOWN):
            return self._changes.take(offset)
        slot, register = divmod(offset - SLOT, SLOT_SIZE)
        if offset < SLOT or slot not in self.present:
            return 0
        address, size = self.present[slot]
        return pack("<QQQB7x", address, address + size - 1, size, 1)[register]
