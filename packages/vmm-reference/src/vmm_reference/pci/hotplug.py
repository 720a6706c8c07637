"""Slots that change while the machine runs, as the guest's ACPI asks about them.

Three registers of 32 bits, a bit a slot, for the AML of the host bridge (`vmm_reference.acpi.pci`):

| offset | register | |
|---|---|---|
| 0 | up | slots that have got a device; reading clears |
| 4 | down | slots whose device is to be given up; reading clears |
| 8 | eject | written by the guest when it has given a device up |
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from .states import PciHotplugState

__all__ = ["PORT", "SIZE", "PciHotplug"]

PORT, SIZE = 0x610, 12

_UP, _DOWN, _EJECT = 0, 4, 8


class PciHotplug:
    """The registers. Ports of a machine with PCI.

    Args:
        notify: tells the guest's ACPI to look.
        ejected: called with each slot that the guest has given up.
    """

    def __init__(self, notify: Callable[[], object], ejected: Callable[[int], object]) -> None:
        self._notify, self._ejected = notify, ejected
        self._up = self._down = 0
        self.ejections = 0

    def plugged(self, slot: int) -> None:
        """A slot has got a device."""
        self._up |= 1 << slot
        self._notify()

    def ask_for(self, slot: int) -> None:
        """A slot's device is to be given up; the guest may take its time, or never do it."""
        self._down |= 1 << slot
        self._notify()

    def read(self, offset: int, length: int) -> bytes:
        """A whole register; anything else reads as zeros."""
        value = 0
        if length == 4 and offset == _UP:
            value, self._up = self._up, 0
        elif length == 4 and offset == _DOWN:
            value, self._down = self._down, 0
        return value.to_bytes(length, "little")

    def write(self, offset: int, data: bytes) -> None:
        """The eject register, whole."""
        if offset == _EJECT and len(data) == 4:
            bits = int.from_bytes(data, "little")
            for slot in range(1, 32):
                if bits >> slot & 1:
                    self.ejections += 1
                    self._ejected(slot)

    def metrics(self) -> dict[str, int]:
        """Slots that the guest has given up."""
        return {"ejections": self.ejections}

    def save(self) -> PciHotplugState:
        """What the guest has not looked at yet."""
        from .states import PciHotplugState

        return PciHotplugState(self._up, self._down)

    def restore(self, state: PciHotplugState) -> None:
        """Take over what was saved; the guest is told again."""
        self._up, self._down = state.up, state.down
        if self._up or self._down:
            self._notify()
