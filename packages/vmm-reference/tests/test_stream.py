"""Console streams: bytes in order, back-pressure both ways, nobody blocked by a full pipe."""

import os
import threading
import time
from collections.abc import Iterator

import pytest

from vmm_reference.backends.stream import StreamInput, StreamOutput
from vmm_reference.loop import Loop


@pytest.fixture
def loop() -> Iterator[Loop]:
    failures: list[BaseException] = []
    loop = Loop(failures.append)
    loop.start()
    yield loop
    loop.stop()
    assert failures == []


def _until(condition: object, seconds: float = 10) -> None:
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.001)


def test_output_arrives_in_order_and_is_accounted_for(loop: Loop) -> None:
    """What several sends queue comes out unchanged; `written` adds up to all of it."""
    reader, writer = os.pipe()
    counts: list[int] = []
    output = StreamOutput(loop, writer, counts.append)
    expected = b"".join(bytes([n % 256]) * (n % 17) for n in range(300))
    position = 0
    for n in range(300):
        size = n % 17
        output.send(expected[position : position + size])
        position += size
    received = b""
    while len(received) < len(expected):
        received += os.read(reader, 1 << 16)
    assert received == expected
    _until(lambda: sum(counts) == len(expected))
    os.close(reader)
    os.close(writer)


def test_a_full_pipe_holds_up_nobody(loop: Loop) -> None:
    """With no reader the loop still serves others; the rest follows when the reader comes."""
    reader, writer = os.pipe()
    counts: list[int] = []
    output = StreamOutput(loop, writer, counts.append)
    data = os.urandom(300_000)
    output.send(data)
    _until(lambda: sum(counts) >= 60_000)
    alive = threading.Event()
    loop.call_soon(alive.set)
    assert alive.wait(5)
    assert sum(counts) < len(data)
    received = b""
    while len(received) < len(data):
        received += os.read(reader, 1 << 16)
    assert received == data
    os.close(reader)
    os.close(writer)


def test_a_closed_reader_costs_the_output_only(loop: Loop) -> None:
    """After EPIPE bytes are dropped and counted, and the sender's window is given back."""
    reader, writer = os.pipe()
    os.close(reader)
    counts: list[int] = []
    output = StreamOutput(loop, writer, counts.append)
    output.send(b"x" * 1000)
    _until(lambda: sum(counts) == 1000)
    assert output.dropped == 1000
    assert isinstance(output.broken, BrokenPipeError)
    os.close(writer)


def test_input_waits_for_the_device(loop: Loop) -> None:
    """No more is read than the device takes; all of it arrives in order when it takes more."""
    reader, writer = os.pipe()
    taken = bytearray()
    room = [16]

    def receive(data: bytes) -> int:
        count = min(room[0], len(data))
        taken.extend(data[:count])
        room[0] -= count
        return count

    ended = threading.Event()
    source = StreamInput(loop, reader, receive, ended.set)
    loop.call_soon(source.start)
    data = bytes(range(256)) * 4
    os.write(writer, data)
    os.close(writer)
    _until(lambda: len(taken) == 16)
    while len(taken) < len(data):
        before = len(taken)
        room[0] = 16
        source.more()
        _until(lambda before=before: len(taken) > before)
    assert bytes(taken) == data
    assert ended.wait(5)
    os.close(reader)
