"""Distribution kernels as they are packaged: recognised, unpacked, planned and loaded."""

from __future__ import annotations

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


@pytest.mark.parametrize("protocol", [Protocol.LINUX64, Protocol.PVH])
def test_debian_kernels_load(images: Path, tmp_path: Path, protocol: Protocol) -> None:
    """Every packaged kernel is unpacked, and loads the same copied as mapped from the cache."""
    for path in find(images, "vmlinuz-*-amd64"):
        seen = []
        for arguments in ({}, {"cache": tmp_path}, {"cache": tmp_path, "map_files": False}):
            with GuestMemory.from_ranges([(GuestAddress(0), SIZE)]) as guest:
                loaded = load(
                    guest, path, memory_map=memory_map(SIZE), protocol=protocol, **arguments
                )
                assert loaded.format is Format.BZIMAGE
                assert loaded.version.startswith(path.name.removeprefix("vmlinuz-"))
                kernel = [item for item in loaded.plan.placements if item.name.startswith("kernel")]
                seen.append(
                    [hash(guest.read(GuestAddress(item.address), item.size)) for item in kernel]
                )
                entry = guest.read(GuestAddress(loaded.entry.rip), 16)
                assert any(entry)
                if arguments == {"cache": tmp_path}:
                    assert loaded.mapped > 16 << 20
        assert seen[0] == seen[1] == seen[2]
        (tmp_path / "vmlinux").unlink(missing_ok=True)


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
        (vmlinux,) = tmp_path.glob("*.vmlinux")
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
