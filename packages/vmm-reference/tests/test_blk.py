from __future__ import annotations

import errno
import itertools
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtio_queue.constants import F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1
from virtio_queue.device import VirtioDevice
from virtio_queue.mmio import MmioTransport
from virtio_queue.testing import Arena, MmioDriver, SplitDriver
from vm_memory import GuestAddress, GuestMemory
from vmm_reference.backends.file import FileBackend
from vmm_reference.devices.blk import model as blk
from vmm_reference.devices.blk.model import F_MQ, Block
from vmm_reference.devices.blk.setup import DriveControl
from vmm_reference.devices.states import BlockState, StateError
from vmm_reference.errors import HostError

IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
OK, IOERR, UNSUPP, UNTOUCHED = 0, 1, 2, 0xEE
RO, F_FLUSH, CONFIG_WCE, F_DISCARD, F_WRITE_ZEROES = 1 << 5, 1 << 9, 1 << 11, 1 << 13, 1 << 14
NEEDS_RESET = 64

SECTORS = 16
EVERYTHING = (1 << 64) - 1
RAM = 8 << 20


class Disk:
    """An image in memory that keeps an account of what is done to it."""

    def __init__(self, sectors: int = SECTORS, *, read_only: bool = False) -> None:
        self.size = sectors * 512
        self.read_only = read_only
        self.data = bytearray(self.size)
        self.calls: list[str] = []
        self.broken = False

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if self.broken:
            raise OSError(errno.EIO, "broken")

    def read(self, offset: int, buffers: Sequence[memoryview]) -> None:
        self._call("read")
        for buffer in buffers:
            assert offset + len(buffer) <= self.size
            buffer[:] = self.data[offset : offset + len(buffer)]
            offset += len(buffer)

    def write(self, offset: int, buffers: Sequence[memoryview]) -> None:
        self._call("write")
        for buffer in buffers:
            assert offset + len(buffer) <= self.size
            self.data[offset : offset + len(buffer)] = buffer
            offset += len(buffer)

    def flush(self) -> None:
        self._call("flush")

    def discard(self, offset: int, length: int) -> None:
        self._call("discard")
        assert offset + length <= self.size
        self.data[offset : offset + length] = b"\xdd" * length

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        self._call("unmap" if unmap else "zero")
        assert offset + length <= self.size
        self.data[offset : offset + length] = bytes(length)


def test_a_driver_uses_every_queue() -> None:
    """5.2.5: each of the queues that the configuration counts carries requests."""
    disk = Disk()
    memory = GuestMemory.from_ranges([(GuestAddress(0), RAM)])
    block = Block(disk, queues=4)
    device = VirtioDevice(block, memory, lambda: None)
    driver = MmioDriver(MmioTransport(device, device.process), arena=Arena(0x1000, RAM - 0x1000))
    driver.start(EVERYTHING)
    assert block.device_features & F_MQ
    assert int.from_bytes(block.read_config(34, 2), "little") == 4
    for number, queue in enumerate(driver.queues):
        queue.add([struct.pack("<IIQ", OUT, 0, number), bytes([number + 1]) * 512], [1])
        driver.kick(number)
        (used,) = queue.reap()
        assert used.data == b"\0"
    assert [disk.data[512 * number] for number in range(5)] == [1, 2, 3, 4, 0]
    block.process(4)
    assert block.metrics() == {"requests_write": 4, "host_failures": 0, "refused_requests": 0}


def test_a_disk_changes_its_size_and_its_image(tmp_path: Path) -> None:
    """The driver is told, sees the capacity with a new generation, and reaches the new end."""
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.write_bytes(path.name.encode() * 4096)
    backend = FileBackend(str(paths[0]))
    machine = Machine(backend)
    control = DriveControl(backend)
    control.block = machine.block
    control.device = machine.device

    def capacity() -> int:
        return int.from_bytes(machine.device.read_config(0, 8), "little")

    before = machine.device.read_config_generation()
    control.resize(16384)
    assert machine.interrupts == 1
    assert capacity() == 32
    assert machine.device.read_config_generation() != before
    assert machine.request(OUT, 31, b"z" * 512) == OK
    paths[0].write_bytes(bytes(2048))  # as somebody outside would
    assert machine.request(IN, 31, room=512) == IOERR
    control.resize()
    assert capacity() == 4
    for size in (0, 511, -512):
        with pytest.raises(HostError, match="multiple of 512"):
            control.resize(size)
    assert capacity() == 4
    with pytest.raises(HostError, match="No such file"):
        control.swap(str(tmp_path / "missing"))
    control.swap(str(paths[1]))
    assert capacity() == 8
    assert machine.send([struct.pack("<IIQ", IN, 0, 0)], [512, 1])[1] == b"b" * 512
    FileBackend(str(paths[0])).close()  # its lock is gone
    with pytest.raises(HostError, match="another machine"):
        FileBackend(str(paths[1]))
    control.close()


class Machine:
    """A disk, its device behind registers, and a driver that speaks to it."""

    def __init__(
        self,
        disk: Disk | FileBackend | None = None,
        *,
        wanted: int = EVERYTHING,
        start: bool = True,
    ) -> None:
        self.disk = Disk() if disk is None else disk
        self.interrupts = 0
        self.memory = GuestMemory.from_ranges([(GuestAddress(0), RAM)])
        self.block = Block(self.disk, serial="serial-0")
        self.device = VirtioDevice(self.block, self.memory, self.interrupt)
        transport = MmioTransport(self.device, self.device.process)
        self.driver = MmioDriver(transport, arena=Arena(0x1000, RAM - 0x1000))
        if start:
            self.driver.start(wanted)

    def interrupt(self) -> None:
        self.interrupts += 1

    @property
    def queue(self) -> SplitDriver:
        queue = self.driver.queues[0]
        assert isinstance(queue, SplitDriver)
        return queue

    def send(
        self, readable: Sequence[bytes], writable: Sequence[int], *, indirect: bool = False
    ) -> tuple[int, bytes, int]:
        """One chain: status byte (or UNTOUCHED), what the buffer holds before it, used length."""
        head = self.queue.add(readable, writable, indirect=indirect)
        buffer = self.queue.outstanding[head]
        pieces = list(buffer.writable)
        for address, length in pieces:
            self.queue.write(address, bytes([UNTOUCHED]) * length)
        self.driver.kick()
        (used,) = self.queue.reap()
        data = b"".join(self.queue.read(address, length) for address, length in pieces)
        return data[-1], data[:-1], used.length

    def request(self, kind: int, sector: int, data: bytes = b"", room: int = 0) -> int:
        """A request laid out as Linux does it; returns the status."""
        header = struct.pack("<IIQ", kind, 0, sector)
        return self.send([header, data] if data else [header], [room, 1] if room else [1])[0]

    def config(self, layout: str, offset: int) -> int:
        data = self.driver.transport.read(0x100 + offset, struct.calcsize(layout))
        return int(struct.unpack("<" + layout, data)[0])

    def still_works(self) -> bool:
        """Whether the device serves the next request as if nothing had been."""
        return self.request(IN, 0, room=512) == OK and self.driver.status == 15


def segments(*entries: tuple[int, int, int]) -> bytes:
    return b"".join(struct.pack("<QII", *entry) for entry in entries)


@pytest.fixture
def machine() -> Iterator[Machine]:
    machine = Machine()
    yield machine
    machine.memory.close()


def disk_of(machine: Machine) -> Disk:
    assert isinstance(machine.disk, Disk)
    return machine.disk


# What a driver sees.


def test_configuration_space(machine: Machine) -> None:
    """Capacity, block size, topology and limits stand where 5.2.4 has them."""
    assert machine.config("Q", 0) == SECTORS
    assert machine.config("I", 8) == blk.SIZE_MAX
    assert machine.config("I", 12) == 254
    assert machine.config("I", 20) == 512
    assert (machine.config("B", 24), machine.config("H", 26)) == (3, 8)
    assert (machine.config("B", 32), machine.config("H", 34)) == (1, 1)
    assert (machine.config("I", 36), machine.config("I", 40)) == (1 << 22, 64)
    assert (machine.config("I", 48), machine.config("I", 52)) == (1 << 17, 1)
    assert machine.config("B", 56) == 1


@pytest.mark.parametrize("offset", [0, 3, 58, 60, 0xEFF])
@pytest.mark.parametrize("length", [1, 2, 4, 8])
def test_configuration_reads_anywhere(machine: Machine, offset: int, length: int) -> None:
    """Reads across and past the end of the structure have their width, zeros past the end."""
    data = machine.driver.transport.read(0x100 + offset, length)
    whole = machine.block.read_config(0, 4096)
    assert len(whole) == 60
    assert data == whole[offset : offset + length].ljust(length, b"\0")


def test_features_of_a_read_only_disk() -> None:
    """A disk that can't be written says so, and offers nothing that writes."""
    machine = Machine(Disk(read_only=True))
    offered = machine.driver.read_features()
    assert offered & RO
    assert offered & F_FLUSH
    assert not offered & (CONFIG_WCE | F_DISCARD | F_WRITE_ZEROES)
    assert not Machine().driver.read_features() & RO
    machine.memory.close()


@pytest.mark.parametrize("serial", ["x" * 21, "é"])
def test_serial_must_fit(serial: str) -> None:
    """An identity of more than 20 bytes, or not of ASCII, is refused when the disk is made."""
    with pytest.raises(ValueError, match="20 ASCII characters"):
        Block(Disk(), serial=serial)


# Requests.


@pytest.mark.parametrize("indirect", [False, True])
def test_write_then_read(machine: Machine, indirect: bool) -> None:
    """What is written to a sector is read from it, over several descriptors."""
    data = bytes(range(256)) * 4
    header = struct.pack("<IIQ", OUT, 0, 3)
    assert machine.send([header, data[:100], data[100:]], [1], indirect=indirect) == (OK, b"", 1)
    assert disk_of(machine).data[1536:2560] == data
    header = struct.pack("<IIQ", IN, 0, 3)
    answer = machine.send([header], [512, 256, 256, 1], indirect=indirect)
    assert answer == (OK, data, 1025)
    assert (machine.interrupts, machine.block.requests) == (2, {OUT: 1, IN: 1})


def test_header_data_and_status_in_any_descriptors(machine: Machine) -> None:
    """The framing is the driver's: one descriptor a byte works, and so does one for everything."""
    data = b"\x5a" * 512
    stream = struct.pack("<IIQ", OUT, 0, 1) + data
    assert machine.send([stream], [1])[0] == OK
    assert machine.send([stream[n : n + 1] for n in range(40)] + [stream[40:]], [1])[0] == OK
    header = struct.pack("<IIQ", IN, 0, 1)
    assert machine.send([header[:7], header[7:]], [513]) == (OK, data, 513)
    assert machine.send([header], [1] * 100 + [413]) == (OK, data, 513)


def test_identity(machine: Machine) -> None:
    """GET_ID gives 20 bytes, padded by zeros; a shorter buffer gets as much as fits."""
    header = struct.pack("<IIQ", GET_ID, 0, 0)
    name = b"serial-0".ljust(20, b"\0")
    assert machine.send([header], [20, 1]) == (OK, name, 21)
    assert machine.send([header], [8, 1]) == (OK, b"serial-0", 9)
    assert machine.send([header], [24, 1]) == (OK, name + bytes([UNTOUCHED]) * 4, 20)


def test_flush(machine: Machine) -> None:
    """A flush goes to the image; its sector means nothing."""
    assert machine.request(FLUSH, 0) == machine.request(FLUSH, 12345) == OK
    assert disk_of(machine).calls == ["flush", "flush"]


def test_discard_and_write_zeroes(machine: Machine) -> None:
    """Segments are carried out in order; write zeroes tells whether space may be given back."""
    disk = disk_of(machine)
    disk.data[:] = b"\xaa" * disk.size
    assert machine.request(DISCARD, 0, segments((1, 1, 0), (4, 2, 0))) == OK
    assert machine.request(WRITE_ZEROES, 0, segments((8, 1, 1))) == OK
    assert machine.request(WRITE_ZEROES, 0, segments((9, 1, 0))) == OK
    assert disk.calls == ["discard", "discard", "unmap", "zero"]
    kept = [n for n in range(SECTORS) if disk.data[n * 512] == 0xAA]
    assert kept == [0, 2, 3, 6, 7, 10, 11, 12, 13, 14, 15]


@pytest.mark.parametrize("kind", [2, 3, 5, 10, 14, 15, 0x80000000, 0xFFFFFFFF])
def test_unknown_type(machine: Machine, kind: int) -> None:
    """A request of a type that the device does not have is answered UNSUPP."""
    assert machine.request(kind, 0) == UNSUPP
    assert machine.still_works()


def test_unknown_types_do_not_grow_the_account(machine: Machine) -> None:
    """The guest chooses 32 bits of type; the account of requests keeps its size."""
    for kind in range(1000, 1100):
        assert machine.request(kind, 0) == UNSUPP
    assert machine.block.requests == {-1: 100}
    assert machine.block.refused == 100


@pytest.mark.parametrize("kind", [FLUSH, DISCARD, WRITE_ZEROES])
def test_feature_that_was_not_accepted(kind: int) -> None:
    """A request whose feature was not negotiated is not served."""
    machine = Machine(wanted=F_VERSION_1)
    assert machine.request(kind, 0, segments((0, 1, 0))) == UNSUPP
    assert disk_of(machine).calls == []
    machine.memory.close()


def test_host_that_fails(machine: Machine) -> None:
    """An error of the host is IOERR for that request, is counted, and the device goes on."""
    disk = disk_of(machine)
    disk.broken = True
    header = struct.pack("<IIQ", IN, 0, 0)
    assert machine.send([header], [512, 1]) == (IOERR, bytes([UNTOUCHED]) * 512, 0)
    assert machine.request(OUT, 0, bytes(512)) == IOERR
    assert machine.request(FLUSH, 0) == IOERR
    assert machine.request(DISCARD, 0, segments((0, 1, 0))) == IOERR
    assert machine.request(WRITE_ZEROES, 0, segments((0, 1, 0))) == IOERR
    assert (machine.block.failures, machine.block.refused) == (5, 0)
    disk.broken = False
    assert machine.still_works()


# Durability.


def test_without_flush_each_write_is_durable() -> None:
    """A driver that can't flush has every write flushed before it is used."""
    machine = Machine(wanted=F_VERSION_1 | F_WRITE_ZEROES)
    assert machine.config("B", 32) == 0
    assert machine.request(OUT, 0, bytes(512)) == OK
    assert machine.request(WRITE_ZEROES, 0, segments((0, 1, 0))) == OK
    assert machine.request(IN, 0, room=512) == OK
    assert disk_of(machine).calls == ["write", "flush", "zero", "flush", "read"]
    machine.memory.close()


def test_cache_mode_can_be_set(machine: Machine) -> None:
    """With CONFIG_WCE the driver turns the cache off and on; other fields can't be written."""
    machine.driver.transport.write(0x100 + 32, b"\0")
    assert machine.config("B", 32) == 0
    machine.request(OUT, 0, bytes(512))
    machine.driver.transport.write(0x100 + 32, b"\x05")
    assert machine.config("B", 32) == 1
    machine.request(OUT, 0, bytes(512))
    machine.driver.transport.write(0x100, b"\xff" * 8)
    assert machine.config("Q", 0) == SECTORS
    assert disk_of(machine).calls == ["write", "flush", "write"]


def test_cache_mode_that_was_not_negotiated() -> None:
    """Without CONFIG_WCE the field can't be written: the mode is what FLUSH says."""
    for wanted, mode in ((F_FLUSH, 1), (0, 0)):
        machine = Machine(wanted=F_VERSION_1 | wanted)
        for value in (b"\0", b"\1"):
            machine.driver.transport.write(0x100 + 32, value)
            assert machine.config("B", 32) == mode
        machine.memory.close()


def test_reset_forgets_the_cache_mode(machine: Machine) -> None:
    """After a reset the next driver finds the cache on."""
    machine.driver.transport.write(0x100 + 32, b"\0")
    machine.driver.start()
    assert machine.config("B", 32) == 1
    assert machine.still_works()


# Hostile drivers.


@pytest.mark.parametrize(
    ("sector", "length"),
    [
        (SECTORS, 512),
        (SECTORS - 1, 1024),
        (0, (SECTORS + 1) * 512),
        (1 << 55, 512),
        ((1 << 64) // 512, 512),
        ((1 << 64) - 1, 512),
        ((1 << 64) - 1, 1024),
        (1 << 63, SECTORS * 512),
    ],
)
def test_hostile_range_past_the_end(machine: Machine, sector: int, length: int) -> None:
    """Item 9: a range that ends behind the disk, also by wrap of sector * 512, is refused whole."""
    disk = disk_of(machine)
    assert machine.request(OUT, sector, b"x" * length) == IOERR
    header = struct.pack("<IIQ", IN, 0, sector)
    assert machine.send([header], [length, 1]) == (IOERR, bytes([UNTOUCHED]) * length, 0)
    assert (disk.calls, len(disk.data), any(disk.data)) == ([], SECTORS * 512, False)
    assert machine.block.refused == 2
    assert machine.still_works()


def test_hostile_sum_of_descriptors_past_the_end(machine: Machine) -> None:
    """Item 9: descriptors of which each fits but whose sum does not are refused whole."""
    header = struct.pack("<IIQ", OUT, 0, SECTORS - 3)
    assert machine.send([header, *[bytes(512)] * 4], [1])[0] == IOERR
    assert disk_of(machine).calls == []
    assert machine.send([header, *[bytes(512)] * 3], [1])[0] == OK


def test_last_sector(machine: Machine) -> None:
    """Item 9: sector capacity - 1 is served, and nothing behind it."""
    assert machine.request(OUT, SECTORS - 1, b"z" * 512) == OK
    assert machine.send([struct.pack("<IIQ", IN, 0, SECTORS - 1)], [512, 1])[1] == b"z" * 512


@pytest.mark.parametrize("length", [0, 1, 511, 513, 1023])
def test_hostile_length_of_no_sectors(machine: Machine, length: int) -> None:
    """Data that is not one or more whole sectors is refused, in both directions."""
    assert machine.request(OUT, 0, b"x" * length) == IOERR
    assert machine.request(IN, 0, room=length) == IOERR
    assert disk_of(machine).calls == []


def test_hostile_descriptors_that_share_memory(machine: Machine) -> None:
    """A request that maps one megabyte 127 times is counted whole, and does not fit the disk."""
    queue, count = machine.queue, 127
    header = queue.arena.allocate(16)
    queue.write(header, struct.pack("<IIQ", IN, 0, 0))
    queue.write_descriptor(0, header, 16, 1, 1)
    for n in range(1, count):
        queue.write_descriptor(n, 0x100000, 1 << 20, 3, n + 1)
    status = queue.arena.allocate(1)
    queue.write_descriptor(count, status, 1, 2)
    queue.make_available(0)
    queue.publish()
    machine.driver.kick()
    assert queue.read(status, 1) == bytes([IOERR])
    assert disk_of(machine).calls == []


def test_hostile_request_of_more_than_the_limits() -> None:
    """A request larger than seg_max segments of size_max is refused before the host does it."""
    disk = Disk()
    disk.size = 1 << 40
    block = Block(disk)
    assert blk.MAX_DATA == 254 << 20
    with pytest.raises(blk.Refused):
        block._data(0, blk.MAX_DATA + 512)
    assert block._data(1, blk.MAX_DATA) == 512


@pytest.mark.parametrize("kind", [DISCARD, WRITE_ZEROES])
@pytest.mark.parametrize(
    ("payload", "status"),
    [
        (b"", IOERR),
        (segments((0, 1, 0))[:15], IOERR),
        (segments((0, 1, 0)) + b"x", IOERR),
        (segments(*[(0, 1, 0)] * 65), IOERR),
        (segments(*[(0, 1, 0)] * 10000), IOERR),
        (segments((0, 1, 2)), UNSUPP),
        (segments((0, 1, 0xFFFFFFFE)), UNSUPP),
        (segments((0, 1, 0x80000000)), UNSUPP),
        (segments((0, 0xFFFFFFFF, 0)), IOERR),
        (segments((0, SECTORS + 1, 0)), IOERR),
        (segments((SECTORS, 1, 0)), IOERR),
        (segments(((1 << 64) - 1, 2, 0)), IOERR),
        (segments(((1 << 55), 1, 0)), IOERR),
        (segments((0, 0, 0)), IOERR),
    ],
)
def test_hostile_segments(machine: Machine, kind: int, payload: bytes, status: int) -> None:
    """Item 10: too many segments, unknown flags, overflow of any kind: refused, nothing done."""
    assert machine.request(kind, 0, payload) == status
    assert disk_of(machine).calls == []
    assert machine.still_works()


def test_hostile_segment_behind_good_ones(machine: Machine) -> None:
    """Item 10: all segments are checked before the first is carried out."""
    assert machine.request(DISCARD, 0, segments((0, 1, 0), (1, 1, 0), (SECTORS, 1, 0))) == IOERR
    assert disk_of(machine).calls == []


def test_discard_with_unmap_flag(machine: Machine) -> None:
    """Item 10: the unmap flag is for write zeroes; a discard that has it is UNSUPP (5.2.6.2)."""
    assert machine.request(DISCARD, 0, segments((0, 1, 1))) == UNSUPP
    assert machine.request(WRITE_ZEROES, 0, segments((0, 1, 1))) == OK


def test_zeroing_is_limited_to_what_can_be_done_at_once() -> None:
    """Item 10: where the host writes zeros by hand, one request can't keep it for minutes."""
    disk = Disk(1 << 18)
    machine = Machine(disk)
    for sectors, status in ((blk.MAX_ZEROES_SECTORS + 1, IOERR), (blk.MAX_ZEROES_SECTORS, OK)):
        assert machine.request(WRITE_ZEROES, 0, segments((0, sectors, 0))) == status
    assert machine.request(WRITE_ZEROES, 0, segments((0, 1, 0), (1, 1, 0))) == IOERR
    assert disk.calls == ["zero"]
    machine.memory.close()


@pytest.mark.parametrize("kind", [OUT, DISCARD, WRITE_ZEROES])
def test_hostile_write_to_a_read_only_disk(kind: int) -> None:
    """Item 10: whatever a driver accepted, a read-only disk is read, flushed and named only."""
    machine = Machine(Disk(read_only=True))
    payload = bytes(512) if kind == OUT else segments((0, 1, 0))
    assert machine.request(kind, 0, payload) in (IOERR, UNSUPP)
    assert machine.request(GET_ID, 0, room=20) == OK
    assert machine.request(FLUSH, 0) == OK
    assert machine.still_works()
    assert disk_of(machine).calls == ["flush", "read"]
    machine.memory.close()


@pytest.mark.parametrize("length", [0, 1, 15])
def test_hostile_short_header(machine: Machine, length: int) -> None:
    """Item 11: a header of less than 16 bytes is IOERR; there is a status byte to say so."""
    readable = [bytes(length)] if length else []
    assert machine.send(readable, [512, 1]) == (IOERR, bytes([UNTOUCHED]) * 512, 0)
    assert machine.still_works()


def test_hostile_header_that_can_only_be_written(machine: Machine) -> None:
    """Item 11: a write-only header is no header."""
    assert machine.send([], [16, 512, 1])[0] == IOERR


def test_hostile_status_that_can_only_be_read(machine: Machine) -> None:
    """Item 11: without a writable byte there is no answer; the device asks for a reset."""
    machine.queue.add([struct.pack("<IIQ", OUT, 0, 0), bytes(512), b"\0"])
    machine.driver.kick()
    assert machine.driver.status & NEEDS_RESET
    assert "status byte" in machine.device.reset_reason
    assert disk_of(machine).calls == []
    machine.driver.start()
    assert machine.still_works()


def test_hostile_zero_length_descriptors(machine: Machine) -> None:
    """Item 11: empty descriptors are nothing, wherever they are; or they end in a reset."""
    header = struct.pack("<IIQ", OUT, 0, 0)
    machine.queue.add([header, b"", b"x" * 512], [0, 1])
    machine.driver.kick()
    if not machine.driver.status & NEEDS_RESET:
        assert disk_of(machine).data[:512] == b"x" * 512


def hostile_chain(queue: SplitDriver, case: str) -> None:
    """Write the descriptors of one published way to break a device."""
    header, status = queue.arena.allocate(16), queue.arena.allocate(1)
    queue.write(header, struct.pack("<IIQ", IN, 0, 0))
    queue.write_descriptor(0, header, 16, 1, 1)
    queue.write_descriptor(1, 0x100000, 512, 3, 2)
    queue.write_descriptor(2, status, 1, 2)
    head, ahead = 0, 1
    if case == "loop":
        queue.write_descriptor(1, 0x100000, 512, 3, 1)
    elif case == "next outside the table":
        queue.write_descriptor(1, 0x100000, 512, 3, queue.size)
    elif case == "head outside the table":
        head = queue.size
    elif case == "available index jumps":
        ahead = queue.size + 1
    elif case == "buffer outside memory":
        queue.write_descriptor(1, RAM, 512, 3, 2)
    elif case == "buffer across the end of memory":
        queue.write_descriptor(1, RAM - 256, 512, 3, 2)
    elif case == "buffer that wraps":
        queue.write_descriptor(1, (1 << 64) - 256, 512, 3, 2)
    elif case == "written before read":
        queue.write_descriptor(0, header, 16, 3, 1)
        queue.write_descriptor(1, 0x100000, 512, 1, 2)
    elif case == "indirect in indirect":
        table = queue.arena.allocate(32, align=16)
        queue.write_descriptor(0, table, 16, 4, 0, table=table)
        queue.write_descriptor(0, table, 16, 4)
    elif case == "indirect of odd length":
        queue.write_descriptor(0, 0x200000, 24, 4)
    else:
        raise AssertionError(case)
    queue.make_available(head)
    queue.set_avail_idx(ahead)


@pytest.mark.parametrize(
    "case",
    [
        "loop", "next outside the table", "head outside the table", "available index jumps",
        "buffer outside memory", "buffer across the end of memory", "buffer that wraps",
        "written before read", "indirect in indirect", "indirect of odd length",
    ],
)  # fmt: skip
def test_hostile_chain(machine: Machine, case: str) -> None:
    """Item 11: a ring or chain that must not be stops the device until its driver resets it."""
    hostile_chain(machine.queue, case)
    machine.driver.kick()
    assert machine.driver.status & NEEDS_RESET
    assert disk_of(machine).calls == []
    machine.driver.kick()
    machine.driver.start()
    assert machine.still_works()


def test_hostile_head_twice_in_flight(machine: Machine) -> None:
    """CVE-2026-45782: a head that is available twice at once is never served twice at once."""
    header = struct.pack("<IIQ", IN, 0, 0)
    head = machine.queue.add([header], [512, 1], publish=False)
    machine.queue.make_available(head)
    machine.queue.publish()
    machine.driver.kick()
    # One after the other they are two requests; together they would be the driver's fault.
    assert disk_of(machine).calls in (["read"], ["read", "read"])


@pytest.mark.parametrize("kind", [OUT, DISCARD])
def test_hostile_double_fetch(machine: Machine, kind: int) -> None:
    """Item 12: what was checked is what is used, though the guest rewrites it in between."""
    disk = disk_of(machine)
    payload = b"x" * 512 if kind == OUT else segments((1, 1, 0), (2, 1, 0))
    head = machine.queue.add([struct.pack("<IIQ", kind, 0, 1), payload], [1])
    (header, _), (data, _) = machine.queue.outstanding[head].readable
    real = disk._call

    def rewrite(name: str) -> None:
        machine.queue.write(header, struct.pack("<IIQ", OUT, 0, SECTORS - 1))
        if kind == DISCARD:
            machine.queue.write(data, segments((0, 1000, 0), (0, 1000, 0)))
        real(name)

    disk._call = rewrite  # type: ignore[method-assign]
    machine.driver.kick()
    assert machine.queue.reap()[0].data == bytes([OK])
    touched = [n for n in range(SECTORS) if any(disk.data[n * 512 : (n + 1) * 512])]
    assert touched == ([1] if kind == OUT else [1, 2])


def test_a_greedy_driver_shares_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """One call moves a bounded amount and says that there is more; the next one goes on."""
    monkeypatch.setattr(blk, "BUDGET", 2048)
    machine = Machine()
    header = struct.pack("<IIQ", IN, 0, 0)
    for _ in range(10):
        machine.queue.add([header], [512, 1])
    machine.driver.kick()
    rounds = [len(machine.queue.reap())]
    while machine.block.unfinished:
        machine.device.process(0)
        rounds.append(len(machine.queue.reap()))
    assert rounds == [4, 4, 2]
    machine.memory.close()


# State.


def test_saved_and_restored_between_requests() -> None:
    """A disk that is restored in another device goes on with its cache mode and its rings."""
    disk = Disk()
    first = Machine(disk)
    first.driver.transport.write(0x100 + 32, b"\0")
    assert first.request(OUT, 2, b"q" * 512) == OK
    second = Machine(disk, start=False)
    second.memory.write(GuestAddress(0), first.memory.read(GuestAddress(0), RAM))
    second.block.restore(first.block.save())
    second.device.restore(first.device.save())
    second.driver.queues, second.driver.features = first.driver.queues, first.driver.features
    second.queue.memory = second.memory
    assert second.config("B", 32) == 0
    assert second.send([struct.pack("<IIQ", IN, 0, 2)], [512, 1])[1] == b"q" * 512
    assert second.request(OUT, 2, bytes(512)) == OK
    assert disk.calls == ["write", "flush", "read", "write", "flush"]
    first.memory.close()
    second.memory.close()


def test_requests_in_flight_are_done_after_a_restore() -> None:
    """A chain that was taken and not answered when the state was saved is answered then."""
    disk = Disk()
    first = Machine(disk)
    head = first.queue.add([struct.pack("<IIQ", OUT, 0, 5), b"w" * 512], [1])
    assert first.device.queues[0].pop(first.memory) is not None
    second = Machine(disk, start=False)
    second.memory.write(GuestAddress(0), first.memory.read(GuestAddress(0), RAM))
    second.block.restore(first.block.save())
    second.device.restore(first.device.save())
    second.driver.queues, second.driver.features = first.driver.queues, first.driver.features
    second.queue.memory = second.memory
    second.driver.kick()
    assert [used.head for used in second.queue.reap()] == [head]
    assert disk.data[5 * 512 : 6 * 512] == b"w" * 512
    first.memory.close()
    second.memory.close()


def test_state_of_another_disk_is_refused() -> None:
    """A state is for a disk of its size; nothing is restored from another."""
    with pytest.raises(StateError, match=r"BlockState\.sectors: 16 must be 17"):
        Block(Disk(17)).restore(Block(Disk(16)).save())
    with pytest.raises(StateError, match=r"BlockState\.writeback"):
        BlockState(writeback=1, sectors=1)  # type: ignore[arg-type]


# The oracle.


def expected(
    model: dict[int, bytes], kind: int, sector: int, payload: bytes, room: int
) -> tuple[int, bytes | None]:
    """Status and data of a request by the specification, on a disk that is a dict of sectors."""
    if kind in (IN, OUT):
        length = room if kind == IN else len(payload)
        count = length // 512
        if length == 0 or length % 512 or sector + count > SECTORS:
            return IOERR, None
        if kind == IN:
            return OK, b"".join(model.get(sector + n, bytes(512)) for n in range(count))
        for n in range(count):
            model[sector + n] = payload[n * 512 : (n + 1) * 512]
        return OK, None
    if kind == FLUSH:
        return OK, None
    if kind == GET_ID:
        return OK, b"serial-0".ljust(20, b"\0")[:room]
    if kind in (DISCARD, WRITE_ZEROES):
        most = 64 if kind == DISCARD else 1
        if len(payload) % 16 or not 1 <= len(payload) // 16 <= most:
            return IOERR, None
        entries = list(struct.iter_unpack("<QII", payload))
        for start, count, flags in entries:
            if flags & ~(kind == WRITE_ZEROES):
                return UNSUPP, None
            if count == 0 or start + count > SECTORS:
                return IOERR, None
        for start, count, _ in entries:
            for n in range(start, start + count):
                model[n] = (b"\xdd" if kind == DISCARD else b"\0") * 512
        return OK, None
    return UNSUPP, None


sectors = st.one_of(st.integers(0, SECTORS + 1), st.sampled_from([1 << 55, (1 << 64) - 1]))
lengths = st.one_of(st.integers(0, 6).map(lambda n: n * 512), st.integers(0, 3000))
payloads = st.one_of(
    st.tuples(lengths, st.integers(0, 255)).map(lambda both: bytes([both[1]]) * both[0]),
    st.lists(
        st.tuples(sectors, st.integers(0, 4), st.sampled_from([0, 0, 0, 1, 2])), max_size=4
    ).map(lambda entries: segments(*entries)),
)
requests = st.lists(
    st.tuples(
        st.sampled_from([IN, OUT, IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES, 99]),
        sectors,
        payloads,
        lengths,
        st.lists(st.integers(0, 3100), max_size=5),
        st.booleans(),
    ),
    max_size=12,
)


def cut(total: int, places: list[int]) -> list[tuple[int, int]]:
    """Non-empty pieces of a stream."""
    bounds = sorted({0, total, *(place for place in places if place < total)})
    return list(itertools.pairwise(bounds))


@pytest.mark.parametrize("features", [0, F_EVENT_IDX, F_INDIRECT_DESC, EVERYTHING])
@given(requests)
def test_disk_agrees_with_a_dict_of_sectors(
    features: int, requests: list[tuple[int, int, bytes, int, list[int], bool]]
) -> None:
    """Any requests in any framing: status, data and disk are what the specification says."""
    machine = Machine(wanted=features | F_VERSION_1 | F_FLUSH | F_DISCARD | F_WRITE_ZEROES)
    model: dict[int, bytes] = {}
    for kind, sector, payload, room, places, indirect in requests:
        stream = struct.pack("<IIQ", kind, 0, sector) + payload
        readable = [stream[start:end] for start, end in cut(len(stream), places)]
        writable = [end - start for start, end in cut(room + 1, places)]
        indirect = indirect and bool(machine.driver.features & F_INDIRECT_DESC)
        status, data = expected(model, kind, sector, payload, room)
        seen = machine.send(readable, writable, indirect=indirect)
        assert seen[0] == status
        if data is not None:
            assert seen[1][: len(data)] == data
            # The status byte counts only where no gap is before it.
            assert seen[2] == len(data) + (room == len(data))
        else:
            assert seen[2] == (room == 0)
    disk = disk_of(machine)
    for n in range(SECTORS):
        assert disk.data[n * 512 : (n + 1) * 512] == model.get(n, bytes(512))
    machine.memory.close()


def test_on_a_file(tmp_path: Path) -> None:
    """The same requests end in an image on the host."""
    path = tmp_path / "disk.img"
    path.write_bytes(b"\xaa" * SECTORS * 512)
    disk = FileBackend(str(path))
    machine = Machine(disk)
    assert machine.request(OUT, 1, b"file" * 128) == OK
    assert machine.request(WRITE_ZEROES, 0, segments((2, 2, 1))) == OK
    assert machine.request(DISCARD, 0, segments((15, 1, 0))) == OK
    assert machine.request(FLUSH, 0) == OK
    header = struct.pack("<IIQ", IN, 0, 0)
    data = machine.send([header], [5 * 512, 1])[1]
    assert data == b"\xaa" * 512 + b"file" * 128 + bytes(1024) + b"\xaa" * 512
    disk.close()
    assert path.read_bytes()[: 5 * 512] == data
    machine.memory.close()
