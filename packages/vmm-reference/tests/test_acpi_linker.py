"""Tables for firmware: carried out as firmware does, the script gives what the machine would."""

from __future__ import annotations

import struct

import pytest

from vmm_reference.acpi import linker, tables

HIGH, F_SEGMENT = 0x7FE0040, 0xF5A00


def carry_out(files: dict[str, bytes]) -> dict[int, bytearray]:
    """What lies where after the script; every checksum byte is zero before, as edk2 needs it."""
    places: dict[str, tuple[int, bytearray]] = {}
    script = files[linker.SCRIPT]
    assert len(script) % 128 == 0
    for start in range(0, len(script), 128):
        entry = script[start : start + 128]
        command, name = entry[0], entry[4:60].rstrip(b"\0").decode()
        if command == 1:
            alignment, zone = struct.unpack_from("<IB", entry, 60)
            address = {1: HIGH, 2: F_SEGMENT}[zone]
            assert address % alignment == 0
            places[name] = (address, bytearray(files[name]))
        elif command == 2:
            other = entry[60:116].rstrip(b"\0").decode()
            offset, size = struct.unpack_from("<IB", entry, 116)
            data = places[name][1]
            value = int.from_bytes(data[offset : offset + size], "little") + places[other][0]
            data[offset : offset + size] = value.to_bytes(size, "little")
        else:
            assert command == 3
            offset, begin, length = struct.unpack_from("<III", entry, 60)
            data = places[name][1]
            assert data[offset] == 0
            data[offset] = -sum(data[begin : begin + length]) & 0xFF
    return dict(places.values())


@pytest.mark.parametrize("cpus", [1, 4, 254])
@pytest.mark.parametrize("fixed", [False, True])
def test_linked_tables_are_those_of_their_address(cpus: int, fixed: bool) -> None:
    """Byte for byte what the machine would have put there itself."""
    found = carry_out(linker.link(tables.build(cpus=cpus, fixed_hardware=fixed, address=0)))
    expected = tables.build(cpus=cpus, fixed_hardware=fixed, address=HIGH)
    assert found[HIGH][36:] == expected[36:]
    assert found[F_SEGMENT] == expected[:36]
    assert sum(found[F_SEGMENT][:20]) & 0xFF == sum(found[F_SEGMENT]) & 0xFF == 0
