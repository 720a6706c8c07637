"""What `Reader` and `Writer` share: a position in a list of guest memory segments."""

from __future__ import annotations

from virtio_queue.errors import EndOfChainError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from vm_memory import GuestAddress, GuestMemory
    from vm_memory.permissions import Permissions

IOV_MAX = 1024


class Cursor:
    """A position in segments; `_done` counts what lies behind it, `available` what is ahead."""

    __slots__ = ("_done", "_index", "_memory", "_segments", "_within", "available")

    def __init__(
        self,
        memory: GuestMemory,
        segments: Iterable[tuple[int, int]],
        available: int | None = None,
    ) -> None:
        self._memory = memory
        self._segments = segments if type(segments) is tuple else tuple(segments)
        self._index = 0
        self._within = 0
        self._done = 0
        if available is None:
            available = sum(length for _, length in self._segments)
        self.available = available

    def _ahead(self, length: int) -> tuple[list[tuple[GuestAddress, int]], int, int]:
        """List the pieces of the next `length` bytes and the position behind them."""
        index, within = self._index, self._within
        pieces: list[tuple[GuestAddress, int]] = []
        segments = self._segments
        while length > 0:
            address, size = segments[index]
            size -= within
            if length < size:
                pieces.append((address + within, length))  # type: ignore[arg-type]
                within += length
                break
            if size:
                pieces.append((address + within, size))  # type: ignore[arg-type]
            length -= size
            index += 1
            within = 0
        return pieces, index, within

    def _take(self, length: int) -> list[tuple[GuestAddress, int]]:
        if length > self.available:
            length = self.available
        pieces, self._index, self._within = self._ahead(length)
        self._done += length
        self.available -= length
        return pieces

    def _views(self, length: int | None, rights: Permissions) -> list[memoryview]:
        wanted = self.available if length is None else min(length, self.available)
        pieces, _, _ = self._ahead(wanted)
        views: list[memoryview] = []
        for address, size in pieces:
            views += self._memory.slices(address, size, rights)
        return views

    def _split(self, offset: int) -> tuple[tuple[int, int], ...]:
        """Cut what is ahead at `offset`, keep the first part and return the second."""
        if not 0 <= offset <= self.available:
            raise EndOfChainError(offset, self.available)
        first, index, within = self._ahead(offset)
        rest = list(self._segments[index:])
        if within:
            address, size = rest[0]
            rest[0] = (address + within, size - within)
        self._segments = self._segments[: self._index] + tuple(
            (int(address), size) for address, size in first
        )
        # The pieces start at the cursor: it now stands at the beginning of the first of them.
        self._within = 0
        self.available = offset
        return tuple(rest)
