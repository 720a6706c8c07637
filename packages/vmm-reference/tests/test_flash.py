"""The flash chip against a model of its array, and against what drivers look for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm_reference.devices.flash import BLOCK, Flash
from vmm_reference.devices.states import FlashState, StateError

BLOCKS = 3


class Chip:
    """A chip with what it has told its surroundings."""

    def __init__(self, content: int = 0xFF) -> None:
        self.array = bytearray([content]) * (BLOCK * BLOCKS)
        self.file = bytearray(self.array)
        self.shown = True
        self.full = False
        self.flash = Flash(memoryview(self.array), self.changed, self.show)

    def changed(self, offset: int, length: int) -> bool:
        if not self.full:
            self.file[offset : offset + length] = self.array[offset : offset + length]
        return not self.full

    def show(self, whole: bool) -> None:
        assert whole != self.shown, "told twice"
        self.shown = whole

    def send(self, offset: int, *cycles: int) -> None:
        for cycle in cycles:
            self.flash.write(offset, bytes([cycle]))


offsets = st.integers(0, BLOCK * BLOCKS - 1)
orders = st.one_of(
    st.tuples(st.just("program"), offsets, st.integers(0, 255)),
    st.tuples(st.just("erase"), offsets, st.just(0)),
    st.tuples(st.just("raw"), offsets, st.integers(0, 255)),
    st.tuples(st.just("restart"), st.just(0), st.just(0)),
)


@given(st.lists(orders, max_size=30))
def test_the_array_is_what_was_programmed_and_erased(orders: list[tuple[str, int, int]]) -> None:
    """Bits are cleared by programming and set by erasing; the file follows; nothing raises."""
    chip = Chip(0x0F)
    model = bytearray(chip.array)
    for order, offset, value in orders:
        if order == "program":
            chip.send(offset, 0xFF, 0xFF, 0x10, value)
            model[offset] &= value
            assert chip.flash.read(offset, 1) == b"\x80"
        elif order == "erase":
            chip.send(offset, 0xFF, 0xFF, 0x20, 0xD0)
            start = offset // BLOCK * BLOCK
            model[start : start + BLOCK] = b"\xff" * BLOCK
        elif order == "raw":
            chip.send(offset, 0xFF, 0xFF, value)
            if value in (0x10, 0x40, 0x20):  # the second cycle, so that the model need not know
                chip.send(offset, 0xFF)
        else:
            chip.flash.restore(chip.flash.save())
        assert chip.array == chip.file
        chip.send(0, 0xFF, 0xFF)
        if order == "raw" and value in (0x10, 0x40):
            assert chip.array == model, "programming 0xFF clears no bit"
        assert chip.array == model
        assert chip.shown
        assert chip.flash.read(offset, 1) == model[offset : offset + 1]


def test_drivers_recognise_it() -> None:
    """OVMF's probe sees a chip, not RAM; the CFI table has the blocks, the identifier Intel."""
    chip = Chip()
    chip.send(5, 0x50, 0x70)
    assert not chip.shown
    assert chip.flash.read(5, 1) == b"\x80"
    chip.send(5, 0x98)
    assert chip.flash.read(0x10, 3) == b"QRY"
    table = chip.flash.read(0, 64)
    assert (table[0x2D] | table[0x2E] << 8) + 1 == BLOCKS
    assert (table[0x2F] | table[0x30] << 8) * 256 == BLOCK
    chip.send(5, 0x90)
    assert chip.flash.read(0, 1) == b"\x89"
    chip.send(5, 0xFF)
    assert chip.shown


def test_a_wrong_sequence_is_an_error_until_it_is_cleared() -> None:
    """Erasing without its confirmation sets two bits and erases nothing."""
    chip = Chip(0x00)
    chip.send(5, 0x20, 0x10)
    assert chip.flash.read(5, 2) == b"\xb0\xb0"
    chip.send(5, 0x50)
    assert chip.flash.read(5, 1) == b"\x80"
    assert not any(chip.array)


def test_what_can_not_be_kept_has_failed() -> None:
    """As on a worn chip: the guest reads why, until it clears that; all of it is counted."""
    chip = Chip()
    chip.full = True
    chip.send(5, 0x10, 0x00)
    assert chip.flash.read(5, 1) == b"\x90"
    chip.send(5, 0x50, 0x20, 0xD0)
    assert chip.flash.read(5, 1) == b"\xa0"
    chip.full = False
    chip.send(5, 0x50, 0x40, 0x12)
    assert chip.flash.read(5, 1) == b"\x80"
    assert chip.file[5] == 0x12
    chip.send(5, 0x20, 0x00, 0x77)
    assert chip.flash.metrics() == {
        "programmed_bytes": 2,
        "erased_blocks": 1,
        "refused_commands": 2,
        "host_failures": 2,
    }


def test_a_saved_chip_goes_on_in_the_middle_of_a_command() -> None:
    """The next cycle is the data of the command before; the array is not shown meanwhile."""
    chip, other = Chip(), Chip()
    chip.send(7, 0x10)
    other.flash.restore(chip.flash.save())
    assert not other.shown
    other.send(7, 0x55, 0xFF)
    assert other.file[7] == 0x55
    for mode in (0x00, 0xD0):
        with pytest.raises(StateError, match="mode"):
            chip.flash.restore(FlashState(mode, 0x80))
    chip.send(7, 0x55, 0xFF)
    assert chip.file[7] == 0x55
