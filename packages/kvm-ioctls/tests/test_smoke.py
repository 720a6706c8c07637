"""The three-line guest in every mode."""

from __future__ import annotations

import pytest

from kvm_ioctls import exits
from kvm_ioctls.testing import Guest, Mode

pytestmark = pytest.mark.kvm


@pytest.mark.parametrize(
    ("mode", "cpl"), [(Mode.REAL, 0), (Mode.PROTECTED, 0), (Mode.LONG, 0), (Mode.LONG, 3)]
)
def test_port_write_in_every_mode(mode: Mode, cpl: int) -> None:
    """A guest that begins in any mode writes a port and the value arrives typed."""
    with Guest("mov $0x3f8, %dx; mov $65, %al; out %al, %dx; hlt", mode, cpl=cpl) as guest:
        assert guest.run() == exits.IoOut(0x3F8, 1, 1, b"A")


def test_reads_are_answered_through_the_run_page() -> None:
    """What is written to a read's view is what the guest sees."""
    source = "in $0x60, %al; mov $0xd0000000, %ebx; mov (%rbx), %cl; add %cl, %al; out %al, $0x61"
    with Guest(source, Mode.LONG) as guest:
        match guest.run():
            case exits.IoIn(port=0x60, size=1, count=1, data=view):
                view[0] = 40
        match guest.run():
            case exits.MmioRead(address=0xD0000000, data=view):
                view[0] = 2
        assert guest.run() == exits.IoOut(0x61, 1, 1, b"\x2a")
