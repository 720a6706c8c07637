"""The guest-physical map: where RAM, tables, device windows and interrupts lie.

Everything that has a fixed address or a fixed interrupt number has it here, so that an overlap can
be seen by reading one file. Addresses are bytes; a range is `(address, size)`.
"""

from __future__ import annotations

__all__ = [
    "ACPI_SIZE",
    "ACPI_TABLES",
    "BLOCK",
    "EBDA",
    "ECAM",
    "ECAM_SIZE",
    "HIGH_MEMORY",
    "IDENTITY_MAP",
    "IOAPIC",
    "ISA_HOLE",
    "LOCAL_APIC",
    "MMIO_GAP_END",
    "MMIO_GAP_START",
    "PCI_MEMORY32",
    "RESET_VECTOR",
    "SERIAL_IRQ",
    "SERIAL_PORT",
    "TSS",
    "VIRTIO_MMIO_DEVICES",
    "VIRTIO_MMIO_SIZE",
    "VIRTIO_MMIO_START",
    "VM_GENERATION",
    "behind_ram",
    "e820_ranges",
    "firmware_pci_memory32",
    "intx_gsi",
    "pci_memory64",
    "ram_ranges",
    "virtio_gsi",
    "virtio_mmio_window",
]

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

EBDA = 0x9FC00  # conventional memory ends here, as kernels expect of a PC
ISA_HOLE = 0xA0000
ACPI_TABLES = 0xE0000  # where a kernel without a pointer would search for the RSDP
ACPI_SIZE = 0x20000
VM_GENERATION = 0xFFFE0  # 16 bytes
RESET_VECTOR = 0xFFFF0  # F000:FFF0, the last 16 bytes of what the tables' range reserves
HIGH_MEMORY = 0x100000

# RAM stops at 3 GiB and goes on at 4 GiB; what is between belongs to devices.
MMIO_GAP_START = 3 * GIB
MMIO_GAP_END = 4 * GIB

# Of a machine with PCI: BARs, and the configuration spaces of bus 0.
PCI_MEMORY32 = (0xC8000000, 0x18000000)
ECAM, ECAM_SIZE = 0xE0000000, 0x100000

BLOCK = 128 * MIB  # what Linux adds and takes away at once (x86's memory block)

VIRTIO_MMIO_START = MMIO_GAP_START
VIRTIO_MMIO_SIZE = 0x1000

IOAPIC = 0xFEC00000
LOCAL_APIC = 0xFEE00000

# Intel hosts without unrestricted guests need one page for an identity map and three for a TSS,
# inside the guest's physical space but not in its RAM. Above them is room for 16 MiB of firmware.
IDENTITY_MAP = 0xFEFFC000
TSS = 0xFEFFD000

SERIAL_PORT, SERIAL_IRQ = 0x3F8, 4

# The IOAPIC of KVM has 24 pins. What a PC's own devices use is left to them (0 timer, 1 keyboard,
# 2 cascade, 3 and 4 serial, 8 RTC, 9 SCI, 12 mouse, 13 FPU).
_VIRTIO_GSIS = (5, 6, 7, 10, 11, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23)
VIRTIO_MMIO_DEVICES = len(_VIRTIO_GSIS)


def virtio_gsi(index: int) -> int:
    """The interrupt of the virtio-mmio device `index`, counted from 0.

    Raises:
        IndexError: there are more devices than interrupt lines.
    """
    return _VIRTIO_GSIS[index]


def intx_gsi(slot: int) -> int:
    """The interrupt of the INTA# pin of a PCI slot; eight lines are shared."""
    return 16 + slot % 8


def behind_ram(memory: int) -> int:
    """Where memory that comes later begins: above 4 GiB and all RAM, at a GiB.

    Args:
        memory: bytes of RAM.
    """
    return MMIO_GAP_END + -(-max(memory - MMIO_GAP_START, 0) // GIB) * GIB


def pci_memory64(end: int) -> tuple[int, int]:
    """The range for large BARs, above all memory that the machine has or may get.

    Args:
        end: of that memory.
    """
    start = max(256 * GIB, -(-end // GIB) * GIB)
    return start, 256 * GIB


def firmware_pci_memory32(memory: int) -> list[tuple[int, int]]:
    """Windows for BARs that firmware places: all between RAM and the IOAPIC but ECAM's range.

    It begins no lower than 2 GiB, as on the chipset that firmware takes the machine for.

    Args:
        memory: bytes of RAM.
    """
    start = max(2 * GIB, min(memory, MMIO_GAP_START))
    behind = ECAM + ECAM_SIZE
    return [(start, ECAM - start), (behind, IOAPIC - behind)]


def virtio_mmio_window(index: int) -> int:
    """The address of the register file of the virtio-mmio device `index`, counted from 0."""
    return VIRTIO_MMIO_START + index * VIRTIO_MMIO_SIZE


def ram_ranges(memory: int) -> list[tuple[int, int]]:
    """Where `memory` bytes of RAM lie: below the gap, and the rest above 4 GiB.

    Example:
        >>> [(hex(a), s >> 20) for a, s in ram_ranges(4 << 30)]
        [('0x0', 3072), ('0x100000000', 1024)]
    """
    low = min(memory, MMIO_GAP_START)
    ranges = [(0, low)]
    if memory > low:
        ranges.append((MMIO_GAP_END, memory - low))
    return ranges


def e820_ranges(memory: int, *, pci: bool = False) -> list[tuple[int, int, bool]]:
    """The memory map as `(address, size, usable)`, sorted, without overlap."""
    low = min(memory, MMIO_GAP_START)
    ranges = [
        (0, EBDA, True),
        (EBDA, ISA_HOLE - EBDA, False),
        (ACPI_TABLES, ACPI_SIZE, False),
        (HIGH_MEMORY, low - HIGH_MEMORY, True),
        *([(ECAM, ECAM_SIZE, False)] if pci else []),
        (IDENTITY_MAP, TSS + 0x3000 - IDENTITY_MAP, False),
    ]
    if memory > low:
        ranges.append((MMIO_GAP_END, memory - low, True))
    return ranges
