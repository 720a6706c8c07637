"""Files that are truncated while guest memory is made of them."""

from __future__ import annotations

import faulthandler
import fcntl
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vm_memory import (
    Anonymous,
    BackingLostError,
    FilePrivate,
    FileShared,
    GuestAddress,
    GuestMemory,
    IommuMemory,
    Iotlb,
    MappingError,
    Memfd,
    Order,
    Permissions,
)
from vm_memory.sharing import MemoryDescription, RegionDescription, rebuild

A = GuestAddress
SIZE = 16 * 4096
ZEROS = os.open("/dev/zero", os.O_RDONLY | os.O_CLOEXEC)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of 16 pages full of ones."""
    file = tmp_path / "file"
    file.write_bytes(b"\1" * SIZE)
    return file


ACCESSES: list[Callable[[GuestMemory], object]] = [
    lambda m: m.read(A(0x8000), 8),
    lambda m: m.write(A(0x8000), b"x"),
    lambda m: m.read_into(A(0x8000), bytearray(100)),
    lambda m: m.fill(A(0x8000), 100),
    lambda m: m.copy(A(0), A(0x8000), 100),
    lambda m: m.copy(A(0x8000), A(0), 100),
    lambda m: m.read_u8(A(0x8000)),
    lambda m: m.read_u64(A(0x8001)),
    lambda m: m.write_u32(A(0x8000), 1),
    lambda m: m.read_u16_be(A(0x8000)),
    lambda m: m.atomic_load(A(0x8000), 4),
    lambda m: m.atomic_store(A(0x8000), 4, 1),
    lambda m: m.atomic_fetch_add(A(0x8000), 4, 1, Order.RELAXED),
    lambda m: m.atomic_compare_exchange(A(0x8000), 4, 0, 1),
    lambda m: m.scalar(A(0x8000), 4).load(),
    lambda m: m.scalar(A(0x8000), 4).store(1),
    lambda m: m.read_struct(A(0x8000), "<Q"),
    lambda m: m.read_exact_from_file(A(0x8000), ZEROS, 10),
]


@pytest.mark.parametrize("backing", [FileShared, FilePrivate])
@pytest.mark.parametrize("access", ACCESSES)
def test_a_truncated_file_is_an_exception(
    path: Path, backing: type[FileShared | FilePrivate], access: Callable[[GuestMemory], object]
) -> None:
    """Every access to pages behind the new end of the file raises, and the process lives."""
    memory = GuestMemory.from_ranges([(A(0), SIZE)], backing=backing(path))
    assert memory.read(A(0x8000), 1) == b"\1"
    assert memory.lost_regions == ()
    os.truncate(path, 0x4000)
    with pytest.raises(BackingLostError, match=r"0x8000|lost"):
        access(memory)


def test_views_read_zeros_and_the_loss_is_told(path: Path) -> None:
    """A slice of lost memory is harmless: it reads as zeros, and the map knows."""
    memory = GuestMemory.from_ranges([(A(0), SIZE)], backing=FileShared(path))
    (view,) = memory.slices(A(0), SIZE)
    os.truncate(path, 0x4000)
    assert view[0x3FFF] == 1
    assert bytes(view[0x4000:]) == bytes(SIZE - 0x4000)
    assert memory.lost_regions == memory.regions
    view[0x5000] = 2
    assert view[0x5000] == 2
    other = GuestMemory.from_ranges([(A(0), 4096)], backing=FileShared(path))
    assert other.read(A(0), 1) == b"\1"
    assert other.lost_regions == ()


def test_mapped_kernel_image_that_is_truncated(path: Path) -> None:
    """Pages mapped into anonymous memory read as zeros when lost; their neighbours stay."""
    memory = GuestMemory.from_ranges([(A(0), 2 * SIZE)])
    memory.fill(A(0), 2 * SIZE, 3)
    with path.open("rb") as file:
        assert memory.map_private_file(A(0x1000), file.fileno(), 0, SIZE)
        assert memory.map_private_file(A(0x1000), file.fileno(), 0, SIZE)
    os.truncate(path, 0)
    memory.write_u32(A(0x2000), 5)
    assert memory.read(A(0x1000), SIZE) == bytes(0x1000) + b"\5" + bytes(SIZE - 0x1001)
    assert memory.read(A(0xFFF), 1) == b"\3" == memory.read(A(0x1000 + SIZE), 1)
    assert memory.lost_regions == memory.regions
    fresh = GuestMemory.from_ranges([(A(0), SIZE)])
    with path.open("r+b") as file:
        file.truncate(SIZE)
        assert fresh.map_private_file(A(0), file.fileno(), 0, SIZE)
        file.truncate(0)
        with pytest.raises(BackingLostError):
            fresh.write_all_to_file(A(0), file.fileno(), 10)


def test_what_was_lost_before_is_not_transferred_as_if_it_were_there(path: Path) -> None:
    """Zeros in place of lost pages never reach a file unsaid, however often they are asked for."""
    kernel = path.with_name("kernel")
    kernel.write_bytes(b"\2" * SIZE)
    shared = GuestMemory.from_ranges([(A(0), SIZE)], backing=FileShared(path))
    overlaid = GuestMemory.from_ranges([(A(0), SIZE)])
    with kernel.open("rb") as file:
        assert overlaid.map_private_file(A(0), file.fileno(), 0, SIZE)
    tlb = Iotlb()
    tlb.set_mapping(0, 0, SIZE, Permissions.READ_WRITE)
    os.truncate(path, 0)
    os.truncate(kernel, 0)
    (view,) = overlaid.slices(A(0), SIZE, Permissions.READ)
    assert bytes(view) == bytes(SIZE)
    for memory in (shared, overlaid, IommuMemory(shared, tlb), IommuMemory(overlaid, tlb)):
        for _ in range(2):
            with pytest.raises(BackingLostError), path.with_name("out").open("wb") as out:
                memory.write_all_to_file(A(0), out, SIZE, 0)
            with pytest.raises(BackingLostError):
                memory.read_from_file(A(0), ZEROS, SIZE)


def test_a_handler_that_comes_later_changes_nothing(path: Path) -> None:
    """Ours stays in front of faulthandler's, however often that is switched on."""
    was = faulthandler.is_enabled()
    try:
        for _ in range(3):
            faulthandler.enable()
            memory = GuestMemory.from_ranges([(A(0), SIZE)], backing=FileShared(path))
            os.truncate(path, 0)
            with pytest.raises(BackingLostError):
                memory.read(A(0), 1)
            os.truncate(path, SIZE)
    finally:
        if not was:
            faulthandler.disable()


@pytest.mark.parametrize("prelude", ["", "import faulthandler; faulthandler.enable()"])
def test_a_bus_error_elsewhere_still_kills(path: Path, prelude: str) -> None:
    """The handler minds its own memory only: SIGBUS of another mapping ends the process."""
    program = (
        f"import sys; sys.path[:] = {sys.path!r}\n{prelude}\n"
        "import mmap, os, resource\n"
        "resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n"
        "from vm_memory import *\n"
        f"path = {str(path)!r}\n"
        "memory = GuestMemory.from_ranges([(0, 4096)], backing=FileShared(path))\n"
        "with open(path, 'r+b') as file: foreign = mmap.mmap(file.fileno(), 0)\n"
        "os.truncate(path, 0)\n"
        "try: memory.read(0, 1)\n"
        "except BackingLostError: print('survived', flush=True)\n"
        "foreign[0]\n"
        "print('not reached')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                          check=False, timeout=60)  # fmt: skip
    assert done.stdout == "survived\n"
    assert done.returncode == -7


def test_slots_are_reused(path: Path) -> None:
    """Mappings come and go without using up the table of watched ranges."""
    for _ in range(9000):
        GuestMemory.from_ranges([(A(0), 4096)], backing=FilePrivate(path))
    memory = GuestMemory.from_ranges([(A(0), SIZE)], backing=FilePrivate(path))
    os.truncate(path, 0)
    with pytest.raises(BackingLostError):
        memory.read(A(0), 1)


def test_a_file_that_refuses_leaves_the_memory_alone() -> None:
    """What cannot be mapped takes nothing away: no gap is left where guest memory was."""
    memory = GuestMemory.from_ranges([(A(0), SIZE)])
    memory.fill(A(0), SIZE, 3)
    # A file of sysfs has a size, but refuses to be mapped only when it is asked to do so.
    with Path("/sys/kernel/mm/transparent_hugepage/enabled").open("rb") as file:
        for _ in range(9000):  # more often than ranges can be watched
            with pytest.raises(MappingError, match="No such device"):
                memory.map_private_file(A(0x1000), file.fileno(), 0, 0x1000)
        with pytest.raises(MappingError, match="no pages that could be mapped"):
            GuestMemory.from_ranges([(A(0), 4096)], backing=FilePrivate(file.fileno()))
    assert memory.read(A(0), SIZE) == b"\3" * SIZE


SENT = """
import ctypes, os, resource, signal, struct, sys
sys.path[:] = {path!r}
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
signal.signal(signal.SIGBUS, signal.{before})
from vm_memory import *
memory = GuestMemory.from_ranges([(0, 4096)], backing=FileShared({file!r}))
address = memory.regions[0].host_address
info = struct.pack("iiiiQ", 7, 0, -1, 0, address).ljust(128, b"\\0")  # SI_QUEUE, si_addr
for _ in range(2):
    ctypes.CDLL(None).syscall(129, os.getpid(), 7, info)  # rt_sigqueueinfo
    print(memory.read(0, 1), memory.lost_regions, flush=True)
"""


@pytest.mark.parametrize("before", ["SIG_IGN", "SIG_DFL"])
def test_a_bus_error_that_was_sent_is_none(path: Path, before: str) -> None:
    """Whoever sends the signal cannot have memory taken away: it does what it did without us."""
    program = SENT.format(path=sys.path, before=before, file=str(path))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                          check=False, timeout=60)  # fmt: skip
    if before == "SIG_IGN":
        assert done.stdout == "b'\\x01' ()\n" * 2
    else:
        assert done.stdout == ""
        assert done.returncode == -7


HUGE = 2 << 20


def test_huge_pages_that_a_child_loses(hugepages: int) -> None:
    """When the parent writes and there are no more, the child's are gone: it is told, and lives."""
    size = hugepages * HUGE
    memory = GuestMemory.from_ranges([(A(0), size)], backing=Anonymous(hugetlb="2M"))
    memory.fill(A(0), size, 5)
    scalar = memory.scalar(A(8), 8)
    (view,) = memory.slices(A(0), 8)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.read(reader, 1)
            for access in (lambda: memory.read(A(0), 1), scalar.load):
                with pytest.raises(BackingLostError):
                    access()
            status = 0 if bytes(view) == bytes(8) and memory.lost_regions else 2
        finally:
            os._exit(status)
    memory.fill(A(0), size, 6)
    os.write(writer, b"x")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert memory.read(A(size - 8), 8) == b"\6" * 8
    assert memory.lost_regions == ()
    os.close(reader)
    os.close(writer)


def test_huge_pages_that_another_process_promised(hugepages: int) -> None:
    """A sealed file of huge pages that the host does not have is an exception when touched."""
    size = (hugepages + 1) * HUGE
    fd = os.memfd_create("promised", os.MFD_HUGETLB | os.MFD_ALLOW_SEALING | 21 << 26)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    memory = rebuild(MemoryDescription((RegionDescription(0, size, 0),)), [fd])
    os.close(fd)
    with pytest.raises(BackingLostError, match="huge pages"):
        memory.fill(A(0), size, 1)
    assert memory.lost_regions == memory.regions
    # Only the page that there is none for is lost.
    assert bytes(memory.regions[0].buffer[::HUGE]).count(1) >= hugepages


def test_huge_pages_that_were_given_back(hugepages: int) -> None:
    """Who discards huge pages, and touches them when somebody else has them, is told so."""
    memory = GuestMemory.from_ranges([(A(0), hugepages * HUGE)], backing=Memfd(hugetlb="2M"))
    memory.fill(A(0), hugepages * HUGE, 7)
    memory.discard(A(HUGE), HUGE)
    taken = GuestMemory.from_ranges([(A(0), HUGE)], backing=Anonymous(hugetlb="2M"))
    taken.fill(A(0), HUGE, 1)
    assert memory.read(A(HUGE - 1), 1) == b"\7"
    with pytest.raises(BackingLostError):
        memory.write(A(HUGE), b"x")
    assert memory.regions[0].buffer[HUGE - 1] == 7 == memory.regions[0].buffer[2 * HUGE]
