r"""Images to test loaders with: builders of valid ones, and strategies that also make them lie.

Needs the extra `linux-loader[testing]`.

>>> from linux_loader.testing import build_elf
>>> build_elf([(0x100000, b"\xf4")], entry=0x100000)[:4]
b'\x7fELF'
"""

from __future__ import annotations

from linux_loader.testing.images import (
    build_bzimage,
    build_elf,
    build_image,
    build_multiboot,
    build_multiboot2,
    build_zboot,
    compress,
    image_file,
    memory_map,
    pvh_note,
    reloc_note,
    with_pe,
)
from linux_loader.testing.strategies import bzimages, cmdlines, elf_images, lies, multiboot_images

__all__ = [
    "build_bzimage",
    "build_elf",
    "build_image",
    "build_multiboot",
    "build_multiboot2",
    "build_zboot",
    "bzimages",
    "cmdlines",
    "compress",
    "elf_images",
    "image_file",
    "lies",
    "memory_map",
    "multiboot_images",
    "pvh_note",
    "reloc_note",
    "with_pe",
]
