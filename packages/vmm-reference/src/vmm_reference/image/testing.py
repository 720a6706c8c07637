"""For tests of images: kernels and packages small enough to make by the dozen."""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

from .kernels import Kernel

__all__ = ["FakeMirror", "fake_busybox", "make_kernel", "make_module"]


def make_module(
    depends: Iterable[str] = (),
    aliases: Iterable[str] = (),
    softdeps: Iterable[str] = (),
) -> bytes:
    """An ELF file with a section `.modinfo`, as far as a builder looks at it.

    Args:
        depends: names of modules.
        aliases: patterns of devices.
        softdeps: whole values, such as "pre: a b post: c".
    """
    facts = ["license=GPL", *(f"alias={alias}" for alias in aliases)]
    facts += [f"softdep={value}" for value in softdeps]
    facts.append(f"depends={','.join(depends)}")
    modinfo = "".join(f"{fact}\0" for fact in facts).encode()
    names = b"\0.modinfo\0.shstrtab\0"
    table_at = 64 + len(modinfo) + len(names)

    def section(name: int, offset: int, size: int) -> bytes:
        return struct.pack("<IIQQQQIIQQ", name, 1, 0, 0, offset, size, 0, 0, 1, 0)

    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        b"\x7fELF\x02\x01\x01", 1, 62, 1, 0, 0, table_at, 0, 64, 0, 0, 64, 3, 2,
    )  # fmt: skip
    sections = section(0, 0, 0) + section(1, 64, len(modinfo))
    sections += section(10, 64 + len(modinfo), len(names))
    return header + modinfo + names + sections


def make_kernel(
    root: Path, modules: Mapping[str, bytes], *, builtin: Iterable[str] = (), version: str = "6.9-x"
) -> Kernel:
    """A kernel with modules, as a package leaves it when it is unpacked.

    Args:
        root: folder to make it in.
        modules: contents by file name, such as "virtio-rng.ko.xz".
        builtin: names of built-in modules.
        version: of the kernel.
    """
    folder = root / "lib/modules" / version
    (folder / "kernel/drivers").mkdir(parents=True)
    for name, image in modules.items():
        (folder / "kernel/drivers" / name).write_bytes(image)
    (folder / "modules.builtin").write_text("".join(f"kernel/{name}.ko\n" for name in builtin))
    vmlinuz = root / "boot" / f"vmlinuz-{version}"
    vmlinuz.parent.mkdir()
    setup = bytearray(0x400)
    setup[0x202:0x206] = b"HdrS"
    setup[0x20E:0x210] = (0x100).to_bytes(2, "little")
    text = f"{version} (someone@somewhere) #1 SMP\0".encode()
    setup[0x300 : 0x300 + len(text)] = text
    vmlinuz.write_bytes(setup)
    return Kernel(vmlinuz, folder, version)


def fake_busybox(cache: Path) -> None:
    """Put into a cache what an earlier fetch of busybox would have left there."""
    folder = cache / "packages/busybox-static_1%3a1.0_all"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin/busybox").write_text(
        "#!/bin/sh\necho bin/busybox\necho bin/sh\necho sbin/init\n"
    )
    (folder / "bin/busybox").chmod(0o755)
    (cache / "packages/busybox-static").write_text(folder.name)


class FakeMirror:
    """Packages to be had from programs that stand in for apt: put `programs` first on PATH.

    Attributes:
        programs: the folder with `apt-cache` and `apt-get`.
        downloads: a file with one line for each archive that was downloaded.
    """

    def __init__(self, root: Path) -> None:
        self.programs = root / "programs"
        self.downloads = root / "downloads"
        self._root = root
        self._count = 0
        self.programs.mkdir(parents=True)
        self.downloads.write_text("")
        # What of apt's command lines is used; the last argument is the package's name.
        self._program(
            "apt-cache",
            f'for name; do :; done; cat "{root}/lists/$name" 2>/dev/null || '
            '{ echo "E: No packages found" >&2; exit 100; }',
        )
        self._program(
            "apt-get",
            f'for wanted; do :; done; echo "$wanted" >>"{self.downloads}"; '
            f'cp "{root}/pool/$wanted.deb" . 2>/dev/null || '
            '{ echo "E: Failed to fetch it  404  Not Found" >&2; exit 100; }',
        )
        (root / "lists").mkdir()
        (root / "pool").mkdir()

    def add(self, name: str, version: str, files: Mapping[str, bytes], depends: str = "") -> None:
        """Offer a package, in place of an older version of it."""
        self._count += 1
        folder = self._root / "build" / str(self._count)
        control = f"Package: {name}\nVersion: {version}\nArchitecture: all\n"
        control += f"Depends: {depends}\n" if depends else ""
        (folder / "DEBIAN").mkdir(parents=True)
        text = f"{control}Maintainer: nobody <nobody@localhost>\nDescription: none\n"
        (folder / "DEBIAN/control").write_text(text)
        for path, data in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)
        archive = self._root / "pool" / f"{name}={version}.deb"
        subprocess.run(
            ["dpkg-deb", "--root-owner-group", "-b", folder, archive],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        self._offer(name, f"{control}Filename: pool/{name}.deb\nSize: {archive.stat().st_size}\n")

    def lose(self, name: str, version: str) -> None:
        """Take a package's archive away, while the lists still name it."""
        (self._root / "pool" / f"{name}={version}.deb").unlink()

    def damage(self, name: str, version: str) -> None:
        """Cut a package's archive short."""
        archive = self._root / "pool" / f"{name}={version}.deb"
        archive.write_bytes(archive.read_bytes()[:200])

    def _offer(self, name: str, text: str) -> None:
        (self._root / "lists" / name).write_text(f"{text}\n")

    def _program(self, name: str, script: str) -> None:
        path = self.programs / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
