"""A device whose driver never stops, and its neighbours in the machine: they are served still."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from vmm_reference.devices.blk.model import Block
from vmm_reference.devices.net.features import HEADER
from vmm_reference.devices.net.model import Net
from vmm_reference.devices.net.setup import Interface, build
from vmm_reference.devices.rng import Rng
from vmm_reference.testing import PumpBench

EVERYTHING = (1 << 64) - 1
PIECE = 1 << 20
TURNS = 4  # of the loop: what was ready before the neighbour's kick, and that


class Endless:
    """A disk, and a cable: the driver makes the next request while the former is carried out."""

    size, read_only = 1 << 30, False
    vnet_header, offloads, queues = False, 0, 1

    def __init__(self) -> None:
        self.again: Callable[[], object] = lambda: None
        self.served = 0

    def read(self, offset: int, buffers: Sequence[memoryview]) -> None:
        self.served += 1
        self.again()

    def send(self, queue: int, pieces: Sequence[bytes | memoryview]) -> bool:
        self.served += 1
        self.again()
        return True

    def receive(self, queue: int) -> bytes | None:
        return None

    def set_offloads(self, offloads: int) -> None:
        pass

    def set_queues(self, pairs: int) -> None:
        pass


def flood(kind: str) -> tuple[PumpBench, Endless]:
    """A device of that kind that always has something to do."""
    endless, bench = Endless(), PumpBench(8 << 20)
    model = Block(endless) if kind == "block" else Net(endless, b"\2\0\0\0\0\1")  # type: ignore[arg-type]
    bench.virtio(model)
    bench.driver.start(EVERYTHING)
    number = 0 if kind == "block" else 1
    ring = bench.driver.queues[number]

    def add() -> None:
        if kind == "block":
            ring.add([struct.pack("<IIQ", 0, 0, 0)], [PIECE, 1])
        else:
            ring.add([bytes(HEADER.size), bytes(60)], [])

    def again() -> None:
        ring.reap()
        add()

    for _ in range(2):
        add()
    endless.again = again
    bench.kick(number)
    return bench, endless


@pytest.mark.parametrize("kind", ["block", "net"])
def test_a_neighbour_of_a_flooding_device_is_served(kind: str) -> None:
    """Within a few turns of the loop, again and again, while the other goes on for ever."""
    busy, endless = flood(kind)
    quiet = PumpBench(neighbour=busy)
    quiet.virtio(Rng(lambda length: b"r" * length))
    quiet.driver.start(EVERYTHING)
    ring = quiet.driver.queues[0]
    for _ in range(5):
        before = endless.served
        ring.add([], [16])
        quiet.kick(0)
        got: list[bytes] = []
        for _ in range(TURNS):
            busy.loop.turn(0)
            got += [used.data for used in ring.reap()]
        assert got == [b"r" * 16]
        assert endless.served > before
    assert not busy.errors
    quiet.close()
    busy.close()


def test_a_neighbour_of_a_flooded_cable_is_served(tmp_path: Path) -> None:
    """A pump has a thread of its own: a cable full of frames costs the loop nothing."""
    busy = PumpBench()
    controls = build(Interface.parse(f"socket={tmp_path}/a,peer={tmp_path}/b"), busy)  # type: ignore[arg-type]
    busy.driver.start(EVERYTHING)
    ring = busy.driver.queues[0]
    for _ in range(256):
        ring.add([], [100])
    busy.kick(0)
    over = threading.Event()

    def send() -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as wire:
            wire.connect(f"{tmp_path}/a")
            wire.settimeout(0.1)
            while not over.is_set():
                try:
                    wire.send(b"\xff" * 60)
                except TimeoutError:
                    continue

    thread = threading.Thread(target=send)
    thread.start()
    quiet = PumpBench(neighbour=busy)
    quiet.virtio(Rng(lambda length: b"r" * length))
    quiet.driver.start(EVERYTHING)
    busy.wait(lambda: controls.net.metrics()["received_frames"] >= 256)
    quiet.driver.queues[0].add([], [16])
    quiet.kick(0)
    quiet.wait(lambda: not quiet.driver.queues[0].outstanding)
    over.set()
    thread.join()
    quiet.close()
    busy.close()
