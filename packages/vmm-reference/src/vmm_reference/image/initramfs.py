"""Initial file systems: busybox, a kernel's modules, and an init.

One builder serves a guest of the VMM (`guest_initramfs`) and whoever brings an init of their own,
such as a lab (`build_initramfs`).
"""

from __future__ import annotations

import functools
import importlib.resources
import os
import stat
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

from .cache import cached_image, content_key, deliver
from .cpio import Entry, character_device, directory, pack, regular, symlink, with_parents
from .errors import ImageError, PackageError
from .files import file_identity, input_files, walk_files
from .kernels import Kernel
from .modules import Module, index_files
from .packages import cached_package, fetch_package, find_tool

__all__ = ["GUEST_MODULES", "LOAD_LIST", "build_initramfs", "busybox", "guest_initramfs"]

GUEST_MODULES = (
    "virtio_mmio",
    "virtio_pci",
    "virtio_blk",
    "virtio_rng",
    "pvpanic_mmio",
    "ext4",
)
"""What a guest's init may find devices for, as far as the kernel has it as modules."""

LOAD_LIST = "lib/modules/load"
"""A file of the image: the paths of all its modules, one a line, in the order to load them."""

_BUSYBOX = "busybox-static"


def build_initramfs(
    output: Path | None,
    kernel: Kernel,
    modules: Iterable[str] = (),
    *,
    init: Path,
    files: Mapping[str, Path | bytes] | None = None,
    optional: Iterable[str] = (),
) -> Path:
    """An initial file system for a kernel; built only if the same was not built before.

    It holds `/init`, busybox with the links `/bin/sh` and `/sbin/modprobe`, the modules with all
    they depend on, decompressed, under `/lib/modules/VERSION` with the indexes of modprobe, and
    `/lib/modules/load`, which names them in the order in which `insmod` takes them.

    Args:
        output: where to put it; None leaves it in the cache alone.
        kernel: whose modules to take.
        modules: names or aliases; what is built into the kernel is left out.
        init: an executable or a script, which becomes `/init`.
        files: further files by their path in the image; a `Path` may be a folder, which comes with
            all below it, and is followed where it is a symbolic link itself.
        optional: modules that are left out where the kernel does not have them.

    Returns:
        The path of the image: `output`, or the one in the cache.

    Raises:
        ImageError: a module is unknown, a file cannot be read, or busybox cannot be had.
    """
    wanted, spare = list(modules), list(optional)
    try:
        added = [
            (name, source)
            for name, top in (files or {}).items()
            for name, source in walk_files(name, top)
        ]
        shell = busybox()
        key = content_key(
            _builder(),
            kernel.version,
            str(kernel.modules),
            "\n".join(wanted),
            "\n".join(spare),
            init,
            str(shell),
            *(part for name, source in added for part in (name, file_identity(source))),
        )

        def build(file: Path) -> list[Path]:
            loaded = kernel.tree().closure(wanted, optional=spare)
            archive = pack(
                with_parents(
                    [
                        *(directory(name) for name in ("dev", "proc", "sys", "tmp", "root")),
                        character_device("dev/console", 5, 1),
                        regular("init", init.read_bytes(), 0o755),
                        regular("bin/busybox", shell.read_bytes(), 0o755),
                        symlink("bin/sh", "busybox"),
                        symlink("sbin/modprobe", "../bin/busybox"),
                        *_module_entries(kernel.version, loaded),
                        *(_entry(name, source) for name, source in added),
                    ]
                )
            )
            file.write_bytes(archive)
            return [shell, *(module.file for module in loaded), *input_files(added)]

        cached = cached_image(f"initramfs-{key}.cpio", build)
    except OSError as error:
        raise ImageError(f"initramfs for {kernel.version}: {error}") from error
    return cached if output is None else deliver(cached, output)


def guest_initramfs(
    kernel: Kernel,
    *,
    output: Path | None = None,
    modules: Iterable[str] = (),
    files: Mapping[str, Path | bytes] | None = None,
) -> Path:
    """The initial file system of a guest, whose init is `guest/init` of this package.

    Args:
        kernel: whose modules to take: `GUEST_MODULES`, as far as it has them.
        output: as for `build_initramfs`.
        modules: further ones.
        files: as for `build_initramfs`.

    Returns:
        The path of the image.

    Raises:
        ImageError: as `build_initramfs`.
    """
    init = Path(str(importlib.resources.files(__package__) / "guest" / "init"))
    return build_initramfs(output, kernel, modules, init=init, files=files, optional=GUEST_MODULES)


def busybox() -> Path:
    """A statically linked busybox: Debian's package, or else the system's own.

    Raises:
        PackageError: there is neither.
    """
    if (package := cached_package(_BUSYBOX)) is None:
        try:
            package = fetch_package(_BUSYBOX)
        except PackageError:
            own = find_tool("busybox")
            if own is None or not _is_static(Path(own)):
                raise
            return Path(own).resolve()
    for folder in ("bin", "usr/bin"):
        if (file := package.root / folder / "busybox").exists():
            return file
    raise PackageError(f"{package.root} has no busybox", "remove that folder")


def _is_static(program: Path) -> bool:
    """Whether an ELF program names no interpreter, so that it runs where no library is."""
    image = program.read_bytes()
    table, size, count = struct.unpack_from("<Q14xHH", image, 0x20)
    kinds = (struct.unpack_from("<I", image, table + size * n)[0] for n in range(count))
    return image[:5] == b"\x7fELF\x02" and 3 not in kinds  # PT_INTERP


@functools.cache
def _builder() -> str:
    """A hash of the builder itself: it does not reuse what another version of it has built."""
    folder = Path(__file__).parent
    return content_key(*(folder / f"{name}.py" for name in ("cpio", "initramfs", "modules")))


def _module_entries(version: str, modules: list[Module]) -> list[Entry]:
    if not modules:
        return []
    folder = f"lib/modules/{version}"
    paths = "".join(f"/{folder}/{module.path}\n" for module in modules)
    return [
        *(regular(f"{folder}/{module.path}", module.image) for module in modules),
        *(regular(f"{folder}/{name}", data) for name, data in index_files(modules).items()),
        regular(LOAD_LIST, paths.encode()),
    ]


def _entry(name: str, source: Path | bytes) -> Entry:
    if isinstance(source, bytes):
        return regular(name, source, 0o755 if source.startswith(b"#!") else 0o644)
    status = source.lstat()
    if stat.S_ISLNK(status.st_mode):
        return symlink(name, os.fspath(source.readlink()))
    if stat.S_ISDIR(status.st_mode):
        return directory(name, stat.S_IMODE(status.st_mode))
    if stat.S_ISREG(status.st_mode):
        return regular(name, source.read_bytes(), stat.S_IMODE(status.st_mode))
    raise ImageError(f"{source} is neither a file, a folder nor a link")
