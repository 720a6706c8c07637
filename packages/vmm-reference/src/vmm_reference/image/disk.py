"""Root disks: an ext4 file system in a sparse raw file, with busybox for a userland.

`mkfs.ext4 -d` fills it from a folder and `debugfs` makes root the owner of all, so nothing is
mounted and nobody needs to be root.
"""

from __future__ import annotations

import importlib.resources
import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from .cache import cached_image, content_key, deliver
from .errors import DiskError, ImageError
from .files import file_identity, input_files, walk_files
from .initramfs import busybox
from .packages import find_tool

__all__ = ["SMALLEST_DISK", "build_disk"]

SMALLEST_DISK = 16 << 20
"""Bytes; below this, ext4's journal leaves no room for what belongs on a root disk."""

_FOLDERS = ("dev", "proc", "sys", "tmp", "run", "root", "mnt", "bin", "sbin", "usr/bin", "usr/sbin")
_PERMISSIONS = {"tmp": 0o1777, "root": 0o700}
_PATIENCE = 300  # seconds for one tool


def build_disk(
    output: Path | None,
    *,
    size: int = 256 << 20,
    files: Mapping[str, Path | bytes] | None = None,
    label: str = "root",
) -> Path:
    """A root disk: boots to a shell on the console, and powers off when that shell ends.

    The same request gives the same bytes, UUID included.

    Args:
        output: where to put it, replacing what is there; None leaves it in the cache alone, where
            it is to be read but never written to.
        size: of the file system in bytes, at least `SMALLEST_DISK`; the file takes less, being
            sparse.
        files: files and folders to add by their path on the disk, as for `build_initramfs`.
        label: of the file system, up to 16 bytes.

    Returns:
        The path of the image: `output`, or the one in the cache.

    Raises:
        DiskError: the size or the label is impossible, the files do not fit, or a tool of e2fsprogs
            is missing or fails.
        ImageError: a file cannot be read, or busybox cannot be had.
    """
    if size < SMALLEST_DISK or size % 4096:
        raise DiskError(
            f"disk size {size}: not a multiple of 4096 of at least {SMALLEST_DISK} bytes"
        )
    if not 0 <= len(label.encode()) <= 16:
        raise DiskError(f"label {label!r}: longer than 16 bytes")
    tools = {name: _tool(name) for name in ("mkfs.ext4", "debugfs")}
    try:
        added = [item for name, top in (files or {}).items() for item in walk_files(name, top)]
        shell = busybox()
        base = _base_files()
        key = content_key(
            Path(__file__),
            f"{size} {label} {shell}",
            *(part for name, source in base for part in (name, source)),
            *(part for name, source in added for part in (name, file_identity(source))),
        )

        def build(file: Path) -> list[Path]:
            with tempfile.TemporaryDirectory(prefix="vmm-disk-") as folder:
                root = Path(folder, "root")
                for name in _FOLDERS:
                    (root / name).mkdir(parents=True)
                _install_busybox(shell, root)
                for name, source in [*base, *added]:
                    _place(root, name, source)
                _permit(root, added)
                _make(file, root, size=size, label=label, tools=tools)
            return [shell, *input_files(added)]

        cached = cached_image(f"disk-{key}.ext4", build)
    except OSError as error:
        raise ImageError(f"root disk: {error}") from error
    return cached if output is None else deliver(cached, output)


def _tool(name: str) -> str:
    found = find_tool(name)
    if found is None:
        raise DiskError(f"there is no {name} on this system", "install the package e2fsprogs")
    return found


def _base_files() -> list[tuple[str, bytes]]:
    """The files of this package that every root disk has."""
    top = Path(str(importlib.resources.files(__package__) / "guest" / "disk"))
    found = [(name, source) for name, source in walk_files("", top) if isinstance(source, Path)]
    return [(name, source.read_bytes()) for name, source in found if source.is_file()]


def _install_busybox(shell: Path, root: Path) -> None:
    """Put busybox and a link for each of its applets where the applet says that it belongs."""
    shutil.copyfile(shell, root / "bin/busybox")
    (root / "bin/busybox").chmod(0o755)
    listed = _run([str(shell), "--list-full"], "busybox cannot be asked for its applets")
    for applet in listed.split():
        link = root / applet
        if applet != "bin/busybox" and link.parent.is_dir():
            link.symlink_to("/bin/busybox")


def _place(root: Path, name: str, source: Path | bytes) -> None:
    """Put one file, link or folder into the staging folder, over whatever has its name."""
    target = root / name
    if not target.parent.resolve().is_relative_to(root.resolve()):
        raise ImageError(f"place {name!r}: a link among the files leads out of the image")
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.is_symlink() or target.is_file():
        target.unlink()
    if isinstance(source, bytes):
        target.write_bytes(source)
        target.chmod(0o755 if source.startswith(b"#!") else 0o644)
    elif source.is_symlink():
        target.symlink_to(source.readlink())
    elif source.is_dir():
        target.mkdir(exist_ok=True)
    elif source.is_file():
        shutil.copyfile(source, target)
        target.chmod(source.stat().st_mode & 0o7777)
    else:
        raise ImageError(f"{source} is neither a file, a folder nor a link")


def _permit(root: Path, added: Sequence[tuple[str, Path | bytes]]) -> None:
    """Set the folders' permissions, which the caller's umask must not decide."""
    modes = {root / name: mode for name, mode in _PERMISSIONS.items()}
    for name, source in added:
        if isinstance(source, Path) and source.is_dir() and not source.is_symlink():
            modes[root / name] = source.stat().st_mode & 0o7777
    for folder, _, _ in os.walk(root):
        Path(folder).chmod(modes.get(Path(folder), 0o755))


def _make(file: Path, root: Path, *, size: int, label: str, tools: Mapping[str, str]) -> None:
    """Make the file system, then give every file in it to root, at the epoch."""
    names = [
        f"/{Path(folder, name).relative_to(root)}"
        for folder, folders, files in os.walk(root)
        for name in [*folders, *files]
    ]
    odd = next((name for name in names if '"' in name or "\n" in name), None)
    if odd is not None:
        raise DiskError(f"file name {odd!r} has a quotation mark or a line break in it")
    names.sort()
    identity = _identity(root, names)
    with file.open("wb") as image:
        image.truncate(size)
    extended = f"hash_seed={identity},root_owner=0:0,lazy_itable_init=0,nodiscard"
    _run(
        [
            tools["mkfs.ext4"], "-q", "-F", "-b", "4096", "-m", "0", "-L", label,
            "-U", str(identity), "-E", extended, "-d", str(root), str(file),
        ],
        f"the files do not fit on a disk of {size >> 20} MiB, or mkfs.ext4 cannot make it",
        "give a larger --size",
    )  # fmt: skip
    script = root.parent / "script"
    lines = (
        f'set_inode_field "{name}" {field} {0 if field.endswith("id") else "@1"}\n'
        for name in ["/", "/lost+found", *names]
        for field in ("uid", "gid", "atime", "ctime", "mtime", "crtime")
    )
    script.write_text("".join(lines))
    _run(
        [tools["debugfs"], "-w", "-f", str(script), str(file)],
        "debugfs cannot set the owners of the files",
    )


def _identity(root: Path, names: Sequence[str]) -> uuid.UUID:
    """A UUID made of the names and contents of the files."""
    parts: list[str | Path] = []
    for name in names:
        path = root / name[1:]
        parts += [name, path if path.is_file() and not path.is_symlink() else ""]
    return uuid.uuid5(uuid.NAMESPACE_OID, content_key(*parts))


def _run(command: Sequence[str], problem: str, remedy: str = "") -> str:
    """The output of a tool that must succeed."""
    ended = subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        errors="replace",
        stdin=subprocess.DEVNULL,
        timeout=_PATIENCE,
        # e2fsprogs takes its time from here, so that the same files give the same image
        env=os.environ | {"LC_ALL": "C", "E2FSPROGS_FAKE_TIME": "1"},
    )
    if ended.returncode:
        words = " ".join(ended.stderr.split()[:40])
        raise DiskError(f"{problem} ({words})", remedy)
    return ended.stdout
