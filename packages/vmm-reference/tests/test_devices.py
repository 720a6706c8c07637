"""The registry of devices, and the three ways to configure one."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import pytest

from vmm_reference.board import Board
from vmm_reference.config import Drive, MachineConfig
from vmm_reference.deviceconfig import (
    DeviceConfig,
    device_from_mapping,
    parse_device,
    to_mapping,
)
from vmm_reference.devices import REGISTRY, config_class, factory
from vmm_reference.devices.balloon import Balloon
from vmm_reference.devices.console.model import Console, PortSpec
from vmm_reference.devices.net.model import Net
from vmm_reference.devices.rng import Entropy
from vmm_reference.devices.vsock.model import Vsock
from vmm_reference.errors import ConfigError
from vmm_reference.machine import Machine
from vmm_reference.testing import Bench, every_device


@pytest.mark.parametrize("kind", REGISTRY)
def test_each_line_of_the_registry_names_what_is_there(kind: str) -> None:
    """The class is a device's configuration of that kind, and the factory takes one."""
    cls = config_class(kind)
    assert issubclass(cls, DeviceConfig)
    assert cls.kind == kind
    assert list(inspect.signature(factory(kind)).parameters) == ["config", "wiring"]
    known = {field.name for field in attrs.fields(cls)}
    assert {cls.positional, *cls.flags.values()} - {""} <= known


def test_a_device_is_written_and_read_back(tmp_path: Path) -> None:
    """`to_mapping` is the inverse of `from_mapping`, for devices and for machines."""
    device = Drive("a,b.img", read_only=True, id="root", slot=7)
    assert device_from_mapping(to_mapping(device), "x") == device
    kernel, image = tmp_path / "vmlinux", tmp_path / "disk.img"
    kernel.write_bytes(b"\x7fELF" + bytes(60))
    image.write_bytes(bytes(512))
    config = MachineConfig(
        kernel=str(kernel),
        drives=[Drive(str(image))],
        devices=[Entropy(id="noise"), Drive(str(image), read_only=True)],
        transport="pci",
    )
    assert MachineConfig.from_mapping(config.to_mapping()) == config
    assert list(config.named_devices()) == ["drive0", "noise", "drive1"]


def test_names_are_given_once(tmp_path: Path) -> None:
    """A device without an id gets the next free name of its kind, whatever ids are given."""
    kernel = tmp_path / "vmlinux"
    kernel.write_bytes(b"\x7fELF" + bytes(60))
    devices = (Entropy(), Entropy(id="rng0"), Entropy())
    named = MachineConfig(kernel=str(kernel), devices=devices).named_devices()
    assert list(named) == ["rng1", "rng0", "rng2"]


@pytest.mark.parametrize(
    ("text", "device"),
    [
        ("rng", Entropy()),
        ("rng,slot=3,id=x", Entropy(slot=3, id="x")),
        ("drive,root.img", Drive("root.img")),
        ("drive,a,b.img,ro", Drive("a,b.img", read_only=True)),
        ("drive,path=a.img,read_only=false", Drive("a.img")),
    ],
)
def test_the_command_lines_form(text: str, device: DeviceConfig) -> None:
    """A kind, a first word, fields and flags."""
    assert parse_device(text) == device


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("", "device"),
        ("toaster", "device"),
        ("rng,loud", "rng"),
        ("rng,slot=many", "rng.slot"),
        ("drive", "drive.path"),
        ("drive,a.img,read_only=maybe", "drive.read_only"),
    ],
)
def test_a_word_that_means_nothing_is_named(text: str, field: str) -> None:
    """One ConfigError that says where."""
    with pytest.raises(ConfigError) as caught:
        parse_device(text)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("table", "field"),
    [
        ("drive", "devices[0]"),
        ({}, "devices[0].kind"),
        ({"kind": "toaster"}, "devices[0].kind"),
        ({"kind": ["rng"]}, "devices[0].kind"),
        ({"kind": "rng", "volume": 11}, "devices[0]"),
        ({"kind": "drive"}, "devices[0].path"),
    ],
)
def test_a_table_that_is_no_device_is_named(table: object, field: str) -> None:
    """One ConfigError that says where."""
    with pytest.raises(ConfigError) as caught:
        device_from_mapping(table, "devices[0]")
    assert caught.value.field == field


# What every device has to have.

STATELESS = {"debug-console", "debug-exit"}
"""Kinds that have nothing to save: each access is for itself."""


@pytest.fixture(params=["mmio", "pci"])
def full(
    request: pytest.FixtureRequest, config: Callable[..., MachineConfig], tmp_path: Path
) -> Iterator[Machine]:
    """A machine with everything that there is."""
    wanted = config(
        "1: hlt; jmp 1b", transport=request.param, devices=every_device(tmp_path),
        max_cpus=4, max_memory="160M",
    )  # fmt: skip
    with Machine(wanted) as machine:
        yield machine


def board_of(machine: Machine) -> Board:
    assert machine._board is not None
    return machine._board


@pytest.mark.kvm
def test_every_device_counts_what_it_does(full: Machine) -> None:
    """Each has counters with names of their own, and so has each part of the machine."""
    counters = full.metrics()
    names = [*board_of(full).legacy.parts(), "cpus", "modules", *full.config.named_devices()]
    common = {"refused", "needs_reset"}
    for name in names:
        own = {key: value for key, value in counters[name].items() if key not in common}
        assert own or "refused" in counters[name], name
        assert all(type(value) is int for value in own.values()), name


@pytest.mark.kvm
def test_every_device_is_saved_and_restored(full: Machine) -> None:
    """Each part takes what it gave, and gives the same again."""
    board = board_of(full)
    full.pause()
    parts = board.parts()
    for name, device in full.config.named_devices().items():
        kept = [part for part in parts if part == name or part.startswith(f"{name}-")]
        assert bool(kept) is (device.kind not in STATELESS), name
    before = {name: part.save() for name, part in parts.items()}
    for name in before.keys() - {"vmgenid0"}:  # which is to become another one
        parts[name].restore(before[name])
    after = {name: part.save() for name, part in parts.items()}
    for name in before.keys() - {"rtc", "power"}:  # time passes; the generation device has told
        assert after[name] == before[name], name
    full.resume()


@pytest.mark.kvm
def test_a_reset_leaves_nothing_of_any_device(full: Machine) -> None:
    """All parts are made anew, as they were when the machine was switched on."""
    board = board_of(full)
    full.pause()
    before = {name: (part, part.save()) for name, part in board.parts().items()}
    for name, (part, _) in before.items():
        if hasattr(part, "write") and name not in ("power", "system-control", "i8042", "pvpanic"):
            for offset in range(16):
                part.write(offset, b"\0\0\0\0")
    full.resume()
    resets = full.resets
    full.reset()
    for _ in range(3000):
        if full.resets > resets and full._board is not board:
            break
        time.sleep(0.01)
    full.pause()
    after = board_of(full).parts()
    assert after.keys() == before.keys()
    for name, (part, state) in before.items():
        assert after[name] is not part, name
        if name not in ("rtc", "vmgenid0"):
            assert after[name].save() == state, name


class NoLink:
    """A cable that leads nowhere."""

    vnet_header, offloads, queues = False, 0, 1

    def send(self, queue: int, pieces: Sequence[bytes | memoryview]) -> bool:
        return True

    def receive(self, queue: int) -> bytes | None:
        return None

    def set_offloads(self, offloads: int) -> None:
        pass

    def set_queues(self, pairs: int) -> None:
        pass


@pytest.mark.parametrize(
    ("make", "number"),
    [
        (Balloon, 0),
        (lambda: Console([PortSpec(console=False, name="port")], lambda port, data: None), 3),
        (lambda: Net(NoLink(), b"\2\0\0\0\0\1"), 1),
        (lambda: Vsock(3, lambda port: None), 0),
        (lambda: Vsock(3, lambda port: None), 1),
    ],
    ids=["balloon", "console", "net", "vsock-rx", "vsock-tx"],
)
def test_chains_that_another_maker_of_a_state_had_in_flight_go_back(
    make: Callable[[], Any], number: int
) -> None:
    """A driver gets all that it lent, once, and can go on, although this device keeps none."""
    bench = Bench(make())
    head = bench.queue(number).add([bytes(64)], [])
    assert bench.device.queues[number].pop(bench.memory) is not None
    moved = bench.moved_to(make())
    used = moved.queue(number).reap()
    assert [(buffer.head, buffer.length) for buffer in used] == [(head, 0)]
    assert not moved.device.queues[number].in_flight
    moved.queue(number).add([bytes(64)], [])
    moved.driver.kick(number)
    assert len(moved.queue(number).reap()) == (number != 0 or make is Balloon)
    moved.close()
    bench.close()
