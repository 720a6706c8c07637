"""Unmodified Debian kernels under `vmm run`: every value, and every pair that interacts."""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path
from subprocess import CompletedProcess

import attrs
import pytest
from lab.dialogue import Dialogue
from lab.direct import Direct
from lab.lab import Lab

from linux_loader import unpack_kernel
from vmm_reference.image.kernels import Kernel
from vmm_reference.layout import MIB, MMIO_GAP_START

pytestmark = [pytest.mark.linux, pytest.mark.timeout(600)]

GAP = MMIO_GAP_START // MIB


@attrs.frozen
class Boot:
    """One way to boot: what is booted, how it is entered, on what machine."""

    flavour: str
    image: str
    cpus: int
    memory: int
    disk: str = ""

    def __str__(self) -> str:
        words = (self.flavour, self.image, f"{self.cpus}cpu", f"{self.memory}M", self.disk)
        return "-".join(filter(None, words))


BOOTS = [
    Boot("cloud", "pvh", 1, 128),
    Boot("cloud", "linux64", 2, 256, "scratch"),
    Boot("cloud", "bzimage", 4, 256, "root"),
    Boot("cloud", "kaslr", 1, 256),
    Boot("cloud", "kaslr", 2, GAP + 1),
    Boot("cloud", "bzimage", 1, GAP - 1),
    Boot("cloud", "pvh", 4, GAP + 1, "scratch"),
    Boot("cloud", "linux64", 1, 6144, "root"),
    Boot("cloud", "pvh", 2, 6144),
    Boot("generic", "bzimage", 1, 256, "root"),
    Boot("generic", "pvh", 2, GAP - 1, "scratch"),
    Boot("generic", "linux64", 4, 6144),
]


@pytest.fixture(scope="session")
def images(
    kernels: dict[str, Kernel], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], Path]:
    """The kernel's file by flavour and kind: as Debian ships it, and the ELF file inside it."""
    folder = tmp_path_factory.mktemp("kernels")
    found: dict[tuple[str, str], Path] = {}
    for flavour, kernel in kernels.items():
        elf = folder / f"vmlinux-{flavour}"
        elf.write_bytes(unpack_kernel(kernel.vmlinuz))
        found |= {(flavour, kind): elf for kind in ("pvh", "linux64")}
        found |= {(flavour, kind): kernel.vmlinuz for kind in ("bzimage", "kaslr")}
    return found


def facts(output: str) -> dict[str, str]:
    """What the guest's init found out about its machine."""
    return dict(re.findall(r"^vmm-check: (\w+)=(\S*)", output, re.MULTILINE))


def said(result: CompletedProcess[str]) -> str:
    return f"status {result.returncode}\n{result.stdout[-3000:]}\n{result.stderr[-2000:]}"


def complaints(log: str) -> list[str]:
    """What the kernel has to say against our tables, topology, devices and interrupts."""
    words = (
        r"ACPI (BIOS )?(Error|Warning|Exception)|ACPI: Unable|Firmware (Bug|Warn)|BUG:|"
        r"lockup|topology|mismatch|nobody cared|virtio.*(fail|error|warn)|I/O error"
    )
    return [line for line in log.splitlines() if re.search(words, line)]


@pytest.mark.parametrize("boot", BOOTS, ids=str)
def test_an_unmodified_kernel_finds_the_machine_it_was_promised(
    boot: Boot,
    linux: Lab | Direct,
    vmm: str,
    images: dict[tuple[str, str], Path],
    initrds: dict[str, Path],
    root_disk: Path,
) -> None:
    """It boots, counts its CPUs and memory right, writes its disk, has entropy, powers off."""
    command: list[str | Path] = [
        vmm, "run", "--kernel", images[boot.flavour, boot.image], "--initrd", initrds[boot.flavour],
        "--cpus", str(boot.cpus), "--memory", f"{boot.memory}M",
    ]  # fmt: skip
    cmdline = "console=ttyS0 loglevel=5 vmm.check"  # warnings too, but no more
    if boot.image == "kaslr":
        command.append("--kaslr")
    elif boot.image in ("pvh", "linux64"):
        command += ["--protocol", boot.image]
    if boot.disk:
        command += ["--drive", str(root_disk)]
        where = "root=/dev/vda" if boot.disk == "root" else "vmm.scratch=/dev/vda"
        cmdline = f"{cmdline} {where}"
    result = linux.run([*command, "--cmdline", cmdline], timeout=300)
    assert result.returncode == 0, said(result)
    found = facts(result.stdout)
    assert found["result"] == "ok", said(result)
    assert found["cpus"] == str(boot.cpus)
    assert found["entropy"] == "ok"
    mebibytes = int(found["memory_kib"]) >> 10
    assert boot.memory * 0.94 - 48 <= mebibytes <= boot.memory, mebibytes
    assert complaints(result.stdout) == []
    if boot.image == "kaslr":
        assert "KASLR disabled" not in result.stdout
    if boot.disk == "scratch":
        data = root_disk.read_bytes()[: 256 << 10]
        assert hashlib.sha256(data).hexdigest() == found["disk_sha256"]
    elif boot.disk == "root":
        assert found["disk_sha256"] == file_digest(root_disk, "/vmm-check.bin")


def file_digest(image: Path, name: str) -> str:
    """The SHA-256 of a file inside an ext4 image, read by e2fsprogs on the host."""
    import subprocess

    debugfs = shutil.which("debugfs", path="/usr/sbin:/sbin:/usr/bin")
    assert debugfs is not None
    done = subprocess.run(
        [debugfs, "-R", f"cat {name}", str(image)], capture_output=True, check=True
    )
    return hashlib.sha256(done.stdout).hexdigest()


@pytest.mark.parametrize(
    ("words", "options", "status", "line"),
    [
        ("vmm.exit=reboot", ["--on-reset", "exit"], 4, "vmm: guest reset"),
        ("vmm.exit=reboot reboot=k", ["--on-reset", "exit"], 4, "vmm: guest reset"),
        ("vmm.exit=reboot reboot=t", ["--on-reset", "exit"], 5, "vmm: triple fault"),
        ("vmm.exit=panic", [], 3, "vmm: guest panic"),
    ],
    ids=["acpi-reset", "keyboard-reset", "triple-fault", "panic"],
)
def test_the_exit_status_tells_how_the_guest_ended(
    words: str,
    options: list[str],
    status: int,
    line: str,
    linux: Lab | Direct,
    vmm: str,
    kernels: dict[str, Kernel],
    initrds: dict[str, Path],
) -> None:
    """A reset, a triple fault and a panic have each their status and one line on stderr."""
    result = linux.run(
        [vmm, "run", "--kernel", kernels["cloud"].vmlinuz, "--initrd", initrds["cloud"],
         "--cmdline", f"console=ttyS0 quiet {words}", *options],
        timeout=300,
    )  # fmt: skip
    assert result.returncode == status, said(result)
    assert line in result.stderr


def test_a_kernel_and_a_disk_are_enough_and_outlive_a_reset(
    linux: Lab | Direct, vmm: str, kernels: dict[str, Kernel], root_disk: Path
) -> None:
    """What the documentation says first: a distribution's kernel boots to the root disk's shell.

    A guest that reboots comes up again and finds what it wrote; then it powers off.
    """
    command: list[str | Path] = [
        vmm, "run", "--kernel", kernels["cloud"].vmlinuz, "--cpus", "2", "--memory", "512M",
        "--drive", root_disk,
    ]  # fmt: skip

    prompt = r"root@\S+# "  # nothing that the kernel says looks so

    def dialogue(job: Dialogue) -> int:
        job.read_until(prompt, 120)
        job.write("echo root=$(grep -c ' / ext4 ' /proc/mounts) cpus=$(nproc)\n")
        job.read_until("root=1 cpus=2", 60)
        job.write("echo kept > /kept; sync; reboot -f\n")
        job.read_until(r"vmm-init: start", 120)
        job.read_until(prompt, 120)
        job.write("cat /kept; poweroff -f\n")
        job.read_until(r"\nkept", 120)
        return job.wait(120)

    assert linux.converse(command, dialogue, pty=True) == 0
