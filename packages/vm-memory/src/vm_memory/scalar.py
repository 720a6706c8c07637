"""One scalar in guest memory, looked up once."""

from __future__ import annotations

from vm_memory._map import WHY_LOST
from vm_memory._words import unsigned, words
from vm_memory.errors import BackingLostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vm_memory.region import GuestRegion

__all__ = ["Scalar"]


class Scalar:
    """A little-endian scalar at a fixed place; it keeps its memory alive.

    Get one from `GuestMemory.scalar`.

    >>> from vm_memory import GuestAddress, GuestMemory
    >>> memory = GuestMemory.from_ranges([(GuestAddress(0), 4096)])
    >>> index = memory.scalar(GuestAddress(0x102), 2)
    >>> index.store(7)
    >>> index.load(), memory.read_u16(GuestAddress(0x102))
    (7, 7)
    """

    __slots__ = ("_index", "_offset", "_region", "_size", "_view")

    def __init__(self, region: GuestRegion, offset: int, size: int) -> None:
        """The scalar of `size` bytes at `offset`, a multiple of the size, in a region."""
        self._region = region
        self._offset = offset
        self._size = size
        self._view = words(region, size)
        self._index = offset // size

    def load(self) -> int:
        """Its value, read in one piece.

        Raises:
            BackingLostError: when pages of its region are lost.
        """
        if self._region.fragile:
            return self._checked(self._view[self._index])
        return self._view[self._index]

    def store(self, value: int) -> None:
        """Write it in one piece, and mark it dirty.

        Raises:
            InvalidValueError: when the value does not fit.
            BackingLostError: when pages of its region are lost.
        """
        region = self._region
        try:
            self._view[self._index] = value
        except ValueError:
            unsigned(value, self._size)
            raise
        if region.dirty is not None:
            region.dirty.mark(self._offset, self._size)
        if region.fragile:
            self._checked(value)

    def _checked(self, value: int) -> int:
        if self._region.mapping.lost:
            address = self._region.guest_address + self._offset
            raise BackingLostError(address, self._size, f"the region has lost pages: {WHY_LOST}")
        return value
