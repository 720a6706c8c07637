"""A snapshot's folder: a manifest, and the parts that it names with size and digest.

    FOLDER/manifest.json          what there is; replaced in one step, and that is the commit
    FOLDER/GENERATION/NAME.json   a state, written by `format`
    FOLDER/GENERATION/memory      guest memory, with holes where it is zero

Writing goes to a generation of its own. Until the manifest names it, on disk and in one rename,
the folder is what it was: a crash or a full disk at any moment leaves the snapshot that was there
before, or none if there was none, and at most a generation that nobody names, which the next
writer clears away. The manifest ends with the digest of itself, so that no byte of it, and with
the digests in it no byte of a state, can change unnoticed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import attrs

from vmm_reference.errors import HostError

from .format import MAX_SIZE, FormatError, decode, encode, encode_fields, fields, parse, state

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType
    from typing import Self

__all__ = ["Difference", "Manifest", "Part", "SnapshotReader", "SnapshotWriter"]

MANIFEST = "manifest.json"
MEMORY = "memory"

_GENERATION = re.compile(r"[0-9a-f]{16}")
_NAME = re.compile(r"[a-z][a-z0-9-]{0,63}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_SEAL = b'"sha256": "%s"}\n'

T = TypeVar("T")


def _named(rule: re.Pattern[str], words: str) -> Any:
    def check(_state: object, field: attrs.Attribute[str], value: object) -> None:
        if not isinstance(value, str) or rule.fullmatch(value) is None:
            raise ValueError(f"{field.name} is {value!r}, {words}")

    return check


def _size(_state: object, field: attrs.Attribute[int], value: int) -> None:
    if not 0 <= value < 1 << 63:
        raise ValueError(f"{field.name} is {value}, must be 0 or more bytes")


@attrs.frozen
class Part:
    """One written state.

    Attributes:
        name: of the part; its file is called so, with `.json`.
        size: bytes.
        sha256: of these.
    """

    name: str = attrs.field(validator=_named(_NAME, "must be letters, digits and dashes"))
    size: int = attrs.field(validator=_size)
    sha256: str = attrs.field(validator=_named(_DIGEST, "must be 64 hexadecimal digits"))


@attrs.frozen
class Difference:
    """Which snapshot this one tells the changes to.

    Attributes:
        folder: where it lies, relative to the folder of this one.
        sha256: its manifest's digest: another snapshot there is refused.
    """

    folder: str
    sha256: str = attrs.field(validator=_named(_DIGEST, "must be 64 hexadecimal digits"))


@attrs.frozen
class Manifest:
    """What a snapshot consists of.

    Attributes:
        writer: the release that wrote it; for people, it decides nothing.
        generation: the folder of its parts.
        parts: all states.
        memory_size: bytes of the memory's file.
        base: None if the memory is whole.
        version: of this form and of the folder's.
    """

    writer: str
    generation: str = attrs.field(validator=_named(_GENERATION, "must be 16 hexadecimal digits"))
    parts: tuple[Part, ...]
    memory_size: int = attrs.field(validator=_size)
    base: Difference | None = None
    version: int = 1

    def __attrs_post_init__(self) -> None:
        names = [part.name for part in self.parts]
        if len(set(names)) != len(names):
            raise ValueError(f"parts have a name twice: {', '.join(names)}")


def seal(manifest: Manifest) -> bytes:
    """The manifest as a file: its last line is the digest of all before it."""
    body = encode(manifest).rstrip().removesuffix(b"}").rstrip() + b",\n "
    return body + _SEAL % hashlib.sha256(body).hexdigest().encode()


def unseal(data: bytes, name: str) -> tuple[Manifest, str]:
    """The manifest in a file, and its digest.

    Raises:
        FormatError: the digest is not that of the rest, or the rest is no manifest.
    """
    body, digest = data[: -len(_SEAL % bytes(64))], data[-len(_SEAL % bytes(64)) :][11:75]
    found = hashlib.sha256(body).hexdigest().encode()
    if data != body + _SEAL % found:
        raise FormatError(f"{name}: sha256", digest, f"is wrong, the content has {found.decode()}")
    if not body.endswith(b",\n "):
        raise FormatError(name, body[-10:], "must end with a line for the digest")
    return decode(body[:-3] + b"\n}\n", Manifest, name), found.decode()


class SnapshotWriter:
    """Writes one snapshot; as a context manager, `commit` inside makes it the folder's.

    Args:
        folder: made if it is not there. What it holds stays valid until `commit`.

    Attributes:
        folder: as given.
        memory: a new file for guest memory, open for writing.

    Raises:
        HostError: the folder or a file can't be made or written.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._generation = os.urandom(8).hex()
        self._path = self.folder / self._generation
        self._parts: list[Part] = []
        self._committed = False
        self._lock = self.memory = -1
        with _told(f"snapshot {self.folder}"):
            if not self.folder.is_dir():
                self.folder.mkdir(parents=True, exist_ok=True)
            try:
                self._lock = _locked(self.folder)
                self._path.mkdir(mode=0o700)  # it has all secrets of the guest
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                self.memory = os.open(self._path / MEMORY, flags, 0o600)
            except BaseException:
                self.abandon()
                raise

    def add(self, name: str, state: object) -> None:
        """Write one state as a part.

        Raises:
            HostError: it can't be written.
        """
        self._add(name, encode(state))

    def add_table(self, name: str, table: dict[str, Any]) -> None:
        """Write fields that are plain JSON values already; `SnapshotReader.table` reads them.

        Raises:
            HostError: it can't be written.
        """
        self._add(name, encode_fields(table))

    def copy(self, name: str, other: SnapshotReader) -> None:
        """Take over a part of another snapshot as it is.

        Raises:
            HostError, FormatError: it can't be read there, or written here.
        """
        self._add(name, other.read(name))

    def beside(self, name: str) -> str:
        """Where a file may be put that belongs to this snapshot, and goes with it."""
        return str(self._path / name)

    def _add(self, name: str, data: bytes) -> None:
        with _told(f"snapshot {self.folder}, {name}"):
            _write(self._path / f"{name}.json", data)
        self._parts.append(Part(name, len(data), hashlib.sha256(data).hexdigest()))

    def commit(self, writer: str, base: Difference | None = None) -> str:
        """Make what was written the folder's snapshot; returns the manifest's digest.

        All is on the disk when this returns.

        Raises:
            HostError: it can't be; the folder is what it was.
        """
        from concurrent.futures import ThreadPoolExecutor  # a clone never needs it

        with _told(f"snapshot {self.folder}"):
            size = os.fstat(self.memory).st_size
            manifest = Manifest(writer, self._generation, tuple(self._parts), size, base)
            data = seal(manifest)
            new = self._path / MANIFEST
            _write(new, data)
            names = [MEMORY, MANIFEST, *(f"{part.name}.json" for part in self._parts), ""]
            # The generation's own name is the folder's. Together they cost about what one does.
            with ThreadPoolExecutor(len(names) + 1) as pool:
                list(pool.map(_sync, [*(self._path / name for name in names), self.folder]))
            new.replace(self.folder / MANIFEST)
            self._committed = True
            _sync(self.folder)
        _clear(self.folder, self._generation)
        self._close()
        return unseal(data, MANIFEST)[1]

    def abandon(self) -> None:
        """Take away what was written, unless it was committed. Idempotent."""
        self._close()
        if not self._committed:
            shutil.rmtree(self._path, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.abandon()

    def _close(self) -> None:
        for fd in (self.memory, self._lock):
            if fd >= 0:
                os.close(fd)
        self._lock = self.memory = -1


class SnapshotReader:
    """A snapshot to read, whole or refused; usable as a context manager.

    Args:
        folder: where it is.

    Attributes:
        folder: as given.
        manifest: what it says.
        digest: of the manifest: the snapshot's identity.
        memory: the memory's file, open for reading.

    Raises:
        HostError: a file is not there or can't be read.
        FormatError: the manifest, or a size, is not what was written.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._kept: dict[str, object] = {}
        with _told(f"snapshot {self.folder}"):
            data = _read(self.folder / MANIFEST, MAX_SIZE)
        self.manifest, self.digest = unseal(data, MANIFEST)
        self._path = self.folder / self.manifest.generation
        with _told(f"snapshot {self.folder}"):
            self.memory = os.open(self._path / MEMORY, os.O_RDONLY | os.O_CLOEXEC)
        size = os.fstat(self.memory).st_size
        if size != self.manifest.memory_size:
            self.close()
            rule = f"bytes it has, the manifest says {self.manifest.memory_size}"
            raise FormatError(MEMORY, size, rule)

    def names(self) -> list[str]:
        """The parts' names, in the order they were written."""
        return [part.name for part in self.manifest.parts]

    def state(self, name: str, kind: type[T]) -> T:
        """The state in one part.

        Raises:
            FormatError: the part is not there, has other content than was written, or another
                state than `kind`.
            HostError: its file can't be read.
        """
        return state(self._plain(name), kind, name)

    def table(self, name: str) -> dict[str, Any]:
        """The fields of the state in one part, as plain JSON values.

        Raises:
            FormatError, HostError: as for `state`.
        """
        return fields(self._plain(name), name)

    def read(self, name: str) -> bytes:
        """One part as it was written.

        Raises:
            FormatError: the part is not there, or has other content than was written.
            HostError: its file can't be read.
        """
        part = next((part for part in self.manifest.parts if part.name == name), None)
        if part is None:
            raise FormatError(MANIFEST, name, f"is no part of this; there are {self.names()}")
        with _told(f"snapshot {self.folder}, {name}"):
            data = _read(self._path / f"{name}.json", min(part.size + 1, MAX_SIZE))
        if len(data) != part.size:
            raise FormatError(name, len(data), f"bytes or more it has, must have {part.size}")
        digest = hashlib.sha256(data).hexdigest()
        if digest != part.sha256:
            raise FormatError(f"{name}: sha256", digest, f"must be {part.sha256}: it was changed")
        return data

    def keep(self) -> None:
        """Read and prove all parts now; `state` and `table` need no file then.

        Raises:
            FormatError, HostError: as for `state`.
        """
        self._kept = {name: self._plain(name) for name in self.names()}

    def _plain(self, name: str) -> object:
        return self._kept[name] if name in self._kept else parse(self.read(name), name)

    def base(self) -> SnapshotReader | None:
        """The snapshot that this one tells the changes to, or None.

        Raises:
            FormatError: there is another one now where it was.
            HostError: there is none.
        """
        told = self.manifest.base
        if told is None:
            return None
        base = SnapshotReader(self.folder / told.folder)
        if base.digest != told.sha256:
            base.close()
            rule = f"is another snapshot than the one this was made from, {told.sha256}"
            raise FormatError(f"base {base.folder}", base.digest, rule)
        return base

    def close(self) -> None:
        """Close the memory's file. Idempotent."""
        if self.memory >= 0:
            os.close(self.memory)
            self.memory = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """An OSError becomes a HostError that says what could not be done."""
    try:
        yield
    except HostError:
        raise
    except OSError as error:
        hint = "the snapshot that was there before is untouched" if error.errno == 28 else ""
        raise HostError(what, error.strerror or error, hint) from error


def _locked(folder: Path) -> int:
    """The folder, open, for one writer alone."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(fd)
        hint = "wait for it, or name another folder"
        raise HostError(f"snapshot {folder}", "another one is being written", hint) from error
    except BaseException:
        os.close(fd)
        raise
    return fd


def _write(path: Path, data: bytes) -> None:
    """A new file."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
    finally:
        os.close(fd)


def _read(path: Path, limit: int) -> bytes:
    with path.open("rb", buffering=0) as file:
        data = b""
        while len(data) < limit and (more := file.read(limit - len(data))):
            data += more
        return data


def _sync(path: Path) -> None:
    """A file's content, or a folder's names, on the disk when this returns."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _clear(folder: Path, keep: str) -> None:
    """Generations that no manifest names: those before this one, and what crashes left.

    Nobody reads them by name; who has their memory mapped keeps it.
    """
    for entry in folder.iterdir():
        if entry.name != keep and _GENERATION.fullmatch(entry.name) and entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
