"""The PCI host bridge in ACPI: windows, interrupt pins, hotplug, and the MCFG table.

Sections are those of ACPI 6.4; _PRT is 6.2.13, MCFG is in the PCI Firmware Specification, 4.1.2.
"""

from __future__ import annotations

from struct import pack
from typing import TYPE_CHECKING

from vmm_reference import layout
from vmm_reference.pci import hotplug
from vmm_reference.pci.bus import CONFIG_ADDRESS, SLOTS

from . import aml

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["NOTIFY_METHOD", "host_bridge", "mcfg"]

NOTIFY_METHOD = "\\_SB.PCI0.PCNT"
"""What the generic event device calls when slots have changed."""

_DEVICE_CHECK, _EJECT_REQUEST = 1, 3  # 5.6.6


def mcfg() -> bytes:
    """The body of the table: configuration space of segment 0, bus 0."""
    return bytes(8) + pack("<QHBB4x", layout.ECAM, 0, 0, 0)


def host_bridge(
    memory64: tuple[int, int],
    slots: Iterable[int],
    memory32: Iterable[tuple[int, int]] = (layout.PCI_MEMORY32,),
) -> bytes:
    """The bridge and what is below it.

    Args:
        memory64: address and size of the window for large BARs.
        slots: those that something can be plugged into, or pulled out of.
        memory32: address and size of each window below 4 GiB.
    """
    windows = aml.resources(
        aml.bus_numbers(0, 0),
        aml.io_ports(CONFIG_ADDRESS, 8),
        aml.io_window(0, CONFIG_ADDRESS - 1),
        aml.io_window(CONFIG_ADDRESS + 8, 0xFFFF),
        *(aml.memory_window32(*window) for window in memory32),
        aml.memory_window64(*memory64),
    )
    pins = aml.package(
        *(
            aml.package(
                aml.integer(slot << 16 | 0xFFFF),
                aml.integer(0),
                aml.integer(0),
                aml.integer(layout.intx_gsi(slot)),
            )
            for slot in range(1, SLOTS)
        )
    )
    return aml.device(
        "PCI0",
        aml.name("_HID", aml.eisa_id("PNP0A08")),
        aml.name("_CID", aml.eisa_id("PNP0A03")),
        aml.name("_SEG", aml.integer(0)),
        aml.name("_BBN", aml.integer(0)),
        aml.name("_UID", aml.integer(0)),
        aml.name("_CCA", aml.integer(1)),
        aml.name("_CRS", windows),
        aml.name("_PRT", pins),
        *_hotplug(list(slots)),
    ) + aml.device(
        "ECAM",
        aml.name("_HID", aml.eisa_id("PNP0C02")),
        aml.name("_UID", aml.integer(0)),
        aml.name("_CRS", aml.resources(aml.memory32(layout.ECAM, layout.ECAM_SIZE))),
    )


def _hotplug(slots: list[int]) -> tuple[bytes, ...]:
    """A device for each slot, and a method that looks which of them have changed."""
    return (
        aml.system_io("PHPR", hotplug.PORT, hotplug.SIZE),
        aml.field("PHPR", ("PCIU", 32), ("PCID", 32), ("PEJT", 32), access=aml.DWORD),
        *(
            aml.device(
                f"S{slot:02X}",
                aml.name("_ADR", aml.integer(slot << 16)),
                aml.name("_SUN", aml.integer(slot)),
                aml.method("_EJ0", 1, aml.store(aml.integer(1 << slot), "PEJT"), serialized=True),
            )
            for slot in slots
        ),
        aml.method(
            "PCNT",
            0,
            aml.store("PCIU", aml.LOCAL0),
            aml.store("PCID", aml.LOCAL1),
            *(
                aml.if_(aml.and_(local, aml.integer(1 << slot)), aml.notify(f"S{slot:02X}", event))
                for slot in slots
                for local, event in ((aml.LOCAL0, _DEVICE_CHECK), (aml.LOCAL1, _EJECT_REQUEST))
            ),
            serialized=True,
        ),
    )
