"""A file to load from: read at offsets, never past the end that it had when it was opened."""

from __future__ import annotations

import os
import stat

from linux_loader.errors import ImageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Self, TypeAlias

    File: TypeAlias = str | os.PathLike[str] | int

__all__ = ["Source", "file_list"]

_VECTORS = 1024  # IOV_MAX of Linux


def file_list(files: File | Sequence[File] | None) -> Sequence[File]:
    """Return no file, one or several as a sequence."""
    if files is None:
        return ()
    return (files,) if isinstance(files, (str, int, os.PathLike)) else files


class Source:
    """A regular file, or bytes that are already in memory.

    Attributes:
        name: for messages.
        size: bytes.
        zeros: ranges (start, end) that are known to hold zeros, sorted; what is not listed may
            hold anything.
    """

    __slots__ = ("_data", "_fd", "_owned", "name", "size", "zeros")

    def __init__(
        self, *, fd: int | None, data: bytes | None, owned: bool, name: str, size: int
    ) -> None:
        self._fd = fd
        self._data = data
        self._owned = owned
        self.name = name
        self.size = size
        self.zeros: tuple[tuple[int, int], ...] = ()

    @classmethod
    def open(cls, file: File) -> Self:
        """Open a path, or adopt an open file descriptor, which stays the caller's.

        Raises:
            OSError: the file cannot be opened.
            ImageError: it is not a regular file.
        """
        owned = not isinstance(file, int)
        if isinstance(file, int):
            fd, name = file, f"file descriptor {file}"
        else:
            name = os.fspath(file)
            # O_NONBLOCK: a FIFO must be refused below, not waited for.
            fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                kind = "directory" if stat.S_ISDIR(status.st_mode) else "special file"
                raise ImageError("file", None, name, f"must be a regular file, not a {kind}")
        except BaseException:
            if owned:
                os.close(fd)
            raise
        return cls(fd=fd, data=None, owned=owned, name=name, size=status.st_size)

    @classmethod
    def of_bytes(cls, data: bytes, name: str) -> Self:
        """Wrap bytes."""
        return cls(fd=None, data=data, owned=False, name=name, size=len(data))

    @property
    def path(self) -> str | None:
        """The path it was opened by, where there was one."""
        return self.name if self._owned else None

    @property
    def fd(self) -> int | None:
        """The descriptor, where there is one to map."""
        return self._fd

    def mappable(self, field: str, offset: int, length: int) -> int | None:
        """Return the descriptor to map a range from, or None where there is none.

        Raises:
            ImageError: the file no longer holds that range: a mapping of it would fault.
        """
        if self._fd is not None and os.fstat(self._fd).st_size < offset + length:
            raise self._shrunk(field, offset)
        return self._fd

    def read(self, field: str, offset: int, length: int) -> bytes:
        """Read exactly `length` bytes.

        Raises:
            ImageError: the range does not lie inside the file; `field` names what it should hold.
        """
        self._check(field, offset, length)
        if self._data is not None:
            return self._data[offset : offset + length]
        pieces: list[bytes] = []
        while length:
            piece = os.pread(self._opened(), length, offset)
            if not piece:
                raise self._shrunk(field, offset)
            if len(piece) == length and not pieces:
                return piece
            pieces.append(piece)
            offset += len(piece)
            length -= len(piece)
        return b"".join(pieces)

    def read_up_to(self, offset: int, length: int) -> bytes:
        """Read `length` bytes, or fewer where the file ends before."""
        return self.read(self.name, offset, max(0, min(length, self.size - offset)))

    def read_into(self, field: str, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill the buffers, in their order, without a copy in between.

        Raises:
            ImageError: the file holds fewer bytes than the buffers take.
        """
        length = sum([buffer.nbytes for buffer in buffers])
        self._check(field, offset, length)
        if self._data is not None:
            whole = memoryview(self._data)
            for buffer in buffers:
                buffer[:] = whole[offset : offset + buffer.nbytes]
                offset += buffer.nbytes
            return
        pending = [buffer for buffer in buffers if buffer.nbytes]
        while pending:
            count = os.preadv(self._opened(), pending[:_VECTORS], offset)
            if not count:
                raise self._shrunk(field, offset)
            offset += count
            while pending and count >= pending[0].nbytes:
                count -= pending.pop(0).nbytes
            if count:
                pending[0] = pending[0][count:]

    def data_ranges(self, start: int, end: int) -> list[tuple[int, int]]:
        """Return the parts of a range that are not known to hold zeros."""
        result = []
        for first, last in self.zeros:
            if last <= start or first >= end:
                continue
            if first > start:
                result.append((start, first))
            start = last
        if start < end:
            result.append((start, end))
        return result

    def close(self) -> None:
        """Release the descriptor and the bytes; safe to call twice."""
        fd, self._fd, self._data = self._fd, None, None
        if self._owned and fd is not None:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def _opened(self) -> int:
        if self._fd is None:
            raise ImageError("file", None, self.name, "has been closed: plan it anew")
        return self._fd

    def _check(self, field: str, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise ImageError(
                field,
                offset,
                length,
                f"must lie inside {self.name} of {self.size} bytes: the image is truncated or lies",
            )

    def _shrunk(self, field: str, offset: int) -> ImageError:
        return ImageError(field, offset, self.name, "the file shrank while it was being read")
