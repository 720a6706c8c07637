"""The watchdog: what it counts, what it ends, and what ACPI says of it."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm_reference.config import MachineConfig
from vmm_reference.devices import watchdog
from vmm_reference.devices.states import StateError, WatchdogState
from vmm_reference.devices.watchdog import CONTROL, COUNTDOWN, LEFT, RESET, Timer, Watchdog
from vmm_reference.machine import Machine
from vmm_reference.outcome import Outcome
from vmm_reference.testing import tiny_kernel


class Bench:
    """A watchdog and a clock by hand."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.when: float | None = None
        self.ends = 0
        self.dog = Watchdog(lambda: self.now, self._timer, self._end)

    def _timer(self, when: float | None) -> None:
        self.when = when

    def _end(self) -> None:
        self.ends += 1

    def advance(self, seconds: float) -> None:
        target = self.now + seconds
        if self.when is not None and self.when <= target:
            self.now = self.when
            self.when = None
            self.dog.expire()
        self.now = target

    def set(self, register: int, value: int) -> None:
        self.dog.write(register, struct.pack("<I", value))

    def get(self, register: int) -> int:
        return int.from_bytes(self.dog.read(register, 4), "little")


@pytest.fixture
def bench() -> Bench:
    bench = Bench()
    bench.set(COUNTDOWN, 20)
    return bench


def test_a_guest_that_hangs_is_reset(bench: Bench) -> None:
    bench.advance(3600)
    assert bench.ends == 0  # nobody has asked for it
    bench.set(CONTROL, 1)
    for _ in range(10):
        bench.advance(1.9)
        assert bench.get(LEFT) == 1
        bench.set(RESET, 1)
        assert bench.get(LEFT) == 20
    bench.advance(2)
    assert (bench.ends, bench.dog.fired) == (1, True)
    bench.advance(100)
    assert bench.ends == 1
    bench.set(LEFT, 1)
    bench.dog.write(CONTROL, b"\1")
    assert bench.dog.metrics() == {
        "starts": 1,
        "renewals": 10,
        "expirations": 1,
        "refused_writes": 2,
    }


def test_another_countdown_begins_at_once(bench: Bench) -> None:
    """While it runs, from the moment when it is written."""
    bench.set(CONTROL, 1)
    bench.advance(1.9)
    bench.set(COUNTDOWN, 30)
    bench.advance(2.9)
    assert (bench.ends, bench.get(LEFT)) == (0, 1)
    bench.advance(0.1)
    assert bench.ends == 1


def test_it_is_stopped(bench: Bench) -> None:
    bench.set(CONTROL, 1)
    bench.set(CONTROL, 0)
    assert (bench.get(CONTROL), bench.get(LEFT)) == (0, 0)
    bench.set(RESET, 1)
    bench.advance(100)
    assert bench.ends == 0


@pytest.mark.parametrize(("asked", "kept"), [(0, 10), (9, 10), (6000, 6000), (0xFFFFFFFF, 6000)])
def test_hostile_countdown(bench: Bench, asked: int, kept: int) -> None:
    """Whatever is asked for lies in what the table allows."""
    bench.set(COUNTDOWN, asked)
    assert bench.get(COUNTDOWN) == kept


@given(st.lists(st.tuples(st.integers(-4, 20), st.binary(max_size=8)), max_size=20))
def test_hostile_accesses(accesses: list[tuple[int, bytes]]) -> None:
    """Any offset and width: nothing raises, and each read is as long as was asked."""
    bench = Bench()
    for offset, data in accesses:
        bench.dog.write(offset, data)
        assert len(bench.dog.read(max(offset, 0), len(data))) == len(data)
        bench.advance(0.05)
    assert 10 <= bench.get(COUNTDOWN) <= 6000


def test_time_stands_still_with_the_machine(bench: Bench) -> None:
    """A machine that is paused for an hour, saved and restored has what was left."""
    bench.set(CONTROL, 1)
    bench.advance(1)
    bench.dog.stop_time()
    bench.advance(3600)
    state = bench.dog.save()
    assert state == WatchdogState(count=20, left=1000)
    bench.dog.start_time()
    bench.advance(0.9)
    assert bench.ends == 0
    bench.advance(0.2)
    assert bench.ends == 1
    other = Bench()
    other.dog.restore(state)
    assert other.dog.save() == state
    other.advance(1.1)
    assert other.ends == 1
    with pytest.raises(StateError, match=r"WatchdogState\.left"):
        WatchdogState(count=20, left=-1)


def test_the_table_is_whole() -> None:
    """Each entry is 24 bytes, in the ports of the device, and each action is there once."""
    body = watchdog.wdat()
    length, segment = struct.unpack_from("<IH", body)
    period, most, least, flags, count = struct.unpack_from("<IIIB3xI", body, 12)
    assert (length, segment, flags & 1) == (32, 0xFF, 1)
    assert (period, least, most) == (100, 10, 6000)
    entries = [body[32 + 24 * n :][:24] for n in range(count)]
    assert len(body) == 32 + 24 * count
    assert len({entry[0] for entry in entries}) == count
    for entry in entries:
        space, width, _, access, port = struct.unpack_from("<BBBBQ", entry, 4)
        assert (space, width, access) == (1, 32, 3)
        assert watchdog.PORT <= port <= watchdog.PORT + watchdog.SIZE - 4


@pytest.mark.kvm
def test_a_machine_is_reset_by_its_watchdog(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A guest asks for a second, and hangs."""
    kernel = tmp_path_factory.mktemp("kernel") / "kernel"
    kernel.write_bytes(
        tiny_kernel(
            """
            movw $0x660, %dx
            movl $10, %eax
            outl %eax, %dx
            movw $0x668, %dx
            movl $1, %eax
            outl %eax, %dx
            1: hlt
            jmp 1b
            """
        )
    )
    config = MachineConfig(kernel=str(kernel), on_reset="exit", devices=[Timer()])
    with Machine(config) as machine:
        assert machine.wait(30) is Outcome.RESET
        assert machine.detail == "the watchdog expired"
