"""The registry of devices, and the three ways to configure one."""

from __future__ import annotations

import inspect
from pathlib import Path

import attrs
import pytest

from vmm_reference.config import Drive, MachineConfig
from vmm_reference.deviceconfig import (
    DeviceConfig,
    device_from_mapping,
    parse_device,
    to_mapping,
)
from vmm_reference.devices import REGISTRY, config_class, factory
from vmm_reference.devices.rng import Entropy
from vmm_reference.errors import ConfigError


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
