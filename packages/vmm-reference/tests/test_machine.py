"""Whole machines with kernels of a few instructions: how they run, end, pause and start again."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from vmm_reference.backends.console import ConsoleTimeout
from vmm_reference.config import Drive, MachineConfig
from vmm_reference.errors import HostError
from vmm_reference.machine import Machine
from vmm_reference.outcome import Outcome
from vmm_reference.testing import tiny_kernel

pytestmark = pytest.mark.kvm

FOREVER = "1: jmp 1b"
# Sends the numbers' low bytes for ever, waiting for the transmitter as a driver does.
FLOOD = """
    movl $0, %ebx
1:  movw $0x3fd, %dx
2:  inb %dx, %al
    testb $0x20, %al
    jz 2b
    movw $0x3f8, %dx
    movb %bl, %al
    outb %al, %dx
    incl %ebx
    jmp 1b
"""
# Echoes what is typed, with one added, until a `q` comes.
ECHO = """
1:  movw $0x3fd, %dx
    inb %dx, %al
    testb $1, %al
    jz 1b
    movw $0x3f8, %dx
    inb %dx, %al
    cmpb $'q', %al
    je 3f
    incb %al
    outb %al, %dx
    jmp 1b
3:  POWER_OFF
"""

# Leaves for real mode as Linux does, and jumps to where a PC's processor begins.
RESTART = """
    cli
    movl $4f, %eax
    movw %ax, 2f + 10
    shrl $16, %eax
    movb %al, 2f + 12
    movb %ah, 2f + 15
    lgdt 3f
    ljmp $8, $0
    .balign 8
2:  .quad 0, 0x00009b000000ffff
3:  .word 15
    .long 2b
    .code16
4:  movl %cr0, %eax
    andb $0xfe, %al
    movl %eax, %cr0
    ljmp $0xf000, $0xfff0
    .code32
"""


def descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.fixture
def kernel(tmp_path: Path) -> Callable[[str], str]:
    def build(source: str) -> str:
        path = tmp_path / "kernel"
        path.write_bytes(tiny_kernel(source))
        return str(path)

    return build


@pytest.mark.parametrize(
    ("source", "outcome"),
    [
        ("POWER_OFF", Outcome.POWER_OFF),
        ("RESET", Outcome.RESET),
        ("OUT 0x64 0xfe; 1: jmp 1b", Outcome.RESET),
        ("OUT 0x505 1; 1: jmp 1b", Outcome.GUEST_PANIC),
        ("lidt 1f; ud2; 1: .long 0, 0", Outcome.TRIPLE_FAULT),
        (RESTART, Outcome.RESET),
    ],
    ids=["acpi-off", "acpi-reset", "keyboard-reset", "pvpanic", "triple-fault", "reset-vector"],
)
def test_each_way_to_end_is_told_apart(
    kernel: Callable[[str], str], source: str, outcome: Outcome
) -> None:
    """The outcome is what the guest did."""
    with Machine(MachineConfig(kernel=kernel(source), on_reset="exit")) as machine:
        assert machine.wait(30) is outcome


def test_the_console_carries_bytes_both_ways(kernel: Callable[[str], str]) -> None:
    """What is typed reaches the guest, what it answers can be expected."""
    with Machine(MachineConfig(kernel=kernel(ECHO))) as machine:
        machine.console.send("abc" * 20)
        machine.console.expect("(bcd){20}", 30)
        machine.console.send("q")
        assert machine.wait(30) is Outcome.POWER_OFF
    with pytest.raises(ConsoleTimeout, match="no 'more'"):
        machine.console.expect("more", 1)


def test_a_guest_that_polls_prints_without_python(kernel: Callable[[str], str]) -> None:
    """Nothing of what it prints is lost or comes later than what it does next; it is read from."""
    source = """
        movl $3000, %ecx
    1:  movw $0x3fd, %dx
    2:  inb %dx, %al
        testb $0x20, %al
        jz 2b
        movw $0x3f8, %dx
        movb $'x', %al
        outb %al, %dx
        loop 1b
        movw $0x3fd, %dx
    3:  inb %dx, %al
        testb $1, %al
        jz 3b
        movw $0x3f8, %dx
        inb %dx, %al
        outb %al, %dx
        POWER_OFF
    """
    with Machine(MachineConfig(kernel=kernel(source))) as machine:
        machine.console.expect("x{3000}", 60)
        assert machine.metrics()["serial"]["served"] > 3000
        machine.console.send("q")
        assert machine.wait(30) is Outcome.POWER_OFF
    assert machine.console.output.endswith("xq")


def test_a_guest_that_sends_by_interrupt_learns_without_python_that_it_is_through(
    kernel: Callable[[str], str],
) -> None:
    """What IIR reads as is right each time, with FIFOs and without, and mostly a constant."""
    source = """
        movl $CHUNKS, %ebx
    1:  movl %ebx, %eax
        andb $1, %al
        movb %al, %ah
        movw $0x3fa, %dx
        outb %al, %dx
        OUT 0x3f9 7
        movw $0x3fa, %dx
        inb %dx, %al
        andb $0x3f, %al
        cmpb $2, %al
        jne 3f
        PUT 'x'
        PUT 'y'
        OUT 0x3f9 5
        movl $10, %ecx
    2:  movw $0x3fa, %dx
        inb %dx, %al
        testb %ah, %ah
        jz 4f
        subb $0xc0, %al
    4:  cmpb $1, %al
        jne 3f
        loop 2b
        decl %ebx
        jnz 1b
        POWER_OFF
    3:  RESET
    """.replace("CHUNKS", "50")
    with Machine(MachineConfig(kernel=kernel(source), on_reset="exit")) as machine:
        assert machine.wait(30) is Outcome.POWER_OFF
        assert machine._board is not None
        # A byte may come to Python: the one before left just then, and that is to be told.
        assert machine._board.legacy._iir.count == 50 * 10
        assert machine.metrics()["serial"]["served"] >= 50 * 10
    assert machine.console.output == "xy" * 50


def test_a_search_for_pci_where_there_is_none_finds_nothing(kernel: Callable[[str], str]) -> None:
    """All ones, whatever is asked for and how wide; and it is counted like any port of nobody."""
    source = """
        movl $100, %ecx
    1:  movw $0xcf8, %dx
        movl $0x80000008, %eax
        outl %eax, %dx
        movw $0xcfc, %dx
        xorl %eax, %eax
        inl %dx, %eax
        cmpl $-1, %eax
        jne 2f
        movw $0xcfe, %dx
        xorl %eax, %eax
        inw %dx, %ax
        cmpw $-1, %ax
        jne 2f
        loop 1b
        PUT 'n'
    2:  PUT '.'
    3:  jmp 3b
    """
    with Machine(MachineConfig(kernel=kernel(source))) as machine:
        machine.console.expect(r"n?\.", 60)
        assert machine.console.output == "n."
        counters = machine.metrics()["bus"]
        assert (counters["unclaimed_reads"], counters["unclaimed_writes"]) == (200, 100)


def test_a_reset_is_a_new_machine_with_the_same_console(kernel: Callable[[str], str]) -> None:
    """The restarted guest finds fresh memory; output goes on where it was."""
    # A flag in memory would survive a jump to the kernel's start; it must not survive a reset.
    source = "cmpl $7, 0x200000; je 1f; movl $7, 0x200000; PUT 'r'; RESET; 1: PUT '!'; POWER_OFF"
    with Machine(MachineConfig(kernel=kernel(source))) as machine:
        machine.console.expect("r{3}", 30)
        assert machine.resets >= 2
        assert machine.outcome is None
        machine.stop()
        assert machine.wait(30) is Outcome.STOPPED
    assert "!" not in machine.console.output


def test_a_paused_guest_stands_still_and_goes_on(kernel: Callable[[str], str]) -> None:
    """While it is paused nothing comes; afterwards the numbers continue without a gap."""
    with Machine(MachineConfig(kernel=kernel(FLOOD))) as machine:
        machine.console.expect("[\\s\\S]{300}", 30)
        machine.pause()
        before = machine.console.output
        time.sleep(0.2)
        assert machine.console.output == before
        machine.resume()
        machine.console.expect("[\\s\\S]{600}", 30)
        numbers = machine.console._output
    assert all((b - a) % 256 == 1 for a, b in pairwise(numbers))


@pytest.mark.parametrize(
    ("end", "outcome"),
    [
        ("movw $0x600, %dx; movb $0x34, %al; outb %al, %dx", Outcome.POWER_OFF),
        ("movb $0xfe, %al; outb %al, $0x64", Outcome.RESET),
    ],
)
def test_no_instruction_follows_on_the_one_that_ends_the_machine(
    kernel: Callable[[str], str], end: str, outcome: Outcome
) -> None:
    """What the guest sent before is all there, and a write behind it never happens."""
    source = f"PUT 'a'; PUT 'b'; {end}; 1: PUT '!'; jmp 1b"
    with Machine(MachineConfig(kernel=kernel(source), on_reset="exit")) as machine:
        assert machine.wait(30) is outcome
    assert machine.console.output == "ab"


@pytest.mark.parametrize("cpus", [2, 4, 33])
def test_vcpus_that_never_started_do_not_hold_up_the_end(
    kernel: Callable[[str], str], cpus: int
) -> None:
    """A machine of many vCPUs ends at once though all but one wait for their first interrupt."""
    with Machine(MachineConfig(kernel=kernel("POWER_OFF"), cpus=cpus)) as machine:
        assert machine.wait(30) is Outcome.POWER_OFF


def test_an_end_that_fails_is_told_all_the_same(
    kernel: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who waits for the machine learns what went wrong, instead of waiting for ever."""
    with Machine(MachineConfig(kernel=kernel("PUT 's'; 1: hlt; jmp 1b"))) as machine:
        machine.console.expect("s", 30)
        board = machine._board
        assert board is not None
        with monkeypatch.context() as patch:
            patch.setattr(board, "stop", lambda: os.close(-1))
            machine.stop()
            assert machine.wait(30) is Outcome.HOST_FAILURE
        assert "Bad file descriptor" in machine.detail


def test_a_full_pipe_stops_the_guests_output_and_nothing_else(
    kernel: Callable[[str], str],
) -> None:
    """With nobody reading, the flood waits for the transmitter; when read, no byte is missing."""
    reader, writer = os.pipe()
    null = os.open("/dev/null", os.O_RDONLY)
    try:
        with Machine(MachineConfig(kernel=kernel(FLOOD)), console=(null, writer)) as machine:
            time.sleep(1.5)
            machine.pause()  # which raises if the vCPU is stuck in a write
            machine.resume()
            data = b""
            while len(data) < 70_000:
                data += os.read(reader, 1 << 16)
            drain = threading.Thread(target=lambda: _read_all(reader), daemon=True)
            drain.start()
            machine.stop()
            machine.wait(30)
            assert machine.dropped_output == 0
        assert data == bytes(n % 256 for n in range(len(data)))
    finally:
        os.close(writer)
        drain.join(10)
        os.close(reader)
        os.close(null)


def _read_all(fd: int) -> None:
    while os.read(fd, 1 << 16):
        pass


def test_one_machine_alone_writes_an_image(kernel: Callable[[str], str], tmp_path: Path) -> None:
    """A second machine on the same image is refused with a hint; nothing is left behind."""
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    config = MachineConfig(kernel=kernel(FOREVER), drives=[Drive(str(image))])
    before = descriptors()
    with Machine(config), pytest.raises(HostError, match="another machine"):
        Machine(config).start()
    assert descriptors() <= before + 2
    with Machine(config) as machine:
        machine.stop()


def test_machines_come_and_go_without_a_trace(kernel: Callable[[str], str]) -> None:
    """Ten machines later there are as many descriptors and threads as after the first."""
    config = MachineConfig(kernel=kernel("POWER_OFF"))

    def once() -> tuple[int, int]:
        with Machine(config) as machine:
            machine.wait(30)
        return descriptors(), threading.active_count()

    gc.collect()  # what tests before have left
    first = once()
    assert [once() for _ in range(10)] == [first] * 10


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_command_with_its_number(
    kernel: Callable[[str], str], number: signal.Signals
) -> None:
    """`vmm run` stops the machine and exits with 128 and the signal's number."""
    process = subprocess.Popen(
        [sys.executable, "-m", "vmm_reference", "run", "--kernel", kernel("PUT 'x'; 1: jmp 1b")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
    )
    assert process.stdout is not None
    assert process.stdout.read(1) == b"x"
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert b"Traceback" not in errors
