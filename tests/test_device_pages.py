"""Every device has a page, which names its options and counters, so that a new one can't forget."""

from __future__ import annotations

import re
from pathlib import Path

import attrs
import pytest

from kvm_ioctls.testing import assemble
from vmm_reference.config import MachineConfig
from vmm_reference.deviceconfig import DeviceConfig
from vmm_reference.devices import REGISTRY, config_class
from vmm_reference.machine import Machine
from vmm_reference.testing import every_device, tiny_kernel

DOCS = Path(__file__).parents[1] / "packages/vmm-reference/docs"
SECTIONS = ("What the guest sees", "State", "Counters", "Limits")
WITH_ANOTHER = {"system-control": "i8042"}  # pages of two


def page(name: str) -> str:
    """The page of a device."""
    return (DOCS / "devices" / f"{WITH_ANOTHER.get(name, name)}.md").read_text()


def words(text: str) -> list[re.Pattern[str]]:
    """What stands there as code; a star stands for any name."""
    found = re.findall(r"`([^`\n]+)`", text)
    return [re.compile(re.escape(word).replace(r"\*", r"\w+")) for word in found]


def counted(machine: Machine) -> dict[str, dict[str, int]]:
    """Counters of a running machine, by the name of a page."""
    kinds = {name: device.kind for name, device in machine.config.named_devices().items()}
    return {kinds.get(name, name): counters for name, counters in machine.metrics().items()}


@pytest.mark.parametrize("kind", REGISTRY)
def test_a_page_names_every_option(kind: str) -> None:
    """With what the guest sees, what is saved, what is counted, and the limits."""
    text = page(kind)
    for section in ("Options", *SECTIONS):
        assert f"\n## {section}\n" in text, section
    known = {field.name for field in attrs.fields(DeviceConfig)}
    options = {field.name for field in attrs.fields(config_class(kind))} - known
    for option in options:
        assert any(word.fullmatch(option) for word in words(text)), option


@pytest.mark.kvm
@pytest.mark.parametrize("transport", ["mmio", "pci"])
def test_a_page_names_every_counter(transport: str, tmp_path: Path) -> None:
    """Those that a machine with everything has; what all devices have is told once."""
    kernel = tmp_path / "kernel"
    kernel.write_bytes(tiny_kernel("1: hlt; jmp 1b"))
    config = MachineConfig(
        kernel=str(kernel), memory="32M", transport=transport, devices=every_device(tmp_path),
        max_cpus=4, max_memory="160M",
    )  # fmt: skip
    with Machine(config) as machine:
        check(counted(machine))


@pytest.mark.kvm
def test_a_page_names_every_counter_of_what_firmware_has(tmp_path: Path) -> None:
    """A machine with flash, and an image that stands still."""
    code = assemble("1: hlt; jmp 1b", bits=16)
    firmware, variables = tmp_path / "bios", tmp_path / "variables"
    image = bytearray(0x10000)
    image[:0x20] = code.ljust(0x20, b"\x90")
    image[0xFFF0:0xFFF3] = b"\xe9" + (0x10000 - 0xFFF3).to_bytes(2, "little")
    firmware.write_bytes(image)
    variables.write_bytes(b"\xff" * 0x2000)
    config = MachineConfig(
        firmware=str(firmware), variables=str(variables), memory="32M", transport="pci"
    )
    with Machine(config) as machine:
        check(counted(machine))


def check(counters: dict[str, dict[str, int]]) -> None:
    """Each counter is on its device's page, or on that of all."""
    for_all = words((DOCS / "devices.md").read_text())
    for name, values in counters.items():
        text = "" if name == "bus" else page(name)
        if text:
            assert all(f"\n## {section}\n" in text for section in SECTIONS), name
        known = [*for_all, *words(text)]
        for counter in values:
            assert any(word.fullmatch(counter) for word in known), f"{name}: {counter}"
