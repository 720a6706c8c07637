"""Processors that may come and go, in ACPI 6.4: sections 8.4 and 6.3."""

from __future__ import annotations

from struct import pack

from vmm_reference.devices import cpus

from . import aml

__all__ = ["NOTIFY_METHOD", "processors"]

NOTIFY_METHOD = "\\_SB.CPUS.SCAN"
"""What the generic event device calls when processors have changed."""

_DEVICE_CHECK, _EJECT_REQUEST = 1, 3


def processors(most: int) -> bytes:
    """A device for each processor that the machine may have, and a method that looks at them."""
    numbers = range(most)
    changes = ((aml.LOCAL0, _DEVICE_CHECK), (aml.LOCAL1, _EJECT_REQUEST))
    return aml.device(
        "CPUS",
        aml.name("_HID", aml.string("ACPI0010")),
        aml.name("_CID", aml.eisa_id("PNP0A05")),
        aml.system_io("CREG", cpus.PORT, 3),
        aml.field("CREG", ("CUP", 8), ("CDWN", 8), ("CEJT", 8)),
        aml.system_io("CPRS", cpus.PORT + cpus.PRESENT, cpus.SIZE - cpus.PRESENT),
        aml.field("CPRS", *((f"P{number:03X}", 1) for number in numbers)),
        *(_processor(number) for number in numbers),
        aml.method(
            "SCAN",
            0,
            aml.store("CUP", aml.LOCAL0),
            aml.store("CDWN", aml.LOCAL1),
            *(
                aml.if_(
                    aml.equal(local, aml.integer(number + 1)), aml.notify(f"C{number:03X}", event)
                )
                for number in numbers
                for local, event in changes
            ),
            serialized=True,
        ),
    )


def _processor(number: int) -> bytes:
    present = aml.if_(aml.call(f"P{number:03X}"), aml.return_(aml.integer(0xF)))
    apic = pack("<BBBBI", 0, 8, number, number, 1)  # as the MADT would have it, enabled
    terms = [
        aml.name("_HID", aml.string("ACPI0007")),
        aml.name("_UID", aml.integer(number)),
        aml.method("_STA", 0, present, aml.return_(aml.integer(0)), serialized=True),
        aml.name("_MAT", aml.buffer(apic)),
    ]
    if number:  # the first stays
        eject = aml.store(aml.integer(number + 1), "CEJT")
        terms.append(aml.method("_EJ0", 1, eject, serialized=True))
    return aml.device(f"C{number:03X}", *terms)
