"""Where the loader puts its own tables, below 1 MiB."""

from __future__ import annotations

from vm_memory._values import frozen

__all__ = ["Layout"]


@frozen
class Layout:
    """Guest-physical addresses of what a boot protocol hands over.

    Attributes:
        gdt: the descriptor table, 48 bytes.
        start_info: PVH's, with its module list and memory map; room up to `zero_page`.
        zero_page: Linux's `boot_params`, one page.
        stack: first stack pointer; the rest of its page below it is the stack.
        page_tables: six pages, page-aligned.
        setup_data: entropy and other extras of the Linux protocol, 8-byte aligned; room up to
            `cmdline`.
        cmdline: the command line.
    """

    gdt: int = 0x500
    start_info: int = 0x6000
    zero_page: int = 0x7000
    stack: int = 0x8FF0
    page_tables: int = 0x9000
    setup_data: int = 0xF000
    cmdline: int = 0x20000
