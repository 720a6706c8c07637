"""The newc cpio format, in which Linux takes its initial file system.

The format is Linux's `Documentation/driver-api/early-userspace/buffer-format.rst`. What is written
depends on the entries alone: owner 0, group 0, time 0, inode numbers counted from 1.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable

from attrs import frozen

from .errors import CpioError

__all__ = [
    "Entry",
    "character_device",
    "directory",
    "pack",
    "regular",
    "symlink",
    "unpack",
    "with_parents",
]

_MAGIC = b"070701"
_HEADER = 110
_TRAILER = "TRAILER!!!"
_NAME_LIMIT = 4095  # PATH_MAX less the NUL: a longer name is skipped by the kernel without a word
_SIZE_LIMIT = 0xFFFF_FFFF
_KINDS = (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO)


@frozen
class Entry:
    """One file, directory, symbolic link or device node of an archive.

    Attributes:
        name: path below the root, without a leading slash, with no empty, "." or ".." parts.
        mode: type and permissions, as in `st_mode`.
        data: contents of a file, or the target of a symbolic link.
        rdev: major and minor number of a device node.
    """

    name: str
    mode: int
    data: bytes = b""
    rdev: tuple[int, int] = (0, 0)

    def check(self) -> None:
        """Raise CpioError if no archive can hold this entry, or the kernel would not unpack it."""
        if any(part in ("", ".", "..") for part in self.name.split("/")) or "\0" in self.name:
            raise CpioError(f"name {self.name!r} is not a plain path below the root")
        if self.name == _TRAILER:
            raise CpioError(f"name {self.name!r} marks the end of an archive")
        if len(os.fsencode(self.name)) > _NAME_LIMIT:
            raise CpioError(f"name {self.name[:40]!r}… is longer than {_NAME_LIMIT} bytes")
        kinds = (
            stat.S_ISREG,
            stat.S_ISDIR,
            stat.S_ISLNK,
            stat.S_ISCHR,
            stat.S_ISBLK,
            stat.S_ISFIFO,
        )
        if not 0 <= self.mode <= 0xFFFF or not any(kind(self.mode) for kind in kinds):
            raise CpioError(f"mode {self.mode:#o} of {self.name!r} names no kind of file")
        if stat.S_ISLNK(self.mode):
            if not 0 < len(self.data) <= _NAME_LIMIT or b"\0" in self.data:
                raise CpioError(f"target {self.data[:40]!r} of link {self.name!r} is not a path")
        elif self.data and not stat.S_ISREG(self.mode):
            raise CpioError(f"{self.name!r} has data, but is neither a file nor a link")
        if len(self.data) > _SIZE_LIMIT:
            raise CpioError(f"{self.name!r} has {len(self.data)} bytes; the limit is {_SIZE_LIMIT}")
        if not all(0 <= number <= _SIZE_LIMIT for number in self.rdev):
            raise CpioError(f"device number {self.rdev} of {self.name!r} is out of range")


def directory(name: str, permissions: int = 0o755) -> Entry:
    """A directory."""
    return Entry(name, stat.S_IFDIR | permissions)


def regular(name: str, data: bytes, permissions: int = 0o644) -> Entry:
    """A file with its contents."""
    return Entry(name, stat.S_IFREG | permissions, data)


def symlink(name: str, target: str) -> Entry:
    """A symbolic link to a path, which need not exist."""
    return Entry(name, stat.S_IFLNK | 0o777, os.fsencode(target))


def character_device(name: str, major: int, minor: int, permissions: int = 0o600) -> Entry:
    """A node of a character device."""
    return Entry(name, stat.S_IFCHR | permissions, rdev=(major, minor))


def with_parents(entries: Iterable[Entry]) -> list[Entry]:
    """Put before each entry those parent directories that the entries do not name themselves.

    The kernel does not make parents: a file without one is lost.

    Example:
        >>> [entry.name for entry in with_parents([regular("etc/rc/start", b"")])]
        ['etc', 'etc/rc', 'etc/rc/start']
    """
    given = list(entries)
    own = {entry.name: entry for entry in given if stat.S_ISDIR(entry.mode)}
    done: set[str] = set()
    result: list[Entry] = []
    for entry in given:
        parts = entry.name.split("/")
        for end in range(1, len(parts)):
            parent = "/".join(parts[:end])
            if parent not in done:
                done.add(parent)
                result.append(own.get(parent) or directory(parent))
        if entry.name not in done or not stat.S_ISDIR(entry.mode):
            done.add(entry.name)
            result.append(entry)
    return result


def pack(entries: Iterable[Entry]) -> bytes:
    """An archive of the entries, in their order.

    Raises:
        CpioError: an entry cannot be held, a name occurs twice, or a parent does not come first.

    Example:
        >>> unpack(pack([symlink("bin", "usr/bin")]))[0].data
        b'usr/bin'
    """
    kinds: dict[str, int] = {}
    pieces: list[bytes] = []
    for number, entry in enumerate(entries, start=1):
        entry.check()
        parent = entry.name.rpartition("/")[0]
        if entry.name in kinds:
            raise CpioError(f"name {entry.name!r} occurs twice")
        if parent and not stat.S_ISDIR(kinds.get(parent, 0)):
            raise CpioError(f"{parent!r}, the parent of {entry.name!r}, is no directory before it")
        kinds[entry.name] = entry.mode
        pieces += _encode(entry, number)
    pieces += _encode(Entry(_TRAILER, 0), 0)
    return b"".join(pieces)


def unpack(archive: bytes) -> list[Entry]:
    """The entries of an archive, up to its trailer.

    Raises:
        CpioError: the archive is cut short, or a header is not one of newc.
    """
    entries: list[Entry] = []
    offset = 0
    while True:
        header = archive[offset : offset + _HEADER]
        if len(header) < _HEADER or header[:6] != _MAGIC:
            raise CpioError(f"no newc header at offset {offset}")
        try:
            fields = [int(header[at : at + 8], 16) for at in range(6, _HEADER, 8)]
        except ValueError:
            raise CpioError(f"header at offset {offset} has a field that is no number") from None
        mode, size, name_size = fields[1], fields[6], fields[11]
        name_at = offset + _HEADER
        data_at = _aligned(name_at + name_size)
        raw = archive[name_at : name_at + name_size]
        data = archive[data_at : data_at + size]
        if not raw or len(raw) < name_size or raw[-1] or len(data) < size:
            raise CpioError(f"entry at offset {offset} is cut short")
        name = os.fsdecode(raw[:-1])
        if name == _TRAILER:
            return entries
        entries.append(Entry(name, mode, data, (fields[9], fields[10])))
        offset = _aligned(data_at + size)


def _aligned(offset: int) -> int:
    return offset + 3 & ~3


def _encode(entry: Entry, number: int) -> list[bytes]:
    name = os.fsencode(entry.name) + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    major, minor = entry.rdev
    size = len(entry.data)
    fields = (number, entry.mode, 0, 0, links, 0, size, 0, 0, major, minor, len(name), 0)
    header = _MAGIC + b"".join(b"%08X" % field for field in fields)
    return [
        header + name + bytes(-(_HEADER + len(name)) % 4),
        entry.data,
        bytes(-size % 4),
    ]
