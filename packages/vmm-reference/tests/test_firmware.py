"""Firmware in the place of a kernel: where it lies, what it is told, what it says."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvm_ioctls.testing import assemble
from vm_memory import GuestAddress
from vmm_reference.config import MachineConfig
from vmm_reference.devices.cmos import cmos
from vmm_reference.devices.debug_console import LIMIT, WINDOW, DebugConsole, DebugLog
from vmm_reference.devices.rtc import Rtc
from vmm_reference.errors import ConfigError, HostError
from vmm_reference.machine import Machine
from vmm_reference.outcome import Outcome
from vmm_reference.state.clone import identity

ROM = 0xFFFF0000
SIZE = 64 << 10

# From the reset vector: says `y` on both debug ports if a read there answers 0xE9, then writes its
# own first byte, reads it back and says what it found, and powers off.
CODE = """
start:
    mov $0x402, %dx
    in %dx, %al
    cmp $0xe9, %al
    jne end
    mov $'y', %al
    out %al, %dx
    in $0xe9, %al
    cmp $0xe9, %al
    jne end
    mov $'Y', %al
    out %al, $0xe9
    movb $0x55, %cs:start
    mov %cs:start, %al
    out %al, $0xe9
    mov $0xf000, %ax
    mov %ax, %ds
    mov start, %al
    out %al, $0xe9
end:
    mov $0x600, %dx
    mov $0x34, %al
    out %al, %dx
    hlt
"""


def build(code: bytes) -> bytes:
    """64 KiB that begin with the code and end with a jump to it."""
    jump = b"\xe9" + (-(0xFFF0 + 3) & 0xFFFF).to_bytes(2, "little")
    return code.ljust(0xFFF0, b"\0") + jump.ljust(16, b"\0")


@pytest.fixture
def firmware(tmp_path: Path) -> Path:
    path = tmp_path / "firmware.bin"
    path.write_bytes(build(assemble(CODE, bits=16, origin=0)))
    return path


@pytest.mark.kvm
def test_firmware_runs_from_the_reset_vector(firmware: Path, tmp_path: Path) -> None:
    """It is in both places, can't write itself, and is heard on both debug ports."""
    said = tmp_path / "said"
    first = firmware.read_bytes()[:1]
    config = MachineConfig(firmware=str(firmware), memory="16M", devices=[DebugLog(str(said))])
    with Machine(config) as machine:
        assert machine.wait(30) is Outcome.POWER_OFF
    assert said.read_bytes() == b"yY" + first * 2


@pytest.mark.kvm
def test_a_firmware_machine_is_saved_and_restored(firmware: Path, tmp_path: Path) -> None:
    """Its read-only memory is part of the snapshot."""
    spinning = tmp_path / "spinning.bin"
    spinning.write_bytes(build(assemble("1: jmp 1b", bits=16, origin=0)))
    with Machine(MachineConfig(firmware=str(spinning), memory="16M")) as machine:
        machine.snapshot(tmp_path / "saved")
    with Machine.restore(tmp_path / "saved") as machine:
        machine.pause()
        board = machine._board
        assert board is not None
        assert board.memory.read(GuestAddress(ROM), SIZE) == spinning.read_bytes()
    larger = tmp_path / "larger.bin"
    larger.write_bytes(bytes(4096) + spinning.read_bytes())
    other = Machine.restore(tmp_path / "saved", firmware=str(larger))
    with pytest.raises(HostError, match="memory"):
        other.start()
    other.close()


# Counts in the flash, which lies in the 4 KiB below the code: clears one more bit of its second
# byte and says by what command it read the status that it then says, and the byte.
COUNT = """
start:
    mov $0xf000, %ax
    mov %ax, %ds
    mov $0x402, %dx
    lgdtl %cs:descriptor
    mov %cr0, %eax
    or $1, %al
    mov %eax, %cr0
    mov $8, %bx
    mov %bx, %es
    and $0xfe, %al
    mov %eax, %cr0
    mov $0xfffef001, %ebx
    mov %es:(%ebx), %cl
    shl $1, %cl
    movb $0x10, %es:(%ebx)
    mov %cl, %es:(%ebx)
    mov %es:(%ebx), %al
    out %al, %dx
    movb $0xff, %es:(%ebx)
    mov %es:(%ebx), %al
    out %al, %dx
    mov $0x600, %dx
    mov $0x34, %al
    out %al, %dx
    hlt
    .balign 8
table: .quad 0, 0x00cf93000000ffff
descriptor: .word 15
    .long 0xffff0000 + table
"""


@pytest.mark.kvm
def test_variables_outlive_the_machine(tmp_path: Path) -> None:
    """What firmware programs into its flash is in the file, and there at the next start."""
    firmware, variables, said = (tmp_path / name for name in ("code", "variables", "said"))
    firmware.write_bytes(build(assemble(COUNT, bits=16, origin=0)))
    variables.write_bytes(b"\xff" * 4096)
    config = MachineConfig(
        firmware=str(firmware),
        variables=str(variables),
        memory="16M",
        devices=[DebugLog(str(said))],
    )
    for _ in range(3):
        with Machine(config) as machine:
            assert machine.wait(30) is Outcome.POWER_OFF
    assert said.read_bytes() == b"\x80\xfe\x80\xfc\x80\xf8"
    assert variables.read_bytes() == b"\xff\xf8" + b"\xff" * 4094


@pytest.mark.kvm
def test_a_flash_is_restored_with_its_file(tmp_path: Path) -> None:
    """A restored machine's chip has what it had, and so has the file again; a clone has its own."""
    firmware, variables = tmp_path / "code", tmp_path / "variables"
    firmware.write_bytes(build(assemble("1: jmp 1b", bits=16, origin=0)))
    variables.write_bytes(b"before".ljust(4096, b"\xff"))
    config = MachineConfig(firmware=str(firmware), variables=str(variables), memory="16M")
    with Machine(config) as machine:
        machine.snapshot(tmp_path / "saved")
    variables.write_bytes(b"after".ljust(4096, b"\xff"))
    with Machine.restore(tmp_path / "saved") as machine:
        machine.pause()
        board = machine._board
        assert board is not None
        assert board.memory.read(GuestAddress(ROM - 4096), 6) == b"before"
    assert variables.read_bytes().startswith(b"before")
    assert identity(config, 4)["variables"] == f"{variables}-4"


def test_variables_need_firmware_and_a_file_to_write(firmware: Path, tmp_path: Path) -> None:
    """Alone, of a wrong size, or too large with the firmware: refused by name."""
    wrong = tmp_path / "wrong"
    wrong.write_bytes(bytes(100))
    large = tmp_path / "large"
    large.write_bytes(bytes(16 << 20))
    for fields, field in (
        ({"variables": str(wrong)}, "variables"),
        ({"firmware": str(firmware), "variables": str(wrong)}, "variables"),
        ({"firmware": str(firmware), "variables": str(large)}, "firmware"),
        ({"firmware": str(firmware), "variables": "/no/such/file"}, "variables"),
    ):
        with pytest.raises(ConfigError) as caught:
            MachineConfig(**fields)  # type: ignore[arg-type]
        assert caught.value.field == field


@pytest.mark.kvm
def test_a_debug_console_that_nobody_reads_holds_nothing_up(firmware: Path, tmp_path: Path) -> None:
    """A directory is refused with what to do; output to a full device is lost, not waited for."""
    config = MachineConfig(firmware=str(firmware), memory="16M", devices=[DebugLog(str(tmp_path))])
    with pytest.raises(HostError, match=r"debug console .*name a file"):
        Machine(config).start()
    config = MachineConfig(firmware=str(firmware), memory="16M", devices=[DebugLog("/dev/full")])
    with Machine(config) as machine:
        assert machine.wait(30) is Outcome.POWER_OFF


@pytest.mark.parametrize(
    ("size", "rule"),
    [(0, "4 KiB"), (4095, "whole"), (4097, "whole"), ((16 << 20) + 4096, "16 MiB")],
)
def test_firmware_has_whole_pages(tmp_path: Path, size: int, rule: str) -> None:
    """An image that can't be mapped below 4 GiB is refused with its size."""
    path = tmp_path / "firmware.bin"
    path.write_bytes(bytes(size))
    with pytest.raises(ConfigError, match=rule) as caught:
        MachineConfig(firmware=str(path))
    assert (caught.value.field, f"({size} bytes)" in str(caught.value)) == ("firmware", True)


@pytest.mark.parametrize(
    ("field", "value"), [("kernel", "vmlinuz"), ("cmdline", "quiet"), ("kaslr", True)]
)
def test_firmware_is_alone(firmware: Path, field: str, value: object) -> None:
    """What only a kernel could be given is refused beside firmware."""
    with pytest.raises(ConfigError, match="firmware finds its own kernel") as caught:
        MachineConfig(firmware=str(firmware), **{field: value})  # type: ignore[arg-type]
    assert caught.value.field == field


@given(st.integers(16, 1 << 20).map(lambda count: count << 20), st.integers(1, 254))
def test_cmos_tells_memory_and_cpus(memory: int, cpus: int) -> None:
    """The registers, read through the clock's ports, add up to what the machine has."""
    rtc = Rtc(lambda: 0.0, lambda level: None, memory=cmos(memory, cpus))

    def register(*indices: int) -> int:
        value = 0
        for index in reversed(indices):
            rtc.write(0, bytes([index]))
            value = value << 8 | rtc.read(1, 1)[0]
        return value

    low = register(0x34, 0x35) * (64 << 10) + (16 << 20)
    assert low + register(0x5B, 0x5C, 0x5D) * (64 << 10) == memory
    assert low <= 3 << 30
    assert register(0x17, 0x18) == register(0x30, 0x31) == min((low >> 10) - 1024, 0xFFFF)
    assert (register(0x15, 0x16), register(0x5F)) == (640, cpus - 1)
    assert register(0x2F, 0x2E) == sum(map(register, range(0x10, 0x2E)))


@given(st.lists(st.one_of(st.binary(max_size=40_000), st.integers(0, 1 << 17)), max_size=30))
def test_debug_output_is_bounded_and_in_order(steps: list[bytes | int]) -> None:
    """What is passed on stays within window and limit; every other byte is counted."""
    passed = bytearray()
    limit = 200_000
    console = DebugConsole(passed.extend, limit=limit)
    written = under_way = 0
    for step in steps:
        if isinstance(step, bytes):
            before = len(passed)
            console.write(0, step)
            written += len(step)
            under_way += len(passed) - before
            assert bytes(passed[before:]) in (b"", step)
        else:
            count = min(step, under_way)
            console.transmitted(count)
            under_way -= count
        assert under_way <= WINDOW
        assert len(passed) <= limit < LIMIT
        assert len(passed) + console.dropped == written
