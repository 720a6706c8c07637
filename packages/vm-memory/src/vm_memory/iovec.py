"""Pieces of memory as C sees them for vectored I/O."""

from __future__ import annotations

from vm_memory._native import ffi

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ["Iovecs"]


class Iovecs:
    """An array of `struct iovec`, which keeps the memory that it points to alive.

    Attributes:
        address: where the array is, for a system call; valid while the object lives.
        views: the pieces themselves.

    >>> from vm_memory import GuestAddress, GuestMemory
    >>> memory = GuestMemory.from_ranges([(GuestAddress(0), 4096), (GuestAddress(4096), 4096)])
    >>> [length for _, length in memory.iovecs(GuestAddress(4000), 100)]
    [96, 4]
    """

    __slots__ = ("_array", "address", "views")

    def __init__(self, views: Iterable[memoryview]) -> None:
        """Describe writable views of bytes."""
        self.views = tuple(views)
        pointers = [int(ffi.cast("uintptr_t", ffi.from_buffer(view))) for view in self.views]
        self._array = ffi.new("uint64_t[]", 2 * len(self.views) or 2)
        for index, (pointer, view) in enumerate(zip(pointers, self.views, strict=True)):
            self._array[2 * index] = pointer
            self._array[2 * index + 1] = len(view)
        self.address = int(ffi.cast("uintptr_t", self._array))

    def __len__(self) -> int:
        """How many pieces there are."""
        return len(self.views)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Host address and length of each piece."""
        for index in range(len(self.views)):
            yield self._array[2 * index], self._array[2 * index + 1]
