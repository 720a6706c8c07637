"""Guests that attack the machine itself: its buses, its legacy devices, its processors.

Numbers are those of the list of holes that other monitors had; what concerns virtio is in
`test_hostile_devices.py` and in virtio-queue's `test_published_holes.py`.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvm_ioctls import CpuidEntry, exits
from vmm_reference.bus import Bus
from vmm_reference.config import MachineConfig
from vmm_reference.cpu.cpuid import topology
from vmm_reference.deviceconfig import parse_device
from vmm_reference.devices.cpus import Cpus
from vmm_reference.devices.debug_console import DebugConsole
from vmm_reference.devices.i8042 import I8042, SystemControl
from vmm_reference.devices.keyboard import Keyboard
from vmm_reference.devices.modules import Modules
from vmm_reference.devices.pm import PowerManagement
from vmm_reference.devices.pvpanic import Pvpanic
from vmm_reference.devices.rtc import Rtc
from vmm_reference.devices.serial import Serial
from vmm_reference.machine import Machine
from vmm_reference.outcome import Outcome
from vmm_reference.pci.hotplug import PciHotplug
from vmm_reference.testing import every_device, tiny_kernel
from vmm_reference.vcpu import VcpuThread


class Strict:
    """A device of eight bytes that fails the test where it is reached outside."""

    def read(self, offset: int, length: int) -> bytes:
        assert 0 <= offset <= offset + length <= 8
        return bytes(length)

    def write(self, offset: int, data: bytes) -> None:
        assert 0 <= offset <= offset + len(data) <= 8


@given(st.integers(0, 64), st.integers(1, 8), st.sampled_from([0x10, (1 << 64) - 16]))
def test_05_an_access_and_its_length_can_not_wrap(at: int, length: int, start: int) -> None:
    """Neither at the end of a device's range nor at the end of the space."""
    bus = Bus()
    bus.add(start, 8, Strict())
    address = (start - 16 + at) % (1 << 64)
    assert len(bus.read(address, length)) == length
    bus.write(address, bytes(length))


# A string instruction that crosses from one device's ports over the next one's and out of any.
SWEEP = """
    cld
    movl $0x300000, %edi
    movl $0x300000, %esi
    movw $DELTA, %dx
1:  movl $4096, %ecx
    rep insb
    movl $0x300000, %edi
    movl $1024, %ecx
    rep insl
    movl $0x300000, %edi
    incw %dx
    cmpw $END, %dx
    jne 1b
    PUT '!'
    POWER_OFF
"""


@pytest.mark.kvm
@pytest.mark.parametrize("first", [0x3F0, 0x5F0, 0x60, 0xCF0])
def test_05_strings_from_any_port_reach_nothing_else(tmp_path: Path, first: int) -> None:
    """Every port around the devices, by bytes and double words, thousands at once."""
    path = tmp_path / "kernel"
    source = SWEEP.replace("DELTA", hex(first)).replace("END", hex(first + 24))
    path.write_bytes(tiny_kernel(source))
    config = MachineConfig(
        kernel=str(path), memory="32M", max_cpus=3, max_memory="160M", transport="pci",
        devices=[parse_device("keyboard")],
    )  # fmt: skip
    with Machine(config) as machine:
        machine.console.expect("!", 50)
        assert machine.wait(30) is Outcome.POWER_OFF


# What a guest may do as often as it likes: a device, and an access to it.


def _serial() -> Serial:
    return Serial(lambda _: None, lambda _: None)


def _rtc() -> Rtc:
    clock = iter(range(1 << 40))
    return Rtc(lambda: next(clock) / 1000, lambda _: None, timer=lambda _: None)


def _i8042() -> I8042:
    controller = I8042(lambda: None)
    controller.connect(Keyboard())
    return controller


def _power() -> PowerManagement:
    return PowerManagement(power_off=lambda: None, reset=lambda: None, interrupt=lambda _: None)


FLOODS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "serial": (_serial, (0, 1, 2, 3, 4, 7)),
    "rtc": (_rtc, (0, 1, 2, 3)),
    "i8042": (_i8042, (0, 4)),
    "system control": (lambda: SystemControl(lambda: None), (0,)),
    "power": (_power, (0, 1, 3)),
    "pvpanic": (lambda: Pvpanic(lambda _: None), (0,)),
    "debug console": (lambda: DebugConsole(lambda _: None), (0,)),
    "cpus": (lambda: Cpus(2, 254, lambda: None, lambda _: None), (2, 0, 40)),
    "pci hotplug": (lambda: PciHotplug(lambda: None, lambda _: None), (0, 4, 8)),
    "modules": (
        lambda: Modules({0: (1 << 32, 1 << 27)}, lambda: None, lambda _a, _b: None),
        (2, 33, 57, 58),
    ),
}


@pytest.fixture
def traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


@pytest.mark.parametrize("name", FLOODS)
def test_22_a_flood_leaves_nothing_behind(
    name: str, traced: None, caplog: pytest.LogCaptureFixture
) -> None:
    """A hundred thousand accesses: no line in the log, and no more memory than after the first."""
    make, offsets = FLOODS[name]
    device = make()

    def flood(count: int) -> None:
        for number in range(count):
            offset = offsets[number % len(offsets)]
            device.write(offset, bytes([number * 37 & 0xFF]))
            device.read(offset, 1)

    with caplog.at_level(logging.DEBUG):
        flood(1000)
        before, _ = tracemalloc.get_traced_memory()
        flood(100_000)
        after, _ = tracemalloc.get_traced_memory()
    assert after - before < 64 << 10
    assert caplog.records == []


FLOOD = """
    PUT 's'
1:  movl $4096, %ecx
    movl $KERNEL, %esi
    movw $0xe9, %dx
    rep outsb
    movb $0x0b, %al
    outb %al, $0x70
    movb $0x72, %al
    outb %al, $0x71
    movw $0x603, %dx
    inb %dx, %al
    movb $0xaa, %al
    outb %al, $0x64
    jmp 1b
"""


@pytest.mark.kvm
def test_22_a_full_pipe_holds_nobody_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A guest that floods the debug port, whose pipe nobody reads, and the clock: all is served.

    The vCPU can be paused, the I/O thread answers, what was too much is counted.
    """
    path, pipe = tmp_path / "kernel", tmp_path / "pipe"
    path.write_bytes(tiny_kernel(FLOOD.replace("KERNEL", "0x100000")))
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    config = MachineConfig(
        kernel=str(path), memory="32M", devices=[parse_device(f"debug-console,{pipe}")]
    )
    try:
        with caplog.at_level(logging.DEBUG), Machine(config) as machine:
            machine.console.expect("s", 30)
            console = machine.device("debug-console0")
            while console.dropped < 100_000:
                machine.pause()
                machine.resume()
                assert machine.metrics()["serial"]["dropped"] == 0
            machine.stop()
            assert machine.wait(30) is Outcome.STOPPED
        assert caplog.records == []
    finally:
        os.close(reader)


@pytest.mark.kvm
def test_06_cve_2020_27174_input_that_no_guest_takes_is_not_read(tmp_path: Path) -> None:
    """One read's worth is taken, of which the port has a byte; the rest stays with its sender."""
    path = tmp_path / "kernel"
    path.write_bytes(tiny_kernel("1: hlt; jmp 1b"))
    reader, writer = os.pipe2(os.O_NONBLOCK)
    quiet = os.open(os.devnull, os.O_WRONLY)
    sent = 0

    def fill() -> None:
        nonlocal sent
        with suppress(BlockingIOError):
            while True:
                sent += os.write(writer, bytes(4096))

    fill()
    capacity = sent
    with Machine(MachineConfig(kernel=str(path), memory="32M"), console=(reader, quiet)) as machine:
        board = machine._board
        assert board is not None
        for _ in range(3000):
            if board.serial.save().received:
                break
            time.sleep(0.01)
        for _ in range(100):  # each is a turn of the loop, which would read what it listens to
            fill()
            machine._loop.call(lambda: None)
    left = 0
    with suppress(BlockingIOError):
        while data := os.read(reader, 1 << 16):
            left += len(data)
    assert 1 <= sent - left <= 256
    assert sent - capacity <= 256 + 4096
    for fd in (reader, writer, quiet):
        os.close(fd)


@pytest.mark.kvm
def test_18_no_guest_names_a_path_of_the_host(tmp_path: Path) -> None:
    """No device shares a file system (9P has the number 9, virtio-fs 26).

    With the first that does, what stands in the list about paths is to be tested here.
    """
    path = tmp_path / "kernel"
    path.write_bytes(tiny_kernel("1: hlt; jmp 1b"))
    config = MachineConfig(kernel=str(path), memory="32M", devices=every_device(tmp_path))
    with Machine(config) as machine:
        assert machine._board is not None
        slots = [wiring.slot for wiring in machine._board.devices.values()]
        numbers = {slot.device.model.device_id for slot in slots if slot is not None}
    assert len(numbers) >= 8
    assert not numbers & {9, 26}


# Processors that do what no kernel does.


class Vcpu:
    """Exits one after another, as KVM would give them."""

    id = 3

    def __init__(self, *found: exits.Exit) -> None:
        self._found = iter(found)

    def run(self) -> exits.Exit:
        return next(self._found)

    def kick(self) -> None:
        pass


def ended_by(found: exits.Exit) -> list[tuple[Outcome, str]]:
    """Run a vCPU that exits so; how the machine ends."""
    ends: list[tuple[Outcome, str]] = []
    done = threading.Event()

    def ended(outcome: Outcome, detail: str) -> None:
        ends.append((outcome, detail))
        done.set()

    thread = VcpuThread(Vcpu(found), Bus(0x10000), Bus(), ended)  # type: ignore[arg-type]
    thread.start()
    assert done.wait(30)
    thread.join()
    return ends


@pytest.mark.parametrize(
    ("told", "outcome"),
    [
        (exits.Unknown(number=99, raw=bytes(256)), Outcome.KVM_INTERNAL_ERROR),
        (exits.FailEntry(hardware_entry_failure_reason=7, cpu=1), Outcome.KVM_INTERNAL_ERROR),
        (exits.InternalError(suberror=2, data=(1, 2)), Outcome.KVM_INTERNAL_ERROR),
        (exits.Shutdown(), Outcome.TRIPLE_FAULT),
        (exits.Hlt(), Outcome.POWER_OFF),
    ],
    ids=lambda value: type(value).__name__,
)
def test_23_exits_that_end_a_machine_end_it_once(told: exits.Exit, outcome: Outcome) -> None:
    """With a status of its own, and what KVM said, and nothing raised."""
    ((found, detail),) = ended_by(told)
    assert found is outcome
    assert detail
    assert 0 < outcome.status < 128 or outcome is Outcome.POWER_OFF


@pytest.mark.kvm
@pytest.mark.parametrize("source", ["cli; 1: hlt; jmp 1b", "1: hlt; jmp 1b", "1: pause; jmp 1b"])
def test_23_a_guest_that_halts_for_ever_can_be_paused_and_ended(
    tmp_path: Path, source: str
) -> None:
    """With and without interrupts; it costs no more than the wait."""
    path = tmp_path / "kernel"
    path.write_bytes(tiny_kernel(source))
    with Machine(MachineConfig(kernel=str(path), memory="32M")) as machine:
        machine.pause()
        machine.resume()
        machine.stop()
        assert machine.wait(30) is Outcome.STOPPED


words = st.integers(0, 0xFFFFFFFF)
registers = st.tuples(words, words, words, words)


@given(
    st.dictionaries(
        st.sampled_from([1, 7, 0xA, 0x80000001, 0x8000000A, 0x80000022]), registers, min_size=6
    ),
    st.booleans(),
)
def test_23_no_nested_virtualization_no_counters_no_umwait(
    leaves: dict[int, tuple[int, int, int, int]], amd: bool
) -> None:
    """Whatever the host's KVM offers: less to attack, and nothing that keeps a processor."""
    vendor = (0, 0x68747541, 0x444D4163, 0x69746E65) if amd else (0, 0, 0, 0)
    table = [
        CpuidEntry(function=function, index=0, flags=0, eax=a, ebx=b, ecx=c, edx=d)
        for function, (a, b, c, d) in {0: vendor, **leaves}.items()
    ]
    found = {e.function: e for e in topology(table, apic_id=0, cpus=1, tsc_deadline=True)}
    assert not found[1].ecx & (1 << 5 | 1 << 15)  # VMX, PDCM
    assert not found[1].edx & 1 << 21  # DS
    assert not found[0x80000001].ecx & (1 << 2 | 1 << 23 | 1 << 24 | 1 << 28)  # SVM, counters
    assert not found[7].ecx & 1 << 5  # WAITPKG
    for function in (0xA, 0x8000000A, 0x80000022):
        entry = found[function]
        assert (entry.eax, entry.ebx, entry.ecx, entry.edx) == (0, 0, 0, 0)
