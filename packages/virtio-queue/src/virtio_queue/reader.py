"""Reading the device-readable part of a descriptor chain, however it is cut (2.7.4)."""

from __future__ import annotations

import os

from virtio_queue._cursor import IOV_MAX, Cursor
from virtio_queue.errors import EndOfChainError
from vm_memory.permissions import Permissions

TYPE_CHECKING = False
if TYPE_CHECKING:
    import struct
    from typing import Any

__all__ = ["Reader"]


class Reader(Cursor):
    """A cursor over the device-readable bytes of one chain.

    Each byte is copied from guest memory once; a second call never sees it again, so that the
    guest cannot change what has been checked. Not thread-safe.
    """

    __slots__ = ()

    @property
    def bytes_read(self) -> int:
        """Bytes consumed so far."""
        return self._done

    def read(self, length: int) -> bytes:
        """Consume up to `length` bytes; fewer only at the end of the chain."""
        memory = self._memory
        if 0 < length <= self.available:
            # Most reads are of a header that lies within one descriptor.
            address, size = self._segments[self._index]
            address += self._within
            end = self._within + length
            if end <= size:
                if end == size:
                    self._index += 1
                    end = 0
                self._within = end
                self._done += length
                self.available -= length
                return memory.read(address, length)  # type: ignore[arg-type]
        pieces = [memory.read(address, size) for address, size in self._take(length)]
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def read_exact(self, length: int) -> bytes:
        """Consume exactly `length` bytes.

        Raises:
            EndOfChainError: the chain holds less; nothing has been consumed.
        """
        if length > self.available:
            raise EndOfChainError(length, self.available)
        return self.read(length)

    def read_struct(self, layout: struct.Struct) -> tuple[Any, ...]:
        """Consume one structure, which may be scattered over descriptors.

        Raises:
            EndOfChainError: the chain holds less; nothing has been consumed.
        """
        return layout.unpack(self.read_exact(layout.size))

    def write_to(self, fd: int, length: int, offset: int | None = None) -> int:
        """Write guest bytes to a file descriptor without copying them through Python.

        Args:
            fd: an open file descriptor.
            length: bytes to transfer, at most `available`.
            offset: file offset (`pwritev`), or None to write at the current position (`writev`).

        Returns:
            Bytes transferred and consumed; fewer than `length` when the file takes no more.

        Raises:
            EndOfChainError: the chain holds less; nothing has been transferred.
            OSError: from the first call; a failure after a partial transfer is a short count.
        """
        if length > self.available:
            raise EndOfChainError(length, self.available)
        done = 0
        while done < length:
            views = self.slices(length - done)[:IOV_MAX]
            try:
                if offset is None:
                    count = os.writev(fd, views)
                else:
                    count = os.pwritev(fd, views, offset + done)
            except OSError:
                if done:
                    break
                raise
            if count == 0:
                break
            self.advance(count)
            done += count
        return done

    def slices(self, length: int | None = None) -> list[memoryview]:
        """Return zero-copy views of the next `length` bytes (default: all) without consuming.

        The guest can change them at any time: use them for transfers, never for decisions.
        """
        return self._views(length, Permissions.READ)

    def advance(self, length: int) -> None:
        """Consume `length` bytes that were used through `slices`.

        Raises:
            EndOfChainError: the chain holds less; nothing has been consumed.
        """
        if length > self.available:
            raise EndOfChainError(length, self.available)
        self._take(length)

    def split_at(self, offset: int) -> Reader:
        """Cut the rest at `offset` bytes from here; this cursor keeps the first part.

        Returns:
            A cursor over what follows.

        Raises:
            EndOfChainError: `offset` lies past the end.
        """
        return Reader(self._memory, self._split(offset))
