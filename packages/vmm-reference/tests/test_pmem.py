"""Persistent memory: what is asked to be durable is, before the guest hears of it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import strategies as st

from virtio_queue.testing.stateful import DeviceMachine
from vm_memory import GuestAddress, GuestMemory
from vmm_reference.config import MachineConfig
from vmm_reference.deviceconfig import parse_device
from vmm_reference.devices.pmem import PersistentMemory, Pmem, _Flushes
from vmm_reference.errors import ConfigError
from vmm_reference.loop import Loop
from vmm_reference.ram import Ram
from vmm_reference.testing import Bench, tiny_kernel, turn

FLUSH = bytes(4)
DONE, FAILED = bytes(4), b"\1\0\0\0"
MIB = 1 << 20


class Guest(Bench):
    """A device whose flushes begin and do not end by themselves."""

    def __init__(self) -> None:
        self.begun = 0
        super().__init__(Pmem(1 << 32, 4 * MIB, self.begin))

    def begin(self) -> None:
        self.begun += 1

    def end(self, *, ok: bool = True) -> list[bytes]:
        """The host's file is durable; what the guest gets."""
        self.model.flushed(ok)
        self.device.notify_used()
        return self.answers()

    def ask(self, *requests: bytes) -> None:
        for request in requests:
            self.queue(0).add([request], [4])
        self.driver.kick(0)

    def answers(self) -> list[bytes]:
        return [used.data for used in self.queue(0).reap()]


@pytest.fixture
def guest() -> Iterator[Guest]:
    guest = Guest()
    yield guest
    guest.close()


def test_where_it_is(guest: Guest) -> None:
    """Section 5.19.4."""
    assert guest.config(0, 16) == (1 << 32).to_bytes(8, "little") + (4 * MIB).to_bytes(8, "little")
    guest.device.write_config(0, b"\xff" * 16)
    assert guest.config(0, 4) == bytes(4)


def test_a_flush_is_answered_when_it_is_done(guest: Guest) -> None:
    """Those that come meanwhile wait for the next one, which serves them together."""
    guest.ask(FLUSH)
    assert guest.begun == 1
    guest.ask(FLUSH, FLUSH)
    assert guest.begun == 1
    assert guest.answers() == []
    assert guest.end() == [DONE]
    assert guest.begun == 2
    assert guest.end() == [DONE, DONE]
    assert guest.begun == 2
    assert guest.interrupts == 2


def test_a_flush_that_fails_says_so(guest: Guest) -> None:
    guest.ask(FLUSH)
    assert guest.end(ok=False) == [FAILED]
    assert guest.model.metrics() == {"flushes": 1, "host_failures": 1, "refused_requests": 0}


@pytest.mark.parametrize("request_", [b"\1\0\0\0", b"\xff" * 4, b"", b"\0\0\0"])
def test_15_a_request_that_is_none(guest: Guest, request_: bytes) -> None:
    """It fails, flushes nothing, and those after it are served."""
    guest.ask(request_, FLUSH)
    assert guest.answers() == [FAILED]
    assert guest.end() == [DONE]
    assert guest.model.refused == 1


@pytest.mark.parametrize("room", [[], [3]])
def test_15_a_request_without_room_for_an_answer(guest: Guest, room: list[int]) -> None:
    guest.queue(0).add([FLUSH], room)
    guest.driver.kick(0)
    assert guest.needs_reset
    assert guest.begun == 0


def test_a_reset_forgets_who_asked(guest: Guest) -> None:
    """The flush that is under way serves nobody, and a new driver's request has one of its own."""
    guest.ask(FLUSH)
    guest.driver.write_status(0)
    guest.driver.start()
    guest.ask(FLUSH)
    assert guest.end() == []
    assert guest.begun == 2
    assert guest.end() == [DONE]


def test_it_goes_on_elsewhere(guest: Guest) -> None:
    """A flush that was not done is done there."""
    guest.ask(FLUSH)
    guest.model.forget()
    begun: list[int] = []
    moved = guest.moved_to(Pmem(1 << 32, 4 * MIB, lambda: begun.append(1)))
    assert begun == [1]
    moved.model.flushed(True)
    assert [used.data for used in moved.queue(0).reap()] == [DONE]
    moved.close()


def make(path: Path, size: int = 4 * MIB) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
    return path


@pytest.mark.parametrize("private", [False, True])
def test_the_file_is_memory(tmp_path: Path, private: bool) -> None:
    """What is written there is in the file, or stays here; where it was saved it comes again."""
    path = make(tmp_path / "file")
    device = PersistentMemory(str(path), private=private)
    kernel = tmp_path / "kernel"
    kernel.write_bytes(tiny_kernel("POWER_OFF"))
    config = MachineConfig(kernel=str(kernel), memory="64M", devices=[device])
    ram = Ram(config, None)
    (address, size) = ram.areas["pmem0"]
    assert size == 4 * MIB
    ram.memory.write(GuestAddress(address + MIB), b"written")
    assert path.read_bytes()[MIB : MIB + 7] == (bytes(7) if private else b"written")
    again = Ram(config, ram.memory)
    assert again.memory.read(GuestAddress(address + MIB), 7) == b"written"
    assert (again.memory is ram.memory) is private
    again.memory.close()
    ram.memory.close()


@pytest.mark.parametrize(
    ("size", "text", "complaint"),
    [
        (MIB, "{}", "multiple of 2 MiB"),
        (0, "{}", "multiple of 2 MiB"),
        (None, "{}", "regular file"),
        (2 * MIB, "{},private=3", "true or false"),
    ],
)
def test_configurations_that_can_not_be(
    tmp_path: Path, size: int | None, text: str, complaint: str
) -> None:
    path = tmp_path / "file"
    if size is not None:
        make(path, size)
    with pytest.raises(ConfigError, match=complaint):
        parse_device(f"pmem,{text.format(path)}").check("devices[0]")


class Host:
    """Makes a file durable when it is let, or fails; with the device and the loop around it."""

    def __init__(self) -> None:
        self.begun = threading.Semaphore(0)
        self.go_on: list[threading.Event] = []  # one a flush
        self.error: OSError | None = None
        self.loop = Loop(self._failed)
        self.flushes = _Flushes(self.loop, self._sync)
        self.bench = Bench(Pmem(1 << 32, 4 * MIB, self.flushes.begin))
        self.flushes.device = self.bench.device

    def _failed(self, error: BaseException) -> None:
        raise error

    def _sync(self) -> None:
        go_on = threading.Event()
        self.go_on.append(go_on)
        self.begun.release()
        assert go_on.wait(30)
        if self.error is not None:
            raise self.error

    def ask(self) -> None:
        """Ask for a flush, and wait until it is under way."""
        self.bench.queue(0).add([FLUSH], [4])
        self.bench.driver.kick(0)
        assert self.begun.acquire(timeout=30)

    def answers(self) -> list[bytes]:
        """Those of what is done once the loop has turned."""
        found: list[bytes] = []

        def reap() -> bool:
            found.extend(used.data for used in self.bench.queue(0).reap())
            return bool(found)

        turn(self.loop, reap)
        return found

    def close(self) -> None:
        """Give everything back."""
        self.flushes.close()
        self.loop.stop()
        self.bench.close()


def test_a_flush_ends_on_the_loop_well_or_not() -> None:
    """What the host could not make durable is told to the driver, and the next one is tried."""
    host = Host()
    for error, answer in ((None, DONE), (OSError("full"), FAILED), (None, DONE)):
        host.error = error
        host.ask()
        host.go_on.pop().set()
        assert host.answers() == [answer]
    assert host.bench.model.metrics() == {"flushes": 3, "host_failures": 1, "refused_requests": 0}
    host.close()


def test_a_flush_that_a_pause_has_overtaken_is_not_told_of() -> None:
    """It is begun anew when the machine goes on, and only the end of that is told."""
    host = Host()
    host.ask()
    old = host.flushes._thread
    assert old is not None
    host.flushes.stop()
    host.bench.device.process(0)
    assert host.begun.acquire(timeout=30)
    host.go_on[0].set()
    old.join()
    for _ in range(10):
        host.loop.turn(0)
    assert host.bench.queue(0).reap() == []
    host.go_on[1].set()
    assert host.answers() == [DONE]
    host.close()


class PmemMachine(DeviceMachine):
    """The rule-based driver, which breaks every rule of the ring, against this device."""

    answers = False
    buffers = st.tuples(
        st.sampled_from([[], [FLUSH], [b"\1\0\0\0"], [b"\0\0", b"\0\0"], [bytes(90)]]),
        st.sampled_from([[4], [1, 3], [2], []]),
    ).filter(any)

    def make_model(self, memory: GuestMemory) -> Pmem:
        return Pmem(1 << 32, 4 * MIB, lambda: None)


TestPmemMachine = PmemMachine.TestCase
TestPmemMachine.__doc__ = "Whatever a driver does, the device and its neighbours survive."
