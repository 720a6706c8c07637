"""What kernels, firmware and bare-metal guests look for on a PC's ports is answered as there.

Some of it is KVM's own (interrupt controllers, timer, port 0x61), some is ours, some is nobody's. A
guest of a few instructions looks at each.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from vmm_reference.config import MachineConfig
from vmm_reference.machine import Machine
from vmm_reference.outcome import Outcome

pytestmark = pytest.mark.kvm


def source(*accesses: tuple[int] | tuple[int, int] | str) -> str:
    """A guest that reads ports and tells what it finds, writes ports, or does as it is written."""
    lines = []
    for access in accesses:
        if isinstance(access, str):
            lines.append(access)
        elif len(access) == 2:
            lines.append(f"movw ${access[0]}, %dx; movb ${access[1]}, %al; outb %al, %dx")
        else:
            lines.append(f"movw ${access[0]}, %dx; inb %dx, %al; {TELL}")
    return "\n".join([*lines, "POWER_OFF"])


TELL = "movw $0x3f8, %dx; outb %al, %dx"
# Sets one bit for each value that bit 4 of port 0x61, the refresh of memory, has had.
REFRESH = """
    xorl %ebx, %ebx
1:  inb $0x61, %al
    testb $0x10, %al
    jz 2f
    orl $1, %ebx
    jmp 3f
2:  orl $2, %ebx
3:  cmpl $3, %ebx
    jne 1b
    movb %bl, %al
"""
# Counts channel 2 down from 2 with its gate on; ends when its output is up.
CHANNEL_2 = """
    movb $0x01, %al
    outb %al, $0x61
    movb $0xb0, %al
    outb %al, $0x43
    movb $2, %al
    outb %al, $0x42
    movb $0, %al
    outb %al, $0x42
1:  inb $0x61, %al
    testb $0x20, %al
    jz 1b
    andb $0x2f, %al
"""


@pytest.mark.parametrize(
    ("accesses", "found"),
    [
        # Interrupt controllers: masks read back, and which lines may be level-triggered.
        ([(0x21, 0xA5), (0xA1, 0x5A), (0x21,), (0xA1,)], "a55a"),
        ([(0x4D0, 0xFF), (0x4D1, 0xFF), (0x4D0,), (0x4D1,)], "f8de"),
        # The timer: gate and speaker read back; channel 2 counts with its gate on; refresh toggles.
        ([(0x61, 0x03), "inb $0x61, %al; andb $0x0f, %al", TELL], "03"),
        ([CHANNEL_2, TELL], "21"),
        ([REFRESH, TELL], "03"),
        # The clock: bit 7 of the index masks NMI and is no part of it; memory keeps bytes.
        ([(0x70, 0x8D), (0x71,), (0x70, 0x0D), (0x71,)], "8080"),
        ([(0x70, 0x50), (0x71, 0x42), (0x70, 0xD0), (0x71,)], "42"),
        ([(0x72, 0x10), (0x73, 0x24), (0x72, 0x10), (0x73,)], "24"),
        # The keyboard controller: nothing to fetch, never busy; A20 by both ways.
        ([(0x64,), (0x64, 0xAA), (0x60,)], "1455"),
        ([(0x64, 0xD0), (0x60,), (0x92,), (0x92, 0x00), (0x92,), (0x92, 0x02), (0x92,)],
         "03020002"),
        # The serial port is there, a second one is not; nor a parallel one, a disk or a screen.
        ([(0x3FF, 0x5A), (0x3FF,), (0x2FF, 0x5A), (0x2FF,)], "5aff"),
        ([(0x378,), (0x1F7,), (0x3CC,), (0x3F4,), (0x201,)], "ffffffffff"),
        # The panic device, by its answer.
        ([(0x505,)], "03"),
    ],
)  # fmt: skip
def test_a_probe_is_answered(
    accesses: list[tuple[int] | tuple[int, int] | str],
    found: str,
    config: Callable[..., MachineConfig],
) -> None:
    """Byte by byte."""
    with Machine(config(source(*accesses))) as machine:
        assert machine.wait(30) is Outcome.POWER_OFF, machine.detail
        assert machine.console._output.hex() == found


def test_time_passes_by_port_0x80(config: Callable[..., MachineConfig]) -> None:
    """A kernel's delay: writes go nowhere, at little cost, and are no access of nobody's port."""
    guest = "movl $200, %ecx\n1: outb %al, $0x80\nloop 1b\nPOWER_OFF"
    with Machine(config(guest)) as machine:
        assert machine.wait(30) is Outcome.POWER_OFF
        assert machine.metrics()["bus"] == {"unclaimed_reads": 0, "unclaimed_writes": 0}


@pytest.mark.parametrize(
    "guest",
    [
        "inb $0x92, %al; orb $1, %al; outb %al, $0x92; 1: jmp 1b",
        "movb $0xd1, %al; outb %al, $0x64; movb $2, %al; outb %al, $0x60; 1: jmp 1b",
        "movb $0xf0, %al; outb %al, $0x64; 1: jmp 1b",
    ],
    ids=["0x92", "output port", "pulse"],
)
def test_each_line_to_the_reset_pin_resets(
    guest: str, config: Callable[..., MachineConfig]
) -> None:
    """Fast reset, the controller's output port, and its pulse command."""
    with Machine(config(guest)) as machine:
        assert machine.wait(30) is Outcome.RESET
