"""What memory can be made of, and how the kernel is told to treat it."""

from __future__ import annotations

import fcntl
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from vm_memory import (
    Advice,
    Anonymous,
    Backing,
    ClosedError,
    FilePrivate,
    FileShared,
    GuestAddress,
    GuestMemory,
    GuestRegion,
    InvalidValueError,
    Lock,
    MappingError,
    Memfd,
    NumaMode,
    NumaPolicy,
    Options,
    RegionError,
)

A = GuestAddress
HUGE = 2 << 20


def smaps(memory: GuestMemory) -> dict[str, str]:
    """The kernel's account of the first region's mapping."""
    start = f"{memory.regions[0].host_address:x}-"
    fields: dict[str, str] = {}
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.startswith(start)
        elif inside:
            name, _, value = line.partition(":")
            fields[name] = value.strip()
    return fields


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of three pages, each of another letter."""
    file = tmp_path / "file"
    file.write_bytes(b"a" * 4096 + b"b" * 4096 + b"c" * 4096)
    return file


def test_shared_file(path: Path) -> None:
    """What is written to a shared file's memory is in the file; regions lie behind one another."""
    ranges = [(A(0), 4096), (A(0x10000), 4096)]
    memory = GuestMemory.from_ranges(ranges, backing=FileShared(path, 4096))
    assert memory.read(A(0), 2) == b"bb"
    assert memory.read(A(0x10000), 2) == b"cc"
    assert [region.file_offset for region in memory.regions] == [4096, 8192]
    memory.write(A(0x10000), b"new")
    memory.write_u64(A(8), 1)
    assert path.read_bytes()[8192:8195] == b"new"
    assert path.read_bytes()[4104] == 1


def test_private_file(path: Path) -> None:
    """A snapshot file is mapped copy-on-write: it can be read-only, and stays as it was."""
    path.chmod(0o400)
    with path.open("rb") as file:
        memory = GuestMemory.from_ranges([(A(0), 3 * 4096)], backing=FilePrivate(file.fileno()))
    assert memory.read(A(4096), 1) == b"b"
    memory.write(A(0), b"mine")
    assert memory.read(A(0), 5) == b"minea"
    assert path.read_bytes()[:4] == b"aaaa"


def test_unfit_files_are_refused(path: Path) -> None:
    """Files that are too short, missing, or no file, and odd offsets say what is wrong."""
    four = [(A(0), 4 * 4096)]
    with pytest.raises(InvalidValueError, match="12288 bytes, but the regions need 16384"):
        GuestMemory.from_ranges(four, backing=FileShared(path))
    with pytest.raises(InvalidValueError, match="0 or 4096"):
        GuestMemory.from_ranges(four, backing=FilePrivate(path, 100))
    with pytest.raises(InvalidValueError):
        GuestMemory.from_ranges(four, backing=FilePrivate(path, -4096))
    with pytest.raises(MappingError, match="No such file"):
        GuestMemory.from_ranges(four, backing=FilePrivate(path.with_name("none")))
    with pytest.raises(MappingError, match="directory"):
        GuestMemory.from_ranges(four, backing=FileShared(path.parent))
    with pytest.raises(MappingError):
        GuestMemory.from_ranges(four, backing=FileShared(12345))
    reader, writer = os.pipe()
    with pytest.raises(MappingError):
        GuestMemory.from_ranges(four, backing=FilePrivate(reader))
    os.close(reader)
    os.close(writer)


def test_memfd_is_sealed() -> None:
    """Nobody can shorten or lengthen the file behind a memfd."""
    memory = GuestMemory.from_ranges([(A(0), 4096)], backing=Memfd(name="test-name"))
    fd = memory.regions[0].fd
    assert fd is not None
    assert not os.get_inheritable(fd)
    for size in (0, 8192):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)
    assert "test-name" in os.readlink(f"/proc/self/fd/{fd}")  # noqa: PTH115
    again = GuestMemory.from_ranges([(A(0), 4096)], backing=FileShared(fd))
    assert not again.regions[0].fragile


def test_huge_page_sizes_are_checked() -> None:
    """A size that the host has not, and ranges that are no multiples of it, are refused."""
    for text in ("3M", "", "M", "2", "-2M", "99999999999G"):
        with pytest.raises(InvalidValueError, match="this host has"):
            GuestMemory.from_ranges([(A(0), HUGE)], backing=Anonymous(hugetlb=text))
    if not Path("/sys/kernel/mm/hugepages/hugepages-2048kB").exists():
        pytest.skip("the host has no huge pages of 2 MiB")
    for backing in (Anonymous(hugetlb="2M"), Memfd(hugetlb="2M")):
        with pytest.raises(RegionError, match="0x400000 bytes at 0x0"):
            GuestMemory.from_ranges([(A(4096), HUGE)], backing=backing)
        with pytest.raises(MappingError, match="free_hugepages"):
            GuestMemory.from_ranges([(A(0), 1 << 40)], backing=backing)


@pytest.mark.parametrize("backing", [Anonymous(hugetlb="2M"), Memfd(hugetlb="2M")])
@pytest.mark.usefixtures("hugepages")
def test_huge_pages(backing: Anonymous | Memfd) -> None:
    """Huge pages are what the kernel uses, and access works across regions."""
    memory = GuestMemory.from_ranges(
        [(A(0), 2 * HUGE), (A(2 * HUGE), HUGE)], backing=backing, options=Options(prefault=2)
    )
    memory.write(A(2 * HUGE - 4), b"12345678")
    assert memory.read(A(2 * HUGE - 4), 8) == b"12345678"
    assert smaps(memory)["KernelPageSize"] == "2048 kB"
    assert memory.regions[0].page_size == HUGE
    memory.discard(A(0), 2 * HUGE)
    assert memory.read(A(2 * HUGE - 4), 8) == b"\0\0\0\x005678"


def test_transparent_huge_pages_and_merging() -> None:
    """Advice arrives at the kernel: hg or nh for huge pages, mg for mergeable."""
    for wanted, flag in ((True, "hg"), (False, "nh")):
        try:
            memory = GuestMemory.from_ranges(
                [(A(0), HUGE)], options=Options(transparent_hugepages=wanted)
            )
        except MappingError as error:
            pytest.skip(f"a kernel without transparent huge pages: {error}")
        assert flag in smaps(memory)["VmFlags"].split()
    try:
        memory = GuestMemory.from_ranges([(A(0), HUGE)], options=Options(mergeable=True))
    except MappingError as error:
        pytest.skip(f"a kernel without KSM: {error}")
    assert "mg" in smaps(memory)["VmFlags"].split()


def test_equal_pages_are_merged() -> None:
    """KSM, switched on for the test, merges equal pages of mergeable memory."""
    folder = Path("/sys/kernel/mm/ksm")
    try:
        lock = (folder / "run").open()
        fcntl.flock(lock, fcntl.LOCK_EX)  # other processes may run this test
        before = (folder / "run").read_text(), (folder / "pages_to_scan").read_text()
        sleep = (folder / "sleep_millisecs").read_text()
        (folder / "pages_to_scan").write_text("10000")
        (folder / "sleep_millisecs").write_text("10")
        (folder / "run").write_text("1")
    except OSError as error:
        pytest.skip(f"KSM cannot be switched on here: {error}")
    try:
        options = Options(mergeable=True, transparent_hugepages=False)
        memory = GuestMemory.from_ranges([(A(0), 256 * 4096)], options=options)
        memory.fill(A(0), 256 * 4096, 0x5A)
        for _ in range(100):
            if int((folder / "pages_sharing").read_text()) >= 200:
                break
            time.sleep(0.05)
        assert int((folder / "pages_sharing").read_text()) >= 200
        memory.write(A(4096), b"x")
        assert memory.read(A(0), 1) + memory.read(A(4096), 2) == b"ZxZ"
    finally:
        (folder / "run").write_text(before[0])
        (folder / "pages_to_scan").write_text(before[1])
        (folder / "sleep_millisecs").write_text(sleep)
        lock.close()


@pytest.mark.parametrize("backing", [Anonymous(), Memfd()])
def test_prefault(backing: Anonymous | Memfd) -> None:
    """All pages are there afterwards, the content is kept, and progress is told."""
    steps: list[tuple[int, int]] = []
    options = Options(prefault=2, progress=lambda done, total: steps.append((done, total)))
    size = 8 << 20
    memory = GuestMemory.from_ranges([(A(0), size), (A(1 << 30), 4096)], backing=backing,
                                     options=options)  # fmt: skip
    assert smaps(memory)["Rss"] == f"{size >> 10} kB"
    assert steps[-1] == (size + 4096, size + 4096)
    assert len(steps) == 2


def test_progress_that_raises_abandons_the_map() -> None:
    """An exception in the progress callback ends the prefault and is not swallowed."""

    def stop(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        GuestMemory.from_ranges([(A(0), 4096)], options=Options(prefault=1, progress=stop))


def test_lock() -> None:
    """Locked memory is resident and locked; a limit that forbids it is named."""
    try:
        memory = GuestMemory.from_ranges([(A(0), 1 << 20)], options=Options(lock=Lock.ALL))
    except MappingError as error:
        pytest.skip(f"memory cannot be locked here: {error}")
    assert smaps(memory)["Locked"] == "1024 kB"
    memory = GuestMemory.from_ranges([(A(0), 1 << 20)], options=Options(lock=Lock.TOUCHED))
    assert "lo" in smaps(memory)["VmFlags"].split()
    assert smaps(memory)["Rss"] == "0 kB"
    program = (
        "import resource, os\n"
        "from vm_memory import *\n"
        "resource.setrlimit(resource.RLIMIT_MEMLOCK, (8192, 8192))\n"
        "if os.geteuid() == 0: os.setgid(65534); os.setuid(65534)\n"
        "try: GuestMemory.from_ranges([(0, 1 << 20)], options=Options(lock=Lock.ALL))\n"
        "except MappingError as error: print(error)\n"
    )
    output = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}\n"
         f"from vm_memory import _policy\n{program}"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "RLIMIT_MEMLOCK is 8192 bytes" in output
    assert resource.getrlimit(resource.RLIMIT_MEMLOCK)


def test_excluded_from_dumps() -> None:
    """Memory without dump carries the kernel's flag, files mapped into it too."""
    memory = GuestMemory.from_ranges([(A(0), 1 << 20)], options=Options(dump=False))
    assert "dd" in smaps(memory)["VmFlags"].split()
    with tempfile.TemporaryFile() as file:
        file.truncate(4096)
        assert memory.map_private_file(A(0), file.fileno(), 0, 4096)
    assert "dd" in smaps(memory)["VmFlags"].split()


def in_child(function: object) -> int:
    """Run a function in a forked child; its exit status is what the function returns."""
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            status = function()  # type: ignore[operator]
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_fork() -> None:
    """A child inherits memory, shared or as a copy, unless it was told not to."""
    private = GuestMemory.from_ranges([(A(0), 4096)])
    shared = GuestMemory.from_ranges([(A(0), 4096)], backing=Memfd())
    hidden = GuestMemory.from_ranges([(A(0), 4096)], options=Options(inherit=False))
    derived, _ = GuestMemory((*hidden.regions,)).remove(A(0), 4096)
    (piece,) = hidden.slices(A(0), 8)
    for memory in (private, shared, hidden):
        memory.write(A(0), b"parent")

    def child() -> int:
        private.write(A(0), b"child!")
        shared.write(A(0), b"child!")
        try:
            hidden.read(A(0), 1)
        except ClosedError:
            return 7 if bytes(piece) == bytes(8) and not derived.closed else 2
        return 1

    assert in_child(child) == 7
    assert private.read(A(0), 6) == b"parent" == hidden.read(A(0), 6)
    assert shared.read(A(0), 6) == b"child!"


def test_guard_pages() -> None:
    """The address space around a region with guards belongs to no other mapping."""
    memory = GuestMemory.from_ranges([(A(0), 1 << 20)], options=Options(guard=64 << 10))
    start = memory.regions[0].host_address
    maps = Path("/proc/self/maps").read_text().splitlines()
    inaccessible = [line.split()[0] for line in maps if line.split()[1].startswith("---p")]
    assert any(text.endswith(f"-{start:x}") for text in inaccessible)
    assert any(text.startswith(f"{start + (1 << 20):x}-") for text in inaccessible)
    assert in_child(lambda: int(GuestMemory.from_ranges([(A(0), 8)]).read_u8(A(0)))) == 0
    for guard, nearest in ((100, "4096"), (-4096, "0"), (1 << 63, "1099511627776")):
        with pytest.raises(InvalidValueError, match=f"as {nearest}"):
            Options(guard=guard)


def test_numa() -> None:
    """Pages come from the node that was asked for, which the kernel confirms."""
    for mode in NumaMode:
        options = Options(numa=NumaPolicy(mode, (0,)), prefault=1)
        try:
            memory = GuestMemory.from_ranges([(A(0), 1 << 20)], options=options)
        except MappingError as error:
            pytest.skip(f"a kernel without NUMA: {error}")
        assert memory.regions[0].numa_nodes() == {0: 256}
        assert memory.regions[0].numa_nodes(4096, 1) == {0: 1}
    untouched = GuestMemory.from_ranges([(A(0), 1 << 20)])
    assert untouched.regions[0].numa_nodes() == {}
    with pytest.raises(InvalidValueError):
        untouched.regions[0].numa_nodes(1 << 20, 1)
    with pytest.raises(MappingError, match="the host's nodes are"):
        GuestMemory.from_ranges(
            [(A(0), 4096)], options=Options(numa=NumaPolicy(NumaMode.BIND, (1000,)))
        )
    impossible: list[tuple[int, ...]] = [(), (0, 1), (-1,), (1024,)]
    for nodes in impossible:
        with pytest.raises(InvalidValueError):
            NumaPolicy(NumaMode.PREFERRED, nodes)


def test_advice_leaves_content_alone() -> None:
    """Whatever is advised, swapping out included, the bytes stay."""
    memory = GuestMemory.from_ranges([(A(0), 16 * 4096)])
    memory.fill(A(0), 16 * 4096, 7)
    for advice in Advice:
        try:
            memory.regions[0].advise(advice, 100, 8000)
        except MappingError as error:
            assert error.errno == 22, "only an older kernel may refuse"  # noqa: PT017
        assert memory.read(A(0), 16 * 4096) == b"\7" * 16 * 4096


@pytest.mark.parametrize("kind", ["anonymous", "memfd", "private", "overlaid"])
def test_discarded_pages_read_as_zeros(kind: str, path: Path) -> None:
    """Whatever memory is made of, a discarded range is zero and its surroundings are not."""
    backings: dict[str, Backing] = {"memfd": Memfd(), "private": FilePrivate(path)}
    backing = backings.get(kind, Anonymous())
    memory = GuestMemory.from_ranges([(A(0), 3 * 4096)], backing=backing, dirty_page_size=4096)
    if kind == "overlaid":
        with path.open("rb") as file:
            assert memory.map_private_file(A(0), file.fileno(), 0, 3 * 4096)
    memory.fill(A(0), 3 * 4096, 1)
    list(memory.harvest_dirty())
    memory.discard(A(100), 2 * 4096)
    if kind in ("anonymous", "memfd"):
        assert smaps(memory)["Rss"] == "8 kB"
    assert memory.read(A(0), 3 * 4096) == b"\1" * 100 + bytes(8192) + b"\1" * (4096 - 100)
    assert list(memory.harvest_dirty()) == [(0, 3 * 4096)]


def test_discarding_a_shared_file_stays_within_the_region(path: Path) -> None:
    """What lies behind the region in the last page of its file is somebody else's."""
    memory = GuestMemory.from_ranges([(A(0), 4096 + 100)], backing=FileShared(path))
    memory.discard(A(0), 4096 + 100)
    assert memory.read(A(0), 4196) == bytes(4196)
    assert path.read_bytes() == bytes(4196) + b"b" * (4096 - 100) + b"c" * 4096


def test_a_region_is_no_longer_than_its_mapping() -> None:
    """Who makes a region by hand cannot make it reach past its memory, or where none can be."""
    (region,) = GuestMemory.from_ranges([(A(0), 4096)]).regions
    for address, size in ((0, 4097), (4, 8), (0, 0), (-8, 8)):
        with pytest.raises(RegionError):
            GuestRegion(A(address), size, region.mapping, Anonymous())


def test_guest_memfd_alongside() -> None:
    """A region carries a guest_memfd of its own, closed with it."""
    (region,) = GuestMemory.from_ranges([(A(0), 4096)]).regions
    with tempfile.TemporaryFile() as file:
        private = region.with_guest_memfd(file.fileno(), 8192)
    assert region.guest_memfd is None
    assert private.guest_memfd is not None
    assert private.guest_memfd.offset == 8192
    fd = private.guest_memfd.fd
    os.fstat(fd)
    private.buffer[0] = 9
    assert region.buffer[0] == 9
    moved = private.at(A(0x8000))
    del private
    os.fstat(fd)
    assert moved.guest_address == 0x8000
    del moved
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)
    with pytest.raises(InvalidValueError):
        region.with_guest_memfd(0, 100)
    with pytest.raises(MappingError):
        region.with_guest_memfd(99999)
