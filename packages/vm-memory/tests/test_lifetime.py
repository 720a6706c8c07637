"""No sequence of Python operations reaches memory that is gone."""

from __future__ import annotations

import contextlib
import gc
import mmap
import os
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vm_memory import (
    Adopted,
    Anonymous,
    Backing,
    ClosedError,
    FilePrivate,
    GuestAddress,
    GuestMemory,
    Iovecs,
    Memfd,
    Options,
    Scalar,
    VmMemoryError,
)

A = GuestAddress
SIZE = 3 * 4096
OPERATIONS = ["map", "slice", "cast", "iovec", "scalar", "buffer", "region", "table", "close",
              "forget map", "forget all maps", "forget view", "collect", "cycle", "raise",
              "overlay", "insert", "discard", "fork", "thread"]  # fmt: skip


def mapped(host_address: int) -> bool:
    """Whether the kernel has a mapping at an address."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(text, 16) for text in line.split()[0].split("-"))
        if start <= host_address < end:
            return True
    return False


class Holder:
    """Something that can be part of a reference cycle, with a finalizer that looks at it all."""

    def __init__(self, thing: object) -> None:
        """Refer to itself as well."""
        self.me = self
        self.thing = thing

    def __del__(self) -> None:
        """Touch the memory while everything around is being collected."""
        touch(self.thing)


def touch(thing: object) -> None:
    """Read and write all that something gives access to."""
    if isinstance(thing, memoryview):
        if thing.nbytes:
            thing[0] = thing[0]
            assert len(bytes(thing)) == thing.nbytes
    elif isinstance(thing, Scalar):
        thing.store(thing.load())
    elif isinstance(thing, Iovecs):
        for view in thing.views:
            touch(view)
    elif isinstance(thing, GuestMemory):
        with contextlib.suppress(VmMemoryError):
            thing.write_u32(A(0x100), thing.read_u32(A(0x100)))


@given(st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 1 << 16)), max_size=40))
def test_views_outlive_everything(steps: list[tuple[str, int]]) -> None:
    """Whatever is closed, forgotten and collected in any order, what is left can be used."""
    maps: list[GuestMemory] = []
    views: list[object] = []
    for name, number in steps:
        if name == "map" or not maps:
            backings: list[Backing] = [Memfd(), Anonymous(), adopted()]
            backing = backings[number % 7 % 3]
            options = [None, Options(guard=4096), Options(inherit=False)][number % 3]
            if isinstance(backing, Adopted):
                options = None
            ranges = [(A(0), SIZE), (A(SIZE), SIZE)]
            maps.append(GuestMemory.from_ranges(ranges, backing=backing, options=options))
        memory = maps[number % len(maps)]
        if name == "close":
            memory.close()
        elif name == "forget map":
            maps.remove(memory)
        elif name == "forget all maps":
            maps.clear()
        elif name == "forget view" and views:
            views.pop(number % len(views))
        elif name == "collect":
            gc.collect()
        elif name == "discard":
            with contextlib.suppress(VmMemoryError):
                memory.discard(A(number % SIZE), SIZE)
        elif name == "fork":
            forked(*views, *maps)
        elif name == "thread":
            beside(memory, *views)
        elif name == "cycle":
            Holder([memory, *views][number % (len(views) + 1)])
        elif name in ("slice", "cast", "iovec", "scalar", "buffer", "region", "table", "overlay",
                      "insert", "raise"):  # fmt: skip
            with contextlib.suppress(VmMemoryError, IndexError):
                views += make(name, memory, maps[number % 7 % len(maps)], number)
        for thing in (*views, *maps):
            touch(thing)
        del memory


def adopted() -> Adopted:
    """Memory of an object that unmaps it when it is gone."""
    return Adopted.from_buffer(mmap.mmap(-1, 2 * SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


def forked(*things: object) -> None:
    """Touch everything in a child, after its own collection."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            for thing in things:
                touch(thing)
            gc.collect()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0


def beside(memory: GuestMemory, *views: object) -> None:
    """Touch everything in a thread, while the map is closed here."""
    wrong: list[BaseException] = []

    def work(*things: object) -> None:
        try:
            for thing in things * 3:
                touch(thing)
        except BaseException as error:
            wrong.append(error)

    thread = threading.Thread(target=work, args=(memory, *views))
    thread.start()
    memory.close()
    thread.join()
    assert not wrong


def make(name: str, memory: GuestMemory, other: GuestMemory, number: int) -> list[object]:
    """A new way into a memory."""
    address = A(number % (2 * SIZE - 8) & ~7)
    if name == "slice":
        return [*memory.slices(address, 8)]
    if name == "cast":
        return [memory.regions[0].u32, memory.regions[0].buffer.cast("Q")[1:]]
    if name == "iovec":
        return [memory.iovecs(A(0), 2 * SIZE)]
    if name == "scalar":
        return [memory.scalar(address, 8)]
    if name == "buffer":
        return [memory.regions[1].buffer]
    if name == "region":
        return [GuestMemory(memory.regions[:1])]
    if name == "insert":
        return [GuestMemory([memory.regions[0], other.regions[1]])]
    if name == "table":
        assert memory.native_table
        memory.read_from_file(address, ZEROS, 8)
    if name == "raise":
        memory.write(A(2 * SIZE - 1), memory.slices(A(0), 16)[0])
    if name == "overlay":
        memory.map_private_file(A(4096), ZEROS, 0, 4096)
    return []


ZEROS = os.open(sys.executable, os.O_RDONLY | os.O_CLOEXEC)


@pytest.mark.parametrize("keep", ["slice", "cast", "iovec", "scalar", "region", "table"])
def test_memory_is_unmapped_with_its_last_reference_and_not_before(keep: str) -> None:
    """One reference of any kind keeps the mapping, and its end is the mapping's end."""
    memory = GuestMemory.from_ranges([(A(0), SIZE)], backing=Memfd(), options=Options(guard=4096))
    address = memory.regions[0].host_address
    assert mapped(address)
    kept: object
    if keep == "region":
        kept = memory.regions[0]
    elif keep == "table":
        kept = memory._native()
    else:
        ways: dict[str, Callable[[], object]] = {
            "slice": lambda: memory.slices(A(8), 8)[0][2:4],
            "cast": lambda: memory.regions[0].u64[1:2],
            "iovec": lambda: memory.iovecs(A(0), 8),
            "scalar": lambda: memory.scalar(A(0), 8),
        }
        kept = ways[keep]()
    memory.close()
    gc.collect()
    assert mapped(address)
    del kept
    assert not mapped(address)


def test_a_region_is_collected_as_soon_as_it_is_forgotten() -> None:
    """There is no cycle inside: memory goes without waiting for the collector."""
    gc.disable()
    try:
        memory = GuestMemory.from_ranges([(A(0), SIZE)], dirty_page_size=4096)
        assert memory.native_table
        watch = weakref.ref(memory.regions[0])
        address = memory.regions[0].host_address
        del memory
        assert watch() is None
        assert not mapped(address)
    finally:
        gc.enable()


def test_closing_under_running_threads() -> None:
    """Threads that access a memory while another closes it see data or ClosedError."""
    strange: list[BaseException] = []
    for _ in range(20):
        memory = GuestMemory.from_ranges([(A(0), SIZE), (A(SIZE), SIZE)], dirty_page_size=4096)

        def work(memory: GuestMemory = memory) -> None:
            try:
                while True:
                    memory.write_u64(A(SIZE - 8), 1)
                    memory.read(A(SIZE - 8), 16)
                    memory.atomic_fetch_add(A(SIZE), 8, 1)
                    memory.fill(A(0), 2 * SIZE)
                    memory.read_exact_from_file(A(0), ZEROS, 2 * SIZE, 0)
                    list(memory.harvest_dirty())
            except ClosedError:
                pass
            except BaseException as error:
                strange.append(error)

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        memory.close()
        for thread in threads:
            thread.join()
    assert not strange


def test_private_files_close_with_their_memory(tmp_path: Path) -> None:
    """The descriptor of a file lives as long as its memory and no longer."""
    path = tmp_path / "file"
    path.write_bytes(bytes(SIZE))
    memory = GuestMemory.from_ranges([(A(0), SIZE)], backing=FilePrivate(path))
    fd = memory.regions[0].fd
    assert fd is not None
    (piece,) = memory.slices(A(0), 8)
    memory.close()
    os.fstat(fd)
    del piece, memory
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(fd)
