"""The folder in which downloaded packages and built images are kept.

    packages/NAME                       text: the folder below that NAME stands for
    packages/NAME_VERSION_ARCH/         a package, unpacked
    images/KIND-HASH.SUFFIX             an image, named by a hash of what was asked for
    images/KIND-HASH.SUFFIX.inputs      the files it was made from, with their sizes and times

Whatever appears here is complete: it was made beside its place and renamed into it. Any number of
processes may use the folder at once; where two make the same thing, the first one's stays.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from .errors import ImageError

__all__ = ["cache_folder", "cached_image", "content_key", "deliver", "new_file", "new_folder"]

_ABANDONED_AFTER = 24 * 3600.0  # seconds; a process that still works on it would be very slow
_TEMPORARY = ".vmm-new-"


def cache_folder() -> Path:
    """The cache's root: `$VMM_CACHE`, else `vmm-reference` in XDG's cache folder."""
    if own := os.environ.get("VMM_CACHE"):
        return Path(own).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification has relative paths ignored.
    root = Path(base) if base.startswith("/") else Path.home() / ".cache"
    return root / "vmm-reference"


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `target` at the end unless that is there by then."""
    target.parent.mkdir(parents=True, exist_ok=True)
    _forget_abandoned(target.parent)
    folder = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=target.parent))
    try:
        folder.chmod(0o755)
        yield folder
        try:
            folder.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """An empty file to fill, which replaces `target` at the end; gone where an exception leaves."""
    _forget_abandoned(target.parent)
    number, name = tempfile.mkstemp(prefix=_TEMPORARY, dir=target.parent)
    os.close(number)
    file = Path(name)
    try:
        file.chmod(0o644)
        yield file
        file.replace(target)
    finally:
        file.unlink(missing_ok=True)


def cached_image(name: str, build: Callable[[Path], Iterable[Path]]) -> Path:
    """The image of a name in the cache; built if it is absent or one of its inputs has changed.

    Args:
        name: file name, with a key over all that is asked of the image.
        build: writes the image to the path it is given, and returns the files it was made from.
    """
    image = cache_folder() / "images" / name
    record = image.with_name(f"{name}.inputs")
    if image.exists() and _unchanged(record):
        return image
    image.parent.mkdir(parents=True, exist_ok=True)
    with new_file(image) as file:
        stamps = [_stamp(path) for path in build(file)]
    with new_file(record) as file:
        file.write_text("".join(f"{stamp}\n" for stamp in stamps), errors="surrogateescape")
    return image


def deliver(image: Path, output: Path) -> Path:
    """Copy an image to where it is wanted, at once, leaving its holes holes; returns that path.

    Raises:
        ImageError: the place can't be written, or is something other than a file.
    """
    if output.exists() and not output.is_file():
        raise ImageError(f"{output}: neither free nor a file", "give the path of a file")
    try:
        with new_file(output) as path, image.open("rb") as old, path.open("r+b") as new:
            _copy(old.fileno(), new.fileno())
    except OSError as error:
        raise ImageError(
            f"{output} can't be written: {error.strerror}", "see that its folder is there"
        ) from error
    return output


def _copy(old: int, new: int) -> None:
    size = os.lseek(old, 0, os.SEEK_END)
    os.ftruncate(new, size)
    end = 0
    while end < size:
        try:
            start = os.lseek(old, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return  # only a hole is left
        end = os.lseek(old, start, os.SEEK_HOLE)
        while start < end:
            piece = os.pread(old, min(end - start, 1 << 20), start)
            start += os.pwrite(new, piece, start)


def content_key(*parts: str | bytes | Path) -> str:
    """A short hash over texts and the contents of files, kept apart from each other.

    Example:
        >>> content_key("ab", "c") == content_key("a", "bc")
        False
    """
    state = hashlib.sha256()
    for part in parts:
        data = part.read_bytes() if isinstance(part, Path) else part
        raw = data.encode() if isinstance(data, str) else data
        state.update(b"%d:" % len(raw))
        state.update(raw)
    return state.hexdigest()[:20]


def _forget_abandoned(folder: Path) -> None:
    """Remove what processes that were killed have left."""
    for path in folder.glob(f"{_TEMPORARY}*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _ABANDONED_AFTER:
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink()


def _stamp(path: Path) -> str:
    status = path.stat()
    return f"{status.st_size} {status.st_mtime_ns} {path}"


def _unchanged(record: Path) -> bool:
    try:
        stamps = record.read_text(errors="surrogateescape").splitlines()
        return all(stamp == _stamp(Path(stamp.split(" ", 2)[2])) for stamp in stamps)
    except (OSError, IndexError):
        return False
