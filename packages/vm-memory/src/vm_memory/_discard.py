"""Giving pages back to the host."""

from __future__ import annotations

from vm_memory._mapping import MAP_ANONYMOUS, MAP_SHARED, PAGE
from vm_memory._native import lib
from vm_memory.backing import Adopted, FileShared

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vm_memory.region import GuestRegion

# From <sys/mman.h>.
_MADV_DONTNEED = 4
_MADV_REMOVE = 9


def discard(region: GuestRegion, offset: int, length: int) -> None:
    """Make a range of a region read as zeros, with no pages behind it where that can be."""
    mapping = region.mapping
    if mapping.overlaid or not mapping.flags & (MAP_SHARED | MAP_ANONYMOUS):
        advice = 0  # pages that were given back would show the file again
    else:
        advice = _MADV_REMOVE if mapping.flags & MAP_SHARED else _MADV_DONTNEED
    start = -(-offset // mapping.page) * mapping.page
    end = (offset + length) // mapping.page * mapping.page
    if offset + length == region.size and not isinstance(region.backing, (FileShared, Adopted)):
        end = mapping.length  # what fills the last page is nobody else's
    if (
        advice == 0
        or start >= end
        or lib.vmm_advise(region.host_address + start, end - start, advice)
    ):
        lib.vmm_fill(region.host_address + offset, 0, length)
        return
    if mapping.page != PAGE:
        region.fragile = True  # the pool may have no page when this one is touched again
    lib.vmm_fill(region.host_address + offset, 0, start - offset)
    if end < offset + length:
        lib.vmm_fill(region.host_address + end, 0, offset + length - end)
