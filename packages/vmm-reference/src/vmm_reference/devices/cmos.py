"""What the CMOS memory of a PC tells of it, besides the time: how much memory, how many CPUs."""

from __future__ import annotations

from vmm_reference.layout import MMIO_GAP_START

__all__ = ["cmos"]

_KIB, _64_KIB, _MIB = 1 << 10, 64 << 10, 1 << 20

# Registers of the CMOS memory, as PCs and SeaBIOS have them: low byte first.
_EQUIPMENT = 0x14  # a coprocessor, no diskette drive; the screen has a BIOS of its own, or is none
_CONVENTIONAL, _EXTENDED, _EXTENDED_TOO = 0x15, 0x17, 0x30  # in KiB
_SUMMED, _SUM = range(0x10, 0x2E), 0x2E  # which stands with its high byte first
_ABOVE_16M, _ABOVE_4G = 0x34, 0x5B  # in 64 KiB
_MORE_CPUS = 0x5F


def cmos(memory: int, cpus: int) -> dict[int, int]:
    """CMOS registers that tell how much memory and how many CPUs there are.

    Args:
        memory: bytes of RAM.
        cpus: how many.

    Example:
        >>> registers = cmos(64 << 20, 2)
        >>> registers[0x34] | registers[0x35] << 8, registers[0x5F]
        (768, 1)
    """
    low = min(memory, MMIO_GAP_START)
    extended = min((low - _MIB) // _KIB, 0xFFFF)
    words = {
        _EQUIPMENT: (0x02, 1),
        _CONVENTIONAL: (640, 2),
        _EXTENDED: (extended, 2),
        _EXTENDED_TOO: (extended, 2),
        _ABOVE_16M: (max(low - 16 * _MIB, 0) // _64_KIB, 2),
        _ABOVE_4G: ((memory - low) // _64_KIB, 3),
        _MORE_CPUS: (cpus - 1, 1),
    }
    found = {
        register + index: byte
        for register, (value, size) in words.items()
        for index, byte in enumerate(value.to_bytes(size, "little"))
    }
    high, low = divmod(sum([found.get(index, 0) for index in _SUMMED]), 256)
    return {**found, _SUM: high, _SUM + 1: low}
