"""Distribution kernels as they are packaged: recognised, unpacked, planned and loaded."""

from __future__ import annotations

from binascii import crc32
from pathlib import Path

import pytest

from linux_loader import Format, Protocol, load
from linux_loader.elf import parse_elf
from linux_loader.source import Source
from linux_loader.testing import memory_map
from vm_memory import GuestAddress, GuestMemory

SIZE = 256 << 20


def find(folder: Path, pattern: str) -> list[Path]:
    """Return the images of that name, or skip the test with the reason."""
    found = sorted(path for path in folder.rglob(pattern) if path.is_file())
    if not found:
        pytest.skip(f"no {pattern} below {folder}")
    return found


def test_debian_kernels_load(images: Path, tmp_path: Path) -> None:
    """Every packaged kernel is unpacked, cached and mapped, and starts by either protocol."""
    for path in find(images, "vmlinuz-*-amd64"):
        for protocol in (Protocol.LINUX64, Protocol.PVH):
            with GuestMemory.from_ranges([(GuestAddress(0), SIZE)]) as guest:
                loaded = load(
                    guest, path, memory_map=memory_map(SIZE), protocol=protocol, cache=tmp_path
                )
                assert loaded.format is Format.BZIMAGE
                assert loaded.version.startswith(path.name.removeprefix("vmlinuz-"))
                assert any(guest.read(GuestAddress(loaded.entry.rip), 16))
                assert loaded.mapped > 16 << 20


def test_mapped_copied_and_unpacked_kernels_are_the_same(images: Path, tmp_path: Path) -> None:
    """The kernel in memory does not depend on the way it came there."""
    path = find(images, "vmlinuz-*-cloud-amd64")[0]
    seen = set()
    for cache, map_files, zeroed in (
        (None, True, False),
        (tmp_path, True, False),
        (tmp_path, False, False),
        (tmp_path, False, True),
    ):
        with GuestMemory.from_ranges([(GuestAddress(0), SIZE)]) as guest:
            loaded = load(
                guest,
                path,
                memory_map=memory_map(SIZE),
                cache=cache,
                map_files=map_files,
                zeroed=zeroed,
            )
            kernel = [item for item in loaded.plan.placements if item.name.startswith("kernel")]
            seen.add(
                tuple(crc32(guest.read(GuestAddress(item.address), item.size)) for item in kernel)
            )
            assert (loaded.mapped > 0) == (cache is not None and map_files)
    assert len(seen) == 1


def test_debian_kernels_run_their_own_decompressor(images: Path) -> None:
    """With kaslr the code starts at its preferred address and keeps room to unpack."""
    for path in find(images, "vmlinuz-*-amd64"):
        with GuestMemory.from_ranges([(GuestAddress(0), SIZE)]) as guest:
            loaded = load(guest, path, memory_map=memory_map(SIZE), kaslr=True)
            assert loaded.entry.rip == 0x1000200
            assert loaded.plan.find("kernel").size > 32 << 20


def test_an_unpacked_kernel_has_a_pvh_entry(images: Path, tmp_path: Path) -> None:
    """The vmlinux out of a packaged kernel is an ELF64 image that starts by PVH too."""
    path = find(images, "vmlinuz-*-cloud-amd64")[0]
    with GuestMemory.from_ranges([(GuestAddress(0), SIZE)]) as guest:
        load(guest, path, memory_map=memory_map(SIZE), cache=tmp_path)
        (vmlinux,) = tmp_path.glob("*.elf")
        with Source.open(vmlinux) as source:
            assert parse_elf(source).pvh_entry
        loaded = load(guest, vmlinux, memory_map=memory_map(SIZE))
        assert (loaded.format, loaded.protocol) == (Format.ELF64, Protocol.PVH)


def test_memtest86_starts(images: Path) -> None:
    """A boot image that is not Linux, with no payload, starts at its own entry."""
    path = find(images, "memtest86+x64.bin")[0]
    with GuestMemory.from_ranges([(GuestAddress(0), SIZE)]) as guest:
        loaded = load(guest, path, memory_map=memory_map(SIZE))
        assert (loaded.protocol, loaded.entry.rip) == (Protocol.LINUX64, 0x100200)
        assert loaded.version == "Memtest86+ v6.10"
    old = find(images, "memtest86+ia32.bin")[0]
    with GuestMemory.from_ranges([(GuestAddress(0), SIZE)]) as guest:
        loaded = load(guest, old, memory_map=memory_map(SIZE))
        assert (loaded.protocol, loaded.entry.rip) == (Protocol.LINUX32, 0x100000)
