"""The PM1 blocks of ACPI's fixed hardware (6.4, section 4.8.3), for a machine that firmware starts.

Offsets from `PORT`: 0 status, 2 enable, 4 control, 16 bits each. There is no fixed event: the
generic event device tells of buttons. So no status bit is ever set, and the SCI never comes. But
firmware uses the 8259s, and only a kernel that finds these blocks takes those in hand: on
hardware-reduced ACPI the timer that firmware has left running comes as exception 8.
"""

from __future__ import annotations

from struct import pack, unpack
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from .states import Pm1State

__all__ = ["CONTROL", "CONTROL_SIZE", "EVENT_SIZE", "PORT", "SIZE", "Pm1"]

PORT, SIZE = 0x670, 6
EVENT_SIZE, CONTROL, CONTROL_SIZE = 4, 4, 2

_ENABLE = 2
_SCI_EN, _SLP_EN = 0x0001, 0x2000
_SLP_TYP = 10  # its first bit
_S5 = 5  # what the DSDT's \_S5 names


class Pm1:
    """The registers.

    Args:
        power_off: is called when the guest enters S5.

    Example:
        >>> blocks = Pm1(lambda: print("off"))
        >>> blocks.write(4, (_SLP_EN | _S5 << _SLP_TYP).to_bytes(2, "little"))
        off
        >>> blocks.read(4, 2).hex()
        '0114'
    """

    def __init__(self, power_off: Callable[[], None]) -> None:
        self._power_off = power_off
        self.refused = 0
        self._registers = bytearray(SIZE)
        self._registers[CONTROL] = _SCI_EN  # there is no other mode

    def read(self, offset: int, length: int) -> bytes:
        """The registers; SLP_EN reads as 0."""
        return bytes(self._registers[offset : offset + length]).ljust(length, b"\xff")

    def write(self, offset: int, data: bytes) -> None:
        """Enable bits and control; status bits are cleared by writing them, and are clear."""
        for at, value in enumerate(data, offset):
            if _ENABLE <= at < CONTROL:
                self._registers[at] = value
            elif at == CONTROL:
                self._registers[at] = value | _SCI_EN
            elif at == CONTROL + 1:
                self._registers[at] = value & ~(_SLP_EN >> 8)
                if value & _SLP_EN >> 8:
                    self._sleep(value >> _SLP_TYP - 8 & 7)

    def metrics(self) -> dict[str, int]:
        """Sleep states that the guest asked for and that are not there."""
        return {"pm1_refused_sleeps": self.refused}

    def save(self) -> Pm1State:
        """All registers."""
        from .states import Pm1State

        return Pm1State(*unpack("<2xHH", self._registers))

    def restore(self, state: Pm1State) -> None:
        """Become the registers that `state` was saved from."""
        self.write(_ENABLE, pack("<HH", state.enable, state.control & ~_SLP_EN))

    def _sleep(self, kind: int) -> None:
        if kind == _S5:
            self._power_off()
        else:
            self.refused += 1
