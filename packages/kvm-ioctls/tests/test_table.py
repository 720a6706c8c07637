"""The one table: whole, the same as the methods, the extension, its types and the documentation."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import kvm_ioctls
from kvm_ioctls import Kvm, Vcpu, Vm, riscv64
from kvm_ioctls._native import lib
from kvm_ioctls.device import Device
from kvm_ioctls.table import EXITS, HOST, IOCTLS, Ioctl, find, layout
from kvm_ioctls.table.checker import source
from kvm_ioctls.table.foreign import FOREIGN
from kvm_ioctls.table.parity import OBJECTS, render

CLASSES = {"kvm": Kvm, "vm": Vm, "vcpu": Vcpu, "device": Device}
# Sizes that the kernel's documentation (virt/kvm/api.rst) or headers state in words.
SIZES = {"kvm_lapic_state": 1024, "kvm_irqchip": 520, "kvm_fpu": 416, "kvm_xsave": 4096,
         "kvm_nested_state": 128, "kvm_pit_config": 64, "kvm_enable_cap": 104}  # fmt: skip


def test_no_ioctl_of_linux_is_missing() -> None:
    """Each name of our list of Linux 7.2's header has a row, and none has two."""
    first, *names = (Path(__file__).parent / "linux-ioctls.txt").read_text().splitlines()
    assert "Linux 7.2.0" in first
    assert len(names) == len(set(names)) > 150
    rows = [row.name for row in (*IOCTLS, *FOREIGN)]
    assert set(names) <= set(rows)
    assert len(rows) == len(set(rows))


def test_no_ioctl_of_this_system_is_missing() -> None:
    """Each ioctl that this machine's own header declares has a row."""
    header = Path("/usr/include/linux/kvm.h")
    if not header.exists():
        pytest.skip("no linux/kvm.h here: linux-libc-dev has it")
    pattern = r"#define[ \t]+(KVM_\w+)[ \t]*(?:\\\n)?[ \t]+_IO[WR]*\("
    names = re.findall(pattern, header.read_text())
    assert len(names) > 100
    assert set(names) <= {row.name for row in (*IOCTLS, *FOREIGN)}


@pytest.mark.parametrize("row", IOCTLS, ids=lambda row: row.name)
def test_every_row_has_its_method(row: Ioctl) -> None:
    """The method has the ioctl's name, on every kind of object, and its docstring names both."""
    for kind in row.fd.split():
        if kind == "kvm" and row.name == "KVM_GET_DEVICE_ATTR":
            assert hasattr(Kvm, row.method)
        name = {"KVM_RUN": "run", "KVM_SET_XSAVE": "set_xsave"}.get(row.name, row.method)
        method = getattr(CLASSES[kind], name)
        assert row.name in (method.__doc__ or ""), f"{OBJECTS[kind]}.{name}"
        capability = row.capability
        if capability and kind == row.fd.split()[-1] and capability not in _GENERAL:
            assert f"KVM_CAP_{capability}" in method.__doc__, f"{OBJECTS[kind]}.{name}"
    assert getattr(lib, row.name) == row.request


# Capabilities that every x86 kernel of the last fifteen years has need no word in each docstring.
_GENERAL = ("IRQCHIP", "USER_MEMORY", "SET_TSS_ADDR", "SET_IDENTITY_MAP_ADDR", "SET_BOOT_CPU_ID",
            "CHECK_EXTENSION_VM", "COALESCED_MMIO", "DEVICE_CTRL", "ENABLE_CAP",
            "GET_MSR_FEATURES", "ARM_SVE", "TSC_CONTROL", "GET_TSC_KHZ")  # fmt: skip


def test_numbers_are_found_again() -> None:
    """An error finds the row by number; a number of this machine's architecture comes first."""
    for row in IOCTLS:
        found = find(row.request)
        assert found is not None
        assert found.name == row.name or found.on(HOST)
    assert find(0x1234) is None


def test_sizes_in_words() -> None:
    """Sizes of structures that documents state, beside the checker's."""
    for name, size in SIZES.items():
        assert layout(name).size == size, name
    with pytest.raises(KeyError, match="no member"):
        layout("kvm_regs").offset("r99")


@pytest.mark.parametrize("architecture", ["x86", "arm64", "riscv", "s390", "powerpc", "none"])
def test_the_checker_agrees_with_this_system(architecture: str, tmp_path: Path) -> None:
    """Its C is whole for every architecture, and compiles for this one; a wrong number does not."""
    check = source(architecture)
    assert check.count("#if") == check.count("#endif") > 3
    wrong = check.replace("KVM_RUN == 0xae80UL", "KVM_RUN == 0xae81UL")
    if architecture not in ("x86", "none"):
        return
    if shutil.which("gcc") is None or not Path("/usr/include/linux/kvm.h").exists():
        pytest.skip("here is no gcc, or no linux/kvm.h")
    for text, good in ((check, True), (wrong, wrong == check)):
        file = tmp_path / "check.c"
        file.write_text(text)
        command = ["gcc", "-c", "-o", str(tmp_path / "check.o"), str(file)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=50)
        assert (done.returncode == 0) == good, done.stderr
        assert good or "KVM_RUN" in done.stderr


def test_ids_of_riscvs_registers() -> None:
    """As api.rst, 4.68, writes them; names that are none are refused."""
    assert riscv64.config_reg("isa") == 0x8030_0000_0100_0000
    assert riscv64.core_reg("pc") == 0x8030_0000_0200_0000
    assert riscv64.core_reg("mode") == 0x8030_0000_0200_0020
    assert riscv64.csr_reg("sstatus") == 0x8030_0000_0300_0000
    assert riscv64.csr_reg("siselect", "aia") == 0x8030_0000_0301_0000
    assert riscv64.timer_reg("state") == 0x8030_0000_0400_0003
    assert riscv64.isa_ext_reg(5) == 0x8030_0000_0700_0005
    assert riscv64.sbi_ext_reg(1) == 0x8030_0000_0800_0001
    for ask in (riscv64.core_reg, riscv64.csr_reg):
        with pytest.raises(KeyError):
            ask("no_such")


def test_the_types_of_the_extension_are_its_names() -> None:
    """What _native.pyi declares is what the extension has, and nothing else."""
    source = (Path(kvm_ioctls.__file__).parent / "_native.pyi").read_text()
    part = source[source.index("class lib:") :]
    declared = set(re.findall(r"def (\w+)\(", part)) | set(
        re.findall(r"^    (\w+): int", part, re.M)
    )
    assert declared == {name for name in dir(lib) if not name.startswith("_")}


def test_the_documentation_is_the_table() -> None:
    """The committed tables are what the declarations give (only where the repository is)."""
    file = Path(__file__).parents[1] / "docs" / "tables.md"
    if not file.exists():
        pytest.skip("the tests run outside of the repository")
    assert file.read_text() == render(), f"run python -m kvm_ioctls.table.parity {file}"


def test_every_public_name_is_there() -> None:
    """`__all__` of the package and of its lazy modules is what can be had from them."""
    for module in (kvm_ioctls, kvm_ioctls.exits, kvm_ioctls.state):
        for name in module.__all__:
            assert getattr(module, name) is not None
        with pytest.raises(AttributeError):
            _ = module.no_such_name
    assert {row.reason for row in EXITS} == set(range(44))
