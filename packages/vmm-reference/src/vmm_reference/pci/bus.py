"""The PCI bus: slots, the two ways into their configuration spaces, and shared interrupt lines.

Configuration is reached through the ports 0xCF8 and 0xCFC (3.2.2.3.2) and through memory, 4 KiB a
function (PCI Express Base Specification, 7.2.2). A slot without a function reads as all ones.
"""

from __future__ import annotations

import threading
from _thread import allocate_lock
from typing import TYPE_CHECKING, Protocol

from vmm_reference import layout

from .config import SIZE, ConfigSpace

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm_reference.bus import Bus

    from .states import PciBusState

__all__ = ["CONFIG_ADDRESS", "SLOTS", "Function", "PciBus"]

SLOTS = 32
CONFIG_ADDRESS = 0xCF8

_ENABLE = 1 << 31
_DATA, _RESET_CONTROL = 4, 1  # offsets from CONFIG_ADDRESS; the latter as chipsets have it
_HARD_RESET = 0x06


class Function(Protocol):
    """What is in a slot."""

    def read_config(self, offset: int, length: int) -> bytes:
        """Configuration space, 0 <= `offset` < 4096."""

    def write_config(self, offset: int, data: bytes) -> None:
        """Configuration space, 0 <= `offset` < 4096."""


class HostBridge:
    """Slot 0: what software expects to find first."""

    def __init__(self) -> None:
        self._config = ConfigSpace(vendor=0x8086, device=0x0D57, class_code=0x060000)

    def read_config(self, offset: int, length: int) -> bytes:
        """The header."""
        return self._config.read(offset, length)

    def write_config(self, offset: int, data: bytes) -> None:
        """The header, where it can be written, which has no effect."""
        self._config.write(offset, data)


class PciBus:
    """Bus 0 of the machine.

    Args:
        ports: gets the two configuration ports.
        mmio: gets the memory-mapped configuration space.
        irq_line: sets the level of an interrupt line of the machine.
        reset: called when the guest resets the machine by port 0xCF9.

    Attributes:
        functions: by slot.
        more: functions beside the first of a slot, by slot and function number (5 and 3 bits).
        lock: held around every configuration access; take it to change `functions`.
    """

    def __init__(
        self,
        ports: Bus,
        mmio: Bus,
        irq_line: Callable[[int, bool], object],
        reset: Callable[[], object],
    ) -> None:
        self.functions: dict[int, Function] = {0: HostBridge()}
        self.more: dict[int, Function] = {}
        self.lock = allocate_lock()
        self._irq_line = irq_line
        self._reset = reset
        self._address = 0
        self._raised: set[int] = set()
        self._intx_lock = threading.Lock()
        self._next_bar = layout.PCI_MEMORY32[0]
        ports.add(CONFIG_ADDRESS, 8, self, lock=self.lock)
        mmio.add(layout.ECAM, layout.ECAM_SIZE, _Ecam(self), lock=self.lock)

    def free_slot(self, taken: set[int]) -> int:
        """The first slot that neither has a function nor is in `taken`.

        Raises:
            ValueError: there is none.
        """
        for slot in range(1, SLOTS):
            if slot not in self.functions and slot not in taken:
                return slot
        raise ValueError(f"all {SLOTS - 1} slots have a device")

    def place(self, size: int) -> int:
        """An address for a BAR, as firmware would choose it, or 0 where the window is full."""
        start, length = layout.PCI_MEMORY32
        address = self._next_bar + size - 1 & -size
        if address + size > start + length:
            return 0
        self._next_bar = address + size
        return address

    def set_intx(self, slot: int, *, level: bool) -> None:
        """A function's interrupt pin; functions that share a line are ored."""
        gsi = layout.intx_gsi(slot)
        with self._intx_lock:
            before = any(layout.intx_gsi(other) == gsi for other in self._raised)
            (self._raised.add if level else self._raised.discard)(slot)
            after = any(layout.intx_gsi(other) == gsi for other in self._raised)
            if after != before:
                self._irq_line(gsi, after)

    def read(self, offset: int, length: int) -> bytes:
        """The configuration ports, from `CONFIG_ADDRESS` on."""
        if offset == 0 and length == 4:
            return self._address.to_bytes(4, "little")
        if offset >= _DATA and offset + length <= _DATA + 4 and self._address & _ENABLE:
            at = self._address & 0xFC | offset - _DATA
            return self.read_config(self._address >> 8 & 0xFFFF, at, length)
        return b"\xff" * length

    def write(self, offset: int, data: bytes) -> None:
        """The configuration ports, from `CONFIG_ADDRESS` on."""
        if offset == 0 and len(data) == 4:
            self._address = int.from_bytes(data, "little") & (_ENABLE | 0xFFFFFC)
        elif offset == _RESET_CONTROL and len(data) == 1:
            if data[0] & _HARD_RESET == _HARD_RESET:
                self._reset()
        elif offset >= _DATA and offset + len(data) <= _DATA + 4 and self._address & _ENABLE:
            at = self._address & 0xFC | offset - _DATA
            self.write_config(self._address >> 8 & 0xFFFF, at, data)

    def read_config(self, where: int, offset: int, length: int) -> bytes:
        """Configuration space of bus, slot and function number `where` (8, 5 and 3 bits)."""
        function = self._find(where)
        if function is None:
            return b"\xff" * length
        return function.read_config(offset, length)

    def write_config(self, where: int, offset: int, data: bytes) -> None:
        """The same, written."""
        function = self._find(where)
        if function is not None:
            function.write_config(offset, data)

    def _find(self, where: int) -> Function | None:
        if where & 7 or where >> 8:
            return self.more.get(where)
        return self.functions.get(where >> 3)

    def save(self) -> PciBusState:
        """What the configuration port holds; lines follow from the functions."""
        from .states import PciBusState

        return PciBusState(self._address)

    def restore(self, state: PciBusState) -> None:
        """Take over what was saved."""
        self._address = state.address & (_ENABLE | 0xFFFFFC)


class _Ecam:
    """Configuration spaces in memory."""

    def __init__(self, bus: PciBus) -> None:
        self._bus = bus

    def read(self, offset: int, length: int) -> bytes:
        if offset & 0xFFF >= SIZE and (offset >> 12) & ~0xF8 == 0:
            present = offset >> 15 in self._bus.functions
            return (b"\0" if present else b"\xff") * length
        return self._bus.read_config(offset >> 12, offset & 0xFFF, length)

    def write(self, offset: int, data: bytes) -> None:
        self._bus.write_config(offset >> 12, offset & 0xFFF, data)
