from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm_reference.devices.pm import PowerManagement


class Power:
    """The registers and what they caused, in order."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.device = PowerManagement(
            lambda: self.seen.append("off"),
            lambda: self.seen.append("reset"),
            lambda level: self.seen.append("high" if level else "low"),
        )


@pytest.mark.parametrize("value", range(256))
def test_sleep_control(value: int) -> None:
    """SLP_EN with the type of S5 powers off; every other value does nothing."""
    power = Power()
    power.device.write(0, bytes([value]))
    assert power.seen == (["off"] if value & 0x3C == 0x34 else [])


@pytest.mark.parametrize("value", range(256))
def test_reset_register(value: int) -> None:
    """The value that the FADT names resets; every other one does nothing."""
    power = Power()
    power.device.write(2, bytes([value]))
    assert power.seen == (["reset"] if value == 1 else [])


def test_power_button_interrupts_until_events_are_read() -> None:
    """A press raises the line once; reading the events tells of it and lowers the line."""
    power = Power()
    power.device.press_power_button()
    power.device.press_power_button()
    assert power.seen == ["high"]
    assert (power.device.read(3, 1), power.device.read(3, 1)) == (b"\x01", b"\x00")
    assert power.seen == ["high", "low"]


def test_pending_event_survives_restore() -> None:
    """A press that the guest has not seen interrupts again where the state is restored."""
    power, other = Power(), Power()
    power.device.press_power_button()
    other.device.restore(power.device.save())
    assert other.seen == ["high"]
    assert other.device.save() == power.device.save()


def test_what_is_asked_for_in_vain_is_counted() -> None:
    """Sleep states that are not there, and values that do not reset."""
    power = Power()
    for kind in range(8):
        power.device.write(0, bytes([0x20 | kind << 2]))
    power.device.write(2, b"\x02")
    power.device.press_power_button()
    assert power.device.metrics() == {"told": 1, "waiting": 1, "refused": 8}


@given(st.lists(st.tuples(st.integers(0, 5), st.binary(max_size=8)), max_size=20))
def test_nothing_raises(writes: list[tuple[int, bytes]]) -> None:
    """Any write at any offset is taken, and every read has its width."""
    power = Power()
    for offset, data in writes:
        power.device.write(offset, data)
        assert len(power.device.read(offset, len(data))) == len(data)
    assert power.device.read(0, 4) == bytes(4)
