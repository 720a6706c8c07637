"""A machine's configuration is checked whole before anything starts."""

import contextlib
import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm_reference.config import MAX_DEVICES, Drive, MachineConfig, parse_size
from vmm_reference.devices.debug_console import DebugLog
from vmm_reference.devices.rng import Entropy
from vmm_reference.errors import ConfigError


@pytest.fixture
def kernel(tmp_path: Path) -> str:
    path = tmp_path / "vmlinux"
    path.write_bytes(b"\x7fELF" + bytes(60))
    return str(path)


def test_a_kernel_is_enough(kernel: str) -> None:
    """Everything but the kernel has a default."""
    config = MachineConfig(kernel=kernel)
    assert (config.cpus, config.memory, config.drives) == (1, 256 << 20, ())


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"cpus": 0}, "cpus"),
        ({"cpus": 10_000}, "cpus"),
        ({"cpus": True}, "cpus"),
        ({"cpus": "two"}, "cpus"),
        ({"memory": 1}, "memory"),
        ({"memory": "1"}, "memory"),
        ({"memory": "lots"}, "memory"),
        ({"memory": (256 << 20) + 1}, "memory"),
        ({"memory": 1 << 60}, "memory"),
        ({"memory": True}, "memory"),
        ({"initrd": "/no/such/file"}, "initrd"),
        ({"initrd": "/"}, "initrd"),
        ({"initrd": "a\0b"}, "initrd"),
        ({"initrd": b"bytes"}, "initrd"),
        ({"cmdline": "a\nb"}, "cmdline"),
        ({"cmdline": "\xe9"}, "cmdline"),
        ({"on_reset": "explode"}, "on_reset"),
        ({"protocol": "efi"}, "protocol"),
        ({"kaslr": "yes"}, "kaslr"),
        ({"devices": [DebugLog("")]}, "devices[0].path"),
        ({"firmware": "/no/such/file"}, "firmware"),
        ({"drives": ["root.img"]}, "drives[0]"),
        ({"drives": [Drive("/no/such/image")]}, "drives[0]"),
        ({"drives": [Drive("/dev/null")]}, "drives[0]"),
        ({"devices": ["rng"]}, "devices[0]"),
        ({"devices": [Entropy()] * (MAX_DEVICES["mmio"] + 1)}, "devices"),
        ({"devices": [Entropy()] * (MAX_DEVICES["pci"] + 1), "transport": "pci"}, "devices"),
        ({"devices": [Entropy(id="a b")]}, "devices[0].id"),
        ({"devices": [Entropy(id="a"), Entropy(id="a")]}, "devices"),
        ({"devices": [Entropy(slot=0)]}, "devices[0].slot"),
        ({"devices": [Entropy(slot=4), Entropy(slot=4)]}, "devices"),
        ({"transport": "isa"}, "transport"),
    ],
)
def test_each_mistake_is_named(kernel: str, change: dict[str, object], field: str) -> None:
    """A wrong value gives one ConfigError with the field, on one line."""
    with pytest.raises(ConfigError) as caught:
        MachineConfig(kernel=kernel, **change)  # type: ignore[arg-type]
    assert caught.value.field == field
    assert "\n" not in str(caught.value)


def test_what_is_no_kernel_is_refused(tmp_path: Path) -> None:
    """A directory, a text file, an empty file and a missing one are each told apart."""
    text = tmp_path / "kernel.txt"
    text.write_text("this is not a kernel\n")
    empty = tmp_path / "empty"
    empty.touch()
    for path, rule in (
        (tmp_path, "directory"),
        (text, "neither"),
        (empty, "neither"),
        (tmp_path / "missing", "No such file"),
    ):
        with pytest.raises(ConfigError, match=rule) as caught:
            MachineConfig(kernel=str(path))
        assert caught.value.field == "kernel"


def test_an_image_has_whole_sectors(kernel: str, tmp_path: Path) -> None:
    """A raw image of a size that is no multiple of 512, or of none, is refused with its size."""
    image = tmp_path / "disk.img"
    for size, good in ((0, False), (511, False), (512, True), (513, False), (1 << 20, True)):
        image.write_bytes(bytes(size))
        if good:
            assert MachineConfig(kernel=kernel, drives=[Drive(str(image))]).drives
        else:
            with pytest.raises(ConfigError, match=str(size)):
                MachineConfig(kernel=kernel, drives=[Drive(str(image))])


def test_tables_hold_known_keys_only(kernel: str, tmp_path: Path) -> None:
    """A key that is not known is refused, at the top and in a drive."""
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(512))
    good = {"kernel": kernel, "drives": [f"{image},ro", {"path": str(image), "read_only": True}]}
    assert MachineConfig.from_mapping(good).drives == (Drive(str(image), True),) * 2
    for bad, value in (
        ({"kernel": kernel, "cpu": 2}, "cpu"),
        ({"kernel": kernel, "drives": [{"path": str(image), "ro": True}]}, "ro"),
        ({"kernel": kernel, "drives": [{"path": 7}]}, 7),
        ({"kernel": kernel, "drives": [7]}, 7),
        ({"kernel": kernel, "drives": "root.img"}, "root.img"),
        ({"kernel": kernel, "drives": [{"path": "x", "read_only": 1}]}, 1),
        ({}, "(none)"),
    ):
        with pytest.raises(ConfigError) as caught:
            MachineConfig.from_mapping(bad)
        assert caught.value.value == value


@given(st.integers(0, 1 << 20), st.sampled_from(["", "K", "M", "G", "T"]), st.booleans())
def test_sizes_are_powers_of_1024(number: int, unit: str, lower: bool) -> None:
    """Every suffix, in either case, with or without iB, multiplies by its power."""
    factor = 1024 ** ["", "K", "M", "G", "T"].index(unit)
    for suffix in (unit, unit + "B", unit + "iB"):
        text = f"{number}{suffix}"
        assert parse_size(text.lower() if lower else text) == number * factor


@given(st.text(alphabet=string.printable))
def test_other_texts_are_no_sizes(text: str) -> None:
    """Whatever is not digits and a suffix is refused, never guessed."""
    with contextlib.suppress(ConfigError):
        assert parse_size(text) >= 0
        assert text.strip()[0].isdigit()


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"cpus": 4, "threads": 3}, "threads"),
        ({"cpus": 6, "threads": 3}, "threads"),
        ({"cpus": 6, "sockets": 2}, "sockets"),
        ({"cpus": 4, "sockets": 3}, "sockets"),
        ({"cpus": 4, "threads": 0}, "threads"),
        ({"cpus": 2, "max_cpus": 6, "sockets": 2}, "sockets"),
    ],
)
def test_topologies_that_can_not_be_numbered(
    fields: dict[str, int], field: str, kernel: str
) -> None:
    """The field is named; what can be, is."""
    with pytest.raises(ConfigError, match=field):
        MachineConfig(kernel=kernel, **fields)  # type: ignore[arg-type]
    for good in ((3, 3, 1), (6, 1, 3), (8, 2, 2), (12, 2, 3), (254, 1, 127)):
        cpus, threads, sockets = good
        MachineConfig(kernel=kernel, cpus=cpus, threads=threads, sockets=sockets)
