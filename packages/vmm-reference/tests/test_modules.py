"""Modules of memory that come and go: the registers, and a guest that does what its ACPI would."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vm_memory import GuestAddress
from vmm_reference.api.client import ask
from vmm_reference.api.server import Control, Server
from vmm_reference.cli import main
from vmm_reference.config import MachineConfig
from vmm_reference.devices.mem import Memory
from vmm_reference.devices.modules import (
    DOWN,
    EJECT,
    PORT,
    SIZE,
    SLOT,
    SLOT_SIZE,
    SLOTS,
    UP,
    Modules,
)
from vmm_reference.devices.states import ModulesState, StateError
from vmm_reference.errors import ConfigError, HostError
from vmm_reference.machine import Machine
from vmm_reference.state.incoming import Incoming
from vmm_reference.testing import tiny_kernel

MIB = 1 << 20
BLOCK = 128 * MIB
START = 4 << 30


class Bench:
    """The registers, and what they asked for."""

    def __init__(self, present: dict[int, tuple[int, int]] | None = None) -> None:
        self.told = 0
        self.ejected: list[tuple[int, int]] = []
        self.statuses: list[tuple[int, int, int]] = []
        self.modules = Modules(
            present or {},
            self.tell,
            lambda *where: self.ejected.append(where),
            lambda *what: self.statuses.append(what),
        )

    def tell(self) -> None:
        self.told += 1

    def slot(self, number: int) -> tuple[int, ...]:
        """First, last, length and presence."""
        data = self.modules.read(SLOT + number * SLOT_SIZE, SLOT_SIZE)
        return *(int.from_bytes(data[at : at + 8], "little") for at in (0, 8, 16)), data[24]


def test_each_change_is_told_once() -> None:
    """The guest fetches one at a time and is told again while there are more."""
    bench = Bench({1: (START, BLOCK)})
    assert bench.slot(1) == (START, START + BLOCK - 1, BLOCK, 1)
    assert bench.slot(0) == (0, 0, 0, 0)
    bench.modules.plug(0, START + BLOCK, 2 * BLOCK)
    bench.modules.plug(15, START + 3 * BLOCK, BLOCK)
    assert [bench.modules.read(UP, 1)[0] for _ in range(3)] == [1, 16, 0]
    assert bench.told == 3
    for slot in (0, 0, 7):
        bench.modules.ask_for(slot)
    assert (bench.modules.read(DOWN, 1), bench.told) == (b"\1", 4)
    bench.modules.write(EJECT, b"\1")
    assert bench.ejected == [(START + BLOCK, 2 * BLOCK)]
    assert bench.slot(0) == (0, 0, 0, 0)


def test_what_came_of_an_event() -> None:
    """Source first, then the status that tells."""
    bench = Bench({2: (START, BLOCK)})
    bench.modules.write(SLOT + 2 * SLOT_SIZE + 25, b"\3")
    assert bench.statuses == []
    bench.modules.write(SLOT + 2 * SLOT_SIZE + 26, b"\x81")
    assert bench.statuses == [(2, 3, 0x81)]


@given(st.lists(st.tuples(st.integers(0, SIZE), st.binary(max_size=8), st.integers(1, 8))))
def test_no_access_raises(accesses: list[tuple[int, bytes, int]]) -> None:
    """Every width at every place, and what is left is a state that can be restored."""
    present = {0: (START, BLOCK), 3: (START + BLOCK, BLOCK)}
    bench = Bench(present)
    bench.modules.plug(5, START + 2 * BLOCK, BLOCK)
    bench.modules.ask_for(0)
    for offset, data, length in accesses:
        data = data[: SIZE - offset]
        bench.modules.write(offset, data)
        assert len(bench.modules.read(offset, min(length, SIZE - offset))) == min(
            length, SIZE - offset
        )
    state = bench.modules.save()
    fresh = Bench(dict(bench.modules.present))
    fresh.modules.restore(state)
    assert fresh.modules.save() == state
    assert len(bench.ejected) + len(bench.modules.present) == 3


def test_a_state_of_another_machine_is_refused() -> None:
    """Modules are where the configuration says."""
    bench = Bench({0: (START, BLOCK)})
    with pytest.raises(StateError, match=r"ModulesState\.present"):
        bench.modules.restore(ModulesState((), (), ()))


# Tells by a letter what has come or is to go: fetches what came, takes what is to go as `ANSWER`.
GUEST = """
    PUT 's'
1:  movw $UP, %dx
    inb %dx, %al
    testb %al, %al
    jz 2f
    PUT 'U'
2:  movw $UP + 1, %dx
    inb %dx, %al
    testb %al, %al
    jz 1b
    movb %al, %bl
    ANSWER
    PUT 'D'
    jmp 1b
"""
EJECTS = "movw $UP + 2, %dx; movb %bl, %al; outb %al, %dx"
REFUSES = f"""
    movw ${PORT + SLOT + 25}, %dx
    movb $3, %al
    outb %al, %dx
    movw ${PORT + SLOT + 26}, %dx
    movb $0x84, %al  # under way
    outb %al, %dx
    movb $0x81, %al  # busy
    outb %al, %dx
"""


def kernel(path: Path, answer: str) -> str:
    source = GUEST.replace("ANSWER", answer).replace("UP", hex(PORT + UP))
    path.write_bytes(tiny_kernel(source))
    return str(path)


def modules(machine: Machine) -> tuple[tuple[int, int], ...]:
    """What the configuration says now."""
    return machine.config.memory_modules


def kept(machine: Machine) -> bytes:
    assert machine._board is not None
    return machine._board.memory.read(GuestAddress(START + 7), 4)


@pytest.mark.kvm
def test_modules_come_and_go_and_come_again(tmp_path: Path) -> None:
    """The first gap is filled; a snapshot and a reset have the same; what can't be is refused."""
    config = MachineConfig(
        kernel=kernel(tmp_path / "kernel", EJECTS), memory="32M", max_memory="544M"
    )
    with Machine(config) as machine:
        machine.console.expect("s", 30)
        assert [machine.add_memory(size) for size in ("128M", 256 * MIB)] == [0, 1]
        machine.console.expect("U[^U]*U", 30)
        board = machine._board
        assert board is not None
        shown = {slot.guest_phys_addr: slot.size for slot in board.vm.slots}
        assert shown[START] == BLOCK
        assert shown[START + BLOCK] == 2 * BLOCK
        board.memory.write(GuestAddress(START + 5), b"hers")
        machine.remove_memory(0)
        machine.console.expect("D", 30)
        assert modules(machine) == ((0, 0), (BLOCK, 2 * BLOCK))
        assert START not in {slot.guest_phys_addr for slot in board.vm.slots}
        assert board.memory.read(GuestAddress(START + 5), 4) == bytes(4)
        for size in ("256M", "100M", 0):
            with pytest.raises(ConfigError, match="memory"):
                machine.add_memory(size)
        for slot in (0, 2, -1, SLOTS):
            with pytest.raises(ConfigError, match="slots that have one are 1"):
                machine.remove_memory(slot)
        assert machine.add_memory("128M") == 0
        assert machine.add_memory("128M") == 2
        assert modules(machine) == (
            (0, BLOCK), (BLOCK, 2 * BLOCK), (3 * BLOCK, BLOCK),
        )  # fmt: skip
        board.memory.write(GuestAddress(START + 7), b"kept")
        machine.snapshot(tmp_path / "snapshot")
        machine.reset()
        machine.console.expect("s", 30)
        assert len(modules(machine)) == 3
        machine.remove_memory(2)
    for how in ("eager", "copy-on-write", "on-demand"):
        with Machine.restore(tmp_path / "snapshot", how) as machine:
            assert len(modules(machine)) == 3
            assert kept(machine) == b"kept"
            machine.remove_memory(1)
            assert modules(machine) == ((0, BLOCK), (0, 0), (3 * BLOCK, BLOCK))
    with (
        Machine(MachineConfig(kernel=str(config.kernel))) as machine,
        pytest.raises(ConfigError, match="max_memory"),
    ):
        machine.add_memory("128M")


@pytest.mark.kvm
@pytest.mark.parametrize("local", [False, True])
def test_modules_move_with_their_machine(tmp_path: Path, local: bool) -> None:
    """To another VMM, page by page or as they are; there they can be given up."""
    config = MachineConfig(
        kernel=kernel(tmp_path / "kernel", EJECTS), memory="32M", max_memory="544M",
        shared_memory=local,
    )  # fmt: skip
    with (
        Machine(config) as machine,
        Incoming(f"unix:{tmp_path / 'migration'}") as incoming,
    ):
        machine.console.expect("s", 30)
        assert machine.add_memory("256M") == 0
        machine.console.expect("U", 30)
        assert machine._board is not None
        machine._board.memory.write(GuestAddress(START + 7), b"kept")
        machine.migrate(incoming.address, local=local)
        with incoming.receive(30) as there:
            assert kept(there) == b"kept"
            assert modules(there) == ((0, 2 * BLOCK),)
            there.remove_memory(0)
            assert there.add_memory("512M") == 0
            there.console.expect("U", 30)


@pytest.mark.kvm
def test_a_guest_that_refuses_is_quoted(tmp_path: Path) -> None:
    """At once, with its status; and one that says nothing runs into the time limit."""
    config = MachineConfig(
        kernel=kernel(tmp_path / "kernel", REFUSES), memory="32M", max_memory="544M"
    )
    with Machine(config) as machine:
        machine.console.expect("s", 30)
        machine.add_memory("128M")
        with pytest.raises(HostError, match="0x81"):
            machine.remove_memory(0)
        machine.add_memory("128M")
        machine.console.expect("D", 30)
        machine.pause()
        with pytest.raises(TimeoutError):
            machine.remove_memory(1, timeout=0.1)


@pytest.mark.kvm
def test_14_devices_reach_memory_that_is_not_there_without_harm(tmp_path: Path) -> None:
    """What a guest lets a device write there is nobody's: the module comes empty and whole."""
    config = MachineConfig(
        kernel=kernel(tmp_path / "kernel", EJECTS), memory="32M", max_memory="160M"
    )
    with Machine(config) as machine:
        machine.console.expect("s", 30)
        board = machine._board
        assert board is not None
        board.memory.write(GuestAddress(START), b"stray")
        assert machine.add_memory("128M") == 0
        machine.console.expect("U", 30)
        machine.remove_memory(0)
        assert board.memory.read(GuestAddress(START), 5) == bytes(5)


@pytest.mark.parametrize(
    "fields",
    [
        {"max_memory": "100M"},
        {"max_memory": "257M"},
        {"max_memory": "3T"},
        {"memory_modules": [(0, BLOCK)]},
        {"max_memory": "512M", "memory_modules": [(0, BLOCK), (0, BLOCK)]},
        {"max_memory": "512M", "memory_modules": [(BLOCK, 2 * BLOCK)]},
        {"max_memory": "512M", "memory_modules": [(0, MIB)]},
        {"max_memory": "512M", "memory_modules": [(0,)]},
        {"max_memory": "512M", "memory_modules": [(0, "x")]},
        {"max_memory": "8G", "memory_modules": [(n * BLOCK, BLOCK) for n in range(17)]},
    ],
)
def test_configurations_that_can_not_be(fields: dict[str, object], tmp_path: Path) -> None:
    """The field is named."""
    path = tmp_path / "kernel"
    path.write_bytes(tiny_kernel("1: jmp 1b"))
    with pytest.raises(ConfigError, match=r"^(max_memory|memory_modules)"):
        MachineConfig.from_mapping({"kernel": str(path), **fields})


@pytest.mark.kvm
def test_slots_are_full_before_memory_is(tmp_path: Path) -> None:
    """One more module is refused until another has left."""
    config = MachineConfig(
        kernel=kernel(tmp_path / "kernel", EJECTS), memory="32M",
        max_memory=(32 + 128 * (SLOTS + 1)) * MIB,
    )  # fmt: skip
    with Machine(config) as machine:
        machine.console.expect("s", 30)
        assert [machine.add_memory(BLOCK) for _ in range(SLOTS)] == list(range(SLOTS))
        with pytest.raises(ConfigError, match=f"one of {SLOTS} slots, which are full"):
            machine.add_memory(BLOCK)
        machine.remove_memory(3)
        assert machine.add_memory(BLOCK) == 3


@pytest.mark.kvm
def test_the_control_socket_and_its_verb(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Add, remove, resize and list; power button and reset; what can't be is refused."""
    path = str(tmp_path / "api")
    config = MachineConfig(
        kernel=kernel(tmp_path / "kernel", EJECTS), memory="32M", max_memory="544M",
        devices=[Memory("1G")],
    )  # fmt: skip

    def said(*words: str) -> Any:
        assert main(["memory", path, *words]) == 0
        text = capsys.readouterr().out
        return json.loads(text) if text else None

    with Machine(config) as machine, Server(path, Control(machine)):
        machine.console.expect("s", 30)
        assert said("--add", "128M") == {"slot": 0}
        assert said("--add", "256M") == {"slot": 1}
        machine.resize_memory("64M", timeout=None)
        found = said()
        assert (found["memory"], found["modules"]) == (32 * MIB, {"0": BLOCK, "1": 2 * BLOCK})
        assert found["devices"]["memory0"]["requested_bytes"] == 64 * MIB
        assert said("--remove", "0") is None
        assert said()["modules"] == {"1": 2 * BLOCK}
        assert ask(path, "GET", "/metrics", {})["memory0"]["plugged_bytes"] == 0
        for words in (["--add", "100M"], ["--remove", "5"], ["--resize", "2G"]):
            assert main(["memory", path, *words]) == 1
        for method, target, body in (
            ("PUT", "/hotplug/memory/modules", {"size": 1 << 64}),
            ("PUT", "/hotplug/memory/modules", {"size": -BLOCK}),
            ("PATCH", "/hotplug/memory", {"requested_size": (1 << 64) + 2 * MIB}),
            ("PATCH", "/hotplug/memory", {"requested_size": 0, "id": "rng0"}),
            ("PUT", "/actions", {"action_type": "Explode"}),
            ("PUT", "/actions", {"action_type": "SendCtrlAltDel"}),
        ):
            with pytest.raises(HostError):
                ask(path, method, target, body)
        ask(path, "PUT", "/actions", {"action_type": "PowerButton"})
        ask(path, "PUT", "/actions", {"action_type": "Reset"})
        machine.console.expect("s", 30)
        assert machine.resets == 1
