"""Debian packages, downloaded and unpacked into the cache; nothing is ever installed.

`apt-get download` needs no root, and `dpkg-deb -x` runs no maintainer script.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from attrs import frozen

from .cache import cache_folder, new_file, new_folder
from .errors import PackageError
from .progress import Progress

__all__ = ["Package", "cached_package", "fetch_package", "find_tool"]

_UPDATE = "run `sudo apt-get update` and try again"
_SILENCE = "30"  # seconds without a byte from a mirror before apt tries again
_LONGEST = 1800.0  # seconds; a download slower than this will not end well


@frozen
class Package:
    """A package, unpacked.

    Attributes:
        name: of the real package, where the one asked for only points to it.
        version: Debian's, with epoch and revision.
        root: the folder that stands for the file system's root.
    """

    name: str
    version: str
    root: Path


@frozen
class _Candidate:
    name: str
    version: str
    architecture: str
    size: int

    @property
    def folder(self) -> str:
        version = self.version.replace(":", "%3a")  # as dpkg does: mounts take ":" for a separator
        return f"{self.name}_{version}_{self.architecture}"


def find_tool(name: str) -> str | None:
    """The path of a program, also where a user's PATH leaves out the system's folders."""
    path = os.environ.get("PATH", os.defpath)
    return shutil.which(name, path=f"{path}:/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin")


def cached_package(name: str) -> Package | None:
    """The package as an earlier fetch has left it, or None."""
    packages = cache_folder() / "packages"
    try:
        folder = (packages / name).read_text().strip()
    except OSError:
        return None
    real, _, rest = folder.partition("_")
    version = rest.rpartition("_")[0].replace("%3a", ":")
    root = packages / folder
    return Package(real, version, root) if root.is_dir() else None


def fetch_package(name: str, *, update: bool = False) -> Package:
    """The package, from the cache if it is there, else downloaded and unpacked.

    A package that only depends on a versioned kernel image stands for that one.

    Args:
        name: as apt knows it.
        update: take the newest that apt's lists name, also where the cache has an older one.

    Raises:
        PackageError: apt does not know it, cannot download it, or the package is damaged.
    """
    if not update and (known := cached_package(name)):
        return known
    candidate = _candidate(name)
    packages = cache_folder() / "packages"
    root = packages / candidate.folder
    try:
        if not root.is_dir():
            _download_and_unpack(candidate, root)
        for alias in {name, candidate.name}:
            with new_file(packages / alias) as record:
                record.write_text(candidate.folder + "\n")
    except OSError as error:
        raise PackageError(
            f"the cache {packages} cannot be written: {error}",
            "free or permit it, or name another folder in VMM_CACHE",
        ) from error
    return Package(candidate.name, candidate.version, root)


def _candidate(name: str) -> _Candidate:
    """What apt's lists, as they are on this system, offer under a name."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9+.-]+", name):
        raise PackageError(f"{name!r} is not the name of a Debian package")
    for _ in range(3):  # a package that points to one that points to the real one
        fields = _show(name)
        pointed = re.search(r"\b(linux-image-\d[a-z0-9+.-]*)", fields.get("Depends", ""))
        if not pointed:
            break
        name = pointed[1]
    if "Filename" not in fields or not fields.get("Size", "").isdigit():
        raise PackageError(f"apt's lists name no archive that has the package {name}", _UPDATE)
    return _Candidate(name, fields["Version"], fields["Architecture"], int(fields["Size"]))


def _show(name: str) -> dict[str, str]:
    program = _apt("apt-cache", name)
    shown = _run([program, "show", "--no-all-versions", name])
    if shown.returncode:
        raise PackageError(f"apt's lists do not have the package {name}", _UPDATE)
    lines = shown.stdout.partition("\n\n")[0].splitlines()
    parts = (line.partition(": ") for line in lines if not line.startswith(" "))
    return {key: value for key, _, value in parts}


def _apt(program: str, name: str) -> str:
    found = find_tool(program)
    if found is None:
        raise PackageError(
            f"package {name} is not in the cache, and there is no {program} here to fetch it",
            "give a kernel of your own with --kernel, or fill the cache on a Debian system",
        )
    return found


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
        env=os.environ | {"LC_ALL": "C"},
    )


def _download_and_unpack(candidate: _Candidate, root: Path) -> None:
    apt_get = _apt("apt-get", candidate.name)
    dpkg_deb = _apt("dpkg-deb", candidate.name)
    with new_folder(root) as folder:
        archives = folder / "archives"
        archives.mkdir()
        options = ["-q", "-o", f"Acquire::http::Timeout={_SILENCE}", "-o", "Acquire::Retries=2"]
        if os.geteuid() == 0:
            # apt would leave root's rights for this, but its user cannot write to our folder.
            options += ["-o", "APT::Sandbox::User=root"]
        wanted = f"{candidate.name}={candidate.version}"
        _watch(
            [apt_get, *options, "download", wanted],
            archives,
            Progress(f"downloading {candidate.name}", candidate.size / 1e6, "MB"),
            f"package {candidate.name} {candidate.version} cannot be downloaded",
            f"see that the network works, then {_UPDATE}",
        )
        for archive in archives.glob("*.deb"):
            _watch(
                [dpkg_deb, "-x", str(archive), str(folder)],
                folder,
                Progress(f"unpacking {candidate.name}"),
                f"{archive.name} cannot be unpacked",
                "see that the disk has room, and try again",
            )
        shutil.rmtree(archives)
        _index_modules(folder)


def _watch(command: list[str], folder: Path, progress: Progress, problem: str, remedy: str) -> None:
    """Run a command in a folder to its end, reporting how large the files there have become."""
    end = time.monotonic() + _LONGEST
    environment = os.environ | {"LC_ALL": "C"}
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
        try:
            while process.poll() is None:
                if time.monotonic() > end:
                    raise PackageError(f"{problem}: it has taken {_LONGEST:.0f} s", remedy)
                time.sleep(0.05)
                progress.update(sum(map(_size, folder.glob("*.deb"))) / 1e6)
        finally:
            process.kill()
            process.wait()
            progress.end()
        if process.returncode:
            log.seek(0)
            lines = [line for line in log.read().splitlines() if line.startswith(("E:", "dpkg"))]
            raise PackageError(": ".join([problem, *lines[:2]]), remedy)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # apt moves its files about while we look
        return 0


def _index_modules(root: Path) -> None:
    """Give a kernel's modules the index that its maintainer script would have made.

    Our own builder does without; modprobe of kmod, in a lab over this folder, does not.
    """
    if not (root / "lib").exists() and (root / "usr/lib/modules").is_dir():
        (root / "lib").symlink_to("usr/lib")
    depmod = find_tool("depmod")
    for folder in (root / "lib/modules").glob("*"):
        if depmod is not None:
            _run([depmod, "-b", str(root), folder.name])
