"""The cache of unpacked kernels: right whatever happens to its folder, and fast when warm."""

from __future__ import annotations

import hashlib
import os
import time
from multiprocessing import get_context
from pathlib import Path

import pytest

from linux_loader.cache import DecompressionCache, default_folder
from linux_loader.source import Source

PIECE = b"payload"


class Unpacker:
    """Counts how often it is asked."""

    def __init__(self, result: bytes = b"kernel" * 1000) -> None:
        self.result = result
        self.calls = 0

    def __call__(self, piece: bytes) -> bytes:
        assert piece == PIECE
        self.calls += 1
        return self.result


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(b"head" + PIECE + b"tail")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "cache"


def settle(monkeypatch: pytest.MonkeyPatch, seconds: float = 10) -> None:
    """Make files that were changed just now look old enough to be remembered."""
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + seconds)


def get(folder: Path, image: Path, unpack: Unpacker) -> bytes:
    with Source.open(image) as source:
        found = DecompressionCache(folder).open(source, 4, len(PIECE), unpack)
        with found:
            return found.read_up_to(0, len(unpack.result))


def test_the_second_time_nothing_is_unpacked(folder: Path, image: Path) -> None:
    """A payload is unpacked once, and found by its hash later."""
    unpack = Unpacker()
    for _ in range(3):
        assert get(folder, image, unpack) == unpack.result
    assert unpack.calls == 1
    digest = hashlib.sha256(PIECE).hexdigest()
    assert [path.name for path in folder.glob("*.elf")] == [f"{digest}.elf"]
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_known_file_is_not_even_hashed(
    folder: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once a settled file was seen, path, size and times are enough."""
    settle(monkeypatch)
    unpack = Unpacker()
    get(folder, image, unpack)
    monkeypatch.setattr(hashlib, "sha256", None)
    assert get(folder, image, unpack) == unpack.result
    assert unpack.calls == 1


def test_a_file_changed_just_now_is_not_remembered(folder: Path, image: Path) -> None:
    """Within two seconds of its last change a file's times do not name its content."""
    get(folder, image, Unpacker())
    assert not (folder / "by-stat").exists()


def test_a_changed_file_is_unpacked_anew(
    folder: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another payload at the same path, of the same size, is not taken for the first."""
    settle(monkeypatch)
    first = Unpacker()
    get(folder, image, first)
    image.write_bytes(b"head" + b"PAYLOAD" + b"tail")
    with Source.open(image) as source:
        cache = DecompressionCache(folder)
        with cache.open(source, 4, 7, lambda piece: piece.lower() * 2) as found:
            assert found.read_up_to(0, 14) == b"payloadpayload"


@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "directory"])
def test_a_damaged_entry_is_replaced(
    folder: Path, image: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An entry that is not whole counts as absent."""
    settle(monkeypatch)
    unpack = Unpacker()
    get(folder, image, unpack)
    (entry,) = folder.glob("*.elf")
    content = entry.read_bytes()
    entry.unlink()
    if damage == "cut":
        entry.write_bytes(content[:-100])
    elif damage == "empty":
        entry.write_bytes(b"")
    elif damage == "directory":
        entry.mkdir()
    assert get(folder, image, unpack) == unpack.result
    assert unpack.calls == 2


def test_an_unusable_folder_costs_only_time(tmp_path: Path, image: Path) -> None:
    """A file where the folder should be, or a folder others may write to, means no cache."""
    unpack = Unpacker()
    blocked = tmp_path / "file"
    blocked.write_bytes(b"")
    assert get(blocked, image, unpack) == unpack.result, "neither folder nor fresh"
    assert get(blocked / "below", image, unpack) == unpack.result
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    assert get(shared, image, unpack) == unpack.result
    assert list(shared.iterdir()) == []
    assert unpack.calls == 3


def test_a_full_disk_leaves_nothing_behind(
    folder: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the entry cannot be written, the kernel is still returned and no piece of it stays."""

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert get(folder, image, Unpacker()) == Unpacker().result
    assert list(folder.iterdir()) == []


def test_old_entries_go(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen kernels are kept, the newest; links to the others go with them."""
    settle(monkeypatch)
    for index in range(18):
        path = tmp_path / f"image{index}"
        path.write_bytes(bytes([index]) * 16)
        with Source.open(path) as source:
            DecompressionCache(folder).open(source, 0, 16, lambda piece: piece * 2).close()
        newest = max(folder.glob("*.elf"), key=lambda item: item.stat().st_mtime_ns)
        os.utime(newest, (index, index))
    assert len(list(folder.glob("*.elf"))) == 16
    assert all(link.exists() for link in (folder / "by-stat").iterdir())


def test_forgetting_removes_only_its_own(folder: Path, image: Path, tmp_path: Path) -> None:
    """A kernel that did not come from the folder is left alone."""
    get(folder, image, Unpacker())
    cache = DecompressionCache(folder)
    with Source.open(image) as source:
        cache.forget(source)
        assert image.exists()
        with cache.open(source, 4, len(PIECE), Unpacker()) as kernel:
            cache.forget(kernel)
    assert list(folder.glob("*.elf")) == []


def _race(arguments: tuple[str, str]) -> bytes:
    folder, image = arguments
    return get(Path(folder), Path(image), Unpacker())


def test_zeros_are_known_and_not_copied(folder: Path, tmp_path: Path) -> None:
    """A kernel's zeros come back with it, from its entry or by its file's state."""
    data = b"x" * 70_000 + bytes(300_000) + b"y" * 70_000 + bytes(100_000)
    zeros = ((131072, 327680), (458752, 524288))
    path = tmp_path / "image"
    path.write_bytes(PIECE)
    for _ in range(2):
        with Source.open(path) as source:
            kernel = DecompressionCache(folder).open(source, 0, len(PIECE), Unpacker(data))
            with kernel:
                assert kernel.zeros == zeros
                assert kernel.data_ranges(100_000, 500_000) == [
                    (100_000, 131072),
                    (327680, 458752),
                ]
                assert kernel.data_ranges(131072, 327680) == []
                assert kernel.data_ranges(0, 10) == [(0, 10)]


def test_zeros_of_plain_kernels_are_remembered(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A settled file is searched once; a list that cannot be right is not believed."""
    path = tmp_path / "vmlinux"
    path.write_bytes(b"x" * 65536 + bytes(131072))
    with Source.open(path) as source:
        DecompressionCache(folder).know_zeros(source)
        assert source.zeros == (), "changed just now"
    settle(monkeypatch)
    for _ in range(2):
        with Source.open(path) as source:
            DecompressionCache(folder).know_zeros(source)
            assert source.zeros == ((65536, 196608),)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with Source.open(path) as source:
        elsewhere = DecompressionCache(tmp_path / "elsewhere")
        elsewhere.know_zeros(source)
        assert source.zeros == (), "not worth it where it cannot be written down"
    (known,) = (folder / "by-stat").glob("*.zeros")
    for wrong in (b"123", bytes(16), (5).to_bytes(8, "little") * 2, b"\xff" * 32):
        known.write_bytes(wrong)
        with Source.open(path) as source:
            DecompressionCache(folder).know_zeros(source)
            assert source.zeros == ()


def test_racing_processes_all_get_the_kernel(folder: Path, image: Path) -> None:
    """Four processes at once each read the whole kernel, and one entry remains."""
    with get_context("fork").Pool(4) as pool:
        results = pool.map(_race, [(str(folder), str(image))] * 16, chunksize=1)
    assert set(results) == {Unpacker().result}
    assert len([path for path in folder.iterdir() if path.is_file()]) == 1


def test_bytes_without_a_file_are_cached_too(folder: Path) -> None:
    """An image without a path is known by its hash alone."""
    unpack = Unpacker()
    for _ in range(2):
        source = Source.of_bytes(PIECE, "bytes")
        DecompressionCache(folder).open(source, 0, len(PIECE), unpack).close()
    assert unpack.calls == 1


def test_the_default_folder_follows_xdg(monkeypatch: pytest.MonkeyPatch) -> None:
    """XDG_CACHE_HOME decides, else ~/.cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert default_folder() == "/x/linux-loader"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/u")
    assert default_folder() == "/home/u/.cache/linux-loader"
