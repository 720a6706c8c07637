"""A disk image: a raw file or a block device, read and written at byte offsets.

The format is raw because the caller says so; nothing of the content is ever looked at. One machine
alone may write an image: an open file description lock says so to other processes, and any number
may share it read-only.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import struct

from vmm_reference.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["SECTOR", "FileBackend"]

SECTOR = 512

# fcntl.h and linux/fs.h, linux/falloc.h
_F_OFD_SETLK = 37
_BLKDISCARD, _BLKZEROOUT = 0x1277, 0x127F
_FICLONE = 0x40049409
_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 1, 2, 16

_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY, errno.EINVAL)
_ZEROES = bytes(1 << 16)

_HINTS = {
    errno.ENOENT: "check the path",
    errno.EACCES: "change its permissions, or open it read-only",
    errno.EROFS: "open it read-only",
    errno.EISDIR: "name a disk image",
}


class FileBackend:
    """An open disk image.

    Args:
        path: a regular file or a block device, whose size is a multiple of 512 bytes.
        read_only: open it for reading alone.
        locked: take its lock; False leaves that to `lock`.

    Attributes:
        size: bytes.
        read_only: as given.

    Raises:
        HostError: it can't be opened, another machine uses it, or its size is not whole sectors.
    """

    def __init__(self, path: str, *, read_only: bool = False, locked: bool = True) -> None:
        self.read_only = read_only
        self._path = path
        # Without O_NONBLOCK a named pipe would hold us here; on files and disks it means nothing.
        flags = os.O_RDONLY if read_only else os.O_RDWR
        try:
            self._fd = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            hint = _HINTS.get(error.errno or 0, "")
            raise HostError(f"drive {path}", error.strerror, hint) from error
        try:
            self._check()
            if locked:
                self.lock()
            self.size = os.lseek(self._fd, 0, os.SEEK_END)
            if self.size == 0 or self.size % SECTOR:
                hint = f"make its size a multiple of {SECTOR}, for example with truncate"
                raise HostError(f"drive {path}", f"it has {self.size} bytes", hint)
        except BaseException:
            self.close()
            raise

    def fileno(self) -> int:
        """The image's descriptor, for who reads and writes it without Python."""
        return self._fd

    def resize(self, size: int | None = None) -> None:
        """Take another size, or notice that the image has one.

        Args:
            size: in bytes, which a regular file is cut or extended to; None to ask for the size.

        Raises:
            HostError: it can't have this size; nothing has changed.
        """
        what = f"drive {self._path}"
        if size is not None and (size <= 0 or size % SECTOR):
            raise HostError(what, f"can't have {size} bytes", f"give a multiple of {SECTOR}")
        try:
            now = os.lseek(self._fd, 0, os.SEEK_END)
            if size is not None and size != now:
                if self.read_only:
                    raise HostError(what, "it is read-only", "change its size outside")
                os.ftruncate(self._fd, size)
                now = size
        except OSError as error:
            if isinstance(error, HostError):
                raise
            raise HostError(what, error.strerror, "change its size outside") from error
        if now == 0 or now % SECTOR:
            raise HostError(what, f"it has {now} bytes", f"make it a multiple of {SECTOR}")
        self.size = now

    def copy(self, path: str) -> None:
        """Make a new file with the same content, which shares blocks with this one where it can.

        Args:
            path: of a file that is not there.

        Raises:
            HostError: it can't be made; nothing is left of it.
        """
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                self._copy(fd)
            except BaseException:
                os.unlink(path)  # noqa: PTH108
                raise
            finally:
                os.close(fd)
        except OSError as error:
            what = f"copy of drive {self._path} to {path}"
            raise HostError(what, error.strerror, "give its folder more room") from error

    def _copy(self, fd: int) -> None:
        try:
            fcntl.ioctl(fd, _FICLONE, self._fd)
        except OSError as error:
            if error.errno not in (*_UNSUPPORTED, errno.EXDEV):
                raise
        else:
            return
        os.ftruncate(fd, self.size)
        at = 0
        while at < self.size:
            try:
                at = os.lseek(self._fd, at, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                return  # a hole up to the end
            end = os.lseek(self._fd, at, os.SEEK_HOLE)
            os.lseek(fd, at, os.SEEK_SET)
            while at < end:
                count = os.sendfile(fd, self._fd, at, end - at)
                if not count:
                    raise OSError(errno.EIO, f"{self._path} ends before {end}")
                at += count

    def close(self) -> None:
        """Close the image, and with it the lock. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def read(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill the buffers from `offset` on; a hole reads as zeros.

        Raises:
            OSError: what the host says; EIO where the image has become shorter.
        """
        for part, count in _parts(buffers):
            done = 0
            while done < count:
                got = os.preadv(self._fd, _rest(part, done), offset + done)
                if got == 0:
                    raise OSError(errno.EIO, f"{self._path} ends before {offset + done}")
                done += got
            offset += count

    def write(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Write the buffers from `offset` on.

        Raises:
            OSError: what the host says; what was written before stays written.
        """
        for part, count in _parts(buffers):
            done = 0
            while done < count:
                done += os.pwritev(self._fd, _rest(part, done), offset + done)
            offset += count

    def flush(self) -> None:
        """Return when all that was written is on stable storage.

        Raises:
            OSError: it may not be.
        """
        os.fdatasync(self._fd)

    def discard(self, offset: int, length: int) -> None:
        """Give the space of a range back to the host; its content is undefined afterwards.

        It is advice: where the host can't, nothing happens.

        Raises:
            OSError: the host could, and failed.
        """
        self._deallocate(offset, length)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        """Make a range read as zeros.

        Args:
            offset: in bytes.
            length: in bytes.
            unmap: whether the host's space may be given back on the way.

        Raises:
            OSError: what the host says.
        """
        if unmap and not self._block and self._deallocate(offset, length):
            return
        try:
            if self._block:
                fcntl.ioctl(self._fd, _BLKZEROOUT, struct.pack("=QQ", offset, length))
            else:
                _fallocate(self._fd, _ZERO_RANGE | _KEEP_SIZE, offset, length)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            self._write_zeroes(offset, length)

    def _deallocate(self, offset: int, length: int) -> bool:
        try:
            if self._block:
                fcntl.ioctl(self._fd, _BLKDISCARD, struct.pack("=QQ", offset, length))
            else:
                _fallocate(self._fd, _PUNCH_HOLE | _KEEP_SIZE, offset, length)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            return False
        return True

    def _write_zeroes(self, offset: int, length: int) -> None:
        end = offset + length
        while offset < end:
            offset += os.pwrite(self._fd, _ZEROES[: end - offset], offset)

    def _check(self) -> None:
        mode = os.fstat(self._fd).st_mode
        self._block = stat.S_ISBLK(mode)
        if not self._block and not stat.S_ISREG(mode):
            raise HostError(
                f"drive {self._path}",
                "it is neither a file nor a block device",
                "name a disk image",
            )

    def lock(self) -> None:
        """Share the image for reading, or have it alone for writing.

        Raises:
            HostError: another machine uses it.
        """
        try:
            self._set_lock(fcntl.F_RDLCK if self.read_only else fcntl.F_WRLCK)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                return  # a file system without locks: nobody can be asked
            raise HostError(
                f"drive {self._path}",
                "another machine uses it",
                "stop that machine, or let both open it read-only",
            ) from None

    def unlock(self) -> None:
        """Let another machine have the image; what was written is on stable storage before.

        Raises:
            OSError: it may not be.
        """
        if not self.read_only:
            self.flush()
        with contextlib.suppress(OSError):  # a file system without locks
            self._set_lock(fcntl.F_UNLCK)

    def _set_lock(self, kind: int) -> None:
        whole = struct.pack("=hhxxxxqqixxxx", kind, os.SEEK_SET, 0, 0, 0)
        fcntl.fcntl(self._fd, _F_OFD_SETLK, whole)


# One system call takes this many buffers (IOV_MAX).
_IOV_MAX = 1024


def _parts(buffers: Sequence[memoryview]) -> list[tuple[Sequence[memoryview], int]]:
    """The buffers in runs that one system call takes, each with its length in bytes."""
    runs = [buffers[n : n + _IOV_MAX] for n in range(0, len(buffers), _IOV_MAX)]
    return [(run, sum(len(buffer) for buffer in run)) for run in runs]


def _rest(buffers: Sequence[memoryview], done: int) -> Sequence[memoryview]:
    """The buffers without their first `done` bytes."""
    if not done:
        return buffers
    rest = []
    for buffer in buffers:
        if done >= len(buffer):
            done -= len(buffer)
        else:
            rest.append(buffer[done:])
            done = 0
    return rest


def _fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """The system call; the standard library's posix_fallocate knows no modes."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.fallocate(fd, mode, ctypes.c_longlong(offset), ctypes.c_longlong(length))
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
