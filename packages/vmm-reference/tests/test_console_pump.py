"""A console whose output threads of C write: nothing lost or doubled, whatever comes between."""

from __future__ import annotations

import os
import select
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from virtio_queue.testing import SplitDriver
from vm_memory import GuestAddress
from vmm_reference.devices.console.model import (
    CONTROL,
    PORT_NAME,
    PORT_OPEN,
    PORT_READY,
    RESIZE,
    Console,
    PortSpec,
)
from vmm_reference.devices.console.served import ServedConsole
from vmm_reference.devices.console.setup import Ports, build
from vmm_reference.testing import PumpBench, turn

TX, TX1, RX1 = 1, 5, 4
VERSION_1, NEEDS_RESET = 1 << 32, 64
PIPE, WINDOW, RAM = 64 << 10, 256 << 10, 8 << 20


class Guest:
    """A console and a port on named pipes, and their driver."""

    def __init__(self, folder: Path) -> None:
        self.bench = PumpBench(RAM)
        self.readers = []
        for name in ("hvc0", "log"):
            path = folder / name
            if not path.exists():
                os.mkfifo(path)
            self.readers.append(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
        ports = Ports(ports=f"file:{folder}/hvc0 log=file:{folder}/log")
        self.controls = build(ports, self.bench)  # type: ignore[arg-type]
        console = self.controls.console
        assert isinstance(console, ServedConsole)
        self.console = console

    def start(self) -> None:
        self.bench.driver.start((1 << 64) - 1)

    def say(self, queue: int, *pieces: bytes) -> None:
        self.bench.driver.queues[queue].add(list(pieces), [])
        self.bench.kick(queue)

    def heard(self, port: int, count: int) -> bytes:
        """So many bytes of a port's output."""
        data = bytearray()

        def enough() -> bool:
            while select.select([self.readers[port]], [], [], 0)[0]:
                part = os.read(self.readers[port], count - len(data))
                data.extend(part)
                if not part:
                    break
            return len(data) == count

        self.bench.wait(enough)
        return bytes(data)

    def close(self) -> None:
        self.bench.close()
        for fd in self.readers:
            os.close(fd)


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Guest]:
    guest = Guest(tmp_path)
    yield guest
    guest.close()


def test_output_of_consoles_and_ports(guest: Guest) -> None:
    """Each goes where it belongs; metrics count both; buffers come back."""
    guest.start()
    guest.say(TX, b"from ", b"hvc0")
    guest.say(TX1, b"from a port")
    assert guest.heard(0, 9) == b"from hvc0"
    assert guest.heard(1, 11) == b"from a port"
    guest.bench.wait(lambda: not guest.bench.driver.queues[TX].outstanding)
    assert guest.console.metrics()["sent_bytes"] == 20
    guest.bench.device.write_config(8, b"!")  # a character in an emergency takes no queue
    assert guest.heard(0, 1) == b"!"
    assert guest.console.metrics()["sent_bytes"] == 21


def test_a_console_waits_for_nobody(guest: Guest) -> None:
    """What finds no room is lost and counted; the driver gets its buffers at once."""
    guest.start()
    for n in range(8):
        guest.say(TX, bytes([n]) * PIPE)
    guest.bench.wait(lambda: not guest.bench.driver.queues[TX].outstanding)
    assert guest.console.metrics()["dropped_bytes"] == 8 * PIPE - PIPE - WINDOW
    expected = b"".join(bytes([n]) * PIPE for n in range(5))
    assert guest.heard(0, PIPE + WINDOW) == expected


@pytest.mark.parametrize("reader", ["slow", "at once"])
def test_over_pauses_and_a_reset(guest: Guest, reader: str) -> None:
    """A port that nobody reads stands still; each byte comes once, in order, whatever happens."""
    guest.start()
    heard = b""
    for n in range(7):
        guest.say(TX1, bytes([n]) * PIPE)
        if reader == "at once":
            heard += guest.heard(1, PIPE)
        guest.bench.stop()
        guest.bench.go()
    sent = 7 * PIPE
    if reader == "slow":
        # The pipe and the window are full, or Python has what the pump left and writes it.
        heard += guest.heard(1, sent)
    assert heard == b"".join(bytes([n]) * PIPE for n in range(7))
    guest.bench.wait(lambda: not guest.bench.driver.queues[TX1].outstanding)
    guest.say(TX1, b"before the reset")
    guest.bench.wait(lambda: not guest.bench.driver.queues[TX1].outstanding)
    guest.bench.driver.write_status(0)
    guest.start()
    guest.say(TX1, b", after")
    assert guest.heard(1, 23) == b"before the reset, after"


def test_a_buffer_under_way_goes_on_elsewhere(guest: Guest, tmp_path: Path) -> None:
    """What is saved with its place is sent on from there, by a pump or by the twin."""
    guest.start()
    guest.say(TX1, b"0123456789" * 100_000)
    guest.bench.wait(lambda: guest.console.metrics()["sent_bytes"] == PIPE + WINDOW)
    guest.bench.stop()
    state, device = guest.console.save(), guest.bench.device.save()
    assert state.offsets == (0, PIPE + WINDOW)
    (tmp_path / "there").mkdir()
    there = Guest(tmp_path / "there")
    twin = Console([PortSpec(console=True), PortSpec(console=False, name="log")], lambda *_: None)
    sent = bytearray()
    twin._send = lambda _port, data: sent.extend(data)
    other = PumpBench(RAM)
    other.virtio(twin)
    for bench in (there.bench, other):
        bench.memory.write(GuestAddress(0), guest.bench.memory.read(GuestAddress(0), RAM))
    there.console.restore(state)
    there.bench.device.restore(device)
    twin.restore(state)
    other.device.restore(device)
    other.device.process(TX1)
    rest = 1_000_000 - PIPE - WINDOW
    expected = (b"0123456789" * 100_000)[PIPE + WINDOW :]
    assert there.heard(1, rest) == expected
    assert expected.startswith(sent)
    assert len(sent) == WINDOW
    there.close()
    other.close()


def test_ports_are_told_of_as_before(guest: Guest) -> None:
    """The control queues stay in Python."""
    guest.start()
    ring = guest.bench.driver.queues[2]
    assert isinstance(ring, SplitDriver)
    for _ in range(3):
        ring.add([], [64])
    guest.bench.kick(2)
    guest.say(3, CONTROL.pack(0xFFFFFFFF, 0, 1))
    guest.bench.wait(lambda: len(ring.outstanding) == 1)


def test_input_of_a_socket_reaches_the_driver_when_it_comes(tmp_path: Path) -> None:
    """It is kept until then; a client that comes, and a terminal's size, are told of."""
    bench = PumpBench(RAM)
    path = tmp_path / "agent"
    controls = build(Ports(ports=f"pty agent=socket:{path}"), bench)  # type: ignore[arg-type]
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        client.sendall(b"early")
        bench.wait(lambda: controls.console._ports[1].host_open)
        bench.driver.start((1 << 64) - 1)
        controls.resize(132, 43)
        assert struct.unpack("<HH", bench.device.read_config(0, 4)) == (132, 43)
        ring, control = bench.driver.queues[RX1], bench.driver.queues[2]
        for _ in range(2):
            ring.add([], [64])
        for _ in range(16):
            control.add([], [64])
        for index in (0, 1):
            bench.driver.queues[3].add([CONTROL.pack(index, PORT_READY, 1)], [])
        bench.driver.queues[3].add([CONTROL.pack(1, PORT_OPEN, 1)], [])
        bench.kick(3)
        said: list[bytes] = []
        heard: list[bytes] = []

        def all_of_it() -> bool:
            bench.kick(2)
            said.extend(used.data for used in control.reap())
            heard.extend(used.data for used in ring.reap())
            return heard == [b"early"] and CONTROL.pack(1, PORT_OPEN, 1) in said

        turn(bench.loop, all_of_it)
        size = CONTROL.pack(0, RESIZE, 0) + struct.pack("<HH", 43, 132)
        assert size in said
        assert CONTROL.pack(1, PORT_NAME, 1) + b"agent\0" in said
    bench.close()


def test_input_meets_a_broken_ring(tmp_path: Path) -> None:
    """The device wants to be reset, then works again; what is typed meanwhile waits."""
    bench = PumpBench(RAM)
    path = tmp_path / "agent"
    build(Ports(ports=f"socket:{path}"), bench)  # type: ignore[arg-type]
    bench.driver.start(VERSION_1)
    ring = bench.driver.queues[0]
    assert isinstance(ring, SplitDriver)
    ring.store16(ring.driver_area + 2, 0xFFFF)  # more than the ring has
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        client.sendall(b"typed")
        turn(bench.loop, lambda: bench.device.status & NEEDS_RESET)
        bench.driver.write_status(0)
        bench.driver.start(VERSION_1)
        ring = bench.driver.queues[0]
        ring.add([], [64])
        bench.kick(0)
        heard: list[bytes] = []

        def typed() -> bool:
            heard.extend(used.data for used in ring.reap())
            return heard == [b"typed"]

        turn(bench.loop, typed)
    bench.close()
