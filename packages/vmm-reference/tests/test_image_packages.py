"""Packages: fetched once, unpacked whole or not at all, and errors that say what to do."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vmm_reference.image.cache import cache_folder, cached_image, content_key, deliver, new_folder
from vmm_reference.image.errors import ImageError, PackageError
from vmm_reference.image.kernels import debian_kernel, local_kernel
from vmm_reference.image.packages import cached_package, fetch_package, find_tool
from vmm_reference.image.progress import Progress
from vmm_reference.image.testing import FakeMirror, make_kernel, make_module

META = "linux-image-cloud-amd64"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("VMM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def mirror(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> FakeMirror:
    """Programs in apt's place that offer a kernel, by a package that only points to it."""
    if find_tool("dpkg-deb") is None:
        pytest.skip("the program dpkg-deb is not installed")
    mirror = FakeMirror(tmp_path / "mirror")
    monkeypatch.setenv("PATH", f"{mirror.programs}:{os.environ['PATH']}")
    offer_kernel(mirror, "6.9.0-1-cloud-amd64", "6.9.1-1")
    return mirror


def offer_kernel(mirror: FakeMirror, version: str, revision: str) -> None:
    folder = f"lib/modules/{version}"
    mirror.add(
        f"linux-image-{version}",
        revision,
        {
            f"boot/vmlinuz-{version}": b"kernel",
            f"{folder}/kernel/virtio.ko": make_module(),
            f"{folder}/modules.builtin": b"",
            f"{folder}/modules.order": b"",
        },
    )
    mirror.add(META, revision, {}, depends=f"linux-image-{version} (= {revision})")


def test_kernel_is_fetched_once(mirror: FakeMirror, cache: Path) -> None:
    """The first call downloads and unpacks the real package; later ones need nothing but files."""
    kernel = debian_kernel()
    assert kernel.version == "6.9.0-1-cloud-amd64"
    assert kernel.package == "linux-image-6.9.0-1-cloud-amd64"
    assert kernel.vmlinuz.read_bytes() == b"kernel"
    assert "virtio" in kernel.tree()
    assert cache in kernel.vmlinuz.parents
    for program in mirror.programs.iterdir():
        program.write_text("#!/bin/sh\nexit 100\n")
    assert debian_kernel() == kernel
    assert fetch_package(kernel.package) == cached_package(META)
    assert len(mirror.downloads.read_text().split()) == 1
    assert list(cache.rglob(".*")) == []


def test_update_takes_a_newer_one(mirror: FakeMirror) -> None:
    """A newer kernel in apt's lists is taken when asked for, and not before."""
    old = debian_kernel()
    offer_kernel(mirror, "6.9.0-2-cloud-amd64", "6.9.2-1")
    assert debian_kernel() == old
    new = debian_kernel(update=True)
    assert new.version == "6.9.0-2-cloud-amd64"
    assert debian_kernel() == new
    assert old.vmlinuz.exists()


def test_version_with_an_epoch(mirror: FakeMirror) -> None:
    """A colon in a version does not get into a path, where mounts take it for a separator."""
    mirror.add("tool", "1:2.0", {"bin/tool": b"x"})
    package = fetch_package("tool")
    assert (package.name, package.version) == ("tool", "1:2.0")
    assert ":" not in str(package.root)
    assert cached_package("tool") == package


@pytest.mark.parametrize("harm", ["lose", "damage"])
def test_failure_leaves_nothing(mirror: FakeMirror, cache: Path, harm: str) -> None:
    """An archive that is gone or damaged is one clear error, and nothing half-made stays."""
    mirror.add("tool", "1.0", {"bin/tool": b"x"})
    getattr(mirror, harm)("tool", "1.0")
    with pytest.raises(PackageError, match="tool") as caught:
        fetch_package("tool")
    assert "\n" not in str(caught.value)
    assert caught.value.remedy
    assert cached_package("tool") is None
    assert list((cache / "packages").iterdir()) == []
    mirror.add("tool", "1.0", {"bin/tool": b"x"})
    assert (fetch_package("tool").root / "bin/tool").read_bytes() == b"x"


def test_empty_lists(mirror: FakeMirror) -> None:
    """A package that apt's lists do not have is an error that says how to get lists."""
    with pytest.raises(PackageError, match="sudo apt-get update"):
        fetch_package("unheard-of")


def test_installed_but_not_offered(mirror: FakeMirror) -> None:
    """A package that apt knows only as installed can't be downloaded: the lists are empty."""
    mirror.add("tool", "1.0", {})
    listing = mirror.programs.parent / "lists/tool"
    lines = listing.read_text().splitlines()
    listing.write_text("\n".join(line for line in lines if not line.startswith("Filename")) + "\n")
    with pytest.raises(PackageError, match="sudo apt-get update"):
        fetch_package("tool")


def test_no_apt(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without apt, the error names the package and the way around it."""
    monkeypatch.setattr("vmm_reference.image.packages.find_tool", lambda name: None)
    with pytest.raises(PackageError, match=r"linux-image-cloud-amd64.*--kernel"):
        debian_kernel()


@pytest.mark.parametrize("name", ["", "x", "../etc", "-o", "a b", "Tool"])
def test_names_that_are_none(cache: Path, name: str) -> None:
    """What is no package's name never reaches apt's command line."""
    with pytest.raises(PackageError, match="not the name"):
        fetch_package(name)


def test_two_processes_at_once(mirror: FakeMirror, cache: Path) -> None:
    """Processes that fetch the same package at the same time both get it, whole."""
    files = {f"usr/share/{number}": bytes(1000) for number in range(200)}
    mirror.add("tool", "1.0", files)
    program = "from vmm_reference.image.packages import fetch_package as f; print(f('tool').root)"
    racers = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    answers = {racer.communicate(timeout=50)[0].strip() for racer in racers}
    assert [racer.returncode for racer in racers] == [0, 0, 0]
    assert answers == {str(cache / "packages/tool_1.0_all")}
    assert len(list((cache / "packages/tool_1.0_all/usr/share").iterdir())) == 200
    assert sorted(path.name for path in (cache / "packages").iterdir()) == ["tool", "tool_1.0_all"]


def test_unwritable_cache(mirror: FakeMirror, tmp_path: Path, cache: Path) -> None:
    """A cache that can't be written is an error that names it and the way to another."""
    cache.write_text("a file where a folder should be")
    with pytest.raises(PackageError, match="VMM_CACHE"):
        fetch_package(META)


def test_no_such_flavour() -> None:
    """A flavour that Debian does not have is refused with those it has."""
    with pytest.raises(ImageError, match=r"'tiny'.*cloud or generic"):
        debian_kernel("tiny")


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The variable of our own counts first, then XDG's where it is absolute, then the home."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("VMM_CACHE", "~/mine")
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("VMM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/vmm-reference")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == tmp_path / ".cache/vmm-reference"


def test_own_kernel(tmp_path: Path) -> None:
    """A kernel of one's own tells its version; its modules are found beside it or given."""
    made = make_kernel(tmp_path / "unpacked", {"virtio.ko": make_module()}, version="6.9.1-own+")
    assert local_kernel(made.vmlinuz) == made
    alone = tmp_path / "alone/bzImage"
    alone.parent.mkdir()
    alone.write_bytes(made.vmlinuz.read_bytes())
    assert local_kernel(alone).modules is None
    assert local_kernel(alone, made.modules).modules == made.modules
    vmlinux = alone.with_name("vmlinux")
    vmlinux.write_bytes(b"\x7fELF" + bytes(5000) + b"Linux version 5.4.0-rc1 (x@y)\0")
    assert local_kernel(vmlinux).version == "5.4.0-rc1"


def test_what_is_no_kernel(tmp_path: Path) -> None:
    """A file that is absent, empty, a folder or something else is named in one line."""
    text = tmp_path / "text"
    text.write_text("hello")
    empty = tmp_path / "empty"
    empty.touch()
    for path in (text, empty, tmp_path, tmp_path / "absent"):
        with pytest.raises(ImageError, match=str(path)) as caught:
            local_kernel(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(ImageError, match="not a folder"):
        local_kernel(make_kernel(tmp_path / "k", {}).vmlinuz, text)


def test_image_is_rebuilt_when_an_input_changes(cache: Path, tmp_path: Path) -> None:
    """A cached image is reused until a file that it was made from changes or goes."""
    source = tmp_path / "source"
    source.write_text("one")
    built: list[str] = []

    def build(file: Path) -> list[Path]:
        built.append(source.read_text())
        file.write_text(built[-1])
        return [source]

    assert cached_image("x.img", build) == cached_image("x.img", build)
    assert built == ["one"]
    source.write_text("three")
    assert cached_image("x.img", build).read_text() == "three"
    assert cached_image("x.img", build).read_text() == "three"
    assert built == ["one", "three"]
    source.unlink()
    with pytest.raises(FileNotFoundError):
        cached_image("x.img", build)
    leftovers = [path.name for path in (cache / "images").iterdir() if path.name[0] == "."]
    assert leftovers == []


def test_abandoned_work_is_removed(tmp_path: Path) -> None:
    """What a killed process left a day ago goes; what another works on stays."""
    for name, age in (("old", 2 * 86400), ("fresh", 60)):
        folder = tmp_path / f".vmm-new-{name}"
        folder.mkdir()
        when = folder.stat().st_mtime - age
        os.utime(folder, (when, when))
    with new_folder(tmp_path / "made"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [".vmm-new-fresh", "made"]


def test_copies_keep_their_holes(tmp_path: Path) -> None:
    """A sparse file is copied with its data where it was, and takes no more room."""
    old, new = tmp_path / "old", tmp_path / "new"
    with old.open("wb") as file:
        file.truncate(64 << 20)
        for place in (0, 5 << 20, (64 << 20) - 4):
            file.seek(place)
            file.write(b"data")
    deliver(old, new)
    assert new.stat().st_size == old.stat().st_size
    assert new.stat().st_blocks <= old.stat().st_blocks + 64
    assert content_key(new) == content_key(old)
    old.write_bytes(b"")
    deliver(old, new)
    assert new.read_bytes() == b""


def test_places_that_take_no_image(tmp_path: Path) -> None:
    """A folder, a device or a path without a folder is refused, and nothing is made there."""
    source = tmp_path / "source"
    source.write_text("x")
    for place in (tmp_path, Path("/dev/null"), tmp_path / "absent/file", source / "below"):
        with pytest.raises(ImageError, match=str(place)) as caught:
            deliver(source, place)
        assert "\n" not in str(caught.value)
    assert Path("/dev/null").is_char_device()
    assert list(tmp_path.iterdir()) == [source]


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_progress_keeps_silent_for_two_seconds() -> None:
    """Short tasks print nothing; long ones one line on a terminal, few lines elsewhere."""
    now = 0.0
    plain, terminal = io.StringIO(), Terminal()
    reports = [
        Progress("fetching", 50, "MB", stream=stream, clock=lambda: now)
        for stream in (plain, terminal)
    ]
    for tick in range(19):
        now = tick / 10
        for report in reports:
            report.update(tick)
    assert plain.getvalue() == terminal.getvalue() == ""
    for tick in range(20, 300):
        now = tick / 10
        for report in reports:
            report.update(tick / 10)
    for report in reports:
        report.end()
    assert plain.getvalue().splitlines()[0] == "fetching: 2 of 50 MB, 2 s"
    assert len(plain.getvalue().splitlines()) == 3
    assert "\n" not in terminal.getvalue()
    assert terminal.getvalue().endswith("\r\033[K")
