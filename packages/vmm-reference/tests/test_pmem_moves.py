"""A machine with a file as memory is saved, comes back and moves: the memory goes along."""

from __future__ import annotations

from pathlib import Path

import pytest

from vm_memory import GuestAddress
from vmm_reference.config import MachineConfig
from vmm_reference.devices.pmem import PersistentMemory
from vmm_reference.errors import HostError
from vmm_reference.machine import Machine
from vmm_reference.state.incoming import Incoming
from vmm_reference.testing import tiny_kernel

pytestmark = pytest.mark.kvm

MIB = 1 << 20
SIZE = 4 * MIB


@pytest.fixture
def config(tmp_path: Path) -> MachineConfig:
    """A machine whose guest does nothing, with memory that is a file's."""
    kernel, file = tmp_path / "kernel", tmp_path / "file"
    kernel.write_bytes(tiny_kernel("PUT '!'\n1: hlt; jmp 1b"))
    with file.open("wb") as empty:
        empty.truncate(SIZE)
    return MachineConfig(
        kernel=str(kernel), memory="32M", devices=[PersistentMemory(str(file), private=False)]
    )


def place(machine: Machine) -> GuestAddress:
    """Where the file is, as the device tells."""
    board = machine._board
    assert board is not None
    return GuestAddress(board.ram.areas["pmem0"][0] + MIB)


def write(machine: Machine, data: bytes) -> None:
    """As the guest would: by its memory."""
    board = machine._board
    assert board is not None
    board.memory.write(place(machine), data)


def read(machine: Machine, length: int) -> bytes:
    board = machine._board
    assert board is not None
    return board.memory.read(place(machine), length)


def private(config: MachineConfig) -> MachineConfig:
    """The same, and the file stays as it is."""
    path = config.devices[0].path  # type: ignore[attr-defined]
    return MachineConfig(
        kernel=config.kernel, memory="32M", devices=[PersistentMemory(path, private=True)]
    )


@pytest.mark.parametrize("how", ["eager", "copy-on-write", "on-demand"])
def test_it_comes_back_from_a_snapshot(config: MachineConfig, tmp_path: Path, how: str) -> None:
    """A shared file is what it is then, also where it has changed; private memory is as saved."""
    file = tmp_path / "file"
    with Machine(config) as machine:
        machine.console.expect("!", 30)
        machine.pause()
        write(machine, b"before")
        machine.snapshot(tmp_path / "shared")
    assert file.read_bytes()[MIB : MIB + 6] == b"before"
    with Machine(private(config)) as machine:
        machine.console.expect("!", 30)
        machine.pause()
        assert read(machine, 6) == b"before"
        write(machine, b"mine!!")
        machine.snapshot(tmp_path / "private")
    with file.open("r+b") as other:
        other.seek(MIB)
        other.write(b"after!")
    with Machine.restore(tmp_path / "shared", how) as machine:
        machine.pause()
        assert read(machine, 6) == b"after!"
        write(machine, b"again!")
        assert file.read_bytes()[MIB : MIB + 6] == b"again!"
        assert machine.metrics()["pmem0"]["flushes"] == 0
    with Machine.restore(tmp_path / "private", how) as machine:
        machine.pause()
        assert read(machine, 6) == b"mine!!"
    assert file.read_bytes()[MIB : MIB + 6] == b"again!"


@pytest.mark.parametrize("way", ["pre-copy", "post-copy"])
@pytest.mark.parametrize("own", [False, True], ids=["shared", "private"])
def test_it_moves(config: MachineConfig, tmp_path: Path, own: bool, way: str) -> None:
    """To a machine on the same file, which is locked by one of them at a time."""
    chosen = private(config) if own else config
    with Machine(chosen) as machine:
        machine.console.expect("!", 30)
        write(machine, b"moved!")
        with Incoming(f"unix:{tmp_path}/socket") as incoming:
            machine.migrate(incoming.address, post_copy=0 if way == "post-copy" else None)
            there = incoming.receive(30)
    with there:
        there.pause()
        assert read(there, 6) == b"moved!"
        if not own:
            with pytest.raises(HostError, match="another"):
                Machine(config).start()
    assert ((tmp_path / "file").read_bytes()[MIB : MIB + 6] == b"moved!") is not own
