"""Helpers for tests of whole machines: kernels of a few instructions that any KVM runs."""

from __future__ import annotations

from kvm_ioctls.testing import assemble
from linux_loader.testing.images import build_elf, pvh_note

__all__ = ["KERNEL_ADDRESS", "tiny_kernel"]

KERNEL_ADDRESS = 0x100000


def tiny_kernel(source: str) -> bytes:
    """An ELF image that is entered by PVH: 32-bit protected mode, flat segments, no stack.

    Args:
        source: 32-bit AT&T assembly. Three macros help: `PUT c` sends a character to the serial
            port, `POWER_OFF` and `RESET` end the machine as a kernel would by ACPI.
    """
    code = assemble(_MACROS + source, bits=32, origin=KERNEL_ADDRESS)
    return build_elf([(KERNEL_ADDRESS, code)], entry=KERNEL_ADDRESS, notes=pvh_note(KERNEL_ADDRESS))


_MACROS = """
.macro OUT port value
    movw $\\port, %dx
    movb $\\value, %al
    outb %al, %dx
.endm
.macro PUT character
    OUT 0x3f8 \\character
.endm
.macro POWER_OFF
    OUT 0x600 0x34
9:  hlt
    jmp 9b
.endm
.macro RESET
    OUT 0x602 1
9:  hlt
    jmp 9b
.endm
"""
