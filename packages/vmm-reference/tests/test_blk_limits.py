"""Limits of a drive: bytes and requests, over all queues, changed while the guest runs."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from vmm_reference.backends.file import FileBackend
from vmm_reference.config import Drive
from vmm_reference.devices.blk.model import Block
from vmm_reference.devices.blk.setup import DriveControl
from vmm_reference.devices.limiter import Limiter, TokenBucket
from vmm_reference.errors import ConfigError
from vmm_reference.testing import Bench

READ = struct.pack("<IIQ", 0, 0, 0)


class Guest(Bench):
    """A disk with two queues and a limiter, on a clock by hand."""

    def __init__(self, path: Path, *, bandwidth: int | None = None, ops: int | None = None) -> None:
        path.write_bytes(bytes(1 << 20))
        self.now = 0
        self.calls: list[tuple[int, Callable[[], None]]] = []
        self.backend = FileBackend(str(path))
        self.block = Block(
            self.backend,
            queues=2,
            limiter=Limiter(
                lambda: self.now,
                lambda wait, call: self.calls.append((self.now + wait, call)),
                bandwidth=TokenBucket(bandwidth, 1000) if bandwidth else None,
                ops=TokenBucket(ops, 1000) if ops else None,
            ),
            kick=lambda index: self.kick_later(index),
        )
        super().__init__(self.block)

    def read(self, count: int, queue: int = 0) -> None:
        for _ in range(count):
            self.queue(queue).add([READ], [4096, 1])
        self.driver.kick(queue)
        self.settle()

    def done(self) -> int:
        self.settle()
        return sum(len(self.queue(queue).reap()) for queue in range(2))

    def advance(self, seconds: float) -> None:
        self.now += int(seconds * 1e9)
        due = [call for when, call in self.calls if when <= self.now]
        self.calls = [item for item in self.calls if item[0] > self.now]
        for call in due:
            call()

    def close(self) -> None:
        super().close()
        self.backend.close()


def test_requests_are_limited_over_all_queues(tmp_path: Path) -> None:
    """Two queues share a limit, and neither starves."""
    guest = Guest(tmp_path / "disk", ops=4)
    guest.read(20, 0)
    guest.read(20, 1)
    assert guest.done() == 4
    total = 4
    for second in range(1, 9):
        guest.advance(1.0001)
        total += guest.done()
        assert 4 * second <= total <= 4 * (second + 2)
    while guest.calls:
        guest.advance(1)
        total += guest.done()
    assert total == 40
    guest.close()


def test_bytes_are_limited_and_the_limit_changes(tmp_path: Path) -> None:
    """A second carries the bucket's worth; a lifted limit lets all through at once."""
    guest = Guest(tmp_path / "disk", bandwidth=4 * 4113)
    guest.read(30)
    assert guest.done() == 4
    guest.advance(1.01)
    assert 3 <= guest.done() <= 6
    control = DriveControl(guest.backend)
    control.block = guest.block
    control.device = guest.device
    with pytest.raises(ConfigError, match="bandwidth"):
        control.limit(bandwidth="fast")
    control.limit(bandwidth="")
    assert guest.done() >= 20
    control.limit(ops="1/1000000")
    guest.read(5)
    assert guest.done() == 1
    guest.close()


def test_a_reset_ends_the_waiting(tmp_path: Path) -> None:
    """A call that comes after a reset finds nothing to do, and the new driver is served."""
    guest = Guest(tmp_path / "disk", ops=1)
    guest.read(3)
    assert guest.done() == 1
    guest.driver.write_status(0)
    guest.advance(10)
    guest.settle()
    guest.driver.start()
    guest.read(1)
    assert guest.done() == 1
    guest.close()


@pytest.mark.parametrize("options", [{"bandwidth": "fast"}, {"ops": "0"}, {"ops": "5/0"}])
def test_configurations_that_can_not_be(tmp_path: Path, options: dict[str, str]) -> None:
    (tmp_path / "disk").write_bytes(bytes(512))
    with pytest.raises(ConfigError, match=rf"drive\.{next(iter(options))}"):
        Drive(str(tmp_path / "disk"), **options).check("drive")  # type: ignore[arg-type]
