"""Modules of memory that may come and go, in ACPI 6.4: sections 9.12, 6.3 and 6.4.3.5.1."""

from __future__ import annotations

from vmm_reference.devices import modules

from . import aml

__all__ = ["NOTIFY_METHOD", "memory_devices"]

NOTIFY_METHOD = "\\_SB.MEMS.SCAN"
"""What the generic event device calls when modules have changed."""

_DEVICE_CHECK, _EJECT_REQUEST = 1, 3
_FIRST, _LAST, _LENGTH = 14, 22, 38  # where a descriptor has them


def memory_devices() -> bytes:
    """A memory device for each slot, and a method that looks at them."""
    slots = range(modules.SLOTS)
    changes = ((aml.LOCAL0, _DEVICE_CHECK), (aml.LOCAL1, _EJECT_REQUEST))
    return aml.device(
        "MEMS",
        aml.name("_HID", aml.eisa_id("PNP0A06")),
        aml.name("_UID", aml.string("Memory modules")),
        aml.system_io("MREG", modules.PORT, modules.SIZE),
        aml.field("MREG", ("MUP", 8), ("MDWN", 8), ("MEJT", 8)),
        *(_registers(slot) for slot in slots),
        *(_module(slot) for slot in slots),
        aml.method(
            "SCAN",
            0,
            aml.store("MUP", aml.LOCAL0),
            aml.store("MDWN", aml.LOCAL1),
            *(
                aml.if_(aml.equal(local, aml.integer(slot + 1)), aml.notify(f"M{slot:03X}", event))
                for slot in slots
                for local, event in changes
            ),
            serialized=True,
        ),
    )


def _registers(slot: int) -> bytes:
    """Addresses by double words, the rest by bytes: a write must not reach its neighbours."""
    region = f"MR{slot:02X}"
    start = modules.PORT + modules.SLOT + slot * modules.SLOT_SIZE
    addresses = ((f"MF{slot:02X}", 64), (f"MT{slot:02X}", 64), (f"MS{slot:02X}", 64))
    rest = (("", 192), (f"MP{slot:02X}", 8), (f"ME{slot:02X}", 8), (f"MO{slot:02X}", 8))
    return (
        aml.system_io(region, start, modules.SLOT_SIZE)
        + aml.field(region, *addresses, access=aml.DWORD)
        + aml.field(region, *rest)
    )


def _module(slot: int) -> bytes:
    present = aml.if_(aml.call(f"MP{slot:02X}"), aml.return_(aml.integer(0xF)))
    where = aml.resources(aml.memory_window64(0, 1, cacheable=True))
    return aml.device(
        f"M{slot:03X}",
        aml.name("_HID", aml.eisa_id("PNP0C80")),
        aml.name("_UID", aml.integer(slot)),
        aml.method("_STA", 0, present, aml.return_(aml.integer(0)), serialized=True),
        aml.method(
            "_CRS",
            0,
            aml.name("RANG", where),
            aml.create_qword_field("RANG", _FIRST, "FRST"),
            aml.create_qword_field("RANG", _LAST, "LAST"),
            aml.create_qword_field("RANG", _LENGTH, "SIZE"),
            aml.store(f"MF{slot:02X}", "FRST"),
            aml.store(f"MT{slot:02X}", "LAST"),
            aml.store(f"MS{slot:02X}", "SIZE"),
            aml.return_("RANG"),
            serialized=True,
        ),
        aml.method("_EJ0", 1, aml.store(aml.integer(slot + 1), "MEJT"), serialized=True),
        aml.method(
            "_OST",
            3,
            aml.store(aml.ARG0, f"ME{slot:02X}"),
            aml.store(aml.ARG1, f"MO{slot:02X}"),
            serialized=True,
        ),
    )
