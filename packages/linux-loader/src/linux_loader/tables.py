"""Descriptor tables and page tables for the protocols that want them in guest memory."""

from __future__ import annotations

import struct

__all__ = ["PAGE_TABLES_SIZE", "descriptor_table", "identity_page_tables"]

_DATA = 0x00CF_9300_0000_FFFF
_CODE32 = 0x00CF_9B00_0000_FFFF
_CODE64 = 0x00AF_9B00_0000_FFFF
_TASK = 0x0000_8B00_0000_0067

PAGE_TABLES_SIZE = 6 * 4096
"""Bytes of `identity_page_tables`: one page each of PML4 and PDPT, four of 2 MiB pages."""


def descriptor_table(*, long: bool) -> bytes:
    """Return a GDT: two null entries, code at 0x10, data at 0x18, a task at 0x20.

    Args:
        long: 64-bit code instead of 32-bit, for the Linux 64-bit protocol.
    """
    # The task descriptor takes 16 bytes in long mode; its upper half is zero here in either.
    return struct.pack("<6Q", 0, 0, _CODE64 if long else _CODE32, _DATA, _TASK, 0)


def identity_page_tables(address: int) -> bytes:
    """Return page tables that map the first 4 GiB to themselves in pages of 2 MiB.

    2 MiB, because pages of 1 GiB are an option of the processor (CPUID 0x80000001, EDX bit 26).

    Args:
        address: where they will lie, page-aligned; the root (CR3) is their first page.
    """
    present_writable = 3
    top = struct.pack("<Q", address + 0x1000 | present_writable).ljust(4096, b"\0")
    middle = struct.pack(
        "<4Q", *[address + 0x2000 + page * 0x1000 | present_writable for page in range(4)]
    ).ljust(4096, b"\0")
    return top + middle + _large_pages(2048)


def _large_pages(count: int) -> bytes:
    """Return entries for this many pages of 2 MiB from 0 on; `count` is a power of two.

    As one long integer that doubles: a boot does this, and a loop over entries takes 3 times as
    long.
    """
    entries, ones, made = 0x83, 1, 1  # large, writable, present
    while made < count:
        entries |= entries + (made << 21) * ones << 64 * made
        ones |= ones << 64 * made
        made *= 2
    return entries.to_bytes(8 * count, "little")
