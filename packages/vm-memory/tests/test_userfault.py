"""Pages supplied on demand, with real faults; and memory filled from a file while it is used."""

import errno
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vm_memory import (
    BackingLostError,
    GuestAddress,
    GuestMemory,
    InvalidValueError,
    MappingError,
    Memfd,
    MemoryAccessError,
)
from vm_memory import userfault as module
from vm_memory._native import lib
from vm_memory.filler import Filler
from vm_memory.looking import export_sparse
from vm_memory.userfault import PageFault, Removal, Userfault

PAGE = 4096
PAGES = 64
DONTNEED = 4  # of madvise(2)
SPLIT = 48  # pages in the first of two regions


def available() -> str:
    """Why not, or nothing."""
    try:
        with GuestMemory.from_ranges([(GuestAddress(0), PAGE)]) as memory:
            Userfault(memory).close()
    except MappingError as error:
        return str(error)
    return ""


WHY_NOT = available()
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=f"no userfaultfd here: {WHY_NOT}")


def new_memory() -> GuestMemory:
    return GuestMemory.from_ranges(
        [(GuestAddress(0), SPLIT * PAGE), (GuestAddress(1 << 30), (PAGES - SPLIT) * PAGE)]
    )


def address(page: int) -> GuestAddress:
    """The guest address of a page, counted over both regions."""
    return GuestAddress(page * PAGE if page < SPLIT else (1 << 30) + (page - SPLIT) * PAGE)


def host(memory: GuestMemory, page: int) -> int:
    region = memory.find_region(address(page))
    assert region is not None
    return region.host_address + address(page) - region.guest_address


class Toucher:
    """Touches a page on a thread that does not hold the interpreter's lock while it waits."""

    def __init__(self, memory: GuestMemory, page: int, *, write: bool = False) -> None:
        self._keep = memory
        at = host(memory, page)
        into = memory.__class__.from_ranges([(GuestAddress(0), PAGE)])
        self._into = into
        target = into.regions[0].host_address
        call = (lib.vmm_fill, at, 7, 1) if write else (lib.vmm_copy, target, at, PAGE)
        self._thread = threading.Thread(target=call[0], args=call[1:], daemon=True)
        self._thread.start()

    def done(self, timeout: float = 10) -> bool:
        self._thread.join(timeout)
        return not self._thread.is_alive()

    @property
    def thread(self) -> int | None:
        return self._thread.native_id

    @property
    def seen(self) -> bytes:
        return self._into.read(GuestAddress(0), PAGE)


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with new_memory() as memory:
        yield memory


def whole(userfault: Userfault, *, missing: bool = True, protect: bool = False) -> None:
    for first, count in ((0, SPLIT), (SPLIT, PAGES - SPLIT)):
        userfault.register(address(first), count * PAGE, missing=missing, protect=protect)


@pytest.mark.parametrize("write", [False, True])
def test_a_page_that_is_given_up_is_told_as_lost(memory: GuestMemory, write: bool) -> None:
    """Who waits for it goes on, who comes later is told, and its neighbour is supplied."""
    with Userfault(memory) as userfault:
        whole(userfault)
        toucher = Toucher(memory, 3, write=write)
        (event,) = userfault.read(10)
        assert isinstance(event, PageFault)
        assert event.thread == toucher.thread
        try:
            userfault.poison(address(3), PAGE)
        except MappingError as error:
            if error.errno != errno.EINVAL:
                raise
            userfault.close()
            pytest.skip("this kernel gives no page up: Linux 6.6 does")
        assert toucher.done()
        userfault.copy(address(4), b"a" * PAGE)
        with pytest.raises(MappingError, match="already"):
            userfault.poison(address(4), PAGE)
        with tempfile.TemporaryFile() as file, pytest.raises(BackingLostError):
            memory.write_all_to_file(address(3), file, 2 * PAGE)
        assert [region.guest_address for region in memory.lost_regions] == [0]
        assert memory.regions[0].buffer[4 * PAGE] == ord("a")


@settings(max_examples=max(settings().max_examples // 4, 25))
@given(
    page=st.integers(0, PAGES - 1),
    write=st.booleans(),
    zero=st.booleans(),
    fill=st.binary(max_size=9),
)
def test_a_missing_page_is_what_is_supplied(
    page: int, write: bool, zero: bool, fill: bytes
) -> None:
    """Whoever touches it waits, is reported with address and kind, and sees what is supplied."""
    content = bytes(PAGE) if zero else fill.ljust(PAGE, b"x")
    with new_memory() as memory, Userfault(memory) as userfault:
        whole(userfault)
        toucher = Toucher(memory, page, write=write)
        assert userfault.read(10) == [PageFault(address(page), write, protected=False)]
        assert not toucher.done(0)
        if zero:
            userfault.zero(address(page), PAGE)
        else:
            userfault.copy(address(page), content)
        assert toucher.done()
        if write:
            assert memory.read(address(page), PAGE) == b"\7" + content[1:]
        else:
            assert toucher.seen == content
        with pytest.raises(MappingError, match="already") as caught:
            userfault.copy(address(page), bytes(PAGE))
        assert caught.value.errno == errno.EEXIST


def test_without_a_wake_they_wait_on(memory: GuestMemory) -> None:
    """Supplying and waking are two things; several waiters go on together."""
    with Userfault(memory) as userfault:
        whole(userfault)
        touchers = [Toucher(memory, 3) for _ in range(4)]
        faults = 0
        while faults < 4:
            faults += len(userfault.read(10))
        userfault.copy(address(3), b"a" * PAGE, wake=False)
        assert not any(toucher.done(0.02) for toucher in touchers)
        userfault.wake(address(3), PAGE)
        assert all(toucher.done() for toucher in touchers)
        assert {toucher.seen for toucher in touchers} == {b"a" * PAGE}


@pytest.mark.parametrize("missing", [True, False])
def test_write_protection_reports_writers_alone(memory: GuestMemory, missing: bool) -> None:
    """Readers pass; a writer waits until the page is open again."""
    for page in range(PAGES):
        memory.write(address(page), bytes([page]) * PAGE)
    with Userfault(memory) as userfault:
        whole(userfault, missing=missing, protect=True)
        userfault.write_protect(address(2), 4 * PAGE)
        reader = Toucher(memory, 2)
        assert reader.done()
        assert reader.seen == b"\2" * PAGE
        writer = Toucher(memory, 2, write=True)
        (event,) = userfault.read(10)
        assert event == PageFault(address(2), write=True, protected=True)
        assert memory.read(address(2), 1) == b"\2"
        userfault.write_protect(address(2), PAGE, protect=False)
        assert writer.done()
        assert memory.read(address(2), 2) == b"\7\2"
        userfault.write_protect(address(3), 3 * PAGE, protect=False)
        assert userfault.read(0) == []


def test_discarded_pages_are_reported(memory: GuestMemory) -> None:
    """The range, in guest addresses; who throws them away waits until it has been read."""
    memory.write(address(5), b"x" * 3 * PAGE)
    with Userfault(memory) as userfault:
        whole(userfault)
        drop = (host(memory, 5), 3 * PAGE, DONTNEED)
        thread = threading.Thread(target=lib.vmm_advise, args=drop)
        thread.start()
        assert userfault.read(10) == [Removal(address(5), 3 * PAGE)]
        thread.join(10)
        assert not thread.is_alive()
        userfault.unregister(address(0), SPLIT * PAGE)
        assert memory.read(address(5), 1) == b"\0"


def test_ranges_are_checked_before_anything_is_done(memory: GuestMemory) -> None:
    """Whole pages of memory, and nothing else; a closed one says so."""
    with Userfault(memory) as userfault:
        for call in (userfault.register, userfault.zero, userfault.wake, userfault.write_protect):
            with pytest.raises(InvalidValueError, match="whole pages"):
                call(GuestAddress(8), PAGE)
            with pytest.raises(InvalidValueError, match="whole pages"):
                call(GuestAddress(0), PAGE + 8)
            for bad in (
                (address(SPLIT - 1), 2 * PAGE),
                (GuestAddress(1 << 40), PAGE),
                (address(0), 0),
            ):
                with pytest.raises(MemoryAccessError):
                    call(*bad)
        with pytest.raises(InvalidValueError, match="asked for"):
            userfault.register(address(0), PAGE, missing=False)
        with pytest.raises(MappingError) as caught:
            userfault.copy(address(0), bytes(PAGE))
        assert caught.value.errno == errno.ENOENT
        assert "not registered" in str(caught.value)
    with pytest.raises(InvalidValueError, match="closed"):
        userfault.read(0)


@pytest.mark.parametrize("error", [errno.EPERM, errno.EACCES, errno.ENOSYS])
def test_a_refusal_says_what_to_do(memory: GuestMemory, error: int) -> None:
    """The device and the knob, with its value; or that the kernel has none."""

    def refuse(_features: int, out: list[int]) -> int:
        out[0] = error
        return -1

    class Refusing:
        vmm_userfault_open = staticmethod(refuse)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "lib", Refusing)
        with pytest.raises(MappingError) as caught:
            Userfault(memory)
    assert caught.value.errno == error
    wanted = "without userfaultfd" if error == errno.ENOSYS else "/dev/userfaultfd"
    assert wanted in caught.value.hint


# --- the filler ---

CONTENTS = st.lists(st.none() | st.integers(1, 255), min_size=PAGES, max_size=PAGES)


@contextmanager
def file_of(content: list[int | None]) -> Iterator[int]:
    """A file as `export_sparse` writes it: a hole where a page is None."""
    with tempfile.TemporaryFile() as file:
        with new_memory() as memory:
            for page, value in enumerate(content):
                if value is not None:
                    memory.write(address(page), bytes([value]) * PAGE)
            export_sparse(memory, file)
        yield file.fileno()


STEPS = st.lists(
    st.tuples(st.sampled_from(("read", "write", "discard", "drop")), st.integers(0, PAGES - 1)),
    max_size=40,
)


@settings(max_examples=max(settings().max_examples // 2, 50))
@given(content=CONTENTS, steps=STEPS, background=st.booleans())
def test_memory_is_the_file_whoever_comes_first(
    content: list[int | None], steps: list[tuple[str, int]], background: bool
) -> None:
    """Reads, writes and discards race with filling; each sees what a plain copy would show."""
    model = [value or 0 for value in content]
    with file_of(content) as fd, new_memory() as memory, Filler(memory, fd) as filler:
        filler.start(background=background)
        for what, page in steps:
            if what == "write":
                model[page] = 256 - len(model) // 64
                memory.write(address(page), bytes([model[page]]) * PAGE)
            elif what == "discard":
                model[page] = 0
                memory.discard(address(page), PAGE)
            elif what == "drop":
                model[page] = 0
                assert lib.vmm_advise(host(memory, page), PAGE, DONTNEED) == 0
            else:
                assert memory.read(address(page), PAGE) == bytes([model[page]]) * PAGE
        for page in range(PAGES):
            assert memory.read(address(page), PAGE) == bytes([model[page]]) * PAGE
        if background:
            assert filler.wait(20)
            assert filler.status.error == 0
        else:
            assert filler.status.faults > 0
            assert not filler.status.complete
    assert filler.status.pages == PAGES


def test_a_python_thread_may_wait_for_a_page(memory: GuestMemory) -> None:
    """It holds the interpreter's lock meanwhile: whoever serves it does not need that."""
    with file_of([9] * PAGES) as fd, Filler(memory, fd) as filler:
        filler.start(background=False)
        assert bytes(memory.regions[1].buffer[:3]) == b"\t\t\t"  # no call of C between
        assert filler.status.faults == 1


def test_many_threads_in_a_large_memory() -> None:
    """64 MiB, eight threads at random places, and the background: every page is the file's."""
    size = 64 << 20
    with (
        tempfile.TemporaryFile() as file,
        GuestMemory.from_ranges([(GuestAddress(0), size)]) as memory,
    ):
        for start in range(0, size, 1 << 20):  # half of it holes
            if start >> 20 & 1:
                block = b"".join(
                    (start + at).to_bytes(8, "little") * 512 for at in range(0, 1 << 20, PAGE)
                )
                os.pwrite(file.fileno(), block, start)
        os.truncate(file.fileno(), size)
        wrong: list[int] = []

        def reader(seed: int) -> None:
            for number in range(2000):
                at = (number * 7919 + seed * 104729) * PAGE % size
                wanted = at if at >> 20 & 1 else 0
                if memory.read_u64(GuestAddress(at + 8 * seed)) != wanted:
                    wrong.append(at)

        with Filler(memory, file.fileno()) as filler:
            filler.start()
            threads = [threading.Thread(target=reader, args=(n,)) for n in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
            assert filler.wait(60)
        assert wrong == []
        for at in range(0, size, PAGE):
            assert memory.read_u64(GuestAddress(at)) == (at if at >> 20 & 1 else 0)
        assert memory.lost_regions == ()


def test_what_the_file_lacks_stays_missing_until_it_is_there(tmp_path: Path) -> None:
    """A truncated file: who touches the page waits, nobody sees zeros; mended, all goes on."""
    path = tmp_path / "memory"
    with file_of([5] * PAGES) as fd:
        path.write_bytes(os.pread(fd, PAGES * PAGE, 0))
    os.truncate(path, 20 * PAGE)
    with path.open("r+b") as file, new_memory() as memory, Filler(memory, file) as filler:
        filler.start()
        with pytest.raises(MappingError, match="retry") as caught:
            filler.wait(10)
        assert caught.value.errno == errno.ENODATA
        assert memory.read(address(19), 1) == b"\5"
        toucher = Toucher(memory, 40)
        assert not toucher.done(0.1)
        os.pwrite(file.fileno(), b"\5" * (PAGES - 20) * PAGE, 20 * PAGE)
        filler.retry()
        assert toucher.done()
        assert toucher.seen == b"\5" * PAGE
        assert filler.wait(10)
        assert filler.status.error == 0


def test_memory_that_was_not_completed_is_lost(memory: GuestMemory) -> None:
    """Closed too early: it can be told, instead of taking zeros for the guest's data."""
    with file_of([5] * PAGES) as fd:
        filler = Filler(memory, fd)
        filler.start(background=False)
        assert memory.read(address(0), 1) == b"\5"
        filler.close()
        filler.close()
    assert len(memory.lost_regions) == 2
    with pytest.raises(InvalidValueError, match="closed"):
        filler.wait(0)


def test_threads_and_descriptors_are_given_back() -> None:
    """Fifty fillers later there are as many of both as before."""

    def count() -> tuple[int, int]:
        return len(list(Path("/proc/self/fd").iterdir())), len(
            list(Path("/proc/self/task").iterdir())
        )

    before = count()
    for number in range(50):
        content: list[int | None] = [1, None] * (PAGES // 2)
        with file_of(content) as fd, new_memory() as memory, Filler(memory, fd) as filler:
            filler.start(background=bool(number & 1))
            memory.read(address(number % PAGES), 1)
    deadline = time.monotonic() + 10
    while count() != before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert count() == before


def test_only_anonymous_memory_is_filled() -> None:
    """A file's pages are not missing when they are thrown away: they would come back wrong."""
    memory = GuestMemory.from_ranges([(GuestAddress(0), PAGE)], backing=Memfd())
    with file_of([1] * PAGES) as fd, pytest.raises(InvalidValueError, match="anonymous"):
        Filler(memory, fd)


def in_child(function: Callable[[], int]) -> int:
    """Run a function in a forked child; its exit status is what the function returns."""
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            status = function()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_child_sees_nothing_invented_and_stops_nothing(memory: GuestMemory) -> None:
    """Where pages are missing a child has zeros: it is told. What it closes is not the parent's."""
    with tempfile.TemporaryFile() as file:
        file.write(b"x" * PAGES * PAGE)
        file.flush()
        filler = Filler(memory, file)
        filler.start(background=False)

        def child() -> int:
            with pytest.raises(BackingLostError):
                memory.read(address(1), 1)
            with pytest.raises(InvalidValueError, match="closed"):
                filler.wait(0)
            filler.close()
            return 5 if memory.lost_regions == memory.regions and not filler.status.complete else 6

        assert in_child(child) == 5
        assert memory.read(address(2), PAGE) == b"x" * PAGE
        assert memory.lost_regions == ()
        filler.close()
        with Filler(new_memory(), file) as other:
            other.start()
            assert other.wait(10)
            assert in_child(lambda: 7 if other.status.complete else 8) == 7


def test_a_child_does_not_keep_waiters_waiting(memory: GuestMemory) -> None:
    """Closing lets everybody go on, although a child was forked that lives on."""
    userfault = Userfault(memory)
    whole(userfault)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(writer)
        try:
            with pytest.raises(BackingLostError):
                memory.write(address(SPLIT), b"x")
            os.read(reader, 1)
        finally:
            os._exit(0)
    os.close(reader)
    toucher = Toucher(memory, 3)
    assert userfault.read(10)
    userfault.close()
    assert toucher.done()
    assert toucher.seen == bytes(PAGE)
    os.close(writer)
    os.waitpid(pid, 0)


def test_a_filler_is_used_by_threads_in_any_order(memory: GuestMemory) -> None:
    """Asking, waiting and closing at once ends in an answer; it is started once."""
    with tempfile.TemporaryFile() as file:
        file.truncate(PAGES * PAGE)
        with pytest.raises(InvalidValueError, match="offset"):
            Filler(memory, file, offset=-PAGE)
        filler = Filler(memory, file)
        filler.start(background=False)
        for background in (False, True):
            with pytest.raises(InvalidValueError, match="started already"):
                filler.start(background=background)
        wrong: list[BaseException] = []

        def ask() -> None:
            try:
                while not filler.wait(0):
                    assert filler.status.pages == PAGES
            except InvalidValueError:
                pass  # it was closed
            except BaseException as error:
                wrong.append(error)

        def wait() -> None:
            try:
                assert not filler.wait()
            except BaseException as error:
                wrong.append(error)

        threads = [threading.Thread(target=call) for call in (ask, ask, wait)]
        for thread in threads:
            thread.start()
        time.sleep(0.05)
        filler.close()
        for thread in threads:
            thread.join()
        assert not wrong
