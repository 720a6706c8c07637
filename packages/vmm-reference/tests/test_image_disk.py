"""Root disks: sound file systems, all root's, the same each time."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from vmm_reference.cli.image import image
from vmm_reference.image.disk import SMALLEST_DISK, build_disk
from vmm_reference.image.errors import DiskError, ImageError
from vmm_reference.image.packages import find_tool
from vmm_reference.image.testing import fake_busybox

TOOLS = {name: find_tool(name) for name in ("mkfs.ext4", "e2fsck", "debugfs")}

pytestmark = pytest.mark.skipif(
    None in TOOLS.values(), reason="mkfs.ext4, e2fsck or debugfs is not installed"
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that has a busybox."""
    monkeypatch.setenv("VMM_CACHE", str(tmp_path / "cache"))
    fake_busybox(tmp_path / "cache")
    return tmp_path / "cache"


def debugfs(disk: Path, request: str) -> str:
    command = [str(TOOLS["debugfs"]), "-R", request, str(disk)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout


def sound(disk: Path) -> bool:
    command = [str(TOOLS["e2fsck"]), "-fn", str(disk)]
    return subprocess.run(command, capture_output=True, check=False, timeout=20).returncode == 0


def test_disk_is_sound_and_sparse(tmp_path: Path) -> None:
    """The file system passes its check, holds an init and a shell, and takes less than its size."""
    disk = build_disk(tmp_path / "root.img", size=512 << 20)
    assert sound(disk)
    assert disk.stat().st_size == 512 << 20
    assert disk.stat().st_blocks * 512 < 64 << 20
    assert "bin/busybox" in debugfs(disk, "stat /sbin/init")
    assert "::sysinit:/etc/init.d/mount" in debugfs(disk, "cat /etc/inittab")
    assert "Mode:  0755" in debugfs(disk, "stat /etc/init.d/console")
    assert "Mode:  01777" in debugfs(disk, "stat /tmp")
    assert "Filesystem volume name:   root" in debugfs(disk, "show_super_stats -h")


def test_same_request_same_bytes(tmp_path: Path, cache: Path) -> None:
    """Two disks of one request are the same to the last byte, also when nothing is cached."""
    first = build_disk(tmp_path / "one.img", size=SMALLEST_DISK, files={"a": b"1"}).read_bytes()
    for path in (cache / "images").iterdir():
        path.unlink()
    assert build_disk(tmp_path / "two.img", size=SMALLEST_DISK, files={"a": b"1"}).read_bytes() == (
        first
    )
    other = build_disk(tmp_path / "three.img", size=SMALLEST_DISK, files={"a": b"2"})
    assert debugfs(other, "show_super_stats -h") != debugfs(
        tmp_path / "one.img", "show_super_stats -h"
    )


def test_cached_disk_is_never_the_users(tmp_path: Path) -> None:
    """What a guest writes to its disk is not in the next one."""
    disk = build_disk(tmp_path / "root.img", size=SMALLEST_DISK)
    with disk.open("r+b") as file:
        file.write(b"guest was here")
    assert sound(build_disk(tmp_path / "next.img", size=SMALLEST_DISK))
    assert build_disk(None, size=SMALLEST_DISK) == build_disk(None, size=SMALLEST_DISK)


def test_everything_is_roots(tmp_path: Path) -> None:
    """Whoever builds it, under whatever umask, all on the disk belongs to root, at the epoch."""
    folder = tmp_path / "data"
    (folder / "sub folder").mkdir(parents=True)
    (folder / "sub folder").chmod(0o750)
    (folder / "sub folder/file").write_text("data")
    (folder / "link").symlink_to("sub folder")
    if os.geteuid() == 0:
        for path in (folder / "sub folder", folder / "sub folder/file"):
            os.chown(path, 1234, 1234)
    before = os.umask(0o077)
    try:
        disk = build_disk(tmp_path / "r.img", size=SMALLEST_DISK, files={"srv/data": folder})
    finally:
        os.umask(before)
    assert sound(disk)
    assert debugfs(disk, 'cat "/srv/data/sub folder/file"') == "data"
    for place, mode in (
        ("/", "0755"),
        ("/srv", "0755"),
        ("/srv/data/sub folder", "0750"),
        ("/srv/data/sub folder/file", None),
        ("/srv/data/link", "0777"),
        ("/bin/busybox", "0755"),
    ):
        status = debugfs(disk, f'stat "{place}"')
        assert "User:     0   Group:     0" in status
        assert "mtime: 0x00000001" in status
        assert mode is None or f"Mode:  {mode}" in status


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_nobody_can_build_one(tmp_path: Path) -> None:
    """A user without any rights builds the same disk."""
    mine = build_disk(tmp_path / "root.img", size=SMALLEST_DISK)
    request = f"build_disk(Path('root.img'), size={SMALLEST_DISK})"
    imports = "from pathlib import Path; from vmm_reference.image.disk import build_disk"

    def as_nobody(folder: str, program: str) -> int:
        environment = os.environ | {
            "HOME": folder,
            "TMPDIR": folder,
            "VMM_CACHE": f"{folder}/cache",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        try:
            return subprocess.run(
                [sys.executable, "-c", program],
                check=False,
                cwd=folder,
                env=environment,
                user=65534,
                group=65534,
                extra_groups=[],
                timeout=50,
            ).returncode
        except PermissionError:  # not even the interpreter
            return 126

    with tempfile.TemporaryDirectory() as folder:  # pytest's own lets nobody else pass
        fake_busybox(Path(folder, "cache"))
        for path in (Path(folder), *Path(folder).rglob("*")):
            os.chown(path, 65534, 65534)
        if as_nobody(folder, imports):
            pytest.skip("nobody may not read this installation")
        assert as_nobody(folder, f"{imports}; {request}") == 0
        assert Path(folder, "root.img").read_bytes() == mine.read_bytes()


def test_files_replace_ours(tmp_path: Path) -> None:
    """A file added where we have one, or a link, takes its place."""
    files: dict[str, Path | bytes] = {
        "/etc/hostname": b"other\n",
        "/sbin/init": b"#!/bin/sh\n",
        "/usr/bin/": tmp_path,
    }
    (tmp_path / "tool").write_text("tool")
    disk = build_disk(tmp_path / "r.img", size=SMALLEST_DISK, files=files)
    assert debugfs(disk, "cat /etc/hostname") == "other\n"
    assert "Type: regular    Mode:  0755" in debugfs(disk, "stat /sbin/init")
    assert debugfs(disk, "cat /usr/bin/tool") == "tool"


def test_nothing_is_written_outside(tmp_path: Path) -> None:
    """Neither a place above the root nor a link among the files leads out of the image."""
    outside = tmp_path / "outside"
    outside.mkdir()
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "way").symlink_to(outside)
    requests: list[dict[str, Path | bytes]] = [
        {"../x": b""},
        {"a/../../x": b""},
        {"": b""},
        {"data": folder, "data/way/x": b""},
    ]
    for files in requests:
        with pytest.raises(ImageError, match="place"):
            build_disk(None, size=SMALLEST_DISK, files=files)
    assert list(outside.iterdir()) == []


def test_what_cannot_be_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Impossible sizes, labels and contents are one line each, and leave no file."""
    output = tmp_path / "root.img"
    large = tmp_path / "large"
    large.write_bytes(os.urandom(SMALLEST_DISK))
    (tmp_path / 'odd"name').touch()
    requests: list[tuple[dict[str, Any], str]] = [
        ({"size": 0}, "disk size 0"),
        ({"size": SMALLEST_DISK + 1}, "multiple of 4096"),
        ({"label": "x" * 17}, "16 bytes"),
        ({"size": SMALLEST_DISK, "files": {"large": large}}, "--size"),
        ({"files": {"absent": tmp_path / "absent"}}, "absent"),
        ({"files": {'odd"name': tmp_path / 'odd"name'}}, "quotation"),
        ({"files": {"null": Path("/dev/null")}}, "neither a file"),
    ]
    for arguments, words in requests:
        with pytest.raises(ImageError, match=words) as caught:
            build_disk(output, **arguments)
        assert "\n" not in str(caught.value)
    monkeypatch.setattr("vmm_reference.image.disk.find_tool", lambda name: None)
    with pytest.raises(DiskError, match=r"mkfs\.ext4.*e2fsprogs"):
        build_disk(output)
    assert not output.exists()


def test_command_builds_a_disk(tmp_path: Path) -> None:
    """The command prints the path, replaces nothing unasked, and refuses sizes that are none."""
    run = CliRunner().invoke
    output = tmp_path / "root.img"
    (tmp_path / "motd").write_text("hi")
    arguments = ["disk", str(output), "--size", "16M", "--add", f"{tmp_path}/motd:/etc/motd"]
    done = run(image, arguments)
    assert (done.exit_code, done.output) == (0, f"{output}\n")
    assert debugfs(output, "cat /etc/motd") == "hi"
    refused = run(image, arguments)
    assert refused.exit_code == 2
    assert "--force" in refused.output
    assert run(image, [*arguments, "--force"]).exit_code == 0
    for size in ("", "M", "1X", "-1M", "1.5G", "٣M"):
        assert run(image, [*arguments, "--force", "--size", size]).exit_code == 2
