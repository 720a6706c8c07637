"""Machines that run before their memory is there: deaths, cuts, and a page process that errs."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from vm_memory import GuestAddress, GuestMemory, MappingError
from vm_memory.userfault import Userfault
from vmm_reference.config import MachineConfig
from vmm_reference.errors import HostError
from vmm_reference.machine import Machine
from vmm_reference.outcome import Outcome
from vmm_reference.state import postcopy
from vmm_reference.state.connection import Address, Listener
from vmm_reference.state.handover import Destination, Source
from vmm_reference.state.incoming import Incoming
from vmm_reference.state.moving import MigrationError
from vmm_reference.state.postcopy import PostCopy
from vmm_reference.state.stream import table
from vmm_reference.state.testing import PIECES, side
from vmm_reference.state.wire import Kind, Link, LinkLost, Role

pytestmark = pytest.mark.kvm


def settled(incoming: Incoming) -> Destination:
    """Where a destination stands once it has noticed that its source is gone."""
    passing = (Destination.RECEIVING,)
    for _ in range(1200):
        phase = incoming.side.phase
        if phase not in passing and incoming._link is None:
            break
        time.sleep(0.05)
    assert isinstance(incoming.side.phase, Destination)
    return incoming.side.phase


@pytest.mark.parametrize(
    ("role", "numbers"), [(Role.CONTROL, range(100)), (Role.FAULTS, (1, 2, 9, 40))]
)
def test_the_death_of_the_source_at_each_step(
    config: Callable[..., MachineConfig], role: Role, numbers: range
) -> None:
    """A machine that lacks pages is lost, and ends in an outcome that says so."""
    lost, kernel = 0, config().kernel
    for number in numbers:
        with ExitStack() as stack:
            incoming = stack.enter_context(Incoming("tcp:127.0.0.1:0"))
            command = side("split-source", incoming.address, role, number, kernel)
            done = subprocess.run(command, timeout=60, check=False)
            if done.returncode == 0:
                incoming.receive(30).close()
                break
            phase = settled(incoming)
            if phase is Destination.SPLIT:
                with pytest.raises(HostError, match="lost"):
                    incoming.resolve()
                assert settled(incoming) is Destination.ABSENT
            elif phase is Destination.FILLING:
                there = stack.enter_context(incoming.receive(30))
                there.console.send("g" * PIECES)
                with pytest.raises(HostError, match="lost"):
                    incoming.resolve()
                assert there.wait(30) is Outcome.HOST_FAILURE
                assert "pages were at its source alone" in there.detail
                board = there._board
                assert board is not None
                assert board.memory.lost_regions
                lost += 1
            elif phase is Destination.OWNING:
                there = stack.enter_context(incoming.receive(30))
                there.console.send("g" * PIECES)
                assert there.wait(60) is Outcome.POWER_OFF
            else:
                assert phase is Destination.ABSENT
    assert lost or role is Role.CONTROL


def test_the_death_of_the_destination_at_each_step(config: Callable[..., MachineConfig]) -> None:
    """Before the decision the machine runs on here; once it ran there, it is lost, and says so."""
    lost = ran_on = 0
    for role, numbers in ((Role.CONTROL, range(100)), (Role.FAULTS, range(3))):
        for number in numbers:
            command = side("destination", "tcp:127.0.0.1:0", role, number)
            with (
                subprocess.Popen(command, stdout=subprocess.PIPE) as process,
                Machine(config()) as machine,
            ):
                assert process.stdout is not None
                address = process.stdout.readline().decode().strip()
                try:
                    machine.migrate(address, post_copy=0)
                except MigrationError as cut:
                    if not cut.runs:
                        with pytest.raises(MigrationError):
                            machine.recover()
                    assert machine._outgoing is not None
                    if machine._outgoing.side.phase is Source.SERVING:
                        with pytest.raises(HostError, match="lost"):
                            machine.resolve()
                        assert machine.wait(30) is Outcome.HOST_FAILURE
                        assert "newest pages were on the other side" in machine.detail
                        lost += 1
                        continue
                    if not cut.runs:
                        machine.resolve()
                    machine.console.send("g" * PIECES)
                    assert machine.wait(60) is Outcome.POWER_OFF
                    ran_on += 1
                else:
                    process.kill()
                    break
    assert lost
    assert ran_on


@contextmanager
def cut_at_first(kind: Kind) -> Iterator[None]:
    """Break the link at the first frame of a kind."""
    real, cut = Link.send_parts, threading.Event()

    def send(link: Link, sent: Kind, *rest: Any, **named: Any) -> None:
        if sent is kind and not cut.is_set():
            cut.set()
            link.close()
            raise LinkLost("migration link", "cut")
        real(link, sent, *rest, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Link, "send_parts", send)
        yield


def test_a_vmm_that_stands_still_at_a_missing_page_is_recovered(
    config: Callable[..., MachineConfig],
) -> None:
    """Its thread waits for the page with the interpreter's lock: it can't even accept the link."""
    command = side("reader", "tcp:127.0.0.1:0", Role.CONTROL, 1000)
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE) as process,
        Machine(config()) as machine,
    ):
        assert process.stdout is not None
        address = process.stdout.readline().decode().strip()
        with cut_at_first(Kind.DATA), pytest.raises(MigrationError) as told:
            machine.migrate(address, post_copy=0)
        assert not told.value.runs
        report = machine.recover()
        assert report.post_copy > 0
        assert machine.outcome is Outcome.MIGRATED
        assert process.stdout.readline() == b"read %d\n" % (32 << 20)
        assert process.stdout.readline() == b"power-off\n"
        assert process.wait(60) == 0


def can_give_up() -> bool:
    """Whether this kernel can: since Linux 6.6."""
    page = GuestAddress(0), 4096
    try:
        with GuestMemory.from_ranges([page]) as memory, Userfault(memory) as userfault:
            userfault.register(*page)
            userfault.poison(*page)
    except MappingError:
        return False
    return True


@pytest.mark.skipif(not can_give_up(), reason="Linux 6.6 gives pages up")
def test_a_vmm_that_stands_still_at_a_page_that_never_comes_can_be_ended(
    config: Callable[..., MachineConfig],
) -> None:
    """Its source is not met again, its thread waits with the interpreter's lock: SIGTERM helps."""
    command = side("deaf", "tcp:127.0.0.1:0", Role.CONTROL, 1000)
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE) as process,
        Machine(config()) as machine,
    ):
        assert process.stdout is not None
        assert machine._board is not None
        machine._board.memory.write(GuestAddress(16 << 20), bytes(range(1, 256)) * 1024)
        address = process.stdout.readline().decode().strip()
        with cut_at_first(Kind.DATA), pytest.raises(MigrationError):
            machine.migrate(address, post_copy=0)
        assert process.stdout.readline() == b"reads\n"
        time.sleep(0.2)  # most likely it does by now
        process.terminate()
        assert process.stdout.readline() == b"read %d\n" % (1 << 20)
        assert process.stdout.readline() == b"stopped True\n"
        assert process.wait(60) == 0


def test_a_machine_that_waits_for_a_page_can_be_stopped(
    config: Callable[..., MachineConfig],
) -> None:
    """Its vCPU stands still in the kernel, where no signal reaches it."""
    with Machine(config()) as machine, Incoming("tcp:127.0.0.1:0") as incoming:
        with cut_at_first(Kind.DATA), pytest.raises(MigrationError):
            machine.migrate(incoming.address, post_copy=0)
        with incoming.receive(30) as there:
            there.console.send("g" * PIECES)
            time.sleep(0.1)
            there.stop()
            assert there.wait(30) is Outcome.STOPPED
        machine.recover()  # nobody there needs the pages any more
        assert machine.outcome is Outcome.MIGRATED


def test_the_end_of_a_machine_waits_until_its_memory_is_marked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two threads come to end it at once, where its source is lost: nobody sees it whole."""
    order: list[str] = []
    entered, release = threading.Event(), threading.Event()

    def lose(mapping: Any) -> None:
        entered.set()
        release.wait(30)
        real(mapping)
        order.append("lost")

    def end() -> None:
        pages.end()
        order.append("ended")

    wake = os.eventfd(0)
    listener = Listener(Address.parse("tcp:127.0.0.1:0"), None)
    with GuestMemory.from_ranges([(GuestAddress(0), 1 << 20)], dirty_page_size=4096) as memory:
        kind = type(memory.regions[0].mapping)
        real = kind.lose
        monkeypatch.setattr(kind, "lose", lose)
        pages = PostCopy(memory, 1, listener, None, wake, lambda sock: sock.close())
        pages.begin(table([(0, 4096)]))
        threads = [threading.Thread(target=pages.close), threading.Thread(target=end)]
        threads[0].start()
        assert entered.wait(30)
        threads[1].start()
        threads[1].join(0.2)
        release.set()
        for thread in threads:
            thread.join()
        assert order == ["lost", "ended"]
        assert memory.lost_regions
    listener.close()
    os.close(wake)


NONSENSE = {
    "no JSON": "print('{', flush=True); time.sleep(100)",
    "another JSON": "print('[1]', flush=True); time.sleep(100)",
    "no end of line": "sys.stdout.write('x' * 200000); sys.stdout.flush(); time.sleep(100)",
    "deep JSON": "print('[' * 60000, flush=True); time.sleep(100)",
    "dead": "sys.exit(1)",
}


@pytest.mark.parametrize("way", NONSENSE)
def test_a_page_process_that_talks_nonsense_harms_nobody(
    config: Callable[..., MachineConfig], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is ended and started anew, a few times; then the machine stays where it was."""
    guest = config()  # before, since the assembler is a process too
    program = "import os, sys, time; os.dup2(int(sys.argv[3]), 1); " + NONSENSE[way]
    real, started = subprocess.Popen, []

    def popen(command: list[str], **named: Any) -> subprocess.Popen[bytes]:
        process = real([sys.executable, "-c", program, *command[1:]], **named)
        started.append(process)
        return process

    monkeypatch.setattr(subprocess, "Popen", popen)
    with Machine(guest) as machine, Incoming("tcp:127.0.0.1:0") as incoming:
        # How far it comes is luck; that it is whole in one place, or lost and said so, is not.
        with pytest.raises(MigrationError) as told:
            machine.migrate(incoming.address, post_copy=0)
        for _ in range(1200):
            if len(started) > postcopy._MOST_DEATHS or incoming.side.phase is Destination.ABSENT:
                break
            time.sleep(0.05)
        if told.value.runs:
            machine.console.send("g" * PIECES)
            assert machine.wait(60) is Outcome.POWER_OFF
        else:
            there = incoming.receive(30)
            there.stop()
            there.close()
    assert len(started) <= postcopy._MOST_DEATHS + 1
    for process in started:
        process.wait(60)
