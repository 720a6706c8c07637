"""Flat binaries and firmware: placed as stated, started in the mode that was asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from linux_loader import E820Entry, Flat, Format, Layout, LoaderError, Protocol, load, plan
from linux_loader.testing import image_file, memory_map
from vm_memory import GuestAddress, GuestMemory

SIZE = 4 << 20
MAP = memory_map(SIZE)
FOUR_GIB = 1 << 32
ROM = (bytes(0x1F000) + b"\xf4" * 0xFF0 + b"\xea\x5b\xe0\x00\xf0".ljust(16, b"\0")) * 2


@pytest.mark.parametrize(
    ("flat", "cs_base", "rip"),
    [
        (Flat(0x7C00), 0, 0x7C00),
        (Flat(0x20000, 16, 0x20004), 0x20000, 4),
        (Flat(0x100000, 32), 0, 0x100000),
        (Flat(0x100000, 64, 0x100008), 0, 0x100008),
    ],
)
def test_a_binary_starts_in_its_mode(flat: Flat, cs_base: int, rip: int) -> None:
    """CS and RIP together are the entry; the mode bits are those of the width."""
    with GuestMemory.from_ranges([(GuestAddress(0), SIZE)]) as guest, image_file(b"\xf4" * 9) as fd:
        loaded = load(guest, fd, memory_map=MAP, flat=flat)
        assert guest.read(GuestAddress(flat.address), 9) == b"\xf4" * 9
    state = loaded.entry
    assert (loaded.format, loaded.protocol) == (Format.FLAT, Protocol.FLAT)
    assert (state.cs.base, state.rip) == (cs_base, rip)
    assert state.cs.selector << 4 == cs_base or flat.bits != 16
    assert state.cr0 & 1 == (flat.bits != 16)
    assert (state.cs.l, state.cs.db) == {16: (0, 0), 32: (0, 1), 64: (1, 0)}[flat.bits]
    assert state.cr0 >> 31 == (flat.bits == 64)


@given(st.integers(0, 0xFFFFF))
def test_every_real_mode_address_is_reached(entry: int) -> None:
    """Selector and offset give exactly the address, for each below 1 MiB."""
    with image_file(bytes(1)) as fd:
        state = plan(
            fd,
            memory_map=[E820Entry(0, SIZE, 1)],
            flat=Flat(entry),
            layout=Layout(stack=0x3FF0) if 0x8000 <= entry < 0x9000 else None,
        ).entry
    assert state.cs.selector * 16 + state.rip == state.cs.base + state.rip == entry


@pytest.mark.parametrize(
    ("flat", "field"),
    [
        (Flat(0x7C00, 8), "bits"),
        (Flat(0x7C00, 16, 0x7BFF), "entry"),
        (Flat(0x7C00, 16, 0x7C09), "entry"),
        (Flat(0x100000, 16), "entry"),
        (Flat(FOUR_GIB, 32), "entry"),
        (Flat(SIZE - 1, 32), "binary"),
        (Flat(0x500, 32), "binary"),
    ],
)
def test_impossible_starts_are_refused(flat: Flat, field: str) -> None:
    """Entries outside the binary or the mode's reach, and places without RAM, are errors."""
    with image_file(b"\xf4" * 9) as fd, pytest.raises(LoaderError) as caught:
        plan(fd, memory_map=MAP, flat=flat)
    assert caught.value.field in (field, "GDT")


def test_an_empty_binary_is_refused() -> None:
    """There is no first instruction in an empty file."""
    with image_file(b"") as fd, pytest.raises(LoaderError, match="must hold code"):
        plan(fd, memory_map=MAP, flat=Flat(0x7C00))


def test_firmware_is_recognised_and_ends_at_4_gib() -> None:
    """It starts at the reset vector; its last 128 KiB lie below 1 MiB too."""
    rom = b"head".ljust(4096, b"\0") + ROM[4096:]
    ranges = [
        (GuestAddress(0), SIZE),
        (GuestAddress(FOUR_GIB - len(rom)), len(rom)),
    ]
    with GuestMemory.from_ranges(ranges) as guest, image_file(rom) as fd:
        loaded = load(guest, fd, memory_map=MAP)
        assert guest.read(GuestAddress(FOUR_GIB - len(rom)), len(rom)) == rom
        assert guest.read(GuestAddress(0xE0000), 0x20000) == rom[-0x20000:]
    state = loaded.entry
    assert (loaded.format, loaded.protocol) == (Format.FIRMWARE, Protocol.RESET)
    assert (state.cs.base + state.rip, state.cs.selector) == (0xFFFFFFF0, 0xF000)
    assert state.cr0 & 1 == 0


@pytest.mark.parametrize(
    "arguments", [{"cmdline": "x"}, {"rng_seed": b"x"}, {"initrd": True}, {"ram": True}]
)
def test_what_firmware_cannot_take_is_refused(arguments: dict[str, object]) -> None:
    """Command line, seed, initrd and RAM in firmware's place are errors."""
    initrd = arguments.pop("initrd", False)
    ram = [E820Entry(0, FOUR_GIB, 1)] if arguments.pop("ram", False) else MAP
    with image_file(ROM) as fd, pytest.raises(LoaderError):
        plan(
            fd,
            memory_map=ram,
            initrd=fd if initrd else None,
            **arguments,  # type: ignore[arg-type]
        )


def test_firmware_can_be_stated() -> None:
    """A file that does not look like firmware is taken for it on request, up to 16 MiB."""
    with image_file(bytes(100)) as fd:
        assert plan(fd, memory_map=MAP, protocol=Protocol.RESET).find("firmware").size == 100
    with image_file(bytes((16 << 20) + 4096)) as fd, pytest.raises(LoaderError, match="16 MiB"):
        plan(fd, memory_map=MAP, protocol=Protocol.RESET)


def test_packaged_firmware_is_recognised() -> None:
    """SeaBIOS, where it is installed, is placed without being asked for."""
    path = Path("/usr/share/seabios/bios-256k.bin")
    if not path.is_file():
        pytest.skip("SeaBIOS is not installed")
    made = plan(path, memory_map=MAP)
    assert made.find("firmware").address == FOUR_GIB - (256 << 10)
