"""What the outer machine boots: Debian's kernel and an initramfs, made once, kept in the cache."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from linux_loader.bzimage import parse_bzimage
from linux_loader.decompress import decompress
from linux_loader.source import Source
from vmm_reference.image import build_initramfs, debian_kernel
from vmm_reference.image.cache import cached_image, content_key

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["MODULES", "Outer", "make"]

MODULES = ("virtio_pci", "9p", "9pnet_virtio", "virtio_console", "overlay", "kvm-amd")
"""Modules of the outer kernel: for its files, for the agent, and what all this is for."""


class Outer(NamedTuple):
    """What the emulator starts.

    Attributes:
        kernel: the ELF file out of the package's image: to decompress it takes the outer machine
            several seconds, at each start.
        initramfs: holds busybox, the modules, and `init` as the first process.
    """

    kernel: Path
    initramfs: Path


def make(modules: Sequence[str] = ()) -> Outer:
    """The kernel and the initramfs, from the cache where they have not changed.

    Args:
        modules: more modules, loaded with what they depend on.

    Raises:
        vmm_reference.image.ImageError: the kernel cannot be had, or has no such module.
    """
    kernel = debian_kernel("generic")

    def unpack(target: Path) -> list[Path]:
        source = Source.open(kernel.vmlinuz)
        try:
            image = parse_bzimage(source)
            payload = source.read("payload", image.payload_offset, image.payload_size)
        finally:
            source.close()
        # Linux appends the size of what comes out.
        target.write_bytes(decompress(payload, size=int.from_bytes(payload[-4:], "little")))
        return [kernel.vmlinuz]

    name = f"vmlinux-{kernel.version}-{content_key(str(kernel.vmlinuz))}"
    init = Path(__file__).parent / "init"
    return Outer(
        kernel=cached_image(name, unpack),
        initramfs=build_initramfs(None, kernel, [*MODULES, *modules], init=init),
    )
