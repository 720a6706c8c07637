"""Maps of guest memory as C code sees them."""

from __future__ import annotations

from vm_memory._native import ffi, lib
from vm_memory._owner import TABLE, own
from vm_memory.errors import MappingError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vm_memory._native import CData
    from vm_memory.region import GuestRegion


class NativeTable:
    """One reference to a `struct vmm_table`, which itself keeps the memory of its regions.

    Attributes:
        pointer: the structure, valid while this object lives.
    """

    __slots__ = ("_owner", "pointer")

    def __init__(self, regions: tuple[GuestRegion, ...]) -> None:
        """Describe regions, sorted by address.

        Raises:
            MappingError: when the host has no memory for it.
        """
        pointer = lib.vmm_table_new(len(regions))
        if not pointer:
            raise MappingError(f"table of {len(regions)} regions", 12)
        self.pointer: CData = pointer
        self._owner = own(pointer, TABLE)
        for index, region in enumerate(regions):
            bitmap = ffi.NULL if region.dirty is None else region.dirty.handle
            mapping = region.mapping.handle
            lib.vmm_table_set(pointer, index, region.guest_address, region.size, mapping, bitmap)

    @property
    def address(self) -> int:
        """Where the structure is."""
        return int(ffi.cast("uintptr_t", self.pointer))
