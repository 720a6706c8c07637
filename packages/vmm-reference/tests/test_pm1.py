"""The PM1 blocks: power, and what a guest may write there."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm_reference.devices.pm1 import CONTROL, SIZE, Pm1
from vmm_reference.devices.states import Pm1State, StateError


class Blocks:
    """The registers, and how often the power went off."""

    def __init__(self) -> None:
        self.offs = 0
        self.pm1 = Pm1(self.off)

    def off(self) -> None:
        self.offs += 1


def test_only_s5_with_its_enable_bit_is_power_off() -> None:
    """Type 5 and SLP_EN, in one write of 16 bits or in that of the upper byte."""
    blocks = Blocks()
    for kind in range(8):
        blocks.pm1.write(CONTROL, (kind << 10).to_bytes(2, "little"))
        blocks.pm1.write(CONTROL, (kind << 10 | 0x2000).to_bytes(2, "little"))
        assert blocks.offs == (kind >= 5)
        assert int.from_bytes(blocks.pm1.read(CONTROL, 2), "little") == kind << 10 | 1
    blocks.pm1.write(CONTROL + 1, b"\x34")
    assert blocks.offs == 2
    assert blocks.pm1.metrics() == {"pm1_refused_sleeps": 7}


def test_acpi_mode_is_the_only_one_and_nothing_has_happened() -> None:
    """SCI_EN can't be cleared, status can't be set; enable bits are as written."""
    blocks = Blocks()
    blocks.pm1.write(0, b"\xff\xff\x21\x05\0\0")
    assert blocks.pm1.read(0, SIZE) == b"\0\0\x21\x05\1\0"


accesses = st.lists(
    st.tuples(st.integers(0, SIZE), st.binary(max_size=8), st.integers(0, 8)), max_size=30
)


@given(accesses)
def test_nothing_raises_and_state_is_the_whole_device(
    accesses: list[tuple[int, bytes, int]],
) -> None:
    """Reads have their width, and a restored twin reads the same."""
    one, two = Blocks(), Blocks()
    for offset, data, length in accesses:
        one.pm1.write(offset, data)
        assert len(one.pm1.read(offset, length)) == length
    two.pm1.restore(one.pm1.save())
    assert two.pm1.save() == one.pm1.save()
    assert two.offs == 0


@pytest.mark.parametrize("field", ["enable", "control"])
def test_impossible_state_is_refused(field: str) -> None:
    """Registers have 16 bits."""
    with pytest.raises(StateError, match=rf"Pm1State\.{field}"):
        Pm1State(**{"enable": 0, "control": 0, field: 1 << 16})
