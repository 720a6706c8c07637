"""Firmware in the machine: it finds a disk, loads GRUB from it, and that loads Linux."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from boot_disk import build_boot_disk
from lab.direct import Direct
from lab.lab import Lab

from vmm_reference.image.initramfs import guest_initramfs
from vmm_reference.image.kernels import Kernel
from vmm_reference.image.packages import fetch_package

pytestmark = [pytest.mark.linux, pytest.mark.timeout(600)]


@pytest.fixture(scope="session")
def boot_disk(kernels: dict[str, Kernel], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A disk with GRUB and Debian's cloud kernel."""
    image = tmp_path_factory.mktemp("disk") / "boot.img"
    build_boot_disk(
        image,
        kernel=kernels["cloud"].vmlinuz,
        initrd=guest_initramfs(kernels["cloud"]),
        cmdline="console=ttyS0 loglevel=7 vmm.check",
    )
    return image


@pytest.fixture
def disk(boot_disk: Path, share: Path, tmp_path: Path) -> Path:
    """A copy of it that a guest may write."""
    return Path(shutil.copy(boot_disk, share / f"{tmp_path.name}-boot.img"))


def checked(output: str, platform: str) -> str:
    """What Linux said, after GRUB of that platform had loaded it and its own check passed."""
    text = output.replace("\r", "")
    assert f"GRUB on {platform}" in text, text[-3000:]
    assert "Command line: BOOT_IMAGE=/vmlinuz console=ttyS0 loglevel=7 vmm.check" in text
    assert "vmm-check: result=ok" in text, text[-3000:]
    return text


@pytest.mark.parametrize(
    ("image", "transport"),
    [
        ("bios-microvm.bin", "mmio"),
        pytest.param("bios-256k.bin", "pci", marks=pytest.mark.soak),
    ],
    ids=["mmio", "pci"],
)
def test_seabios_boots_grub_and_linux(
    image: str, transport: str, linux: Lab | Direct, vmm: str, disk: Path
) -> None:
    """From the first sector of a virtio disk; Linux finds memory, CPUs and ACPI as they are."""
    bios = fetch_package("seabios").root / "usr/share/seabios" / image
    result = linux.run(
        [vmm, "run", "--firmware", bios, "--drive", disk, "--memory", "256M", "--cpus", "2",
         "--transport", transport],
        timeout=400,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
    text = checked(result.stdout, "pc")
    assert "SeaBIOS (version " in text
    assert "vmm-check: cpus=2" in text
    assert re.search(r"\[vda\] \d+ 512-byte logical blocks", text)
    assert "ACPI: PM-Timer IO Port: 0x608" in text


# OVMF ends its interrupts by writing CR8, which QEMU's emulation of SVM can't bear while another
# one waits (see docs/lab.md). With a hundredth of its ticks none does.
SLOW_TIMER = "echo 1000000 >/sys/module/kvm/parameters/min_timer_period_us"
USUAL_TIMER = "echo 200 >/sys/module/kvm/parameters/min_timer_period_us"


@pytest.mark.soak  # where it is too slow all the same, the lab dies
def test_ovmf_comes_to_its_shell_and_boots_the_same_disk(linux: Lab | Direct, disk: Path) -> None:
    """The shell answers on the serial port; with the disk it loads GRUB by EFI, and that Linux."""
    folder = fetch_package("ovmf").root / "usr/share/OVMF"
    if isinstance(linux, Lab):
        linux.run(["sh", "-c", SLOW_TIMER], timeout=60)
    script = Path(__file__).parent / "guests" / "ovmf.py"
    command = [sys.executable, script, folder / "OVMF_CODE.fd", folder / "OVMF_VARS.fd", disk]
    done = linux.run([str(word) for word in command], timeout=400)
    if isinstance(linux, Lab):
        linux.run(["sh", "-c", USUAL_TIMER], timeout=60)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    print(done.stderr, file=sys.stderr)
    found = json.loads(done.stdout)
    assert found["shell"].startswith("UEFI v2.")
    assert found["off"]
    text = checked(found["output"], "efi")
    assert "efi: EFI v2." in text
    assert "vmm-check: cpus=1" in text
