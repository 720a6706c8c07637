"""The map as C code of other extensions sees it."""

from __future__ import annotations

import gc

import pytest

from vm_memory import ClosedError, GuestAddress, GuestMemory
from vm_memory._native import ffi

A = GuestAddress


def test_the_table_tells_what_the_map_is() -> None:
    """Addresses, sizes and host memory of the regions are in the table, and marks arrive."""
    memory = GuestMemory.from_ranges([(A(0), 8192), (A(1 << 32), 4096)], dirty_page_size=4096)
    table = ffi.cast("struct vmm_table *", memory.native_table)
    assert (table.version, table.count) == (1, 2)
    for region, entry in zip(memory.regions, [table.regions[0], table.regions[1]], strict=True):
        assert (entry.guest_address, entry.size) == (region.guest_address, region.size)
        assert int(ffi.cast("uintptr_t", entry.host)) == region.host_address
    table.mark(table.regions[0].bitmap, 5000, 1)
    assert list(memory.harvest_dirty()) == [(4096, 4096)]
    assert memory.native_table == memory.native_table


def test_who_retains_a_table_keeps_its_memory() -> None:
    """After retain the table outlives the map, memory and bitmaps included, until release."""
    memory = GuestMemory.from_ranges([(A(0), 8192)], dirty_page_size=4096)
    table = ffi.cast("struct vmm_table *", memory.native_table)
    table.retain(table)
    memory.write(A(0), b"kept")
    memory.close()
    with pytest.raises(ClosedError):
        _ = memory.native_table
    del memory
    gc.collect()
    assert bytes(ffi.buffer(table.regions[0].host, 4)) == b"kept"
    table.mark(table.regions[0].bitmap, 0, 1)
    assert table.references == 1
    table.release(table)


def test_the_layout_is_the_interface() -> None:
    """Version 1 of the structures has these sizes and offsets; another layout is a new version."""
    table, region = "struct vmm_table", "struct vmm_table_region"
    names = ("version", "count", "references", "retain", "release", "mark", "regions")
    assert [ffi.offsetof(table, n) for n in names] == [0, 4, 8, 16, 24, 32, 40]
    fields = ("guest_address", "size", "host", "bitmap", "mapping")
    assert [ffi.offsetof(region, n) for n in fields] == [0, 8, 16, 24, 32]
    assert ffi.sizeof(region) == 40
