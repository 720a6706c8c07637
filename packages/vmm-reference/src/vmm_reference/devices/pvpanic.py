"""The device by which a guest tells that its kernel has panicked: QEMU's pvpanic, ISA variant.

One byte at port 0x505: read, it has a bit for each event that may be reported; written, it reports
those whose bits are set. Linux finds it through ACPI as QEMU0001. Specification: QEMU's
`docs/specs/pvpanic`.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .states import PvpanicState

__all__ = ["CRASH_LOADED", "PANICKED", "PORT", "Pvpanic"]

PORT = 0x505

PANICKED = 0x01
CRASH_LOADED = 0x02  # it panicked, and its crash kernel takes over: leave it alone


class Pvpanic:
    r"""One register for bad news.

    Args:
        event: is given the events that the guest reports, as bits: `PANICKED`, `CRASH_LOADED`.
        supported: which events it may report; others are ignored.

    Example:
        >>> device = Pvpanic(event=print)
        >>> device.write(0, b"\x01")
        1
    """

    def __init__(
        self, event: Callable[[int], None], *, supported: int = PANICKED | CRASH_LOADED
    ) -> None:
        self._event = event
        self._supported = supported
        self.panics = self.crash_loads = self.refused = 0

    def read(self, offset: int, length: int) -> bytes:
        """The events that may be reported."""
        return bytes([self._supported if offset + n == 0 else 0xFF for n in range(length)])

    def write(self, offset: int, data: bytes) -> None:
        """Report events."""
        if offset or not data:
            return
        events = data[0] & self._supported
        self.panics += bool(events & PANICKED)
        self.crash_loads += bool(events & CRASH_LOADED)
        self.refused += events != data[0]
        if events:
            self._event(events)

    def metrics(self) -> dict[str, int]:
        """What was reported, and writes with events that can't be."""
        return {
            "panics": self.panics,
            "crash_loads": self.crash_loads,
            "refused_writes": self.refused,
        }

    def save(self) -> PvpanicState:
        """What the guest was told that it may report."""
        from .states import PvpanicState

        return PvpanicState(self._supported)

    def restore(self, state: PvpanicState) -> None:
        """Support what the guest was told."""
        self._supported = state.supported
