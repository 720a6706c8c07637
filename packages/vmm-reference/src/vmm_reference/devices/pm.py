"""Power of the machine as hardware-reduced ACPI has it: sleep registers, reset, power button.

Four ports of one byte each, which the FADT and DSDT of `vmm_reference.acpi` announce:

| offset | register | ACPI 6.4 |
|---|---|---|
| 0 | sleep control: bit 5 SLP_EN, bits 2 to 4 SLP_TYP | 4.8.3.7 |
| 1 | sleep status: bit 7 WAK_STS, cleared by writing it | 4.8.3.7 |
| 2 | reset: `RESET_VALUE` resets the machine | 4.8.3.6 |
| 3 | events for the generic event device, cleared by reading | 5.6.9, our own layout |

Hardware-reduced, since a machine without firmware has nothing to gain from PM1 and GPE blocks: a
kernel that knows their absence leaves alone the 8259 and 8254 too, which saves it time at boot.
"""

from __future__ import annotations

from struct import pack

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .states import PowerState

__all__ = [
    "EVENTS",
    "EVENT_CPU",
    "EVENT_GENERATION",
    "EVENT_MEMORY",
    "EVENT_PCI",
    "EVENT_POWER_BUTTON",
    "PORT",
    "RESET",
    "RESET_CODE",
    "RESET_VALUE",
    "SIZE",
    "SLEEP_CONTROL",
    "SLEEP_STATUS",
    "SLEEP_TYPE_S5",
    "PowerManagement",
]

PORT, SIZE = 0x600, 4

SLEEP_CONTROL, SLEEP_STATUS, RESET, EVENTS = range(4)

SLEEP_TYPE_S5 = 5  # the value that the DSDT's \_S5 names
RESET_VALUE = 0x01
EVENT_POWER_BUTTON = 0x01
EVENT_PCI = 0x02
EVENT_GENERATION = 0x04
EVENT_CPU = 0x08
EVENT_MEMORY = 0x10

# Real-mode code that resets the machine, for a PC's reset vector: mov $RESET, %dx; mov $VALUE, %al;
# out %al, %dx; then hlt for as long as the reset takes. Linux jumps there when it reboots on
# hardware-reduced ACPI without EFI: it takes EFI's reset for the right one, and falls back.
RESET_CODE = pack("<BHBBBB", 0xBA, PORT + RESET, 0xB0, RESET_VALUE, 0xEE, 0xF4) + b"\xeb\xfd"

SLP_EN = 0x20
WAK_STS = 0x80


class PowerManagement:
    """The guest's way to power off and reset, and the host's way to ask for it.

    Args:
        power_off: is called when the guest enters S5.
        reset: is called when the guest writes the reset register.
        interrupt: is given the level of the generic event device's interrupt when it changes.

    Example:
        >>> power = PowerManagement(lambda: print("off"), lambda: print("reset"), print)
        >>> power.write(SLEEP_CONTROL, bytes([SLP_EN | SLEEP_TYPE_S5 << 2]))
        off
    """

    def __init__(
        self,
        power_off: Callable[[], None],
        reset: Callable[[], None],
        interrupt: Callable[[bool], None],
    ) -> None:
        self._power_off = power_off
        self._reset = reset
        self._interrupt = interrupt
        self._events = 0
        self.told = self.refused = 0
        self._wake_status = False

    def press_power_button(self) -> None:
        """Ask the guest to shut down; it learns it by an interrupt and may ignore it."""
        self._raise(EVENT_POWER_BUTTON)

    def tell(self, event: int) -> None:
        """Raise an event of the generic event device."""
        self._raise(event)

    def read(self, offset: int, length: int) -> bytes:
        """The registers; sleep control and reset read as zero."""
        return bytes([self._read(offset + n) for n in range(length)])

    def write(self, offset: int, data: bytes) -> None:
        """The registers; events can't be written."""
        for value in data:
            if offset == SLEEP_CONTROL:
                if value & SLP_EN:
                    self._sleep(value >> 2 & 7)
            elif offset == SLEEP_STATUS:
                if value & WAK_STS:
                    self._wake_status = False
            elif offset == RESET and value == RESET_VALUE:
                self._reset()
            elif offset == RESET:
                self.refused += 1
            offset += 1

    def metrics(self) -> dict[str, int]:
        """Events that the guest was told of, whether one waits, and requests that are none."""
        waiting = int(bool(self._events))
        return {"told": self.told, "waiting": waiting, "refused": self.refused}

    def save(self) -> PowerState:
        """Events that the guest has not fetched, and the wake status."""
        from .states import PowerState

        return PowerState(self._events, self._wake_status)

    def restore(self, state: PowerState) -> None:
        """Become the registers that `state` was saved from; what is pending interrupts again."""
        self._events = 0
        self._wake_status = state.wake_status
        self._raise(state.events)

    def _read(self, offset: int) -> int:
        if offset == SLEEP_STATUS:
            return WAK_STS if self._wake_status else 0
        if offset == EVENTS:
            events, self._events = self._events, 0
            if events:
                self._interrupt(False)
            return events
        return 0 if offset in (SLEEP_CONTROL, RESET) else 0xFF

    def _sleep(self, kind: int) -> None:
        if kind == SLEEP_TYPE_S5:
            self._power_off()
        else:  # the DSDT names no other
            self.refused += 1

    def _raise(self, events: int) -> None:
        quiet = not self._events
        self.told += bool(events)
        self._events |= events
        if quiet and self._events:
            self._interrupt(True)
