"""Kernels, initial file systems and root disks for guests, made from Debian's own parts.

Nothing here is imported by `vmm run`, which takes files as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__all__ = [
    "ImageError",
    "Kernel",
    "build_disk",
    "build_initramfs",
    "debian_kernel",
    "guest_initramfs",
    "local_kernel",
]

if TYPE_CHECKING:
    from .disk import build_disk
    from .errors import ImageError
    from .initramfs import build_initramfs, guest_initramfs
    from .kernels import Kernel, debian_kernel, local_kernel

_HOMES = {
    "ImageError": "errors",
    "Kernel": "kernels",
    "build_disk": "disk",
    "build_initramfs": "initramfs",
    "debian_kernel": "kernels",
    "guest_initramfs": "initramfs",
    "local_kernel": "kernels",
}


def __getattr__(name: str) -> object:
    """Import a name's module when the name is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
