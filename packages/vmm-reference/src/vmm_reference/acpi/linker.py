"""ACPI tables for firmware: files, and the script by which it puts them where it wants.

Firmware chooses the addresses, so it is told which bytes are pointers and where checksums are.
Format: `struct BiosLinkerLoaderEntry` of QEMU's `hw/acpi/bios-linker-loader.c`.
"""

from __future__ import annotations

from struct import pack, unpack_from

__all__ = ["RSDP", "SCRIPT", "TABLES", "link"]

SCRIPT, RSDP, TABLES = "etc/table-loader", "etc/acpi/rsdp", "etc/acpi/tables"

_ENTRY_SIZE = 128
_ALLOCATE, _ADD_POINTER, _ADD_CHECKSUM = 1, 2, 3
_HIGH, _F_SEGMENT = 1, 2
_RSDP_SIZE = 36
_CHECKSUM = 9  # its offset in a table's header
_FADT_POINTERS = ((36, 4), (40, 4), (140, 8))  # FACS, which may not be there, DSDT and X_DSDT


def link(blob: bytes) -> dict[str, bytes]:
    """The files of firmware's configuration device.

    Args:
        blob: of `tables.build` with address 0, so that its pointers are offsets into it.
    """
    tables = bytearray(blob)
    xsdt = unpack_from("<Q", tables, 24)[0]
    rsdp = tables[:_RSDP_SIZE]
    tables[:_RSDP_SIZE] = bytes(_RSDP_SIZE)
    script = [
        pack("<I56sIB", _ALLOCATE, RSDP.encode(), 16, _F_SEGMENT),
        pack("<I56sIB", _ALLOCATE, TABLES.encode(), 64, _HIGH),
    ]

    def pointer(file: str, offset: int, size: int) -> None:
        script.append(
            pack("<I56s56sIB", _ADD_POINTER, file.encode(), TABLES.encode(), offset, size)
        )

    def checksum(file: str, offset: int, start: int, length: int) -> None:
        (rsdp if file == RSDP else tables)[offset] = 0
        script.append(pack("<I56sIII", _ADD_CHECKSUM, file.encode(), offset, start, length))

    def table(start: int) -> None:
        checksum(TABLES, start + _CHECKSUM, start, unpack_from("<I", tables, start + 4)[0])

    end = xsdt + unpack_from("<I", tables, xsdt + 4)[0]
    for entry in range(xsdt + 36, end, 8):
        pointer(TABLES, entry, 8)
        start = unpack_from("<Q", tables, entry)[0]
        if tables[start : start + 4] == b"FACP":
            table(unpack_from("<Q", tables, start + 140)[0])
            for offset, size in _FADT_POINTERS:
                if any(tables[start + offset : start + offset + size]):
                    pointer(TABLES, start + offset, size)
        table(start)
    table(xsdt)
    pointer(RSDP, 24, 8)
    checksum(RSDP, 8, 0, 20)
    checksum(RSDP, 32, 0, _RSDP_SIZE)
    return {
        SCRIPT: b"".join([entry.ljust(_ENTRY_SIZE, b"\0") for entry in script]),
        RSDP: bytes(rsdp),
        TABLES: bytes(tables),
    }
