"""The power management timer of ACPI (6.4, section 4.8.2.1): a counter that firmware waits by."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from .states import PmTimerState

__all__ = ["FREQUENCY", "PORT", "SIZE", "PmTimer"]

PORT, SIZE = 0x608, 4  # 8 behind the power management registers, as chipsets have it
FREQUENCY = 3_579_545
_MASK = (1 << 24) - 1


class PmTimer:
    """A counter of 24 bits.

    Args:
        clock: seconds, of a clock that does not go back.

    Example:
        >>> PmTimer(clock=lambda: 2.0).read(0, 4) == (2 * FREQUENCY).to_bytes(4, "little")
        True
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._offset = 0
        self.reads = self.refused = 0

    def read(self, offset: int, length: int) -> bytes:
        """The counter, little-endian."""
        self.reads += 1
        return self._now().to_bytes(4, "little")[offset : offset + length].ljust(length, b"\0")

    def write(self, offset: int, data: bytes) -> None:
        """It can't be written."""
        self.refused += 1

    def metrics(self) -> dict[str, int]:
        """Looks at it, and writes that had no effect."""
        return {"timer_reads": self.reads, "timer_refused_writes": self.refused}

    def save(self) -> PmTimerState:
        """What it shows."""
        from .states import PmTimerState

        return PmTimerState(self._now())

    def restore(self, state: PmTimerState) -> None:
        """Go on from there."""
        self._offset += state.counter - self._now()

    def _now(self) -> int:
        return int(self._clock() * FREQUENCY) + self._offset & _MASK
