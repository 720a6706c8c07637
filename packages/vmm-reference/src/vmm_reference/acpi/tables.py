"""The tables a kernel finds: RSDP, XSDT, FADT, MADT and DSDT (ACPI 6.4, chapter 5).

A machine that begins with a kernel is hardware-reduced (4.1): no SCI, no PM1 and GPE blocks, no
FACS, and nothing to make a kernel use the 8259 and 8254, which are there all the same. Power is the
block of `vmm_reference.devices.pm`, its button a generic event device. One that firmware starts has
fixed hardware beside it (`vmm_reference.devices.pm1`).
"""

from __future__ import annotations

from struct import pack, pack_into

from vmm_reference.devices import pm, pvpanic
from vmm_reference.layout import (
    ACPI_TABLES,
    IOAPIC,
    LOCAL_APIC,
    SERIAL_IRQ,
    SERIAL_PORT,
    VM_GENERATION,
)

from . import aml

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["POWER_GSI", "PVPANIC_PORT", "RTC_GSI", "RTC_PORT", "build", "virtio_mmio"]

RTC_PORT, RTC_GSI = 0x70, 8
PVPANIC_PORT = pvpanic.PORT
POWER_GSI = 9
SCI_GSI = 13  # of fixed hardware, and never raised: any line that nothing else has

_OEM_ID, _OEM_TABLE_ID, _CREATOR = b"PYVMM ", b"VMMREF  ", b"PYVM"

# FADT flags (table 5.10)
_WBINVD, _PWR_BUTTON, _SLP_BUTTON, _RESET_REG_SUP, _HW_REDUCED = 1, 1 << 4, 1 << 5, 1 << 10, 1 << 20
_VGA_NOT_PRESENT = 1 << 2  # IA-PC boot flags (table 5.11)
_NO_C2, _NO_C3 = 0xFFF, 0xFFF  # latencies that say that there is no such state
_RSDP_SIZE, _FADT_SIZE = 36, 276

_PCAT_COMPAT = 1  # MADT flag (table 5.44): the two 8259 are there
_PIT_GSI = 2  # KVM wires the timer, IRQ 0 of the 8259, to this pin of the IOAPIC
_REVISIONS = {b"SRAT": 3}  # of tables that others make, other than 1
_FIRST_X2APIC = 255  # the broadcast identifier of xAPIC: from here on identifiers have 32 bits


def build(
    *,
    cpus: int,
    max_cpus: int | None = None,
    devices: Sequence[bytes] = (),
    events: Sequence[tuple[int, str]] = (),
    more: Sequence[tuple[bytes, bytes]] = (),
    boot_flags: int = 0,
    fixed_hardware: bool = False,
    address: int = ACPI_TABLES,
) -> bytes:
    r"""All tables as one piece of memory, in which the RSDP is first.

    Args:
        cpus: number of processors, whose APIC identifiers count from 0.
        max_cpus: how many there may be later; then `devices` announce all processors.
        devices: terms that the DSDT has in `\_SB` beside the machine's own.
        events: bits of the event register, and the method that each of them calls.
        more: signatures and bodies of further tables.
        boot_flags: what a PC has beside VGA, which it has not (table 5.11).
        fixed_hardware: whether there are PM1 blocks and a PM timer; else ACPI is hardware-reduced.
        address: where the piece will lie, a multiple of 16 below 4 GiB.

    Raises:
        ValueError: the tables do not fit into the space that the layout has for them.

    Example:
        >>> build(cpus=2)[:8]
        b'RSD PTR '
    """
    blob = bytearray(_RSDP_SIZE)  # to be filled in last

    def append(table: bytes, alignment: int = 16) -> int:
        """Add a table on a boundary; returns its address in the guest."""
        blob.extend(bytes(-(address + len(blob)) % alignment))
        start = address + len(blob)
        blob.extend(table)
        return start

    dsdt = append(_dsdt(cpus if max_cpus is None else 0, devices, events))
    facs = append(_facs(), 64) if fixed_hardware else None
    fadt = append(_fadt(dsdt, boot_flags, facs))
    found = [fadt, append(_madt(cpus, max_cpus or cpus))]
    found += [append(_table(s, _REVISIONS.get(s, 1), body)) for s, body in more]
    blob[:_RSDP_SIZE] = _rsdp(append(_table(b"XSDT", 1, pack(f"<{len(found)}Q", *found))))
    if len(blob) > VM_GENERATION - ACPI_TABLES:
        raise ValueError(
            f"ACPI tables of {len(blob)} bytes: must fit into {VM_GENERATION - ACPI_TABLES}"
        )
    return bytes(blob)


def virtio_mmio(number: int, address: int, size: int, gsi: int) -> bytes:
    """The term that announces a virtio-mmio device's window and interrupt."""
    return aml.device(
        f"VR{number:02X}",
        aml.name("_HID", aml.string("LNRO0005")),
        aml.name("_UID", aml.integer(number)),
        aml.name("_CCA", aml.integer(1)),
        aml.name("_CRS", aml.resources(aml.memory32(address, size), aml.interrupt(gsi))),
    )


def _checksum(data: bytes | bytearray) -> int:
    return -sum(data) & 0xFF


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    """A table with the common header (5.2.6)."""
    header = pack(
        "<4sIBB6s8sI4sI", signature, 36 + len(body), revision, 0,
        _OEM_ID, _OEM_TABLE_ID, 1, _CREATOR, 1,
    )  # fmt: skip
    table = bytearray(header + body)
    table[9] = _checksum(table)
    return bytes(table)


def _rsdp(xsdt: int) -> bytes:
    """The root pointer (5.2.5.3), with both checksums."""
    rsdp = bytearray(pack("<8sB6sBIIQB3x", b"RSD PTR ", 0, _OEM_ID, 2, 0, 36, xsdt, 0))
    rsdp[8] = _checksum(rsdp[:20])
    rsdp[32] = _checksum(rsdp)
    return bytes(rsdp)


def _register(port: int, bits: int = 8, access: int = 1) -> bytes:
    """A generic address structure (5.2.3.2): I/O space, by default one byte of it."""
    return pack("<BBBBQ", 1, bits, 0, access, port)


def _facs() -> bytes:
    """The firmware control structure (5.2.10), which has no checksum; nothing wakes here."""
    return pack("<4sI24xB31x", b"FACS", 64, 2)


def _fadt(dsdt: int, boot_flags: int, facs: int | None) -> bytes:
    """The fixed description table (5.2.9), revision 6.3; `facs` where there is fixed hardware."""
    body = bytearray(_FADT_SIZE - 36)

    def put(layout: str, offset: int, *values: int | bytes) -> None:
        pack_into("<" + layout, body, offset - 36, *values)

    flags = _WBINVD | _PWR_BUTTON | _SLP_BUTTON | _RESET_REG_SUP
    if facs is None:
        flags |= _HW_REDUCED
        # Not used then; left at 0, Linux takes the timer's override for the SCI's.
        put("H", 46, POWER_GSI)
    else:
        from vmm_reference.devices import pm1, pm_timer

        put("I", 36, facs)
        put("H", 46, SCI_GSI)
        put("I", 56, pm1.PORT)
        put("I", 64, pm1.PORT + pm1.CONTROL)
        put("I", 76, pm_timer.PORT)
        put("BBBB", 88, pm1.EVENT_SIZE, pm1.CONTROL_SIZE, 0, pm_timer.SIZE)
        put("HH", 96, _NO_C2, _NO_C3)
        put("12s", 148, _register(pm1.PORT, 8 * pm1.EVENT_SIZE, 2))
        put("12s", 172, _register(pm1.PORT + pm1.CONTROL, 8 * pm1.CONTROL_SIZE, 2))
        put("12s", 208, _register(pm_timer.PORT, 8 * pm_timer.SIZE, 3))
    put("I", 40, dsdt)
    put("B", 108, 0x32)  # CMOS register of the century
    put("H", 109, boot_flags | _VGA_NOT_PRESENT)
    put("I", 112, flags)
    put("12s", 116, _register(pm.PORT + pm.RESET))
    put("B", 128, pm.RESET_VALUE)
    put("B", 131, 3)  # minor revision
    put("Q", 140, dsdt)
    if facs is None:
        put("12s", 244, _register(pm.PORT + pm.SLEEP_CONTROL))
        put("12s", 256, _register(pm.PORT + pm.SLEEP_STATUS))
    return _table(b"FACP", 6, bytes(body))


def _madt(cpus: int, most: int) -> bytes:
    """Interrupt controllers (5.2.12): a local APIC a processor, one IOAPIC, NMI on LINT1."""
    small, large = range(min(most, _FIRST_X2APIC)), range(_FIRST_X2APIC, most)
    entries = [pack("<II", LOCAL_APIC, _PCAT_COMPAT)]
    entries += [pack("<BBBBI", 0, 8, number, number, _state(number < cpus)) for number in small]
    entries += [
        pack("<BBHIII", 9, 16, 0, number, _state(number < cpus), number) for number in large
    ]
    entries.append(pack("<BBBBII", 1, 12, 0, 0, IOAPIC, 0))
    entries.append(pack("<BBBBIH", 2, 10, 0, 0, _PIT_GSI, 0))
    entries.append(pack("<BBBHB", 4, 6, 0xFF, 0, 1))
    if large:
        entries.append(pack("<BBHIB3x", 10, 12, 0, 0xFFFFFFFF, 1))
    return _table(b"APIC", 5, b"".join(entries))


def _state(enabled: bool) -> int:
    """Local APIC flags (table 5.47): enabled, or capable of coming online later."""
    return 1 if enabled else 2


def _dsdt(cpus: int, devices: Sequence[bytes], events: Sequence[tuple[int, str]]) -> bytes:
    """What kernels can't find by themselves: devices with their ports, windows and interrupts."""
    processors = [
        aml.device(
            f"C{number:03X}",
            aml.name("_HID", aml.string("ACPI0007")),
            aml.name("_UID", aml.integer(number)),
        )
        for number in range(cpus)
    ]
    content = (
        aml.name("_S5", aml.package(*map(aml.integer, (pm.SLEEP_TYPE_S5, 0, 0, 0)))),
        aml.scope("_SB", *processors, *_legacy(), *devices, *_power(events)),
    )
    return _table(b"DSDT", 2, b"".join(content))


def _legacy() -> tuple[bytes, ...]:
    """Serial port, clock, and the device that a panic is reported to."""
    return (
        aml.device(
            "COM1",
            aml.name("_HID", aml.eisa_id("PNP0501")),
            aml.name("_UID", aml.integer(0)),
            aml.name(
                "_CRS", aml.resources(aml.io_ports(SERIAL_PORT, 8), aml.interrupt(SERIAL_IRQ))
            ),
        ),
        aml.device(
            "RTC",
            aml.name("_HID", aml.eisa_id("PNP0B00")),
            aml.name("_CRS", aml.resources(aml.io_ports(RTC_PORT, 4), aml.interrupt(RTC_GSI))),
        ),
        aml.device(
            "PEVT",
            aml.name("_HID", aml.string("QEMU0001")),
            aml.name("_CRS", aml.resources(aml.io_ports(PVPANIC_PORT, 1))),
            aml.system_io("PEOR", PVPANIC_PORT, 1),
            aml.field("PEOR", ("PEPT", 8)),
            aml.name("_STA", aml.integer(0xF)),
            aml.method("RDPT", 0, aml.return_("PEPT")),
            aml.method("WRPT", 1, aml.store(aml.ARG0, "PEPT")),
        ),
    )


def _power(events: Sequence[tuple[int, str]]) -> tuple[bytes, ...]:
    """The power button and what else there is to tell, by a generic event device (5.6.9)."""

    def event(bit: int, term: bytes) -> bytes:
        return aml.if_(aml.and_(aml.LOCAL0, aml.integer(bit)), term)

    return (
        aml.device(
            "PWRB",
            aml.name("_HID", aml.eisa_id("PNP0C0C")),
            aml.name("_UID", aml.integer(0)),
        ),
        aml.device(
            "GED",
            aml.name("_HID", aml.string("ACPI0013")),
            aml.name("_UID", aml.integer(0)),
            aml.name("_CRS", aml.resources(aml.interrupt(POWER_GSI, level=True))),
            aml.system_io("EREG", pm.PORT + pm.EVENTS, 1),
            aml.field("EREG", ("EVTS", 8)),
            aml.method(
                "_EVT", 1,
                aml.store("EVTS", aml.LOCAL0),
                event(pm.EVENT_POWER_BUTTON, aml.notify("PWRB", 0x80)),
                *(event(bit, aml.call(method)) for bit, method in events),
                serialized=True,
            ),
        ),
    )  # fmt: skip
