"""Kernels taken out of their boot images once, kept by the hash of what they came from.

A folder holds `<sha256 of the compressed payload>.elf` files, each put there whole by a rename, so
that any number of processes may race. Hashing at every boot would cost more than all the rest of
loading, so `by-stat/` remembers which file (path, size, times) had which hash, as symbolic links,
and of kernels that need no unpacking where they hold zeros.
"""

# A boot would wait for the import of pathlib.
# ruff: noqa: PTH100, PTH103, PTH105, PTH108, PTH110, PTH111, PTH115, PTH116, PTH123, PTH211
from __future__ import annotations

import os

from linux_loader.source import Source
from linux_loader.zeros import decode_zeros, encode_zeros, find_zeros

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["DecompressionCache", "default_folder"]

_SUFFIX = ".elf"
_ZEROS = ".zeros"
_MAX_ZEROS = _TAIL = 64 << 10
_KEPT = 16
_SETTLED = 2.0  # seconds; a file changed later than that may change again within one tick


def default_folder() -> str:
    """Return the user's cache folder for kernels: `$XDG_CACHE_HOME/linux-loader`."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return f"{base}/linux-loader"


class DecompressionCache:
    """A folder of decompressed kernels. It is an aid: when it cannot be used, nothing fails.

    A folder that others may write to is not trusted, so not used.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = os.fspath(folder)

    def open(
        self, image: Source, offset: int, size: int, unpack: Callable[[bytes], bytes]
    ) -> Source:
        """Return what `unpack` makes of a piece of `image`: from the folder, or left there.

        Args:
            image: the file.
            offset: of the piece in it.
            size: bytes of the piece.
            unpack: called with the piece where the folder does not have its result.
        """
        name = f"kernel of {image.name}"
        if not self._trusted():
            return Source.of_bytes(unpack(image.read("payload", offset, size)), name)
        stamp = _stamp(image, offset)
        entry = self._remembered(stamp)
        found = self._find(entry) if entry is not None else None
        if found is not None:
            return found
        # Read once: hash and result must be of the same bytes, though the file may change.
        piece = image.read("payload", offset, size)
        entry = _digest(piece) + _SUFFIX
        found = self._find(entry)
        if found is None:
            fresh = Source.of_bytes(unpack(piece), name)
            fresh.zeros = find_zeros(fresh)
            if not self._publish(entry, fresh):
                return fresh
            found = self._find(entry) or fresh
        self._remember(stamp, entry)
        return found

    def know_zeros(self, kernel: Source) -> None:
        """Fill in `zeros` of a kernel that needs no unpacking, from the folder if it knows them."""
        stamp = _stamp(kernel, 0)
        if stamp is None or not self._trusted():
            return
        path = f"{self.folder}/by-stat/{stamp}{_ZEROS}"
        try:
            with open(path, "rb") as file:
                kernel.zeros = decode_zeros(file.read(_MAX_ZEROS), kernel.size)
        except OSError:
            # Looking costs as much as copying: only once, so only where it can be written down.
            if self._make_by_stat() and os.access(f"{self.folder}/by-stat", os.W_OK):
                kernel.zeros = find_zeros(kernel)
                self._write(path, encode_zeros(kernel.zeros))
                self._prune()

    def forget(self, kernel: Source) -> None:
        """Remove an entry that turned out to be no kernel."""
        if kernel.name.startswith(f"{self.folder}/"):
            _unlink(kernel.name)

    def _trusted(self) -> bool:
        try:
            status = os.stat(self.folder)
        except OSError:
            try:
                os.makedirs(self.folder, mode=0o700, exist_ok=True)
                status = os.stat(self.folder)
            except OSError:
                return False
        user = os.geteuid()
        return not status.st_mode & 0o022 and (user in (0, status.st_uid))

    def _find(self, name: str) -> Source | None:
        try:
            source = Source.open(f"{self.folder}/{name}")
        except (OSError, ValueError):
            return None
        # Behind the kernel lie its ranges of zeros, then its length: what a crash cut is not whole.
        tail = source.read_up_to(max(0, source.size - _TAIL), _TAIL)
        length = int.from_bytes(tail[-8:], "little")
        start = len(tail) - (source.size - length)
        if len(tail) >= 8 and 0 <= start <= len(tail) - 8:
            source.zeros = decode_zeros(tail[start:-8], length)
            return source
        source.close()
        _unlink(f"{self.folder}/{name}")
        return None

    def _publish(self, name: str, kernel: Source) -> bool:
        data = kernel.read("kernel", 0, kernel.size)
        tail = encode_zeros(kernel.zeros) + len(data).to_bytes(8, "little")
        if not self._write(f"{self.folder}/{name}", data, tail):
            return False
        self._prune()
        return True

    def _write(self, path: str, *pieces: bytes) -> bool:
        """Put a file there, whole or not at all."""
        folder, _, name = path.rpartition("/")
        temporary = f"{folder}/.{name}.{os.getpid()}.{os.urandom(6).hex()}"
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError:
            return False
        try:
            with open(fd, "wb", buffering=0) as file:
                for piece in pieces:
                    view = memoryview(piece)
                    while view:
                        view = view[file.write(view) :]
                os.fsync(fd)
            os.replace(temporary, path)
        except OSError:
            _unlink(temporary)
            return False
        return True

    def _prune(self) -> None:
        """Keep the newest entries only; whoever has an older one open keeps it."""
        _keep_newest(self.folder, _SUFFIX)
        _keep_newest(f"{self.folder}/by-stat", _ZEROS)
        try:
            with os.scandir(f"{self.folder}/by-stat") as links:
                dangling = [link.path for link in links if not os.path.exists(link.path)]
        except OSError:
            return
        for path in dangling:
            _unlink(path)

    def _remembered(self, stamp: str | None) -> str | None:
        if stamp is None:
            return None
        try:
            name = os.readlink(f"{self.folder}/by-stat/{stamp}")
        except OSError:
            return None
        name = name.removeprefix("../")
        return None if "/" in name else name

    def _make_by_stat(self) -> bool:
        try:
            os.makedirs(f"{self.folder}/by-stat", mode=0o700, exist_ok=True)
        except OSError:
            return False
        return True

    def _remember(self, stamp: str | None, name: str) -> None:
        if stamp is None:
            return
        if not self._make_by_stat():
            return
        try:
            os.symlink(f"../{name}", f"{self.folder}/by-stat/{stamp}")
        except OSError:
            return


def _digest(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()


def _stamp(image: Source, offset: int) -> str | None:
    """Name a file's present state; None where it may change without the name changing.

    No device or inode number: they differ between a host and what it shares by 9p or virtio-fs.
    """
    import time
    from binascii import crc32

    if image.fd is None or image.path is None:
        return None
    status = os.fstat(image.fd)
    if not 0 <= status.st_ctime <= time.time() - _SETTLED:
        return None
    path = os.path.abspath(image.path).encode("utf-8", "surrogateescape")
    times = f"{status.st_mtime_ns:x}-{status.st_ctime_ns:x}"
    return f"{status.st_size:x}-{offset:x}-{times}-{crc32(path):08x}"


def _keep_newest(folder: str, suffix: str) -> None:
    try:
        with os.scandir(folder) as entries:
            ages = sorted(
                [
                    (entry.stat().st_mtime_ns, entry.path)
                    for entry in entries
                    if entry.name.endswith(suffix)
                ]
            )
    except OSError:
        return
    for _, path in ages[:-_KEPT]:
        _unlink(path)


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        return
