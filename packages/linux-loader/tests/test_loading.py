"""Files: recognised by content, refused with reason, never left open."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from linux_loader import (
    E820Entry,
    ImageError,
    LoaderError,
    Protocol,
    inspect,
    load,
    plan,
    unpack_kernel,
)
from linux_loader.source import Source
from linux_loader.testing import (
    build_bzimage,
    build_elf,
    bzimages,
    compress,
    elf_images,
    image_file,
    lies,
    memory_map,
    multiboot_images,
    pvh_note,
)
from vm_memory import GuestAddress, GuestMemory

SIZE = 32 << 20
MAP = memory_map(SIZE)
ELF = build_elf([(0x1000000, b"\xf4" * 64)], entry=0x1000000, notes=pvh_note(0x1000000))
KINDS = (elf_images(), bzimages(), multiboot_images())


@pytest.fixture(scope="module")
def guest():  # type: ignore[no-untyped-def]
    with GuestMemory.from_ranges([(GuestAddress(0), SIZE)]) as memory:
        yield memory


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.one_of([st.one_of(kind, lies(kind)) for kind in KINDS] + [st.binary(max_size=2000)]),
    st.sampled_from([None, *Protocol]),
    st.booleans(),
    st.one_of(st.just(0), st.sampled_from([0x1000, 0x200000, -0x200000]), st.integers()),
)
def test_any_image_is_loaded_or_refused(
    guest: GuestMemory, image: bytes, protocol: Protocol | None, kaslr: bool, offset: int
) -> None:
    """Hostile images raise LoaderError or are loaded inside their plan; no file stays open."""
    before = open_files()
    guest.fill(GuestAddress(0), SIZE, 0xAA)
    written: list[tuple[int, int]] = []
    with image_file(image) as fd:
        try:
            loaded = load(
                guest,
                fd,
                memory_map=MAP,
                protocol=protocol,
                kaslr=kaslr,
                cmdline="quiet",
                offset=offset,
            )
        except LoaderError:
            pass
        else:
            written = [(item.address, item.size) for item in loaded.plan.placements]
    position = 0
    for address, size in [*written, (SIZE, 0)]:
        assert position <= address <= SIZE
        between = guest.read(GuestAddress(position), address - position)
        assert between == b"\xaa" * len(between)
        position = address + size
    assert open_files() == before


@settings(max_examples=60)
@given(st.one_of(KINDS))
def test_every_valid_image_is_planned(image: bytes) -> None:
    """Valid images of every kind find their place in 64 MiB."""
    with image_file(image) as fd:
        made = plan(fd, memory_map=memory_map(64 << 20))
    ends = [(item.address, item.address + item.size) for item in made.placements]
    assert all(left[1] <= right[0] for left, right in pairwise(ends))
    kernel = [item for item in made.placements if item.name.startswith("kernel")]
    assert any(item.address <= made.entry.rip < item.address + item.size for item in kernel)


@pytest.mark.parametrize("content", [b"", b"#!/bin/sh\n", b"\x7fELF", b"MZ" + bytes(2000)])
def test_what_is_no_kernel_is_refused(guest: GuestMemory, content: bytes) -> None:
    """Empty files, scripts and other things are told apart from kernels."""
    with image_file(content) as fd, pytest.raises(ImageError):
        load(guest, fd, memory_map=MAP)


def test_what_is_no_file_is_refused(guest: GuestMemory, tmp_path: Path) -> None:
    """Directories, FIFOs and devices are errors at once; what does not exist is an OSError."""
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo", "/dev/zero"):
        with pytest.raises(ImageError, match="regular file"):
            load(guest, path, memory_map=MAP)
    with pytest.raises(FileNotFoundError):
        load(guest, tmp_path / "absent", memory_map=MAP)


def test_files_are_closed_whatever_happens(guest: GuestMemory, tmp_path: Path) -> None:
    """After success, refusal and a missing initrd, as many descriptors are open as before."""
    kernel = tmp_path / "kernel"
    kernel.write_bytes(ELF)
    initrd = tmp_path / "initrd"
    initrd.write_bytes(b"x" * 100)
    before = open_files()
    load(guest, kernel, memory_map=MAP, initrd=str(initrd))
    with pytest.raises(LoaderError):
        load(guest, kernel, memory_map=MAP, initrd=initrd, cmdline="\n")
    with pytest.raises(FileNotFoundError):
        load(guest, kernel, memory_map=MAP, initrd=[initrd, tmp_path / "absent"])
    with pytest.raises(LoaderError):
        load(guest, kernel, memory_map=[E820Entry(0, 0, 1)])
    assert open_files() == before


def test_a_plan_can_be_written_later(guest: GuestMemory, tmp_path: Path) -> None:
    """The plan holds its files open, so that replacing the path changes nothing."""
    kernel = tmp_path / "kernel"
    kernel.write_bytes(ELF)
    made = plan(kernel, memory_map=MAP)
    kernel.unlink()
    made.write(guest)
    assert guest.read(GuestAddress(0x1000000), 64) == b"\xf4" * 64


def test_a_loaded_plan_cannot_be_written_again(guest: GuestMemory) -> None:
    """After load the files are closed, and the plan says so."""
    with image_file(ELF) as fd:
        loaded = load(guest, fd, memory_map=MAP)
    with pytest.raises(ImageError, match="closed"):
        loaded.plan.write(guest)


def test_the_cache_serves_load(guest: GuestMemory, tmp_path: Path) -> None:
    """With a cache the same guest comes about, also from an entry that someone overwrote."""
    kernel = tmp_path / "kernel"
    kernel.write_bytes(build_bzimage(b"\x90" * 32, payload=compress("zstd", ELF)))
    folder = tmp_path / "cache"
    for _ in range(2):
        guest.fill(GuestAddress(0x1000000), 64, 0)
        load(guest, kernel, memory_map=MAP, cache=folder)
        assert guest.read(GuestAddress(0x1000000), 64) == b"\xf4" * 64
    (entry,) = folder.glob("*.elf")
    size = entry.stat().st_size
    entry.write_bytes(b"no kernel".ljust(size - 8) + (size - 8).to_bytes(8, "little"))
    load(guest, kernel, memory_map=MAP, cache=folder)
    load(guest, kernel, memory_map=MAP, cache=folder)
    assert (entry.read_bytes())[:4] == b"\x7fELF"


def test_a_payload_that_lies_about_its_size_is_refused(guest: GuestMemory) -> None:
    """The size behind the payload must be what comes out."""
    payload = compress("gzip", ELF)[:-4] + (1 << 29).to_bytes(4, "little")
    with image_file(build_bzimage(b"\x90", payload=payload)) as fd, pytest.raises(ImageError):
        load(guest, fd, memory_map=MAP)


def test_the_kernel_inside_a_boot_image_can_be_had() -> None:
    """unpack_kernel gives the ELF file; images without one, or with a bomb, are refused."""
    with image_file(build_bzimage(b"\x90", payload=compress("zstd", ELF))) as fd:
        assert unpack_kernel(fd) == ELF
    with image_file(build_bzimage(b"\x90")) as fd, pytest.raises(ImageError, match="no kernel"):
        unpack_kernel(fd)
    bomb = build_bzimage(b"\x90", payload=compress("xz", bytes(1 << 20)), init_size=0x80000)
    for use in (unpack_kernel, lambda fd: plan(fd, memory_map=MAP), inspect):
        with image_file(bomb) as fd, pytest.raises(ImageError, match="0x80000"):
            use(fd)


def test_reading_stays_inside_a_source() -> None:
    """Ranges outside the file are refused, for files and bytes alike."""
    with image_file(b"0123456789") as fd:
        for source in (Source.open(fd), Source.of_bytes(b"0123456789", "bytes")):
            assert source.read("x", 2, 3) == b"234"
            assert source.read_up_to(8, 100) == b"89"
            for offset, length in ((-1, 2), (9, 2), (11, 0), (0, -1)):
                with pytest.raises(ImageError):
                    source.read("x", offset, length)
            target = bytearray(6)
            view = memoryview(target)
            source.read_into("x", 1, [view[:2], view[2:2], view[2:]])
            assert target == b"123456"
            with pytest.raises(ImageError):
                source.read_into("x", 8, [view])
            source.close()
            source.close()
