"""A disk that nobody else sees changed: a base that is only read, and a sparse file for the rest.

What is written goes to the overlay in blocks of 4 KiB; which blocks it has is known to this process
alone, so an overlay ends with it. Offsets and lengths are those of `FileBackend`.
"""

from __future__ import annotations

import os
import tempfile

from vmm_reference.errors import HostError

from .file import FileBackend

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["Overlay"]

_BLOCK = 4096


class Overlay:
    """An image below and a new file above.

    Args:
        path: of the base, which is shared with all who read it.
        folder: where the overlay's file is made, without a name; it goes with this process.

    Attributes:
        size: bytes, those of the base.
        read_only: never.

    Raises:
        HostError: the base can't be opened, somebody writes it, or no file can be made.
    """

    def __init__(self, path: str, folder: str) -> None:
        self._base = FileBackend(path, read_only=True)
        self.size, self.read_only = self._base.size, False
        try:
            self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        except OSError as error:
            self._base.close()
            raise HostError(
                f"overlay in {folder}", error.strerror, "name another folder"
            ) from error
        self._fd = self._file.fileno()
        os.ftruncate(self._fd, self.size)
        self._has = bytearray(-(-self.size // _BLOCK))

    def close(self) -> None:
        """Close both; what was written is gone. Idempotent."""
        self._base.close()
        self._file.close()

    def read(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill the buffers from `offset` on.

        Raises:
            OSError: what the host says.
        """
        for buffer in buffers:
            for start, count, above in self._runs(offset, len(buffer)):
                part = buffer[start - offset : start - offset + count]
                if not above:
                    self._base.read(start, [part])
                    continue
                done = 0
                while done < count:
                    got = os.preadv(self._fd, [part[done:]], start + done)
                    if not got:
                        raise OSError(5, "the overlay ends too early")
                    done += got
            offset += len(buffer)

    def write(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Write the buffers from `offset` on; the base stays as it is.

        Raises:
            OSError: what the host says.
        """
        total = sum(map(len, buffers))
        self._copy_up(offset // _BLOCK)
        self._copy_up((offset + total - 1) // _BLOCK)
        first = offset
        for buffer in buffers:
            done = 0
            while done < len(buffer):
                done += os.pwrite(self._fd, buffer[done:], offset + done)
            offset += len(buffer)
        self._mark(first, total)

    def flush(self) -> None:
        """Nothing of an overlay outlives the process, so nothing has to be on stable storage."""

    def discard(self, offset: int, length: int) -> None:
        """It is advice, and not taken."""

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        """Make a range read as zeros.

        Raises:
            OSError: what the host says.
        """
        end = offset + length
        zeros = memoryview(bytes(1 << 16))
        while offset < end:
            count = min(end - offset, len(zeros))
            self.write(offset, [zeros[:count]])
            offset += count

    def _mark(self, offset: int, length: int) -> None:
        first, end = offset // _BLOCK, -(-(offset + length) // _BLOCK)
        self._has[first:end] = b"\1" * (end - first)

    def _copy_up(self, block: int) -> None:
        """Have a block that is written in part in the overlay, whole."""
        if self._has[block]:
            return
        start = block * _BLOCK
        data = bytearray(min(_BLOCK, self.size - start))
        self._base.read(start, [memoryview(data)])
        if os.pwrite(self._fd, data, start) != len(data):
            raise OSError(28, "the overlay can't grow")
        self._has[block] = 1

    def _runs(self, offset: int, length: int) -> Iterator[tuple[int, int, bool]]:
        """Pieces of a range that lie in one of the two: offset, length, whether above."""
        end = offset + length
        while offset < end:
            block = offset // _BLOCK
            above = bool(self._has[block])
            other = self._has.find(0 if above else 1, block, -(-end // _BLOCK))
            stop = end if other < 0 else other * _BLOCK
            yield offset, stop - offset, above
            offset = stop
