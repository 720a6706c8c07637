"""Writing the device-writable part of a descriptor chain, with an account of what was written."""

from __future__ import annotations

import os

from virtio_queue._cursor import IOV_MAX, Cursor
from virtio_queue.errors import EndOfChainError
from vm_memory.permissions import Permissions

TYPE_CHECKING = False
if TYPE_CHECKING:
    import struct
    from collections.abc import Iterable
    from typing import Any

    from vm_memory import GuestMemory

__all__ = ["Writer"]


class Writer(Cursor):
    """A cursor over the device-writable bytes of one chain. Not thread-safe.

    `used_length` is what belongs into `Queue.add_used`: it counts by itself, over all parts that
    `split_at` made, and stops at the first gap (2.7.8.2: the device must have written at least
    that many bytes "beginning at the first device-writable buffer").
    """

    __slots__ = ("_tail",)

    def __init__(
        self,
        memory: GuestMemory,
        segments: Iterable[tuple[int, int]],
        available: int | None = None,
    ) -> None:
        super().__init__(memory, segments, available)
        self._tail: Writer | None = None

    @property
    def bytes_written(self) -> int:
        """Bytes written through this cursor so far."""
        return self._done

    @property
    def used_length(self) -> int:
        """Bytes written without a gap from this cursor's beginning, through its split parts.

        0 to 2**32 - 1: a chain of exactly 2**32 bytes written in full counts one less, which
        2.7.8.2 allows.
        """
        total = 0
        part: Writer | None = self
        while part is not None:
            total += part._done
            if part.available:
                break
            part = part._tail
        return min(total, 0xFFFFFFFF)

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Write as much of `data` as fits and return its length in bytes."""
        if type(data) is bytes and 0 < len(data) <= self.available:
            # Most writes are of a status that lies within one descriptor.
            address, size = self._segments[self._index]
            address += self._within
            length = len(data)
            end = self._within + length
            if end <= size:
                self._memory.write(address, data)  # type: ignore[arg-type]
                if end == size:
                    self._index += 1
                    end = 0
                self._within = end
                self._done += length
                self.available -= length
                return length
        view = memoryview(data).cast("B")
        done = 0
        for address, size in self._take(len(view)):
            self._memory.write(address, view[done : done + size])
            done += size
        return done

    def write_exact(self, data: bytes | bytearray | memoryview) -> None:
        """Write all of `data`.

        Raises:
            EndOfChainError: the chain holds less; nothing has been written.
        """
        length = memoryview(data).nbytes
        if length > self.available:
            raise EndOfChainError(length, self.available)
        self.write(data)

    def write_struct(self, layout: struct.Struct, *values: Any) -> None:
        """Write one structure, which may be scattered over descriptors.

        Raises:
            EndOfChainError: the chain holds less; nothing has been written.
        """
        self.write_exact(layout.pack(*values))

    def fill(self, length: int, value: int = 0) -> None:
        """Write `length` bytes of `value` (0 to 255) without building them in Python.

        Raises:
            EndOfChainError: the chain holds less; nothing has been written.
        """
        if length > self.available:
            raise EndOfChainError(length, self.available)
        for address, size in self._take(length):
            self._memory.fill(address, size, value)

    def read_from(self, fd: int, length: int, offset: int | None = None) -> int:
        """Read from a file descriptor straight into guest memory.

        Args:
            fd: an open file descriptor.
            length: bytes to transfer, at most `available`.
            offset: file offset (`preadv`), or None to read at the current position (`readv`).

        Returns:
            Bytes transferred and accounted for; fewer than `length` at the end of the file.

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
                    count = os.readv(fd, views)
                else:
                    count = os.preadv(fd, views, offset + done)
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
        """Return zero-copy views of the next `length` bytes (default: all), marked dirty.

        Nothing counts as written until `advance` says how much of it was.
        """
        return self._views(length, Permissions.WRITE)

    def advance(self, length: int) -> None:
        """Account for `length` bytes that were written through `slices`.

        Raises:
            EndOfChainError: the chain holds less; nothing has been accounted for.
        """
        if length > self.available:
            raise EndOfChainError(length, self.available)
        for address, size in self._take(length):
            # Once more, after the data: a harvest in between would have missed it.
            self._memory.mark_dirty(address, size)

    def split_at(self, offset: int) -> Writer:
        """Cut the rest at `offset` bytes from here; this cursor keeps the first part.

        Returns:
            A cursor over what follows, whose writes count in this one's `used_length`.

        Raises:
            EndOfChainError: `offset` lies past the end.
        """
        rest = Writer(self._memory, self._split(offset))
        rest._tail, self._tail = self._tail, rest
        return rest
