from __future__ import annotations

import re
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm_reference import layout
from vmm_reference.acpi import aml, cpus, modules, pci, tables
from vmm_reference.acpi.srat import srat
from vmm_reference.devices import pm, pvpanic

BASE = layout.ACPI_TABLES

needs_iasl = pytest.mark.skipif(
    shutil.which("iasl") is None, reason="iasl is not installed; it comes with acpica-tools"
)


def terms(count: int) -> list[bytes]:
    return [tables.virtio_mmio(number, *window) for number, window in enumerate(windows(count))]


def windows(count: int) -> list[tuple[int, int, int]]:
    return [
        (layout.virtio_mmio_window(n), layout.VIRTIO_MMIO_SIZE, layout.virtio_gsi(n))
        for n in range(count)
    ]


def found(blob: bytes, base: int = BASE) -> dict[str, bytes]:
    """The tables, found as a kernel finds them: from the RSDP by physical addresses."""

    def table(address: int) -> bytes:
        start = address - base
        length = struct.unpack_from("<I", blob, start + 4)[0]
        assert address % 16 == 0
        assert 0 < start < start + length <= len(blob)
        assert sum(blob[start : start + length]) % 256 == 0
        return blob[start : start + length]

    signature, _, _, revision, _, length, xsdt, _ = struct.unpack_from("<8sB6sBIIQB", blob)
    assert (signature, revision, length) == (b"RSD PTR ", 2, 36)
    assert sum(blob[:20]) % 256 == sum(blob[:36]) % 256 == 0
    root = table(xsdt)
    pointers = [pointer for (pointer,) in struct.iter_unpack("<Q", root[36:])]
    result = {"XSDT": root} | {t[:4].decode(): t for t in map(table, pointers)}
    (dsdt,) = struct.unpack_from("<Q", result["FACP"], 140)
    assert struct.unpack_from("<I", result["FACP"], 40)[0] == dsdt
    return result | {"DSDT": table(dsdt)}


def entries(madt: bytes) -> Iterator[bytes]:
    """The structures of a MADT."""
    at = 44
    while at < len(madt):
        yield madt[at : at + madt[at + 1]]
        at += madt[at + 1]
    assert at == len(madt)


# The tables.


@pytest.mark.parametrize(("cpus", "devices"), [(1, 0), (4, 3), (255, 15), (300, 1)])
def test_a_kernel_finds_every_table(cpus: int, devices: int) -> None:
    """From the RSDP on every pointer, length and checksum is right, wherever the tables lie."""
    expected = {"XSDT", "FACP", "APIC", "DSDT"}
    assert set(found(tables.build(cpus=cpus, devices=terms(devices)))) == expected
    moved = tables.build(cpus=cpus, devices=terms(devices), address=0x7FF0000)
    assert set(found(moved, 0x7FF0000)) == expected


def test_tables_are_a_function_of_their_arguments() -> None:
    """The same machine gets the same bytes, so that a saved one finds what it knew."""
    assert tables.build(cpus=3, devices=terms(2)) == tables.build(cpus=3, devices=terms(2))


def test_tables_fit_their_place() -> None:
    """The largest machine's tables end before 1 MiB; a larger one is refused, not cut."""
    assert BASE + len(tables.build(cpus=255, devices=terms(15))) <= 0x100000
    with pytest.raises(ValueError, match="must fit into 131040"):
        tables.build(cpus=4000)


def test_fadt_names_the_power_registers() -> None:
    """Sleep control, sleep status and reset are where the device has them, one byte of I/O each."""
    fadt = found(tables.build(cpus=1))["FACP"]
    assert len(fadt) == 276
    registers = {116: pm.RESET, 244: pm.SLEEP_CONTROL, 256: pm.SLEEP_STATUS}
    for offset, register in registers.items():
        space, width, shift, size, port = struct.unpack_from("<BBBBQ", fadt, offset)
        assert (space, width, shift, size, port) == (1, 8, 0, 1, pm.PORT + register)
    assert fadt[128] == pm.RESET_VALUE
    flags, boot = struct.unpack_from("<I", fadt, 112)[0], struct.unpack_from("<H", fadt, 109)[0]
    assert flags & 1 << 20  # hardware-reduced
    assert flags & 1 << 10  # the reset register is there
    assert boot & 2 == 0  # nobody looks for a keyboard controller
    assert struct.unpack_from("<H", fadt, 46)[0] != 0  # see the comment where it is written


@pytest.mark.parametrize("cpus", [1, 2, 32, 254, 255, 256, 300])
def test_madt_has_every_processor_once(cpus: int) -> None:
    """Identifiers up to 254 are local APICs, those from 255 on x2APICs; all are enabled."""
    madt = list(entries(found(tables.build(cpus=cpus))["APIC"]))
    small = [e for e in madt if e[0] == 0]
    large = [struct.unpack("<BBHIII", e) for e in madt if e[0] == 9]
    assert [(e[2], e[3], e[4]) for e in small] == [(n, n, 1) for n in range(min(cpus, 255))]
    assert [(e[3], e[5], e[4]) for e in large] == [(n, n, 1) for n in range(255, cpus)]
    assert [e for e in madt if e[0] == 10] == (
        [struct.pack("<BBHIB3x", 10, 12, 0, 0xFFFFFFFF, 1)] if cpus > 255 else []
    )


def test_madt_describes_kvms_interrupt_controllers() -> None:
    """One IOAPIC from interrupt 0 on, the timer on its pin 2, NMI on LINT1 of every processor."""
    madt = list(entries(found(tables.build(cpus=1))["APIC"]))
    assert struct.pack("<BBBBII", 1, 12, 0, 0, layout.IOAPIC, 0) in madt
    assert struct.pack("<BBBBIH", 2, 10, 0, 0, 2, 0) in madt
    assert struct.pack("<BBBHB", 4, 6, 0xFF, 0, 1) in madt


# What ACPICA's compiler says.


def disassembled(path: Path, table: bytes) -> str:
    """A table as source, provided that `iasl` has nothing to complain about."""
    path.write_bytes(table)
    answer = subprocess.run(
        ["iasl", "-d", path.name], cwd=path.parent, capture_output=True, text=True, check=True
    )
    said = answer.stdout + answer.stderr
    assert not re.search("warning|error|remark|unknown", said, re.IGNORECASE), said
    return path.with_suffix(".dsl").read_text()


@needs_iasl
@pytest.mark.parametrize(("cpus", "devices"), [(1, 0), (4, 15), (300, 1)])
def test_iasl_reads_and_writes_the_same_tables(tmp_path: Path, cpus: int, devices: int) -> None:
    """Every table, disassembled and compiled again, is the same but for who compiled it."""
    for name, table in found(tables.build(cpus=cpus, devices=terms(devices))).items():
        disassembled(tmp_path / f"{name}.aml", table)
        answer = subprocess.run(
            ["iasl", "-p", f"again-{name}", f"{name}.dsl"],
            cwd=tmp_path, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert "0 Errors, 0 Warnings, 0 Remarks" in answer.stdout + answer.stderr
        again = (tmp_path / f"again-{name}.aml").read_bytes()

        def content(data: bytes) -> bytes:
            return data[:9] + data[10:28] + data[36:]  # without checksum and creator

        assert content(again) == content(table), name


@needs_iasl
def test_dsdt_says_what_the_machine_has(tmp_path: Path) -> None:
    """Each device stands in the DSDT with its identifier, ports, memory and interrupt."""
    text = disassembled(
        tmp_path / "dsdt.aml", found(tables.build(cpus=2, devices=terms(2)))["DSDT"]
    )
    text = " ".join(re.sub(r"/\*.*?\*/|//.*", "", text).split())
    devices = dict(re.findall(r"Device \((\w+)\) \{ (.*?)(?= \} Device| \} \} $|$)", text))
    assert set(devices) == {"C000", "C001", "COM1", "RTC", "PEVT", "PWRB", "GED", "VR00", "VR01"}
    assert "Name (_S5, Package (0x04) { 0x05, Zero, Zero, Zero })" in text
    for number, (address, size, gsi) in enumerate(windows(2)):
        device = devices[f"VR{number:02}"]
        assert "LNRO0005" in device
        assert f"Memory32Fixed (ReadWrite, 0x{address:08X}, 0x{size:08X}, )" in device
        assert (
            f"Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive, ,, ) {{ 0x{gsi:08X}, }}"
            in device
        )
    assert "PNP0501" in devices["COM1"]
    assert f"0x{layout.SERIAL_PORT:04X}" in devices["COM1"]
    assert f"0x{layout.SERIAL_IRQ:08X}" in devices["COM1"]
    assert "PNP0B00" in devices["RTC"]
    assert "QEMU0001" in devices["PEVT"]
    assert f"OperationRegion (PEOR, SystemIO, 0x{pvpanic.PORT:04X}, One)" in devices["PEVT"]
    assert "Notify (PWRB, 0x80)" in devices["GED"]
    assert f"SystemIO, 0x{pm.PORT + pm.EVENTS:04X}, One" in devices["GED"]
    assert all("ACPI0007" in devices[name] for name in ("C000", "C001"))


# The encoder.


@given(st.integers(0, (1 << 64) - 1))
def test_integers_are_as_short_as_can_be(value: int) -> None:
    """A constant takes the smallest prefix that holds it, and holds it."""
    data = aml.integer(value)
    if value < 2:
        assert data == bytes([value])
    else:
        size = {0x0A: 1, 0x0B: 2, 0x0C: 4, 0x0E: 8}[data[0]]
        assert len(data) == size + 1
        assert int.from_bytes(data[1:], "little") == value
        assert size == 1 or value >> 8 * size // 2


@pytest.mark.parametrize("value", [-1, 1 << 64])
def test_integer_out_of_range_is_refused(value: int) -> None:
    """ACPI's integers are 64 bits wide and have no sign."""
    with pytest.raises(ValueError, match="64 bits"):
        aml.integer(value)


def package_length(data: bytes) -> tuple[int, int]:
    """A package length and how many bytes it takes, decoded as 20.2.4 says."""
    extra = data[0] >> 6
    if extra == 0:
        return data[0], 1
    assert data[0] & 0x30 == 0
    return data[0] & 15 | int.from_bytes(data[1 : 1 + extra], "little") << 4, 1 + extra


@pytest.mark.parametrize(
    "size", [0, 57, 58, 59, 4088, 4089, 4090, 4091, (1 << 20) - 8, (1 << 20) - 7, (1 << 20) - 6]
)
def test_package_length_counts_itself(size: int) -> None:
    """At every step of the length's own size, the term ends exactly where its length says."""
    term = aml.scope("ABCD", bytes(size))
    length, taken = package_length(term[1:])
    assert length == len(term) - 1 == taken + 4 + size


@pytest.mark.parametrize(
    ("path", "encoded"),
    [
        ("AB", b"AB__"),
        ("\\_SB", b"\\_SB_"),
        ("A.B", b"\x2eA___B___"),
        ("\\A.B.C", b"\\\x2f\x03A___B___C___"),
    ],
)
def test_paths(path: str, encoded: bytes) -> None:
    """Segments are padded to four characters; two and more have their prefix."""
    assert aml.scope(path)[2:] == encoded


@pytest.mark.parametrize("path", ["ABCDE", "A.BCDEF"])
def test_segment_too_long_is_refused(path: str) -> None:
    """A name has at most four characters."""
    with pytest.raises(ValueError, match="one to four"):
        aml.scope(path)


@needs_iasl
def test_bridge_and_processors_are_sound_aml(tmp_path: Path) -> None:
    """`iasl` takes back what it made; slots and processors can be ejected, but the first."""
    slots, most = range(1, 32), 16
    blob = tables.build(
        cpus=2,
        max_cpus=most,
        devices=[pci.host_bridge(layout.pci_memory64(1 << 30), slots), cpus.processors(most)],
        events=[(2, pci.NOTIFY_METHOD), (8, cpus.NOTIFY_METHOD)],
        more=[(b"MCFG", pci.mcfg())],
    )
    text = disassembled(tmp_path / "dsdt.aml", found(blob)["DSDT"])
    for slot in slots:
        assert f"Device (S{slot:02X})" in text
        assert f"Notify (S{slot:02X}, 0x03)" in text
    for number in range(most):
        assert f"Device (C{number:03X})" in text
        assert f"Notify (C{number:03X}, One)" in text
    assert text.count("Method (_EJ0") == 31 + most - 1
    madt = [entry for entry in entries(found(blob)["APIC"]) if entry[0] == 0]
    assert [entry[4] for entry in madt] == [1] * 2 + [2] * (most - 2)
    assert int.from_bytes(found(blob)["MCFG"][44:52], "little") == layout.ECAM
    largest = tables.build(cpus=1, max_cpus=254, devices=[cpus.processors(254)])
    assert BASE + len(largest) <= 0xFFFF0


@needs_iasl
def test_memory_modules_are_sound_aml(tmp_path: Path) -> None:
    """`iasl` takes back what it made: each slot says where its module is, and can be ejected."""
    blob = tables.build(
        cpus=1, devices=[modules.memory_devices()], events=[(16, modules.NOTIFY_METHOD)]
    )
    text = disassembled(tmp_path / "dsdt.aml", found(blob)["DSDT"])
    for slot in range(16):
        assert f"Device (M{slot:03X})" in text
        assert f"Notify (M{slot:03X}, 0x03)" in text
    assert text.count('_HID, EisaId ("PNP0C80")') == 16
    assert text.count("CreateQWordField (RANG, \\_SB.MEMS.M000._CRS._Y") >= 1
    for name in ("_MIN", "_MAX", "_LEN"):
        assert re.search(rf"CreateQWordField \(RANG, .*{name}, ", text)
    assert text.count("Method (_OST, 3") == 16


RAM = [(0, 0xA0000), (1 << 20, 3 << 30), (4 << 30, 1 << 30)]
AREAS = [(8 << 30, 4 << 30, 0), (16 << 30, 1 << 30, 5)]


@needs_iasl
@pytest.mark.parametrize("count", [1, 300])
def test_memory_that_may_come_is_told_with_its_node(tmp_path: Path, count: int) -> None:
    """By iasl's reading: who is where, and which memory is hot-pluggable."""
    blob = tables.build(cpus=count, more=[(b"SRAT", srat(count, RAM, AREAS))])
    text = disassembled(tmp_path / "srat.aml", found(blob)["SRAT"])

    def numbers(name: str) -> list[int]:
        return [int(word, 16) for word in re.findall(rf"{name} : ([0-9A-F]+)\n", text)]

    assert numbers("Base Address") == [start for start, *_ in (*RAM, *AREAS)]
    assert numbers("Address Length") == [size for _, size, *_ in (*RAM, *AREAS)]
    assert numbers("Hot Pluggable") == [0] * len(RAM) + [1] * len(AREAS)
    assert numbers("Enabled") == [1] * (count + len(RAM) + len(AREAS))
    assert numbers("Proximity Domain")[-5:] == [0, 0, 0, 0, 5]
    assert numbers("Apic ID") == list(range(count))
    assert text.count("[Processor Local x2APIC Affinity]") == max(count - 255, 0)


def test_fixed_hardware_is_told_where_there_is_firmware() -> None:
    """Blocks and timer by both kinds of pointer, a FACS on its boundary; else nothing of it."""
    blob = tables.build(cpus=1, fixed_hardware=True, address=BASE)
    fadt = found(blob)["FACP"]

    def word(offset: int, size: int) -> int:
        return int.from_bytes(fadt[offset : offset + size], "little")

    facs = word(36, 4)
    assert facs % 64 == 0
    assert blob[facs - BASE : facs - BASE + 8] == b"FACS" + (64).to_bytes(4, "little")
    assert (word(46, 2), word(56, 4), word(64, 4), word(76, 4)) == (13, 0x670, 0x674, 0x608)
    assert list(fadt[88:92]) == [4, 2, 0, 4]
    assert [word(offset + 4, 8) for offset in (148, 172, 208)] == [0x670, 0x674, 0x608]
    assert not word(112, 4) & 1 << 20
    reduced = found(tables.build(cpus=1))["FACP"]
    assert int.from_bytes(reduced[112:116], "little") & 1 << 20
    assert reduced[56:92] == bytes(36)
