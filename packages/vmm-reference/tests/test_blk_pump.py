"""The disk in Python and the pump's block requests in C answer the same, to the byte."""

from __future__ import annotations

import os
import select
import struct
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from virtio_queue import BlockPump, Queue
from virtio_queue.constants import F_EVENT_IDX, F_INDIRECT_DESC
from virtio_queue.testing import Arena, PackedDriver, SplitDriver
from vm_memory import GuestAddress, GuestMemory
from vmm_reference.backends.file import FileBackend
from vmm_reference.devices.blk import model as blk

SECTORS = 48
PATTERN = b"".join(struct.pack("<Q", n) * 64 for n in range(SECTORS))
FEATURES = F_EVENT_IDX | F_INDIRECT_DESC
PATIENCE = 60.0

Kind = type[SplitDriver] | type[PackedDriver]
Request = tuple[list[bytes], list[int]]

SECTOR_NUMBERS = st.integers(0, SECTORS + 1) | st.sampled_from([1 << 55, (1 << 64) - 1, 1 << 63])
LENGTHS = st.integers(0, 4).map(lambda n: n * 512) | st.integers(0, 1100)


@st.composite
def cuts(draw: st.DrawFn, length: int) -> list[int]:
    """Lengths of pieces, some of them empty, that make up `length`."""
    places = sorted(draw(st.lists(st.integers(0, length), max_size=3)))
    return [b - a for a, b in zip([0, *places], [*places, length], strict=True)]


@st.composite
def requests(draw: st.DrawFn) -> Request:
    """A request, good or bad, in any layout."""
    kind = draw(st.sampled_from([*sorted(blk.KNOWN), 0, 1]))
    whole = blk.HEADER.pack(kind, 0, draw(SECTOR_NUMBERS))
    if kind == blk.T_OUT:
        whole += draw(st.randoms(use_true_random=False)).randbytes(draw(LENGTHS))
    elif kind in (blk.T_DISCARD, blk.T_WRITE_ZEROES):
        sizes = st.sampled_from([0, 1, 3, blk.MAX_ZEROES_SECTORS + 1])
        entry = st.builds(blk.SEGMENT.pack, SECTOR_NUMBERS, sizes, st.sampled_from([0, 0, 1, 2]))
        whole += b"".join(draw(st.lists(entry, max_size=3)))
    whole = whole[: draw(st.sampled_from([len(whole)] * 9 + [len(whole) - 1, 15]))]
    room = draw(LENGTHS) if kind in (blk.T_IN, blk.T_GET_ID) else draw(st.sampled_from([0, 0, 9]))
    readable, at = [], 0
    for length in draw(cuts(len(whole))):
        readable.append(whole[at : at + length])
        at += length
    return readable, draw(cuts(room + 1))


class Side:
    """A memory, a driver and an image of its own."""

    def __init__(self, kind: Kind, path: Path) -> None:
        path.write_bytes(PATTERN)
        self.path = path
        self.memory = GuestMemory.from_ranges([(GuestAddress(0), 1 << 20)])
        self.driver = kind(self.memory, 32, features=FEATURES, arena=Arena(0x1000, 0xF_0000))
        self.queue = Queue(32)
        self.driver.configure(self.queue)

    def add(self, request: Request) -> list[tuple[int, int]]:
        """Make a request available; where its answer will be."""
        return self.driver.outstanding[self.driver.add(*request)].writable

    def result(self, places: list[tuple[int, int]]) -> tuple[int, bytes, bytes]:
        """Used length, everything that can have been written, and the image."""
        (used,) = self.driver.reap()
        written = b"".join(self.driver.read(*place) for place in places)
        return used.length, written, self.path.read_bytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the two images are."""
    return tmp_path_factory.mktemp("twins")


@pytest.mark.parametrize("engine", ["sync", "io_uring"])
@settings(max_examples=60, deadline=None)
@given(
    plan=st.lists(requests(), min_size=1, max_size=8),
    kind=st.sampled_from([SplitDriver, PackedDriver]),
    declined=st.sampled_from([0, blk.F_FLUSH, blk.F_DISCARD | blk.F_WRITE_ZEROES]),
    read_only=st.booleans(),
)
def test_requests_of_any_kind(
    folder: Path, engine: Literal["sync", "io_uring"], plan: list[Request], kind: Kind,
    declined: int, read_only: bool,
) -> None:  # fmt: skip
    """What is written, what counts as written, and what becomes of the image."""
    python, native = Side(kind, folder / "python"), Side(kind, folder / "native")
    backend = FileBackend(str(python.path), read_only=read_only)
    file = os.open(native.path, os.O_RDONLY if read_only else os.O_RDWR)
    kick, interrupt = os.eventfd(0), os.eventfd(0)
    device = blk.Block(backend, serial="twin")
    features = device.device_features & ~declined
    pump = BlockPump(
        file, sectors=SECTORS, read_only=read_only, identity=b"twin", engine=engine,
        max_data=blk.MAX_DATA,
        max_discard=(blk.MAX_DISCARD_SECTORS, blk.MAX_DISCARD_SEGMENTS),
        max_write_zeroes=(blk.MAX_ZEROES_SECTORS, blk.MAX_ZEROES_SEGMENTS),
    )  # fmt: skip
    pump.wire([kick], [interrupt])
    try:
        device.activate(python.memory, features, [python.queue])
        pump.start(native.memory, [native.queue], features)
        for request in plan:
            places = python.add(request), native.add(request)
            device.process(0)
            os.eventfd_write(kick, 1)
            ready, _, _ = select.select([interrupt], [], [], PATIENCE)
            assert ready, "the pump did not answer"
            os.eventfd_read(interrupt)
            assert python.result(places[0]) == native.result(places[1])
        pump.stop()
        refused = sum(n for name, n in pump.counters.items() if name.startswith("refused"))
        assert refused == device.refused
    finally:
        pump.stop()
        backend.close()
        python.memory.close()
        native.memory.close()
        for fd in (file, kick, interrupt):
            os.close(fd)
