"""Hot swap, sharing with other processes, the IOMMU view, and looking into memory."""

from __future__ import annotations

import io
import json
import os
import re
import socket
import tempfile
import threading

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vm_memory import (
    Anonymous,
    DirtyBitmap,
    FilePrivate,
    FileShared,
    GuestAddress,
    GuestMemory,
    InvalidValueError,
    IommuMemory,
    Iotlb,
    Memfd,
    MemoryAccessError,
    MemoryHolder,
    NotLockedError,
    Permissions,
    RegionError,
    ShortTransferError,
    TransferError,
    TranslationError,
)
from vm_memory.looking import (
    compare,
    data_ranges,
    export_sparse,
    hexdump,
    import_sparse,
    search,
    search_pattern,
)
from vm_memory.sharing import MemoryDescription, describe, rebuild, receive, send
from vm_memory.transfer import receive_message, send_message

A = GuestAddress
R, W, RW = Permissions.READ, Permissions.WRITE, Permissions.READ_WRITE


def test_readers_see_one_map_or_the_other() -> None:
    """While maps are swapped, a reader that takes the map once always finds a whole one."""
    (low,) = GuestMemory.from_ranges([(A(0), 4096)]).regions
    maps = []
    for value in (1, 2):
        (high,) = GuestMemory.from_ranges([(A(4096), 4096)]).regions
        high.buffer[0] = high.buffer[4095] = value
        maps.append(GuestMemory([low, high]))
    holder = MemoryHolder(maps[0])
    stop = threading.Event()
    wrong: list[object] = []

    def look() -> None:
        while not stop.is_set():
            memory = holder.memory
            pair = memory.read_u8(A(4096)), memory.read_u8(A(8191))
            if pair not in ((1, 1), (2, 2)):
                wrong.append(pair)

    readers = [threading.Thread(target=look) for _ in range(3)]
    for reader in readers:
        reader.start()
    for turn in range(2000):
        with holder.lock():
            assert holder.replace(maps[(turn + 1) % 2]) is maps[turn % 2]
    stop.set()
    for reader in readers:
        reader.join()
    assert not wrong


def test_only_the_locks_holder_replaces() -> None:
    """A map cannot be replaced by who did not lock, also while another thread has locked."""
    holder = MemoryHolder(GuestMemory())
    with pytest.raises(NotLockedError):
        holder.replace(GuestMemory())
    with holder.lock():
        with pytest.raises(NotLockedError, match="wait for itself"), holder.lock():
            pass
        errors: list[Exception] = []

        def other() -> None:
            try:
                holder.replace(GuestMemory())
            except NotLockedError as error:
                errors.append(error)

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(errors) == 1


def test_another_process_sees_the_same_memory() -> None:
    """A process that received memory and one that sent it see each other's writes."""
    memory = GuestMemory.from_ranges([(A(0), 4096), (A(0x4000), 8192)], backing=Memfd())
    here, there = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            mine = receive(there, dirty_page_size=4096)
            mine.write(A(0x5FFE), b"yo")
            status = 0 if mine.read(A(0), 5) == b"hello" and mine.is_dirty(A(0x5000)) else 2
        finally:
            os._exit(status)
    memory.write(A(0), b"hello")
    send(here, memory)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert memory.read(A(0x5FFE), 2) == b"yo"
    here.close()
    there.close()


def test_descriptions_are_not_trusted() -> None:
    """Memory that cannot be shared, and messages that are wrong, are refused."""
    with pytest.raises(RegionError, match="can be shared"):
        describe(GuestMemory.from_ranges([(A(0), 4096)]))
    memory = GuestMemory.from_ranges([(A(0), 4096)], backing=Memfd())
    description, fds = describe(memory)
    with pytest.raises(InvalidValueError):
        rebuild(description, [])
    with pytest.raises(InvalidValueError):
        rebuild(attrs.evolve(description, version=2), fds)
    region = description.regions[0]
    with pytest.raises(InvalidValueError, match="has 4096 bytes"):
        rebuild(MemoryDescription((attrs.evolve(region, size=1 << 30),)), fds)
    with pytest.raises(RegionError):
        rebuild(MemoryDescription((region, region)), [*fds, *fds])


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b'{"version": 1}', b'{"version": 1, "regions": [{"size": 1}]}',
     b'{"version": 1, "regions": [{"guest_address": -1, "size": 1, "file_offset": 0}]}',
     b'{"version": 1, "regions": [{"guest_address": 0, "size": true, "file_offset": 0}]}',
     b'{"version": 1, "regions": 7}', b"[" * 60000, b"\xff\xfe",
     b'{"version": 3, "regions": []}'],
)  # fmt: skip
def test_broken_messages_are_refused(body: bytes) -> None:
    """Whatever arrives, it is one exception, and no descriptor is left open."""
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    here, there = socket.socketpair()
    with here, there, open(os.devnull) as file:  # noqa: PTH123
        socket.send_fds(here, [len(body).to_bytes(4, "little") + body], [file.fileno()])
        here.shutdown(socket.SHUT_WR)
        with pytest.raises(InvalidValueError):
            receive(there)
    here, there = socket.socketpair()
    with here, there:
        here.sendall(b"\xff\xff\xff\xff")
        with pytest.raises(InvalidValueError):
            receive(there)
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


ENTRIES = st.lists(
    st.tuples(
        st.sampled_from(["set", "set", "invalidate"]), st.integers(0, 60), st.integers(1, 30),
        st.integers(0, 200), st.sampled_from([Permissions(0), R, W, RW]),
    ),
    max_size=10,
)  # fmt: skip


@given(ENTRIES, st.integers(0, 80), st.integers(0, 60), st.sampled_from([R, W, RW]))
def test_translations_against_a_dictionary(
    entries: list[tuple[str, int, int, int, Permissions]],
    iova: int,
    length: int,
    access: Permissions,
) -> None:
    """Lookups agree, byte by byte, with a dictionary; misses and refusals are told apart."""
    tlb = Iotlb()
    model: dict[int, tuple[int, Permissions]] = {}
    for kind, start, count, target, permissions in entries:
        if kind == "set":
            tlb.set_mapping(start, target, count, permissions)
            model |= {start + i: (target + i, permissions) for i in range(count)}
        else:
            tlb.invalidate_mapping(start, count)
            model = {at: what for at, what in model.items() if not start <= at < start + count}
    wanted = range(iova, iova + length)
    misses = [at for at in wanted if at not in model]
    denied = [at for at in wanted if at in model and model[at][1] & access != access]
    if misses or denied:
        with pytest.raises(TranslationError) as caught:
            tlb.lookup(iova, length, access)
        assert [at for s, n in caught.value.misses for at in range(s, s + n)] == misses
        assert [at for s, n in caught.value.denied for at in range(s, s + n)] == denied
    else:
        found = [at for s, n in tlb.lookup(iova, length, access) for at in range(s, s + n)]
        assert found == [model[at][0] for at in wanted]
    assert sum(entry.length for entry in tlb.translations) == len(model)
    ends = [(e.iova + e.length, e.target + e.length, e.permissions) for e in tlb.translations]
    assert all(
        end < after.iova
        or (end == after.iova and (target, permissions) != (after.target, after.permissions))
        for (end, target, permissions), after in zip(ends, tlb.translations[1:], strict=False)
    )
    tlb.invalidate_all()
    assert tlb.translations == ()


def test_iommu_memory() -> None:
    """Every form of access goes through the translation, and marks both dirty spaces."""
    memory = GuestMemory.from_ranges([(A(0), 0x4000), (A(0x8000), 0x1000)], dirty_page_size=4096)
    tlb = Iotlb()
    base = 1 << 33
    tlb.set_mapping(base, 0x3000, 0x1000, RW)
    tlb.set_mapping(base + 0x1000, 0, 0x1000, RW)
    tlb.set_mapping(base + 0x2000, 0x1000, 0x1000, R)
    tlb.set_mapping(base + 0x4000, 0x7000, 0x2000, RW)
    dirty = DirtyBitmap(1 << 34)
    view = IommuMemory(memory, tlb, dirty=dirty)
    view.write(A(base + 0xFFE), b"abcd")
    assert memory.read(A(0x3FFE), 2) + memory.read(A(0), 2) == b"abcd"
    assert list(memory.harvest_dirty()) == [(0, 0x1000), (0x3000, 0x1000)]
    assert dirty.harvest() == [(base, 0x2000)]
    view.write_u32(A(base + 8), 0x01020304)
    assert view.read_u32_be(A(base + 8)) == 0x04030201
    assert view.atomic_fetch_add(A(base + 8), 4, 1) == 0x01020304
    assert b"".join(view.slices(A(base + 0xFFE), 4, R)) == b"abcd"
    assert view.read_partial(A(base), 1 << 20) == memory.read(A(0x3000), 4096) + memory.read(
        A(0), 8192
    )
    assert view.write_partial(A(base + 0x1FFE), b"abcd") == 2
    with pytest.raises(TranslationError) as denied:
        view.write(A(base + 0x1FFE), b"abcd")
    assert denied.value.denied == ((base + 0x2000, 2),)
    with pytest.raises(TranslationError) as missed:
        view.read(A(base + 0x2FFE), 4)
    assert missed.value.misses == ((base + 0x3000, 2),)
    with pytest.raises(MemoryAccessError):
        view.read(A(base + 0x4000), 1)
    with pytest.raises(InvalidValueError):
        view.read(A(base), -1)
    assert view.read(A(base + 0x5000), 8) == bytes(8)
    assert view.check_range(A(base), 0x3000, R)
    assert not view.check_range(A(base), 0x3000)
    assert not view.check_range(A(base + 0x4000), 1)
    view.enabled = False
    assert view.read(A(0), 2) == b"cd"
    assert view.check_range(A(0), 1)
    (extra,) = GuestMemory.from_ranges([(A(0x7000), 0x1000)]).regions
    bigger = view.with_memory(memory.insert(extra))
    bigger.enabled = True
    assert bigger.read(A(base + 0x4FFF), 2) == bytes(2)
    for iova, target, length in ((0, 0, 0), (-1, 0, 1), (1 << 64, 0, 1), (0, (1 << 64) - 1, 2)):
        with pytest.raises(InvalidValueError):
            tlb.set_mapping(iova, target, length, R)


def translated() -> tuple[GuestMemory, Iotlb, IommuMemory, int]:
    """Three pages in a row for the device, two of them far apart and the last read-only."""
    memory = GuestMemory.from_ranges([(A(0), 0x4000), (A(0x4000), 0x4000)], dirty_page_size=4096)
    tlb = Iotlb()
    base = 1 << 33
    tlb.set_mapping(base, 0x3000, 0x1800, RW)
    tlb.set_mapping(base + 0x1800, 0x1800, 0x800, RW)
    tlb.set_mapping(base + 0x2000, 0x6000, 0x1000, R)
    return memory, tlb, IommuMemory(memory, tlb, dirty=DirtyBitmap(1 << 34)), base


def test_transfers_through_an_iommu() -> None:
    """Files and sockets reach scattered pages in one call; both dirty spaces say which."""
    memory, tlb, view, base = translated()
    content = bytes(range(256)) * 32
    assert view.dirty is not None
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.flush()
        view.read_exact_from_file(A(base + 0x800), file, 0x1800, 0)
        assert memory.read(A(0x3800), 0x1000) + memory.read(A(0x1800), 0x800) == content[:0x1800]
        assert list(memory.harvest_dirty()) == [(0x1000, 0x1000), (0x3000, 0x2000)]
        assert view.dirty.harvest() == [(base, 0x2000)]
        assert view.read_from_file(A(base + 0x1FFE), file, 100, 0) == 2
        assert view.read_from_file(A(base), file, 100, 0x1FF0) == 16
        assert view.read_from_file(A(base), file, 100, 0x2000) == 0
        assert view.read_from_file(A(base + 0x9000), file, 0) == 0
        with pytest.raises(ShortTransferError) as short:
            view.read_exact_from_file(A(base), file, 0x100, 0x1FF0)
        assert short.value.completed == 16
        for refused in (
            lambda: view.read_exact_from_file(A(base + 0x1FFF), file, 2, 0),
            lambda: view.read_from_file(A(base + 0x2000), file, 2, 0),
        ):
            with pytest.raises(TranslationError) as caught:
                refused()
            assert caught.value.denied
        with pytest.raises(InvalidValueError, match="offset"):
            view.read_exact_from_file(A(base), file, 1, -1)
        with pytest.raises(TransferError, match="Bad file descriptor"):
            view.write_all_to_file(A(base), -1, 1)
        view.write_all_to_file(A(base + 0x1FF0), file, 0x20, 0)
        assert os.pread(file.fileno(), 0x20, 0) == memory.read(A(0x1FF0), 16) + bytes(16)
        os.lseek(file.fileno(), 0, os.SEEK_SET)
        assert view.write_to_file(A(base + 0x2FFE), file, 100) == 2
        tlb.invalidate_all()
        with pytest.raises(TranslationError) as missed:
            view.write_to_file(A(base), file, 1)
        assert missed.value.misses == ((base, 1),)


def test_messages_and_structures_through_an_iommu() -> None:
    """Recvmsg, records, vectors and marks go the same way, and need the right permission."""
    memory, _, view, base = translated()
    assert view.dirty is not None
    one, other = socket.socketpair()
    with one, other:
        one.send(b"abcdef")
        assert receive_message(view, A(base + 0x17FD), 100, other)[0] == 6
        assert memory.read(A(0x47FD), 3) + memory.read(A(0x1800), 3) == b"abcdef"
        assert send_message(view, A(base + 0x1FFE), 4, one) == 4
        assert other.recv(9) == memory.read(A(0x1FFE), 2) + memory.read(A(0x6000), 2)
        with pytest.raises(TranslationError):
            receive_message(view, A(base + 0x1FFF), 2, other)
    assert list(memory.harvest_dirty()) == [(0x1000, 0x1000), (0x4000, 0x1000)]
    assert view.dirty.harvest() == [(base + 0x1000, 0x1000)]
    view.write_struct(A(base + 0x17FC), "<Q", 0x1122334455667788)
    assert view.read_struct(A(base + 0x17FC), "<II") == (0x55667788, 0x11223344)
    assert [n for _, n in view.iovecs(A(base + 0x1700), 0x200)] == [0x100, 0x100]
    view.dirty.clear()
    view.mark_dirty(A(base + 0x1FFF), 1)
    assert view.dirty.ranges() == [(base + 0x1000, 0x1000)]


def test_a_scalar_is_translated_by_each_access() -> None:
    """An accessor holds no memory that was taken away, and follows to where it is now."""
    memory, tlb, view, base = translated()
    scalar = view.scalar(A(base + 8), 4)
    scalar.store(7)
    assert memory.read_u32(A(0x3008)) == 7
    assert view.dirty is not None
    assert view.dirty.harvest() == [(base, 0x1000)]
    tlb.set_mapping(base, 0x5000, 0x1000, R)
    assert scalar.load() == 0
    with pytest.raises(TranslationError):
        scalar.store(1)
    tlb.invalidate_mapping(base, 0x1000)
    with pytest.raises(TranslationError):
        scalar.load()
    for address, size in ((base + 0x1002, 4), (base + 0x2000, 4), (base + 0x1000, 3)):
        with pytest.raises((MemoryAccessError, TranslationError, InvalidValueError)):
            view.scalar(A(address), size)


def test_partial_forms_tell_a_miss_from_a_hole() -> None:
    """Where not even the first byte can be had, the reason is the one that it is."""
    _, tlb, view, base = translated()
    tlb.set_mapping(base + 0x10000, 0x9000, 0x1000, RW)
    with pytest.raises(TranslationError) as missed:
        view.read_partial(A(base + 0x5000), 8)
    assert missed.value.misses
    with pytest.raises(TranslationError) as denied:
        view.write_partial(A(base + 0x2000), b"x")
    assert denied.value.denied
    with pytest.raises(MemoryAccessError):
        view.read_partial(A(base + 0x10000), 8)
    assert view.read_partial(A(base + 0x2FFE), 8) == bytes(2)


def test_translations_that_go_on_are_one() -> None:
    """Pages mapped one by one, in any order, are kept as the one range that they are."""
    tlb = Iotlb()
    for page in (3, 0, 2, 1):
        tlb.set_mapping(page * 4096, (page + 7) * 4096, 4096, RW)
    (entry,) = tlb.translations
    assert (entry.iova, entry.length, entry.target) == (0, 4 * 4096, 7 * 4096)
    tlb.set_mapping(4 * 4096, 11 * 4096, 4096, R)
    assert len(tlb.translations) == 2


@given(
    st.lists(st.tuples(st.integers(0, 0x5FFF), st.binary(min_size=1, max_size=6)), max_size=8),
    st.binary(min_size=1, max_size=4),
    st.sampled_from([Anonymous(), Memfd()]),
)
def test_search_against_find(
    writes: list[tuple[int, bytes]], needle: bytes, backing: Anonymous | Memfd
) -> None:
    """Search finds what bytes.find finds in each stretch of adjacent regions."""
    memory = GuestMemory.from_ranges(
        [(A(0), 0x1001), (A(0x2000), 0x800), (A(0x2800), 8), (A(0x2808), 0x2000)], backing=backing
    )
    for address, data in [*writes, (0x27FE, needle + b"\1" + needle), (0xFFF, needle)]:
        if memory.check_range(A(address), len(data)):
            memory.write(A(address), data)
    expected: list[int] = []
    for start, size in ((0, 0x1001), (0x2000, 0x2808)):
        content = memory.read(A(start), size)
        at = content.find(needle)
        while at >= 0:
            expected.append(start + at)
            at = content.find(needle, at + 1)
    assert sorted(search(memory, needle)) == expected
    inside = [at for at in expected if at >= 0x2100 and at + len(needle) <= 0x2900]
    assert sorted(search(memory, needle, 0x2100, 0x2900)) == inside
    ranges = [(at, n) for at, n in data_ranges(memory)]
    for at, count in ranges:
        assert memory.check_range(at, count)
    marked = {at + i for at, n in ranges for i in range(n)}
    for region in memory.regions:
        for i, value in enumerate(region.buffer):
            assert not value or region.guest_address + i in marked
    for region in memory.regions:
        first, size = region.guest_address, region.size // 2
        some = {at + i for at, n in data_ranges(memory, within=[(first, size)]) for i in range(n)}
        assert some <= set(range(first, first + size))
        for i, value in enumerate(region.buffer[:size]):
            assert not value or first + i in some
    with pytest.raises(MemoryAccessError):
        list(data_ranges(memory, within=[(0x2000, 0x10000)]))


def test_search_touches_nothing() -> None:
    """Looking through memory that was never used gives it no pages, save at borders."""
    for backing in (Anonymous(), Memfd()):
        memory = GuestMemory.from_ranges([(A(0), 1 << 30)], backing=backing)
        memory.write(A(0x1234567), b"needle")
        assert list(search(memory, b"needle")) == [0x1234567]
        assert list(data_ranges(memory)) == [(0x1234000, 4096)]
        fd = memory.regions[0].fd
        assert fd is None or os.fstat(fd).st_blocks <= 32, "a few pages at borders"
    with pytest.raises(InvalidValueError):
        list(search(memory, b""))
    with pytest.raises(InvalidValueError):
        list(data_ranges(memory, 0))


def test_patterns() -> None:
    """Regular expressions match across regions and windows, and never overlap."""
    memory = GuestMemory.from_ranges([(A(0), 3 << 20), (A(3 << 20), 4096), (A(4 << 20), 4096)])
    places = [0, 0xFFFFE, 0x1FFFFD, (3 << 20) - 3, (4 << 20) + 100]
    for number, place in enumerate(places):
        memory.write(A(place), b"id=%04d" % number)
    found = list(search_pattern(memory, re.compile(rb"id=(\d+)")))
    assert found == [(place, b"id=%04d" % i) for i, place in enumerate(places)]
    some = list(search_pattern(memory, re.compile(rb"id=\d+"), 1, 0x1FFFFF))
    assert some == [(0xFFFFE, b"id=0001")]


def test_hexdump_shows_holes() -> None:
    """A dump marks what is not memory, and leaves out what was not asked for."""
    memory = GuestMemory.from_ranges([(A(0x1000), 8)])
    memory.write(A(0x1000), b"AB\0\xff~ \x7fz")
    assert hexdump(memory, A(0x0FFE), 14).splitlines() == [
        "00000ff0                                             -- --  |                |",
        "00001000  41 42 00 ff 7e 20 7f 7a  -- -- -- --              |AB..~ .z        |",
    ]
    assert hexdump(memory, A(0), 0) == ""


@pytest.mark.parametrize("backing", [Anonymous(), Memfd()])
def test_sparse_export_and_restore(backing: Anonymous | Memfd) -> None:
    """What was exported is sparse, can be imported, and mapped as a snapshot."""
    ranges = [(A(0), 64 << 20), (A(1 << 32), 10_000)]
    memory = GuestMemory.from_ranges(ranges, backing=backing)
    memory.write(A(0x5000), b"one")
    memory.write(A((64 << 20) - 1), b"z")
    memory.write(A((1 << 32) + 9_999), b"e")
    with tempfile.TemporaryFile() as file:
        assert export_sparse(memory, file) == 2 * 4096 + 10_000 - 8192
        assert os.fstat(file.fileno()).st_size == (64 << 20) + 12_288
        assert os.fstat(file.fileno()).st_blocks <= 64
        copy = GuestMemory.from_ranges(ranges)
        assert import_sparse(copy, file.fileno()) >= 2 * 4096
        assert list(compare(memory, copy)) == []
        mapped = GuestMemory.from_ranges(ranges, backing=FilePrivate(file.fileno()))
        assert list(compare(memory, mapped)) == []
        with pytest.raises(InvalidValueError, match="must have"):
            import_sparse(GuestMemory.from_ranges([(A(0), 4096)]), file)
        with pytest.raises(TransferError):
            export_sparse(memory, os.open("/dev/null", os.O_RDONLY))
        with pytest.raises(io.UnsupportedOperation):
            export_sparse(memory, io.BytesIO())


def test_comparison() -> None:
    """Differences are found by page, as are parts that only one memory has."""
    one = GuestMemory.from_ranges([(A(0), 0x8000), (A(0x10000), 0x1000)])
    other = GuestMemory.from_ranges([(A(0), 0x4000), (A(0x4000), 0x4000)], backing=Memfd())
    assert list(compare(one, other)) == [(0x10000, 0x1000)]
    one.write(A(0x3FFF), b"ab")
    other.write(A(0x6000), b"c")
    one.write(A(0x7000), b"same")
    other.write(A(0x7000), b"same")
    assert list(compare(one, other)) == [
        (0x3000, 0x2000), (0x6000, 0x1000), (0x10000, 0x1000)
    ]  # fmt: skip
    assert list(compare(one, other, 1))[:2] == [(0x3FFF, 2), (0x6000, 1)]
    assert list(compare(one, one)) == []


def test_a_description_is_plain() -> None:
    """A description consists of fields that any format can carry."""
    memory = GuestMemory.from_ranges([(A(8), 4096), (A(0x8000), 16)], backing=Memfd())
    description, _ = describe(memory)
    assert json.loads(json.dumps(attrs.asdict(description))) == {
        "version": 1,
        "regions": [
            {"guest_address": 8, "size": 4096, "file_offset": 0},
            {"guest_address": 0x8000, "size": 16, "file_offset": 4096},
        ],
    }
    assert isinstance(FileShared(3).file, int)
