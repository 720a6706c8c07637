"""A disk served by a thread of C: the same answers as its twin in Python, at every turn."""

from __future__ import annotations

import select
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from virtio_queue.errors import PumpError
from vm_memory import GuestAddress
from vmm_reference.backends.file import FileBackend
from vmm_reference.devices.blk.model import Block
from vmm_reference.devices.blk.pumped import PumpedBlock
from vmm_reference.devices.blk.setup import DriveControl
from vmm_reference.errors import ConfigError
from vmm_reference.testing import PumpBench

RAM = 1 << 20
IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
EVERYTHING = (1 << 64) - 1

REQUESTS = [
    (OUT, 3, b"x" * 1024, 0),
    (IN, 3, b"", 1024),
    (IN, 200, b"", 512),
    (OUT, 63, b"y" * 1024, 0),
    (GET_ID, 0, b"", 20),
    (FLUSH, 0, b"", 0),
    (WRITE_ZEROES, 0, struct.pack("<QII", 3, 1, 0), 0),
    (DISCARD, 0, struct.pack("<QII", 60, 9, 0), 0),
    (DISCARD, 0, b"short", 0),
    (0xBEEF, 0, b"", 0),
    (IN, 3, b"", 1024),
]


def runs(block: PumpedBlock) -> bool:
    """Whether the thread serves the queues."""
    return block.server.pump.running


class Slot(PumpBench):
    """A machine of one disk, with its driver."""

    def request(self, kind: int, sector: int, data: bytes, room: int, queue: int = 0) -> bytes:
        """One request, and what comes back: data and status."""
        pieces = [struct.pack("<IIQ", kind, 0, sector)] + [data] * bool(data)
        ring = self.driver.queues[queue]
        head = ring.add(pieces, [room, 1] if room else [1], publish=False)
        buffers = list(ring.outstanding[head].writable)
        for address, length in buffers:
            self.memory.write(GuestAddress(address), b"\xee" * length)
        ring.publish()  # a pump that is awake looks without a kick
        self.driver.kick(queue)
        self.wait(lambda: head not in ring.outstanding)
        return b"".join(self.memory.read(GuestAddress(at), length) for at, length in buffers)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(range(256)) * 128)
    return path


@pytest.fixture(params=["sync", "io_uring"])
def pumped(request: pytest.FixtureRequest, image: Path) -> Iterator[tuple[Slot, PumpedBlock]]:
    backend, slot = FileBackend(str(image)), Slot(RAM)
    try:
        block = PumpedBlock(backend, request.param, slot.memory, serial="serial-0", queues=2)
    except PumpError as error:
        backend.close()
        pytest.skip(f"this host: {error}")
    slot.on_close(backend.close)
    slot.on_close(block.server.close)
    block.offload.plug_in(slot.virtio(block), slot)  # type: ignore[arg-type]
    yield slot, block
    slot.close()


def test_it_answers_as_its_twin(pumped: tuple[Slot, PumpedBlock], tmp_path: Path) -> None:
    """Good requests, refused ones and unknown types: the same bytes, and the same image after."""
    slot, block = pumped
    copy = tmp_path / "copy.img"
    copy.write_bytes(bytes(range(256)) * 128)
    backend, twin = FileBackend(str(copy)), Slot(RAM)
    twin.virtio(Block(backend, serial="serial-0", queues=2))
    for each in (slot, twin):
        each.driver.start(EVERYTHING)
    for queue in (0, 1):
        for request in REQUESTS:
            assert slot.request(*request, queue) == twin.request(*request, queue), request
    assert (
        Path(str(copy)).read_bytes()[: 60 * 512] == (tmp_path / "disk.img").read_bytes()[: 60 * 512]
    )
    assert block.metrics()["reads"] == 6  # refused ones count too
    twin.close()
    backend.close()


def test_a_pause_a_state_and_a_reset(pumped: tuple[Slot, PumpedBlock]) -> None:
    """Paused nothing is served, and queues can be saved; what came meanwhile is served then."""
    slot, block = pumped
    slot.driver.start(EVERYTHING)
    assert runs(block)
    assert slot.request(OUT, 0, b"a" * 512, 0) == b"\0"
    slot.stop()
    assert not runs(block)
    slot.driver.queues[0].add([struct.pack("<IIQ", IN, 0, 0)], [512, 1])
    slot.driver.kick(0)
    assert slot.device.save() == slot.device.save()
    assert not slot.driver.queues[0].reap()
    slot.go()
    assert slot.request(IN, 0, b"", 512)[:1] == b"a"
    slot.driver.write_status(0)
    assert not runs(block)
    slot.driver.start(EVERYTHING)
    assert slot.request(IN, 0, b"", 512) == b"a" * 512 + b"\0"


def test_another_image_and_another_cache_mode(
    pumped: tuple[Slot, PumpedBlock], tmp_path: Path
) -> None:
    """The pump goes on with the other image at once, and makes writes durable where asked to."""
    slot, block = pumped
    slot.driver.start(EVERYTHING)
    other = tmp_path / "other.img"
    other.write_bytes(b"o" * 1024)
    backend = FileBackend(str(other))
    with slot.device.lock:
        block.exchange(backend)
    assert slot.request(IN, 1, b"", 512) == b"o" * 512 + b"\0"
    assert slot.request(IN, 2, b"", 512)[-1:] == b"\1"
    assert block.save().writeback
    slot.device.write_config(32, b"\0")
    assert not block.save().writeback
    assert not block.server.pump.writeback
    assert slot.request(OUT, 0, b"d" * 512, 0) == b"\0"
    slot.driver.write_status(0)
    backend.close()


def test_a_malformed_chain_stops_it(pumped: tuple[Slot, PumpedBlock]) -> None:
    """A request without room for a status can't be answered: the device asks for a reset."""
    slot, _ = pumped
    slot.driver.start(EVERYTHING)
    slot.driver.queues[0].add([struct.pack("<IIQ", IN, 0, 0)], [])
    slot.driver.kick(0)
    slot.wait(lambda: slot.device.status & 64)
    slot.driver.write_status(0)
    slot.driver.start(EVERYTHING)
    assert slot.request(IN, 0, b"", 512)[-1:] == b"\0"


def test_limits_come_and_go_while_it_runs(pumped: tuple[Slot, PumpedBlock]) -> None:
    """With the last token gone a request waits; a lifted limit lets it through at once."""
    slot, block = pumped
    slot.driver.start(EVERYTHING)
    control = DriveControl(block.backend)  # type: ignore[arg-type]
    control.block, control.device = block, slot.device
    with pytest.raises(ConfigError, match="ops"):
        control.limit(ops="none")
    control.limit(ops="1/1000000000")
    assert slot.request(IN, 0, b"", 512)[-1:] == b"\0"
    slot.driver.queues[0].add([struct.pack("<IIQ", IN, 0, 0)], [512, 1])
    slot.driver.kick(0)
    while not block.server.pump.counters["throttled"]:
        select.select([], [], [], 0.001)
    assert not slot.driver.queues[0].reap()
    control.limit(bandwidth="1G")
    assert not slot.driver.queues[0].reap()
    control.limit(ops="", bandwidth="")
    assert slot.request(IN, 0, b"", 512)[-1:] == b"\0"
    # The kernel's ring may finish the later one first.
    slot.wait(lambda: not slot.driver.queues[0].outstanding)
