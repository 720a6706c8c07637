"""Processors that come and go: the registers, and a guest that does what its ACPI would."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm_reference.config import MachineConfig
from vmm_reference.devices.cpus import DOWN, EJECT, PRESENT, UP, Cpus
from vmm_reference.devices.states import CpusState, StateError
from vmm_reference.errors import ConfigError
from vmm_reference.machine import Machine
from vmm_reference.testing import tiny_kernel

# Tells by a letter what has come or is to go, and ejects it.
GUEST = """
    PUT 's'
1:  movw $0x620, %dx
    inb %dx, %al
    testb %al, %al
    jz 2f
    PUT 'U'
2:  movw $0x621, %dx
    inb %dx, %al
    testb %al, %al
    jz 1b
    movb %al, %bl
    PUT 'D'
    movw $0x622, %dx
    movb %bl, %al
    outb %al, %dx
    jmp 1b
"""


class Bench:
    """The registers, and what they asked for."""

    def __init__(self, count: int = 2, most: int = 5) -> None:
        self.told = 0
        self.ejected: list[int] = []
        self.cpus = Cpus(count, most, self.tell, self.ejected.append)

    def tell(self) -> None:
        self.told += 1

    def present(self) -> set[int]:
        bits = int.from_bytes(self.cpus.read(PRESENT, 32), "little")
        return {number for number in range(256) if bits >> number & 1}


def test_each_change_is_told_once() -> None:
    """The guest fetches one at a time and is told again while there are more."""
    bench = Bench()
    assert bench.present() == {0, 1}
    for number in (2, 3, 3, 1):
        bench.cpus.plug(number)
    assert bench.told == 2
    assert [bench.cpus.read(UP, 1)[0] for _ in range(3)] == [3, 4, 0]
    assert bench.told == 3
    bench.cpus.ask_for(3)
    bench.cpus.ask_for(3)
    bench.cpus.ask_for(4)
    assert bench.told == 4
    assert [bench.cpus.read(DOWN, 1)[0] for _ in range(2)] == [4, 0]
    bench.cpus.write(EJECT, b"\x04")
    assert (bench.ejected, bench.present()) == ([3], {0, 1, 2})
    bench.cpus.plug(3)
    assert bench.cpus.read(UP, 1) == b"\x04"


def test_what_is_not_there_can_not_be_ejected() -> None:
    """Nor the first processor, nor number 255."""
    bench = Bench()
    for value in range(256):
        if value != 2:
            bench.cpus.write(EJECT, bytes([value]))
    assert (bench.ejected, bench.present()) == ([], {0, 1})


@given(st.lists(st.tuples(st.integers(0, 80), st.binary(max_size=8), st.integers(1, 8))))
def test_no_access_raises(accesses: list[tuple[int, bytes, int]]) -> None:
    """Every width at every place; the first processor stays."""
    bench = Bench()
    bench.cpus.plug(4)
    bench.cpus.ask_for(1)
    for offset, data, length in accesses:
        bench.cpus.write(offset, data)
        assert len(bench.cpus.read(offset, length)) == length
    assert 0 in bench.cpus.present
    state = bench.cpus.save()
    fresh = Bench()
    fresh.cpus.restore(state)
    assert fresh.cpus.save() == state


def test_a_state_of_a_larger_machine_is_refused() -> None:
    """Nothing is restored of it."""
    bench = Bench()
    with pytest.raises(StateError, match=r"CpusState\.up"):
        bench.cpus.restore(CpusState((0, 1), (5,), ()))
    assert bench.present() == {0, 1}


@pytest.mark.kvm
def test_processors_come_and_go_and_come_again(tmp_path: Path) -> None:
    """The number follows, is kept by a snapshot and over a reset; what can't be is refused."""
    path = tmp_path / "kernel"
    path.write_bytes(tiny_kernel(GUEST))
    with Machine(MachineConfig(kernel=str(path), cpus=1, max_cpus=4)) as machine:
        machine.console.expect("s", 30)
        for _ in range(2):
            machine.set_cpus(3)
            machine.console.expect("U[^U]*U", 30)
            assert machine.config.cpus == 3
            machine.set_cpus(2)
            machine.console.expect("D", 30)
            assert machine.config.cpus == 2
            machine.set_cpus(1)
        machine.set_cpus(4)
        machine.snapshot(tmp_path / "snapshot")
        machine.reset()
        machine.console.expect("s", 30)
        assert machine.config.cpus == 4
        machine.set_cpus(2)
        for count in (0, 5, True):
            with pytest.raises(ConfigError, match="1 to 4"):
                machine.set_cpus(count)
    with Machine.restore(tmp_path / "snapshot") as machine:
        assert machine.config.cpus == 4
        machine.set_cpus(1)
    with (
        Machine(MachineConfig(kernel=str(path))) as machine,
        pytest.raises(ConfigError, match="max_cpus"),
    ):
        machine.set_cpus(2)
