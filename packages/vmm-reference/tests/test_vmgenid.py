"""The generation identifier: when it changes, and what the guest sees of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vm_memory import GuestAddress
from vmm_reference.config import MachineConfig
from vmm_reference.devices.states import GenerationState, StateError
from vmm_reference.devices.vmgenid import Generation, VmGeneration
from vmm_reference.layout import VM_GENERATION
from vmm_reference.machine import Machine
from vmm_reference.testing import tiny_kernel


def test_it_changes_when_a_state_is_gone_on_from() -> None:
    """And only then; the guest is told after it has changed."""
    seen: list[bytes] = []
    told: list[bytes] = []
    first = VmGeneration(lambda: os.urandom(16), seen.append, lambda: told.append(seen[-1]))
    assert (seen, told) == ([first.identifier], [])
    state = first.save()
    second = VmGeneration(lambda: os.urandom(16), seen.append, lambda: told.append(seen[-1]))
    second.restore(state)
    assert second.identifier != first.identifier
    assert told == [second.identifier] == seen[-1:]
    assert (first.metrics(), second.metrics()) == ({"changes": 0}, {"changes": 1})
    # A source that repeats itself does not make a clone the same.
    numbers = iter([b"a" * 16, b"b" * 16])
    third = VmGeneration(lambda: next(numbers), seen.append, lambda: None)
    third.restore(GenerationState(b"a" * 16))
    assert seen[-1] == b"b" * 16
    with pytest.raises(StateError, match=r"GenerationState\.identifier"):
        GenerationState(b"short")


@pytest.mark.kvm
def test_clones_of_a_machine_differ(tmp_path: Path) -> None:
    """Two machines from one snapshot have two identifiers, and an event waits for each guest."""
    kernel = tmp_path / "kernel"
    kernel.write_bytes(tiny_kernel("1: PUT 'x'\nhlt\njmp 1b"))
    config = MachineConfig(kernel=str(kernel), memory="32M", devices=[Generation()])
    seen = set()

    def identifier(machine: Machine) -> bytes:
        assert machine._board is not None
        return machine._board.memory.read(GuestAddress(VM_GENERATION), 16)

    with Machine(config) as machine:
        machine.console.expect("x", 30)
        seen.add(identifier(machine))
        machine.pause()
        machine.snapshot(tmp_path / "snapshot")
        assert identifier(machine) in seen
    for _ in range(2):
        with Machine.restore(tmp_path / "snapshot") as machine:
            seen.add(identifier(machine))
            assert machine._board is not None
            assert machine._board.power.save().events & 4
    assert len(seen) == 3
    assert bytes(16) not in seen
