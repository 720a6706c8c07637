"""The files that a caller adds to an image."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from .errors import ImageError

__all__ = ["file_identity", "input_files", "walk_files"]


def walk_files(name: str, source: Path | bytes) -> list[tuple[str, Path | bytes]]:
    """A file, or a folder and all below it in a fixed order, each with its name in the image.

    Raises:
        ImageError: the place is not a plain path.
        OSError: the file is not there.
    """
    name = name.strip("/")
    if any(part in ("", ".", "..") for part in name.split("/")) and (
        name or isinstance(source, bytes) or not source.is_dir()
    ):
        raise ImageError(f"place {name!r} is not a plain path below the root")
    if isinstance(source, bytes) or not source.is_dir():
        return [(name, source if isinstance(source, bytes) else source.resolve(strict=True))]
    found: list[tuple[str, Path | bytes]] = [(name, source)] if name else []
    for folder, folders, files in os.walk(source):
        folders.sort()
        for each in sorted([*folders, *files]):
            path = Path(folder, each)
            found.append((f"{name}/{path.relative_to(source)}".lstrip("/"), path))
    return found


def file_identity(source: Path | bytes) -> str | bytes:
    """All of a file that decides its place in an image, but for the contents of one on disk.

    Those are known by size and time, see `cached_image`.
    """
    if isinstance(source, bytes):
        return source
    target = os.fspath(source.readlink()) if source.is_symlink() else ""
    return f"{source.absolute()} {source.lstat().st_mode:o} {target}"


def input_files(added: Iterable[tuple[str, Path | bytes]]) -> list[Path]:
    """Those files whose contents go into the image."""
    return [source for _, source in added if isinstance(source, Path) and source.is_file()]
