"""The kinds of image, and the ways to start them."""

from __future__ import annotations

import enum

__all__ = ["Format", "Protocol", "format_of"]


class Format(enum.Enum):
    """What a file is, told by its content."""

    ELF64 = "elf64"
    ELF32 = "elf32"
    BZIMAGE = "bzimage"
    MULTIBOOT = "multiboot"
    FLAT = "flat"
    FIRMWARE = "firmware"
    ARM64 = "arm64"
    RISCV64 = "riscv64"


class Protocol(enum.Enum):
    """How an image is started."""

    LINUX64 = "linux64"
    LINUX32 = "linux32"
    PVH = "pvh"
    MULTIBOOT = "multiboot"
    MULTIBOOT2 = "multiboot2"
    FLAT = "flat"
    RESET = "reset"


def format_of(head: bytes) -> Format | None:
    r"""Recognise an image by its first bytes; 1024 are enough. None where it is of no known kind.

    >>> format_of(b"\x7fELF\x02\x01\x01")
    <Format.ELF64: 'elf64'>
    """
    if head[:4] == b"\x7fELF":
        return Format.ELF32 if head[4:5] == b"\x01" else Format.ELF64
    if head[0x1FE:0x200] == b"\x55\xaa" and head[0x202:0x206] == b"HdrS":
        return Format.BZIMAGE
    return None
