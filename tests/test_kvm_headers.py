"""kvm_ioctls' declarations beside the kernel's headers of every architecture.

Two oracles: Debian's headers with its (cross) compilers, and those that PyPI's ziglang brings for
every architecture, which are newer. The checker is C that does not compile if one number, size,
offset or constant differs.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvm_ioctls.constants import capability_names
from kvm_ioctls.table import EXITS, IOCTLS
from kvm_ioctls.table.checker import source
from kvm_ioctls.table.foreign import FOREIGN

DEBIAN = {"x86": "gcc", "arm64": "aarch64-linux-gnu-gcc", "riscv": "riscv64-linux-gnu-gcc",
          "none": "gcc"}  # fmt: skip
ZIG = {"x86": "x86_64", "arm64": "aarch64", "riscv": "riscv64", "s390": "s390x",
       "powerpc": "powerpc64le"}  # fmt: skip
LIST = Path(__file__).parents[1] / "packages" / "kvm-ioctls" / "tests" / "linux-ioctls.txt"
IOCTL = r"#define[ \t]+(KVM_\w+)[ \t]*(?:\\\n)?[ \t]+_IO[WR]*\("
CASES = [("Debian", each) for each in DEBIAN] + [("ziglang", each) for each in ZIG]


def compiler(oracle: str, architecture: str) -> list[str]:
    if oracle == "Debian":
        name = DEBIAN[architecture]
        if shutil.which(name) is None:
            pytest.skip(f"{name} is not here; `nox -s whole` installs it")
        return [name]
    if importlib.util.find_spec("ziglang") is None:
        pytest.skip("PyPI's ziglang is not in this environment; `nox -s whole` installs it")
    return [sys.executable, "-m", "ziglang", "cc", f"--target={ZIG[architecture]}-linux-gnu"]


@pytest.mark.parametrize(("oracle", "architecture"), CASES)
def test_declarations_are_the_headers(oracle: str, architecture: str, tmp_path: Path) -> None:
    """Every number, size, offset and constant of a header is ours; and a wrong one is seen."""
    command = [*compiler(oracle, architecture), "-c", "-o", str(tmp_path / "check.o")]
    check = source(architecture)
    least = 800 if architecture in ("x86", "arm64", "riscv") else 8
    assert check.count("_Static_assert") > least
    file = tmp_path / "check.c"
    file.write_text(check)
    done = subprocess.run([*command, file], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-3000:]
    name = {"s390": "KVM_S390_IRQ", "powerpc": "KVM_PPC_GET_CPU_CHAR",
            "none": "KVM_SET_MEMORY_ALIAS"}.get(architecture, "KVM_RUN")  # fmt: skip
    file.write_text(re.sub(rf"({name}\)?) == (\w+)", r"\1 == 1 + \2", check))
    done = subprocess.run([*command, file], capture_output=True, text=True, timeout=100)
    assert done.returncode != 0
    assert name in done.stderr


def headers() -> dict[str, str]:
    """The generic header of each oracle that is here, by its path."""
    paths = [Path("/usr/include/linux/kvm.h")]
    found = importlib.util.find_spec("ziglang")
    if found is not None and found.origin is not None:
        lib = Path(found.origin).parent / "lib" / "libc" / "include" / "any-linux-any"
        paths.append(lib / "linux" / "kvm.h")
    return {str(path): path.read_text() for path in paths if path.exists()}


def test_no_ioctl_exit_or_capability_of_a_header_is_missing() -> None:
    """Whatever a header declares has a row, whichever architecture it belongs to."""
    seen = headers()
    if not seen:
        pytest.skip("no linux/kvm.h here")
    rows = {row.name for row in (*IOCTLS, *FOREIGN)}
    kinds = {"IO_IN", "IO_OUT", "HYPERV_SYNIC", "HYPERV_HCALL", "HYPERV_SYNDBG", "XEN_HCALL"}
    exits = {row.name for row in EXITS} | kinds
    for path, text in seen.items():
        ioctls = re.findall(IOCTL, text)
        assert len(ioctls) > 150, path
        assert set(ioctls) <= rows, path
        numbers = re.findall(r"#define[ \t]+KVM_EXIT_(\w+)[ \t]+\d+\b", text)
        assert set(numbers) <= exits, path
        capabilities = re.findall(r"#define[ \t]+KVM_CAP_(\w+)[ \t]+\d+", text)
        assert len(capabilities) > 180, path
        assert set(capabilities) <= set(capability_names()), path


def test_the_committed_list_is_of_the_version_that_it_names() -> None:
    """Beside the header of that very version, the list of ioctls has each of them, and no other."""
    first, *names = LIST.read_text().splitlines()
    named = re.findall(r"Linux ([\d.]+),", first)
    found = importlib.util.find_spec("ziglang")
    if found is None or found.origin is None:
        pytest.skip("PyPI's ziglang is not in this environment; `nox -s whole` installs it")
    folder = Path(found.origin).parent / "lib" / "libc" / "include" / "any-linux-any" / "linux"
    version = (folder / "version.h").read_text()
    parts = [re.findall(rf"LINUX_VERSION_{part} (\d+)", version)[0]
             for part in ("MAJOR", "PATCHLEVEL", "SUBLEVEL")]  # fmt: skip
    if named != [".".join(parts)]:
        pytest.skip(f"the list is of Linux {named[0]}, ziglang's header of {'.'.join(parts)}")
    text = (folder / "kvm.h").read_text()
    assert names == sorted(set(re.findall(IOCTL, text)))
