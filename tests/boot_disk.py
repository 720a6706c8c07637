"""A disk that both kinds of firmware boot: GRUB in its first sectors and in its EFI partition.

Debian's own GRUB, taken from its packages, loads Linux and an initial file system from the one
partition, FAT, and speaks on the serial port.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from struct import pack

from vmm_reference.image.packages import fetch_package

__all__ = ["build_boot_disk"]

_SECTOR = 512
_START = 1 << 20  # of the partition; in front of it is room for GRUB
_EFI_SYSTEM = 0xEF  # partition type
_MODULES = ("part_msdos", "fat", "normal", "linux", "serial", "terminal", "echo", "test")
_CONFIGURATION = """
serial --unit=0 --speed=115200
terminal_input serial
terminal_output serial
echo "GRUB on $grub_platform"
linux /vmlinuz {cmdline}
initrd /initrd
boot
"""


def build_boot_disk(image: Path, *, kernel: Path, initrd: Path, cmdline: str) -> None:
    """Write the image of a disk.

    Args:
        image: its path.
        kernel: a bzImage.
        initrd: of the kernel.
        cmdline: what GRUB hands to the kernel.
    """
    folder = image.with_suffix(".parts")
    (folder / "EFI/BOOT").mkdir(parents=True)
    (folder / "boot/grub").mkdir(parents=True)
    (folder / "boot/grub/grub.cfg").write_text(_CONFIGURATION.format(cmdline=cmdline))
    (folder / "vmlinuz").symlink_to(kernel.resolve())
    (folder / "initrd").symlink_to(initrd.resolve())
    _grub("grub-efi-amd64-bin", "x86_64-efi", "/boot/grub", folder / "EFI/BOOT/BOOTX64.EFI")
    core = folder / "core.img"
    modules = _grub("grub-pc-bin", "i386-pc", "(hd0,msdos1)/boot/grub", core, "biosdisk")

    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    sectors = (size + (16 << 20)) // _SECTOR
    first = bytearray((modules / "boot.img").read_bytes())
    first[440:512] = bytes(72)
    first[446:462] = pack(
        "<B3sB3sII", 0x80, b"\xfe\xff\xff", _EFI_SYSTEM, b"\xfe\xff\xff", _START // _SECTOR, sectors
    )
    first[510:512] = b"\x55\xaa"
    # GRUB's image begins with a sector that loads the rest, by default from sector 2 on.
    head = bytes(first) + core.read_bytes()
    assert len(head) <= _START, "GRUB must end before the partition"
    image.write_bytes(head)
    os.truncate(image, _START + sectors * _SECTOR)

    partition = f"{image}@@{_START}"
    _mtools("mformat", "-i", partition, "-T", str(sectors), "::")
    for name in ("EFI", "boot", "vmlinuz", "initrd"):
        _mtools("mcopy", "-s", "-i", partition, str(folder / name), "::")


def _grub(package: str, platform: str, prefix: str, output: Path, *modules: str) -> Path:
    """Make an image of GRUB; returns the folder that its parts came from."""
    folder = fetch_package(package).root / "usr/lib/grub" / platform
    program = fetch_package("grub-common").root / "usr/bin/grub-mkimage"
    libraries = fetch_package("libdevmapper1.02.1").root / "lib/x86_64-linux-gnu"
    command: list[str | Path] = [program, "-d", folder, "-O", platform, "-p", prefix, "-o", output]
    _run([*command, *_MODULES, *modules], LD_LIBRARY_PATH=str(libraries))
    return folder


def _mtools(verb: str, *arguments: str) -> None:
    program = fetch_package("mtools").root / "usr/bin" / verb
    _run([program, *arguments], MTOOLS_SKIP_CHECK="1")


def _run(command: list[str | Path], **environment: str) -> None:
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | environment, timeout=60,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}: {done.stderr}"
