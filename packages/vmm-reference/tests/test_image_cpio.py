"""The newc archive: what is written is what is read, by us and by cpio."""

from __future__ import annotations

import stat
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm_reference.image.cpio import (
    Entry,
    character_device,
    directory,
    pack,
    regular,
    symlink,
    unpack,
    with_parents,
)
from vmm_reference.image.errors import CpioError
from vmm_reference.image.packages import find_tool

PARTS = st.text(
    st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=8
).filter(lambda part: part not in (".", ".."))
PERMISSIONS = st.integers(0, 0o7777)
NUMBERS = st.integers(0, 0xFFFF_FFFF)


@st.composite
def trees(draw: st.DrawFn) -> list[Entry]:
    """Entries with distinct names, each below folders that come before it."""
    folders, taken = [""], set()
    entries: list[Entry] = []
    for _ in range(draw(st.integers(0, 12))):
        parent = draw(st.sampled_from(folders))
        name = f"{parent}/{draw(PARTS)}".lstrip("/")
        if name in taken or name == "TRAILER!!!":
            continue
        taken.add(name)
        permissions = draw(PERMISSIONS)
        match draw(st.sampled_from(["file", "folder", "link", "device", "disk"])):
            case "file":
                entries.append(regular(name, draw(st.binary(max_size=40)), permissions))
            case "folder":
                entries.append(directory(name, permissions))
                folders.append(name)
            case "link":
                entries.append(symlink(name, draw(PARTS)))
            case "device":
                entries.append(character_device(name, draw(NUMBERS), draw(NUMBERS), permissions))
            case _:
                numbers = (draw(NUMBERS), draw(NUMBERS))
                entries.append(Entry(name, stat.S_IFBLK | permissions, rdev=numbers))
    return entries


@given(trees())
def test_reads_what_it_wrote(entries: list[Entry]) -> None:
    """An archive holds exactly the entries it was made of, in their order."""
    archive = pack(entries)
    assert unpack(archive) == entries
    assert len(archive) % 4 == 0
    assert pack(entries) == archive


@given(trees())
def test_parents_are_completed(entries: list[Entry]) -> None:
    """Whatever folders are missing, completed entries make an archive."""
    files = [entry for entry in entries if not stat.S_ISDIR(entry.mode)]
    completed = with_parents(files)
    assert unpack(pack(completed)) == completed
    assert [entry for entry in completed if not stat.S_ISDIR(entry.mode)] == files


@given(trees())
def test_own_folders_keep_their_permissions(entries: list[Entry]) -> None:
    """A folder that is named itself comes once, as it was given, before what lies in it."""
    completed = with_parents(reversed(entries))
    assert sorted(unpack(pack(completed)), key=lambda entry: entry.name) == sorted(
        entries, key=lambda entry: entry.name
    )


@given(trees().filter(bool), st.data())
def test_cut_short_is_an_error(entries: list[Entry], data: st.DataObject) -> None:
    """No beginning of an archive passes for a whole one."""
    archive = pack(entries)
    trailer = archive.rindex(b"070701")
    with pytest.raises(CpioError):
        unpack(archive[: data.draw(st.integers(0, trailer + 110))])


@given(st.binary(max_size=300))
def test_noise_is_an_error(noise: bytes) -> None:
    """Bytes that are no archive raise the error that says so."""
    with pytest.raises(CpioError):
        unpack(noise)


def test_number_field_with_letters() -> None:
    """A header whose field is no hexadecimal number names its offset."""
    archive = bytearray(pack([directory("a")]))
    archive[10:14] = b"what"
    with pytest.raises(CpioError, match="offset 0"):
        unpack(bytes(archive))


@pytest.mark.parametrize("name", ["", "/etc", "etc/", "a//b", "./a", "a/../b", "..", "a\0b"])
def test_names_that_lead_elsewhere(name: str) -> None:
    """A name that is not a plain path below the root is refused."""
    with pytest.raises(CpioError, match="plain path"):
        pack([regular(name, b"")])


@pytest.mark.parametrize(
    "entries",
    [
        [regular("a", b""), regular("a", b"")],
        [regular("a/b", b"")],
        [regular("a", b""), regular("a/b", b"")],
        [regular("a/b", b""), directory("a")],
        [regular("TRAILER!!!", b"")],
        [regular("x" * 4096, b"")],
        [Entry("a", 0o644)],
        [Entry("a", 0x1FFFF)],
        [Entry("a", stat.S_IFDIR | 0o755, b"data")],
        [symlink("a", "")],
        [symlink("a", "x" * 4096)],
        [character_device("a", -1, 0)],
    ],
    ids=str,
)
def test_what_the_kernel_would_lose(entries: list[Entry]) -> None:
    """What the kernel would skip or misread is refused when the archive is made."""
    with pytest.raises(CpioError):
        pack(entries)


def test_cpio_reads_it(tmp_path: Path) -> None:
    """The program cpio lists and unpacks an archive as it was meant."""
    program = find_tool("cpio")
    if program is None:
        pytest.skip("the program cpio is not installed")
    entries = with_parents(
        [
            regular("etc/motd", b"hello\n", 0o640),
            regular("empty", b""),
            symlink("usr/bin/sh", "../../bin/busybox"),
            directory("tmp", 0o1777),
        ]
    )
    archive = pack([*entries, character_device("console", 5, 1)])
    listing = subprocess.run(
        [program, "-tv", "--quiet"], input=archive, capture_output=True, check=True, timeout=20
    ).stdout.decode()
    rows = [line.split() for line in listing.splitlines()]
    assert [row[-1] for row in rows if "->" not in row] == [
        "etc", "etc/motd", "empty", "usr", "usr/bin", "tmp", "console",
    ]  # fmt: skip
    assert rows[1][:5] == ["-rw-r-----", "1", "root", "root", "6"]
    assert "usr/bin/sh -> ../../bin/busybox" in listing
    assert rows[-1][:6] == ["crw-------", "1", "root", "root", "5,", "1"]
    subprocess.run(
        [program, "-id", "--quiet"], input=pack(entries), cwd=tmp_path, check=True, timeout=20
    )
    assert (tmp_path / "etc/motd").read_bytes() == b"hello\n"
    assert (tmp_path / "usr/bin/sh").readlink() == Path("../../bin/busybox")
    assert stat.S_IMODE((tmp_path / "tmp").stat().st_mode) == 0o1777
