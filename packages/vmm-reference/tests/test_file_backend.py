from __future__ import annotations

import errno
import fcntl
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm_reference.backends import file
from vmm_reference.backends.file import FileBackend
from vmm_reference.errors import HostError

SIZE = 64 * 512


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(range(256)) * (SIZE // 256))
    return path


@pytest.fixture
def disk(image: Path) -> Iterator[FileBackend]:
    backend = FileBackend(str(image))
    yield backend
    backend.close()


def views(*pieces: bytes | bytearray) -> list[memoryview]:
    return [memoryview(piece) for piece in pieces]


# Opening.


def test_size_and_mode(image: Path) -> None:
    """An image is as large as its file, and may be opened for reading alone."""
    backend = FileBackend(str(image), read_only=True)
    assert (backend.size, backend.read_only) == (SIZE, True)
    with pytest.raises(OSError, match="Bad file descriptor"):
        backend.write(0, views(b"x"))
    backend.close()
    backend.close()


@pytest.mark.parametrize("size", [0, 1, 511, 513, SIZE + 100])
def test_size_must_be_whole_sectors(tmp_path: Path, size: int) -> None:
    """An image with a tail that no sector holds is refused, and the message says what to do."""
    path = tmp_path / "odd.img"
    path.write_bytes(bytes(size))
    with pytest.raises(HostError, match=rf"{size} bytes; make its size a multiple of 512"):
        FileBackend(str(path))
    assert path.stat().st_size == size


def test_what_is_no_image_is_refused(tmp_path: Path) -> None:
    """Folders, pipes, devices that are no disks and missing files are told apart, at once."""
    os.mkfifo(tmp_path / "pipe")
    cases = {
        tmp_path: "name a disk image",
        tmp_path / "pipe": "neither a file nor a block device",
        Path("/dev/null"): "neither a file nor a block device",
        tmp_path / "missing": "check the path",
    }
    for path, message in cases.items():
        for read_only in (False, True):
            with pytest.raises(HostError, match=message):
                FileBackend(str(path), read_only=read_only)


def test_refused_image_leaves_no_descriptor_open(tmp_path: Path) -> None:
    """Whatever is wrong with an image, nothing stays open."""
    (tmp_path / "odd.img").write_bytes(b"x")
    before = sorted(Path("/proc/self/fd").iterdir())
    for path in (tmp_path, tmp_path / "odd.img"):
        with pytest.raises(HostError):
            FileBackend(str(path), read_only=True)
    assert sorted(Path("/proc/self/fd").iterdir()) == before


def test_descriptor_is_not_inherited(disk: FileBackend) -> None:
    """A child process does not get the guest's disk."""
    assert fcntl.fcntl(disk._fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC


# The lock.


@pytest.mark.parametrize(
    ("first", "second", "allowed"),
    [(False, False, False), (False, True, False), (True, False, False), (True, True, True)],
)
def test_one_machine_writes_or_all_read(
    image: Path, first: bool, second: bool, allowed: bool
) -> None:
    """An image that is written belongs to one; any number may share it for reading."""
    one = FileBackend(str(image), read_only=first)
    if allowed:
        FileBackend(str(image), read_only=second).close()
    else:
        with pytest.raises(HostError, match="another machine uses it; stop that machine"):
            FileBackend(str(image), read_only=second)
    one.close()
    FileBackend(str(image)).close()


def test_lock_holds_against_another_process(disk: FileBackend, image: Path) -> None:
    """The lock is the kernel's, so another process is refused too."""
    program = "import sys; from vmm_reference.backends.file import FileBackend as F; F(sys.argv[1])"
    answer = subprocess.run(
        [sys.executable, "-c", program, str(image)], capture_output=True, text=True, check=False
    )
    assert answer.returncode == 1
    assert "another machine uses it" in answer.stderr


def test_where_nobody_can_lock_an_image_is_used_unlocked(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mount without locks, such as of a network, is no reason to refuse; another user is."""

    def lock(number: int) -> Callable[..., object]:
        def fail(*_arguments: object) -> object:
            raise OSError(number, os.strerror(number))

        return fail

    for number in (errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL):
        monkeypatch.setattr(FileBackend, "_set_lock", lock(number))
        with closing(FileBackend(str(image))) as disk:
            assert disk.size == image.stat().st_size
    for number in (errno.EAGAIN, errno.EACCES):
        monkeypatch.setattr(FileBackend, "_set_lock", lock(number))
        with pytest.raises(HostError, match="another machine uses it"):
            FileBackend(str(image))


def test_an_image_that_can_not_have_a_size_keeps_its_own(image: Path) -> None:
    """Read-only, or changed outside to something that is no disk: the reason is named."""
    size = image.stat().st_size
    with closing(FileBackend(str(image), read_only=True)) as disk:
        with pytest.raises(HostError, match="it is read-only; change its size outside"):
            disk.resize(size + 512)
        assert (disk.size, image.stat().st_size) == (size, size)
    with closing(FileBackend(str(image))) as disk:
        with pytest.raises(HostError, match="change its size outside"):
            disk.resize(1 << 62)  # more than any file system takes
        assert image.stat().st_size == size
        for other in (size + 100, 0):
            os.truncate(image, other)
            with pytest.raises(HostError, match=f"it has {other} bytes; make it a multiple of 512"):
                disk.resize()
            assert disk.size == size
        os.truncate(image, 3 * size)
        disk.resize()
        assert disk.size == 3 * size


# Transfers.


def test_read_and_write_across_buffers(disk: FileBackend, image: Path) -> None:
    """Buffers of any sizes are one stream of bytes at the offset."""
    disk.write(510, views(b"ab", b"", b"cde"))
    out = bytearray(1), bytearray(6)
    disk.read(509, views(*out))
    assert b"".join(out) == b"\xfdabcde\x03"
    assert image.read_bytes()[510:515] == b"abcde"


def test_more_buffers_than_one_call_takes(disk: FileBackend) -> None:
    """More than IOV_MAX buffers take several calls, and stay in order."""
    data = os.urandom(3000)
    disk.write(100, views(*(data[n : n + 1] for n in range(3000))))
    out = bytearray(3000)
    disk.read(100, [memoryview(out)[n : n + 1] for n in range(3000)])
    assert out == data


def test_short_transfers_are_continued(disk: FileBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that moves fewer bytes than asked is asked again for the rest."""
    read, write = os.preadv, os.pwritev

    def some(buffers: list[memoryview]) -> list[memoryview]:
        first = next(buffer for buffer in buffers if len(buffer))
        return [first[: max(len(first) // 2, 1)]]

    monkeypatch.setattr(os, "preadv", lambda fd, to, at: read(fd, some(to), at))
    monkeypatch.setattr(os, "pwritev", lambda fd, of, at: write(fd, some(of), at))
    disk.write(7, views(b"0123456789", b"abc", b"", b"defghij"))
    out = bytearray(5), bytearray(15)
    disk.read(7, views(*out))
    assert b"".join(out) == b"0123456789abcdefghij"


def test_image_that_became_shorter(disk: FileBackend, image: Path) -> None:
    """Reading where the file has ended is an error, not zeros or an endless loop."""
    os.truncate(image, 512)
    with pytest.raises(OSError, match="ends before 512") as caught:
        disk.read(0, views(bytearray(1024)))
    assert caught.value.errno == errno.EIO


def test_flush_reaches_the_host(disk: FileBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flush is fdatasync of the image, and its failure is not swallowed."""
    seen: list[int] = []
    monkeypatch.setattr(os, "fdatasync", seen.append)
    disk.flush()
    assert seen == [disk._fd]

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "no")

    monkeypatch.setattr(os, "fdatasync", fail)
    with pytest.raises(OSError, match="no"):
        disk.flush()


# Discard and write zeroes.


def allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


@pytest.mark.parametrize("unmap", [False, True])
@pytest.mark.parametrize("able", [False, True])
def test_zeroes_are_zeroes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unmap: bool, able: bool
) -> None:
    """A range is zeros afterwards and nothing beside it, whether or not the host can do it."""
    if not able:
        monkeypatch.setattr(file, "_fallocate", refuse)
    path = tmp_path / "disk.img"
    path.write_bytes(b"\xaa" * 1_048_576)
    disk = FileBackend(str(path))
    disk.write_zeroes(4096, 700_160, unmap=unmap)
    disk.close()
    expected = b"\xaa" * 4096 + bytes(700_160) + b"\xaa" * (1_048_576 - 4096 - 700_160)
    assert path.read_bytes() == expected


def refuse(fd: int, mode: int, offset: int, length: int) -> None:
    raise OSError(errno.EOPNOTSUPP, "not here")


def test_discard_gives_space_back_where_the_host_can(tmp_path: Path) -> None:
    """A discarded range is a hole; the file keeps its size."""
    path = tmp_path / "disk.img"
    path.write_bytes(b"\xaa" * (1 << 20))
    disk = FileBackend(str(path))
    try:
        file._fallocate(disk._fd, file._PUNCH_HOLE | file._KEEP_SIZE, 0, 4096)
    except OSError as error:
        disk.close()
        pytest.skip(f"this file system punches no holes: {error}")
    before = allocated(path)
    disk.discard(1 << 18, 1 << 19)
    disk.close()
    assert allocated(path) <= before - (1 << 18)
    assert path.stat().st_size == 1 << 20


def test_discard_is_advice(disk: FileBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the host can't discard nothing happens; where it fails, that is told."""
    monkeypatch.setattr(file, "_fallocate", refuse)
    disk.discard(0, 512)

    def full(fd: int, mode: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(file, "_fallocate", full)
    with pytest.raises(OSError, match="full"):
        disk.discard(0, 512)
    with pytest.raises(OSError, match="full"):
        disk.write_zeroes(0, 512, unmap=True)
    with pytest.raises(OSError, match="full"):
        disk.write_zeroes(0, 512, unmap=False)


def test_block_devices_are_asked_by_ioctl(
    disk: FileBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a block device discard is BLKDISCARD and zeroing BLKZEROOUT, with writing as fallback."""
    seen: list[tuple[int, bytes]] = []

    def ioctl(fd: int, request: int, argument: bytes) -> int:
        seen.append((request, argument))
        if request == 0x127F and len(seen) > 2:
            raise OSError(errno.EOPNOTSUPP, "not here")
        return 0

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    disk._block = True
    disk.discard(512, 1024)
    disk.write_zeroes(0, 512, unmap=True)
    pair = (512).to_bytes(8, "little") + (1024).to_bytes(8, "little")
    assert seen == [(0x1277, pair), (0x127F, bytes(8) + (512).to_bytes(8, "little"))]
    disk.write_zeroes(512, 512, unmap=False)
    out = bytearray(1024)
    disk.read(256, views(out))
    assert out == bytes(range(256)) + bytes(512) + bytes(range(256))


# The oracle.

steps = st.lists(
    st.tuples(
        st.sampled_from(["read", "write", "zero", "unmap"]),
        st.integers(0, SIZE - 1),
        st.integers(0, 5000),
        st.lists(st.integers(0, 5000), max_size=4),
    ),
    max_size=15,
)


@given(steps)
def test_image_agrees_with_a_bytearray(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int, int, list[int]]]
) -> None:
    """Under any transfers in any pieces, an image holds what a bytearray holds."""
    path = tmp_path_factory.getbasetemp() / "oracle.img"
    path.write_bytes(bytes(SIZE))
    disk, model = FileBackend(str(path)), bytearray(SIZE)
    for number, (kind, offset, length, places) in enumerate(steps):
        length = min(length, SIZE - offset)
        bounds = [0, *sorted(min(place, length) for place in places), length]
        cuts = list(itertools.pairwise(bounds))
        if kind == "read":
            out = [bytearray(end - start) for start, end in cuts]
            disk.read(offset, views(*out))
            assert b"".join(out) == model[offset : offset + length]
        elif kind == "write":
            data = bytes([number + 1]) * length
            disk.write(offset, views(*(data[start:end] for start, end in cuts)))
            model[offset : offset + length] = data
        elif length:
            disk.write_zeroes(offset, length, unmap=kind == "unmap")
            model[offset : offset + length] = bytes(length)
    disk.close()
    assert path.read_bytes() == model
