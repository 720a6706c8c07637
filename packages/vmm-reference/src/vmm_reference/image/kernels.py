"""Kernels to build images for: Debian's own, or one that the user has."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

from attrs import frozen

from .errors import ImageError, PackageError
from .modules import ModuleTree
from .packages import fetch_package

__all__ = ["FLAVOURS", "Kernel", "debian_kernel", "local_kernel"]

FLAVOURS = {
    "cloud": "linux-image-cloud-amd64",
    "generic": "linux-image-amd64",
    "rt": "linux-image-rt-amd64",
}
"""Debian's kernels by the name used here, and the package that always points to the newest."""


@frozen
class Kernel:
    """A kernel with what belongs to it.

    Attributes:
        vmlinuz: the kernel's file.
        modules: the folder `lib/modules/VERSION`, or None for a kernel without modules.
        version: as `uname -r` shows it.
        package: Debian's package it came from, or an empty string.
    """

    vmlinuz: Path
    modules: Path | None
    version: str
    package: str = ""

    def tree(self) -> ModuleTree:
        """The kernel's modules."""
        return ModuleTree(self.modules)


def debian_kernel(flavour: str = "cloud", *, update: bool = False) -> Kernel:
    """Debian's kernel of a flavour, from the cache if it is there, else downloaded.

    Args:
        flavour: "cloud" (small, for virtual machines), "generic", or "rt" (PREEMPT_RT).
        update: look for a newer one than the cache has.

    Raises:
        ImageError: there is no such flavour.
        PackageError: it can neither be found in the cache nor downloaded.
    """
    if flavour not in FLAVOURS:
        raise ImageError(f"no such flavour: {flavour!r}", f"use {' or '.join(FLAVOURS)}")
    package = fetch_package(FLAVOURS[flavour], update=update)
    for vmlinuz in sorted(package.root.glob("boot/vmlinuz-*")):
        version = vmlinuz.name.partition("-")[2]
        return Kernel(vmlinuz, package.root / "lib/modules" / version, version, package.name)
    raise PackageError(
        f"package {package.name} in {package.root} has no kernel", "remove that folder"
    )


def local_kernel(vmlinuz: Path, modules: Path | None = None) -> Kernel:
    """A kernel that is a file of the user's.

    Its modules are looked for beside it (`../lib/modules/VERSION`, as packages lay them), then in
    the system's own `/lib/modules/VERSION`.

    Args:
        vmlinuz: a bzImage, or an ELF file vmlinux.
        modules: the folder `lib/modules/VERSION`, where it lies elsewhere.

    Raises:
        ImageError: the file cannot be read, tells no version, or `modules` is not a folder.
    """
    version = _version(vmlinuz)
    if modules is not None:
        if not modules.is_dir():
            raise ImageError(f"modules {modules}: not a folder", "give lib/modules/VERSION")
        return Kernel(vmlinuz, modules, version)
    for root in (vmlinuz.absolute().parent.parent, Path("/")):
        if (folder := root / "lib/modules" / version).is_dir():
            return Kernel(vmlinuz, folder, version)
    return Kernel(vmlinuz, None, version)


def _version(vmlinuz: Path) -> str:
    """What `uname -r` will show, as the file itself tells it."""
    try:
        with vmlinuz.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as image:
            if image[0x202:0x206] == b"HdrS":
                # Linux/x86 boot protocol, kernel_version: offset of a string, less 0x200
                start = 0x200 + int.from_bytes(image[0x20E:0x210], "little")
                text = image[start : start + 256]
            else:
                start = image.find(b"Linux version ")
                text = image[start + 14 : start + 270] if start >= 0 else b""
    except (OSError, ValueError) as error:
        raise ImageError(f"kernel {vmlinuz} cannot be read: {error}") from error
    found = re.match(rb"\d[\w.+~-]*", text)
    if not found:
        raise ImageError(
            f"kernel {vmlinuz} tells no version", "give a bzImage or an uncompressed vmlinux"
        )
    return found[0].decode()
