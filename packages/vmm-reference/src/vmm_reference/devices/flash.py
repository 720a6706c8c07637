"""A parallel flash memory: Intel's command set as OVMF's driver uses it (JEDEC CFI, JESD68).

One chip with a bus of eight bits and blocks of 4 KiB. While it shows its array, reads need no
help: KVM has the memory. A command takes it away, and every read is answered here until the chip
shows its array again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from .states import FlashState

__all__ = ["BLOCK", "Flash"]

BLOCK = 4096

# Commands
READ_ARRAY, READ_STATUS, CLEAR_STATUS, READ_IDENTIFIER, CFI_QUERY = 0xFF, 0x70, 0x50, 0x90, 0x98
PROGRAM, PROGRAM_TOO, ERASE, CONFIRM = 0x10, 0x40, 0x20, 0xD0

# Bits of the status register
READY, ERASE_ERROR, PROGRAM_ERROR = 0x80, 0x20, 0x10

_MANUFACTURER, _DEVICE = 0x89, 0x18  # Intel, 28F128J3

_MODES = (READ_ARRAY, READ_STATUS, READ_IDENTIFIER, CFI_QUERY, PROGRAM, ERASE)


class Flash:
    r"""The chip.

    Args:
        array: what it holds; written here and nowhere else, a multiple of `BLOCK` bytes.
        changed: told offset and length of each piece that was programmed or erased; whether it
            could be kept, else the chip tells the guest that its command has failed.
        show: told whether reads find the array, each time that this changes.

    Example:
        >>> array = bytearray(b"\xff" * 4096)
        >>> chip = Flash(memoryview(array), changed=lambda *_: True, show=lambda whole: None)
        >>> chip.write(5, b"\x10"); chip.write(5, b"A"); chip.write(5, b"\xff")
        >>> chip.read(4, 2)
        b'\xffA'
    """

    def __init__(
        self,
        array: memoryview,
        changed: Callable[[int, int], bool],
        show: Callable[[bool], None],
    ) -> None:
        self._array = array
        self._changed = changed
        self._show = show
        self._mode = READ_ARRAY
        self._status = READY
        self.programmed = self.erased = self.refused = self.failures = 0

    def read(self, offset: int, length: int) -> bytes:
        """The array, the status register, identifiers or the CFI table, by the last command."""
        if self._mode == READ_ARRAY:
            return bytes(self._array[offset : offset + length])
        if self._mode == READ_IDENTIFIER:
            return bytes([self._identifier(offset + n) for n in range(length)])
        if self._mode == CFI_QUERY:
            return bytes([self._query(offset + n) for n in range(length)])
        return bytes([self._status]) * length

    def write(self, offset: int, data: bytes) -> None:
        """Commands, and the second cycles of programming and erasing; a byte a cycle."""
        for value in data:
            self._cycle(offset, value)
            offset += 1

    def metrics(self) -> dict[str, int]:
        """Bytes programmed, blocks erased, commands that are none, and what could not be kept."""
        return {
            "programmed_bytes": self.programmed,
            "erased_blocks": self.erased,
            "refused_commands": self.refused,
            "host_failures": self.failures,
        }

    def save(self) -> FlashState:
        """What the next access would meet; the array is part of the machine's memory."""
        from .states import FlashState

        return FlashState(self._mode, self._status)

    def restore(self, state: FlashState) -> None:
        """Go on from there; the array may be another than the host's file holds.

        Raises:
            StateError: the chip has no such mode.
        """
        from .states import StateError

        if state.mode not in _MODES:
            raise StateError("FlashState.mode", state.mode, f"must be one of {_MODES}")
        self._set_mode(state.mode)
        self._status = state.status | READY
        self.failures += not self._changed(0, len(self._array))

    def _cycle(self, offset: int, value: int) -> None:
        if self._mode == PROGRAM:
            # Programming clears bits; only erasing sets them.
            self._array[offset] &= value
            self.programmed += 1
            self._keep(offset, 1, PROGRAM_ERROR)
        elif self._mode == ERASE:
            if value == CONFIRM:
                start = offset & -BLOCK
                self._array[start : start + BLOCK] = b"\xff" * BLOCK
                self.erased += 1
                self._keep(start, BLOCK, ERASE_ERROR)
            else:
                self.refused += 1
                self._status |= ERASE_ERROR | PROGRAM_ERROR  # a wrong sequence of commands
                self._set_mode(READ_STATUS)
        elif value in (PROGRAM, PROGRAM_TOO):
            self._set_mode(PROGRAM)
        elif value == CLEAR_STATUS:
            self._status = READY
            self._set_mode(READ_STATUS)
        elif value in _MODES:
            self._set_mode(value)
        else:  # what it does not know leaves the chip showing its array, as real ones do
            self.refused += 1
            self._set_mode(READ_ARRAY)

    def _keep(self, offset: int, length: int, error: int) -> None:
        if not self._changed(offset, length):
            self.failures += 1
            self._status |= error
        self._set_mode(READ_STATUS)

    def _set_mode(self, mode: int) -> None:
        before, self._mode = self._mode, mode
        if (before == READ_ARRAY) != (mode == READ_ARRAY):
            self._show(mode == READ_ARRAY)

    def _identifier(self, offset: int) -> int:
        return {0: _MANUFACTURER, 1: _DEVICE}.get(offset & 0xFF, 0)

    def _query(self, offset: int) -> int:
        """The table of JESD68: command set 1, timings, size, one region of blocks."""
        blocks = len(self._array) // BLOCK - 1
        size = (len(self._array) - 1).bit_length()
        table = b"QRY\x01\0\x31\0\0\0\0\0" + b"\x45\x55\0\0\x07\0\x0a\0\x04\0\x04\0"
        table += bytes((size, 0, 0, 0, 0, 1, blocks & 0xFF, blocks >> 8, BLOCK >> 8 & 0xFF, 0))
        index = offset - 0x10
        return table[index] if 0 <= index < len(table) else 0
