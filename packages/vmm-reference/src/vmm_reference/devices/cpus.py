"""Processors that come and go while the machine runs, as the guest's ACPI asks about them.

Our own layout, for the AML of `vmm_reference.acpi.cpus`; offsets from `PORT`:

| offset | register | |
|---|---|---|
| 0 | up | number plus 1 of a processor that has come, or 0; reading takes it off the list |
| 1 | down | number plus 1 of a processor that is to be given up, or 0; likewise |
| 2 | eject | written by the guest: number plus 1 of a processor that it has given up |
| 32 to 63 | present | a bit a processor, read-only |

KVM can't destroy a vCPU. So all that the machine may ever have are made at power-on: one that has
not come, or has been given up, waits in KVM for the INIT that a guest brings a processor up with,
which resets it. That costs nothing, and the vCPU is used again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .changes import DOWN, UP, Changes

if TYPE_CHECKING:
    from collections.abc import Callable

    from .states import CpusState

__all__ = ["DOWN", "EJECT", "PORT", "PRESENT", "SIZE", "UP", "Cpus"]

PORT, SIZE = 0x620, 64
EJECT, PRESENT = 2, 32


class Cpus:
    """The registers.

    Args:
        count: processors that are there from the start.
        most: processors that the machine may have, up to 254.
        notify: tells the guest's ACPI to look.
        ejected: called with the number of a processor that the guest has given up.

    Attributes:
        present: numbers of the processors that are there.
        refused: ejections of what was not there, or of the first one.
    """

    def __init__(
        self,
        count: int,
        most: int,
        notify: Callable[[], object],
        ejected: Callable[[int], object],
    ) -> None:
        self.present = set(range(count))
        self._most = most
        self._ejected = ejected
        self._changes = Changes(notify)
        self.refused = 0

    def plug(self, number: int) -> None:
        """A processor comes; nothing happens where it is there already."""
        if number not in self.present:
            self.present.add(number)
            self._changes.come(number)

    def ask_for(self, number: int) -> None:
        """A processor is to be given up; the guest may take its time, or never do it."""
        if number in self.present:
            self._changes.ask_for(number)

    def read(self, offset: int, length: int) -> bytes:
        """Bytes at rising offsets."""
        return bytes([self._read(offset + n) for n in range(length)])

    def write(self, offset: int, data: bytes) -> None:
        """Only `eject` can be written; the first processor can't be given up."""
        for at, value in enumerate(data, offset):
            number = value - 1
            if at == EJECT and not (number > 0 and number in self.present):
                self.refused += 1
            elif at == EJECT:
                self.present.remove(number)
                self._changes.forget(number)
                self._ejected(number)

    def metrics(self) -> dict[str, int]:
        """How many there are, and ejections that could not be."""
        return {"present": len(self.present), "refused": self.refused}

    def save(self) -> CpusState:
        """Who is there, and what the guest has not looked at yet."""
        from .states import CpusState

        present, changes = tuple(sorted(self.present)), self._changes
        return CpusState(present, tuple(changes.up), tuple(changes.down))

    def restore(self, state: CpusState) -> None:
        """Take over what was saved; what the guest has not looked at is told again.

        Raises:
            StateError: a number is of no processor of this machine.
        """
        from .states import StateError

        for name in ("present", "up", "down"):
            numbers = getattr(state, name)
            if any(not 0 <= number < self._most for number in numbers):
                rule = f"must be from 0 to {self._most - 1}"
                raise StateError(f"CpusState.{name}", numbers, rule)
        self.present = set(state.present)
        self._changes.restore(state.up, state.down)

    def _read(self, offset: int) -> int:
        if offset in (UP, DOWN):
            return self._changes.take(offset)
        if PRESENT <= offset < SIZE:
            first = 8 * (offset - PRESENT)
            return sum(1 << bit for bit in range(8) if first + bit in self.present)
        return 0 if offset < PRESENT else 0xFF
