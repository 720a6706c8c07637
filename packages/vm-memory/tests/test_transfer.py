"""Files and sockets, records, and C types."""

from __future__ import annotations

import array
import itertools
import os
import signal
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import IO

import attrs
import cffi
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vm_memory import (
    GuestAddress,
    GuestMemory,
    InvalidValueError,
    MemoryAccessError,
    ShortTransferError,
    TransferError,
)
from vm_memory.records import field, layout_of
from vm_memory.transfer import receive_message, send_message

A = GuestAddress


@pytest.fixture
def memory() -> GuestMemory:
    """A hundred adjacent regions of 4 KiB, and one behind a hole."""
    ranges = [(A(i * 4096), 4096) for i in range(100)]
    return GuestMemory.from_ranges([*ranges, (A(0x100000), 4096)])


@pytest.fixture
def file() -> Iterator[IO[bytes]]:
    """A file of 300,000 random bytes."""
    with tempfile.TemporaryFile() as file:
        file.write(os.urandom(300_000))
        file.flush()
        yield file


def test_exact_transfers_span_many_regions(memory: GuestMemory, file: IO[bytes]) -> None:
    """More pieces than one system call takes are transferred, both ways, at offsets."""
    content = os.pread(file.fileno(), 300_000, 0)
    memory.read_exact_from_file(A(100), file, 299_000, 1000)
    assert memory.read(A(100), 299_000) == content[1000:]
    with tempfile.TemporaryFile() as copy:
        memory.write_all_to_file(A(100), copy, 299_000, 50)
        assert os.pread(copy.fileno(), 400_000, 0) == bytes(50) + content[1000:]


def test_the_files_position_is_used_and_moves(memory: GuestMemory, file: IO[bytes]) -> None:
    """Without an offset a transfer begins where the file is, and moves it."""
    os.lseek(file.fileno(), 100, os.SEEK_SET)
    memory.read_exact_from_file(A(0), file.fileno(), 5000)
    assert os.lseek(file.fileno(), 0, os.SEEK_CUR) == 5100
    assert memory.read(A(0), 5000) == os.pread(file.fileno(), 5000, 100)


def test_partial_transfers(memory: GuestMemory, file: IO[bytes]) -> None:
    """One call moves what there is: up to a hole, or to the end of the file, where it is 0."""
    assert memory.read_from_file(A(0x100FFF), file, 100, 0) == 1
    assert memory.read_from_file(A(0), file, 100, 299_990) == 10
    assert memory.read_from_file(A(0), file, 100, 300_000) == 0
    assert memory.read_from_file(A(0), file, 0, 0) == 0
    reader, writer = os.pipe()
    assert memory.write_to_file(A(0), writer, 100) == 100
    assert memory.read_from_file(A(0x100000), reader, 4096) == 100
    assert memory.read(A(0x100000), 100) == memory.read(A(0), 100)
    os.close(reader)
    os.close(writer)


def test_transfers_that_cannot_be_complete(memory: GuestMemory, file: IO[bytes]) -> None:
    """The end of a file, a hole and a refusal of the kernel are told apart, with numbers."""
    with pytest.raises(ShortTransferError) as short:
        memory.read_exact_from_file(A(0), file, 100, 299_990)
    assert (short.value.length, short.value.completed) == (100, 10)
    assert "ended after 10" in str(short.value)
    with pytest.raises(MemoryAccessError):
        memory.read_exact_from_file(A(0x100FFF), file, 2, 0)
    with pytest.raises(MemoryAccessError):
        memory.read_from_file(A(0x100000 - 1), file, 2, 0)
    closed = os.dup(file.fileno())
    os.close(closed)
    with pytest.raises(TransferError, match="Bad file descriptor") as refused:
        memory.write_all_to_file(A(0), closed, 100, 0)
    assert refused.value.errno == 9
    for number in (1 << 31, -(1 << 40)):
        with pytest.raises(InvalidValueError, match="descriptor"):
            memory.read_exact_from_file(A(0), number, 8, 0)
    with pytest.raises(TransferError):
        memory.write_to_file(A(0), os.open(os.devnull, os.O_RDONLY), 1)


def test_places_in_a_file_are_checked(memory: GuestMemory, file: IO[bytes]) -> None:
    """A negative place is refused, and never taken for the file's own position."""
    calls = (memory.read_from_file, memory.read_exact_from_file, memory.write_to_file,
             memory.write_all_to_file)  # fmt: skip
    for call, offset in itertools.product(
        calls, (-1, -(1 << 63), -(1 << 64), (1 << 63) - 1, 1 << 64)
    ):
        with pytest.raises(InvalidValueError, match="offset"):
            call(A(0), file, 8, offset)


def test_only_what_arrived_is_marked_at_a_place_too(file: IO[bytes]) -> None:
    """A file that ends early leaves the pages behind its end clean."""
    memory = GuestMemory.from_ranges([(A(0), 16 * 4096)], dirty_page_size=4096)
    file.truncate(0)
    os.pwrite(file.fileno(), b"x" * 5000, 0)
    memory.read(A(0), 1)
    with pytest.raises(ShortTransferError):
        memory.read_exact_from_file(A(4096), file, 4 * 4096, 0)
    assert list(memory.harvest_dirty()) == [(4096, 2 * 4096)]
    memory.read_exact_from_file(A(0), file, 5000, 0)
    assert memory.read(A(0), 5001) == b"x" * 4999 + b"xx"
    assert list(memory.harvest_dirty()) == [(0, 2 * 4096)]


@pytest.mark.parametrize("size", [64, 3 << 20])
def test_any_writable_buffer_can_be_filled(size: int) -> None:
    """Whatever its items and its shape, a buffer gets the bytes; what is none is refused."""
    memory = GuestMemory.from_ranges([(A(0), 12 << 20)])
    content = bytes(range(256)) * (size // 64)
    memory.write(A(0), content)
    wide = array.array("I", bytes(size))
    square = memoryview(bytearray(size)).cast("B", (8, size // 8))
    signed = memoryview(bytearray(size)).cast("b")
    for buffer in (wide, square, signed, bytearray(size)):
        memory.read_into(A(0), buffer)  # type: ignore[arg-type]
        assert memoryview(buffer).tobytes() == content[:size]
    for wrong in ([0] * size, memoryview(bytes(size)), "x" * size):
        with pytest.raises((TypeError, BufferError)):
            memory.read_into(A(0), wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [64, 3 << 20])
def test_a_buffer_with_gaps_can_be_filled(size: int) -> None:
    """Every second byte of a buffer is a buffer too; what lies between stays."""
    memory = GuestMemory.from_ranges([(A(0), 12 << 20)])
    content = bytes(range(256)) * (size // 64)
    memory.write(A(0), content)
    target = bytearray(2 * size)
    memory.read_into(A(0), memoryview(target)[::2])
    assert target[::2] == content[:size]
    assert not any(target[1::2])


def test_what_a_mapping_has_behind_a_region_is_not_read() -> None:
    """A region may end within its last page: reading, loading and storing end there too."""
    memory = GuestMemory.from_ranges([(A(0), 0x1008)])
    memory.regions[0].mapping.view(0x2000)[0x1000:] = b"x" * 0x1000
    memory.read_into(A(0x1000), bytearray(8))
    with tempfile.TemporaryFile() as file:
        file.write(bytes(100))
        file.flush()
        for length in (9, 0x1000, 0x1001, 1 << 62):
            for address in (A(0x1000), A(1 << 63), A((1 << 64) - 1)):
                with pytest.raises(MemoryAccessError):
                    memory.read_exact_from_file(address, file, length, 0)
                with pytest.raises(MemoryAccessError):
                    memory.write_all_to_file(address, file, length, 0)
        for length in (9, 0x1000, 0x1001):
            target = bytearray(length)
            with pytest.raises(MemoryAccessError):
                memory.read_into(A(0x1000), target)
            assert not any(target)
        assert memory.regions[0].mapping.view(0x2000)[0x1000:] == b"x" * 0x1000
        assert os.fstat(file.fileno()).st_size == 100


def test_a_signal_does_not_end_an_exact_transfer(memory: GuestMemory) -> None:
    """After EINTR Python's handler runs, and the transfer goes on."""
    reader, writer = os.pipe()
    handled: list[int] = []
    main = threading.main_thread().ident
    assert main is not None

    def note(number: int, _frame: FrameType | None) -> None:
        handled.append(number)

    def feed() -> None:
        for part in (b"abc", b"def"):
            time.sleep(0.05)
            signal.pthread_kill(main, signal.SIGUSR1)
            time.sleep(0.05)
            os.write(writer, part)

    before = signal.signal(signal.SIGUSR1, note)
    thread = threading.Thread(target=feed)
    thread.start()
    try:
        memory.read_exact_from_file(A(4094), reader, 6)
    finally:
        thread.join()
        signal.signal(signal.SIGUSR1, before)
    assert memory.read(A(4094), 6) == b"abcdef"
    assert len(handled) == 2
    os.close(reader)
    os.close(writer)


def test_a_handler_that_raises_ends_a_transfer(memory: GuestMemory) -> None:
    """An exception of a signal handler comes out of a blocked transfer."""
    reader, writer = os.pipe()

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        with pytest.raises(KeyboardInterrupt):
            memory.read_exact_from_file(A(0), reader, 6)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    os.close(reader)
    os.close(writer)


def test_messages_with_descriptors(memory: GuestMemory) -> None:
    """Recvmsg and sendmsg work on memory, ancillary data included."""
    one, other = socket.socketpair()
    rights = struct.pack("i", 0)
    memory.write(A(4090), b"0123456789")
    with one, other:
        control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)]
        assert send_message(memory, A(4090), 10, one, control) == 10
        count, received, _, _ = receive_message(memory, A(0), 100, other, socket.CMSG_SPACE(4))
    assert count == 10
    assert memory.read(A(0), 11) == b"0123456789\0"
    ((level, kind, data),) = received
    assert (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
    os.close(struct.unpack("i", data)[0])


def test_iovecs_point_into_memory(memory: GuestMemory) -> None:
    """The array has the address and length of each piece, as C reads it, and keeps it alive."""
    ffi = cffi.FFI()
    vector = memory.iovecs(A(4090), 100)
    memory.write(A(4096), b"alive")
    memory.close()
    assert len(vector) == 2
    raw = bytes(ffi.buffer(ffi.cast("char *", vector.address), 32))
    assert list(struct.iter_unpack("QQ", raw)) == list(vector)
    _, (address, length) = vector
    assert length == 94
    assert bytes(ffi.buffer(ffi.cast("char *", address), 5)) == b"alive"
    assert len(memory.__class__().iovecs(A(0), 0)) == 0


def test_copies(memory: GuestMemory) -> None:
    """Copies into buffers and within memory, overlapping too, long and short."""
    data = os.urandom(300_000)
    memory.write(A(0), data)
    target = bytearray(200_000)
    memory.read_into(A(50), target)
    assert target == data[50:200_050]
    memory.copy(A(5000), A(100), 200_000)
    assert memory.read(A(5000), 200_000) == data[100:200_100]
    memory.write(A(0), data)
    memory.copy(A(10), A(0), 1000)
    assert memory.read(A(10), 1000) == data[:1000]
    single = GuestMemory.from_ranges([(A(0), 1 << 20)])
    single.write(A(0), data)
    long = bytearray(300_000)
    single.read_into(A(0), long)
    assert long == data
    with pytest.raises(MemoryAccessError):
        memory.copy(A(0), A(0x100FFF), 2)
    with pytest.raises(MemoryAccessError):
        memory.read_into(A(0x100FFF), bytearray(2))
    with pytest.raises((TypeError, BufferError, ValueError)):
        single.read_into(A(0), bytes(10))  # type: ignore[arg-type]


@given(st.integers(0, 150), st.integers(0, 150), st.integers(0, 120))
def test_overlapping_copies_over_many_regions(target: int, source: int, length: int) -> None:
    """A copy is as if all were read before anything is written, wherever regions begin."""
    sizes = [40, 8, 64, 24, 136]
    starts = itertools.accumulate(sizes[:-1], initial=0)
    memory = GuestMemory.from_ranges([(A(at), n) for at, n in zip(starts, sizes, strict=True)])
    content = bytes(range(256)) + bytes(16)
    memory.write(A(0), content)
    memory.copy(A(target), A(source), length)
    expected = bytearray(content)
    expected[target : target + length] = content[source : source + length]
    assert memory.read(A(0), 272) == expected


@attrs.frozen
class Element:
    """An element of the used ring (virtio 1.2, 2.7.8)."""

    id: int = field("I")
    length: int = field("I")


@attrs.frozen
class Header:
    """A big-endian record."""

    BYTE_ORDER = ">"
    magic: int = field("I")
    name: bytes = field("6s", default=b"")


def test_records(memory: GuestMemory) -> None:
    """Attrs classes are read and written as their fields say, across regions too."""
    memory.write_record(A(4092), Element(1, 2))
    assert memory.read(A(4092), 8) == b"\1\0\0\0\2\0\0\0"
    assert memory.read_record(A(4092), Element) == Element(1, 2)
    memory.write_record(A(0), Header(0xD00DFEED, b"device"))
    assert memory.read_u32_be(A(0)) == 0xD00DFEED
    assert memory.read_record(A(0), Header) == Header(0xD00DFEED, b"device")
    assert layout_of(Header).size == 10
    assert memory.read_struct(A(0), struct.Struct(">H")) == (0xD00D,)


def test_unfit_records_are_refused(memory: GuestMemory) -> None:
    """Classes without formats, bad formats and values that do not fit change nothing."""

    @attrs.frozen
    class Plain:
        value: int

    for call in (
        lambda: memory.read_record(A(0), Plain),
        lambda: memory.read_record(A(0), int),
        lambda: memory.write_record(A(0), Plain(1)),
        lambda: memory.write_record(A(0), 1),
        lambda: memory.write_record(A(0), Element(-1, 0)),
        lambda: memory.write_record(A(0), Element(1 << 32, 0)),
        lambda: memory.write_struct(A(0), "<I", 1, 2),
        lambda: memory.read_struct(A(0), "nonsense"),
        lambda: field("II"),
        lambda: field("!"),
    ):
        with pytest.raises(InvalidValueError):
            call()
    assert memory.read(A(0), 16) == bytes(16)


def test_c_types(memory: GuestMemory) -> None:
    """Structures that cffi declares are copied out and in."""
    ffi = cffi.FFI()
    ffi.cdef("struct request { uint32_t type; uint32_t reserved; uint64_t sector; };")
    request = ffi.new("struct request *", {"type": 1, "sector": 0x1122})
    memory.write_cdata(A(4090), ffi, request)
    copy = memory.read_cdata(A(4090), ffi, "struct request")
    assert (copy.type, copy.reserved, copy.sector) == (1, 0, 0x1122)
    memory.write_cdata(A(0), ffi, ffi.new("uint16_t[2]", [1, 2]))
    assert memory.read(A(0), 4) == b"\1\0\2\0"


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_read_modify_write(size: int) -> None:
    """Exchange, arithmetic and compare-exchange return what was before, modulo the width."""
    memory = GuestMemory.from_ranges([(A(0), 4096)])
    full = (1 << 8 * size) - 1
    assert memory.atomic_exchange(A(8), size, full) == 0
    assert memory.atomic_fetch_add(A(8), size, 3) == full
    assert memory.atomic_fetch_add(A(8), size, -1) == 2
    assert memory.atomic_fetch_or(A(8), size, 0x70) == 1
    assert memory.atomic_fetch_and(A(8), size, 0x3F) == 0x71
    assert memory.atomic_fetch_xor(A(8), size, 0x0F) == 0x31
    assert memory.atomic_compare_exchange(A(8), size, 0x31, 1) == (False, 0x3E)
    assert memory.atomic_compare_exchange(A(8), size, 0x3E, full) == (True, 0x3E)
    assert memory.read(A(0), 24) == bytes(8) + b"\xff" * size + bytes(16 - size)
    with pytest.raises(InvalidValueError):
        memory.atomic_compare_exchange(A(8), size, full + 1, 0)
    with pytest.raises(InvalidValueError):
        memory.atomic_exchange(A(8), size, -1)
    with pytest.raises(InvalidValueError, match="Order"):
        memory.atomic_fetch_add(A(8), size, 1, 9)  # type: ignore[arg-type]


def test_big_endian_words(memory: GuestMemory) -> None:
    """Big-endian words have their first byte first, at any alignment."""
    for address in (0, 1, 4093):
        memory.write_u16_be(A(address), 0x0102)
        assert memory.read(A(address), 2) == b"\1\2"
        memory.write_u32_be(A(address), 0x01020304)
        assert memory.read_u32_be(A(address)) == 0x01020304
        memory.write_u64_be(A(address), 0x0102030405060708)
        assert memory.read(A(address), 8) == bytes(range(1, 9))
        assert memory.read_u64_be(A(address)) == 0x0102030405060708
        assert memory.read_u16_be(A(address)) == 0x0102
    with pytest.raises(InvalidValueError):
        memory.write_u16_be(A(0), 1 << 16)


def test_a_scalar_keeps_its_memory_and_checks_values(memory: GuestMemory) -> None:
    """An accessor works after the map was closed, and refuses what does not fit."""
    scalar = memory.scalar(A(4088), 8)
    with pytest.raises(MemoryAccessError):
        memory.scalar(A(1), 2)
    memory.close()
    scalar.store((1 << 64) - 1)
    assert scalar.load() == (1 << 64) - 1
    for value in (-1, 1 << 64):
        with pytest.raises(InvalidValueError):
            scalar.store(value)
