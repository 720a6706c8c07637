from __future__ import annotations

import pytest

from vmm_reference.devices.pvpanic import CRASH_LOADED, PANICKED, Pvpanic
from vmm_reference.devices.states import PvpanicState, StateError


@pytest.mark.parametrize(
    ("written", "events", "counted"),
    [
        (b"\x01", [PANICKED], (1, 0, 0)),
        (b"\x02", [CRASH_LOADED], (0, 1, 0)),
        (b"\x03", [3], (1, 1, 0)),
        (b"\xff", [3], (1, 1, 1)),
    ],
)
def test_events_are_reported(
    written: bytes, events: list[int], counted: tuple[int, int, int]
) -> None:
    """The bits that the guest writes are handed on, those that are not supported left out."""
    seen: list[int] = []
    device = Pvpanic(seen.append)
    device.write(0, written)
    assert seen == events
    assert tuple(device.metrics().values()) == counted


@pytest.mark.parametrize(("offset", "data"), [(0, b"\x00"), (0, b"\xfc"), (1, b"\x01"), (0, b"")])
def test_nothing_to_report(offset: int, data: bytes) -> None:
    """Writes without a supported event, or beside the register, say nothing."""
    seen: list[int] = []
    Pvpanic(seen.append).write(offset, data)
    assert seen == []


@pytest.mark.parametrize("length", [1, 2, 4, 8])
def test_reading_tells_what_may_be_reported(length: int) -> None:
    """The register reads as the supported events; a wider read has nothing beside it."""
    assert Pvpanic(print).read(0, length) == b"\x03" + b"\xff" * (length - 1)


def test_state() -> None:
    """A restored device supports what the guest was told, whatever it was made with."""
    device = Pvpanic(print)
    device.restore(Pvpanic(print, supported=PANICKED).save())
    assert device.read(0, 1) == b"\x01"
    with pytest.raises(StateError, match=r"PvpanicState\.supported: 256"):
        PvpanicState(256)
