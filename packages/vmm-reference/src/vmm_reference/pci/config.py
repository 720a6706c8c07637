"""The configuration space of a function: a type 0 header and a list of capabilities (chapter 6)."""

from __future__ import annotations

from struct import pack_into
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .states import PciConfigState

__all__ = [
    "BAR0",
    "COMMAND",
    "COMMAND_INTX_DISABLE",
    "COMMAND_MEMORY",
    "SIZE",
    "STATUS",
    "STATUS_INTERRUPT",
    "ConfigSpace",
]

SIZE = 256

COMMAND, STATUS, BAR0, CAPABILITIES, INTERRUPT_LINE, INTERRUPT_PIN = 4, 6, 0x10, 0x34, 0x3C, 0x3D
COMMAND_MEMORY, COMMAND_MASTER, COMMAND_INTX_DISABLE = 0x0002, 0x0004, 0x0400
STATUS_INTERRUPT, STATUS_CAPABILITIES = 0x08, 0x10  # in the low byte

_CACHE_LINE_SIZE = 0x0C
_COMMAND_WRITABLE = COMMAND_MEMORY | COMMAND_MASTER | 0x0140 | COMMAND_INTX_DISABLE
_FIRST_CAPABILITY = 0x40
_MEMORY_64 = 0x04  # type field of a memory BAR, 6.2.5.1


class ConfigSpace:
    """256 bytes, of which some can be written.

    Reads and writes of any width and place are taken as bytes: what lies outside reads as zeros
    and ignores writes, and a bit that is read-only keeps its value. So there is no access that a
    driver could get wrong.

    Args:
        vendor: vendor identifier.
        device: device identifier.
        class_code: base class, sub-class and interface, 24 bits.
        revision: 0 to 255.
        subsystem: subsystem vendor and subsystem identifier.
        pin: 1 for INTA#, 0 for none.

    Example:
        >>> config = ConfigSpace(vendor=0x1AF4, device=0x1042, class_code=0x018000)
        >>> config.write(0, b"away")
        >>> config.read(0, 4).hex()
        'f41a4210'
    """

    def __init__(
        self,
        *,
        vendor: int,
        device: int,
        class_code: int,
        revision: int = 0,
        subsystem: tuple[int, int] = (0, 0),
        pin: int = 0,
    ) -> None:
        self._bytes = bytearray(SIZE)
        self._writable = bytearray(SIZE)
        pack_into("<HH", self._bytes, 0, vendor, device)
        pack_into("<I", self._bytes, 8, class_code << 8 | revision)
        pack_into("<HH", self._bytes, 0x2C, *subsystem)
        self._bytes[INTERRUPT_PIN] = pin
        pack_into("<H", self._writable, COMMAND, _COMMAND_WRITABLE)
        self._writable[_CACHE_LINE_SIZE] = 0xFF
        self._writable[INTERRUPT_LINE] = 0xFF
        self._next = _FIRST_CAPABILITY
        self._last = CAPABILITIES

    def add_bar(self, index: int, size: int, address: int = 0) -> None:
        """A 64-bit memory BAR in registers `index` and `index` + 1.

        Args:
            index: 0 to 4.
            size: bytes, a power of two from 16.
            address: where it is at first.
        """
        pack_into("<Q", self._bytes, BAR0 + 4 * index, address | _MEMORY_64)
        pack_into("<Q", self._writable, BAR0 + 4 * index, (1 << 64) - size)

    def bar(self, index: int) -> int:
        """The address that a BAR holds."""
        return self.word(BAR0 + 4 * index, 8) & ~0xF

    def add_capability(self, data: bytes, writable: bytes = b"") -> int:
        """Put a capability at the end of the list; its `next` byte is filled in.

        Args:
            data: the capability from its identifier on.
            writable: a mask of the bits that can be written, from the same place on.

        Returns:
            Its offset in configuration space.
        """
        offset = self._next
        self._bytes[offset : offset + len(data)] = data
        self._bytes[offset + 1] = 0
        self._writable[offset : offset + len(writable)] = writable
        self._bytes[self._last] = offset
        self._bytes[STATUS] |= STATUS_CAPABILITIES
        self._last = offset + 1
        self._next = offset + (len(data) + 3 & ~3)
        if self._next > SIZE:
            raise ValueError(f"capabilities of {self._next} bytes: must fit into {SIZE}")
        return offset

    def word(self, offset: int, length: int = 2) -> int:
        """A register as a number."""
        return int.from_bytes(self._bytes[offset : offset + length], "little")

    def set_status(self, bit: int, *, on: bool) -> None:
        """Set or clear a read-only bit of the status register's low byte."""
        self._bytes[STATUS] = self._bytes[STATUS] & ~bit | bit * on

    def set_bytes(self, offset: int, data: bytes) -> None:
        """Set registers, whether or not a guest can write them."""
        self._bytes[offset : offset + len(data)] = data

    def let_write(self, offset: int, mask: bytes) -> None:
        """Let a guest write the bits of `mask` from a register on."""
        self._writable[offset : offset + len(mask)] = mask

    def read(self, offset: int, length: int) -> bytes:
        """What a guest reads."""
        return bytes(self._bytes[offset : offset + length]).ljust(length, b"\0")

    def write(self, offset: int, data: bytes) -> None:
        """What a guest writes, as far as it can be written."""
        for at, value in enumerate(data[: max(SIZE - offset, 0)], offset):
            mask = self._writable[at]
            self._bytes[at] = self._bytes[at] & ~mask | value & mask

    def save(self) -> PciConfigState:
        """All registers."""
        from .states import PciConfigState

        return PciConfigState(bytes(self._bytes))

    def check(self, state: PciConfigState) -> None:
        """Raise `StateError` unless the state is of this function, but for what can be written."""
        from vmm_reference.devices.states import StateError

        for at, (own, saved) in enumerate(zip(self._bytes, state.registers, strict=True)):
            mask = self._writable[at] | STATUS_INTERRUPT * (at == STATUS)
            if (own ^ saved) & ~mask:
                rule = f"must be {own:#x} in its fixed bits at {at:#x}"
                raise StateError("PciConfigState.registers", saved, rule)

    def restore(self, state: PciConfigState) -> None:
        """Take over what was saved from the same function.

        Raises:
            StateError: it was another one.
        """
        self.check(state)
        self._bytes[:] = state.registers
