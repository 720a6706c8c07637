"""Migrations among strangers and deaths: nobody runs a machine twice, and a survivor says so."""

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm_reference.config import MachineConfig
from vmm_reference.errors import HostError
from vmm_reference.machine import Machine
from vmm_reference.outcome import Outcome
from vmm_reference.state import connection, wire
from vmm_reference.state.connection import Address
from vmm_reference.state.handover import Destination, Source
from vmm_reference.state.incoming import Incoming
from vmm_reference.state.moving import MigrationError
from vmm_reference.state.pager import Missing
from vmm_reference.state.postcopy import PostCopy
from vmm_reference.state.testing import PIECES, Remains, side
from vmm_reference.state.wire import Kind, LinkLost, ProtocolError, Role

pytestmark = pytest.mark.kvm


@pytest.fixture(scope="module")
def waiting() -> Any:
    """One VMM that waits through all that strangers say to it."""
    with Incoming("tcp:127.0.0.1:0") as incoming:
        yield incoming


FRAMES = st.tuples(
    st.sampled_from(Kind), st.binary(max_size=60), st.integers(0, (1 << 64) - 1),
    st.integers(0, (1 << 64) - 1) | st.integers(0, 3),
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(role=st.sampled_from(Role), frames=st.lists(FRAMES, max_size=6), tail=st.binary(max_size=40))
def test_no_stranger_harms_who_waits(
    waiting: Incoming,
    role: Role,
    frames: list[tuple[Kind, bytes, int, int]],
    tail: bytes,
) -> None:
    """Any frames on any link, and bytes that are none: nothing runs, nothing is kept."""
    try:
        with connection.connect(Address.parse(waiting.address), role, None) as link:
            for kind, payload, argument, extra in frames:
                link.send(kind, payload, argument, extra)
            link.socket.sendall(tail)
    except (LinkLost, OSError):
        pass  # it had enough
    assert waiting.side.phase is Destination.ABSENT


@settings(max_examples=50, deadline=None)
@given(data=st.binary(max_size=100))
def test_no_preamble_harms_who_waits(waiting: Incoming, data: bytes) -> None:
    """Bytes instead of a greeting."""
    where = Address.parse(waiting.address)
    with socket.create_connection((where.host, where.port)) as sock:
        sock.sendall(data)
    assert waiting.side.phase is Destination.ABSENT


def test_after_all_that_a_machine_comes(
    waiting: Incoming, config: Callable[..., MachineConfig], twin: tuple[Remains, bytes]
) -> None:
    """Who waits still does."""
    with Machine(config()) as machine:
        machine.migrate(waiting.address)
        output = bytes(machine.console._output)
    with waiting.receive(30) as there:
        there.console.send("g" * PIECES)
        assert there.wait(60) is Outcome.POWER_OFF
        assert (Remains.of(there), output + bytes(there.console._output)) == twin


def test_another_version_is_refused(config: Callable[..., MachineConfig]) -> None:
    """By both sides, with both versions."""
    with (
        Machine(config()) as machine,
        Incoming("tcp:127.0.0.1:0") as incoming,
    ):
        where = Address.parse(incoming.address)
        with socket.create_connection((where.host, where.port)) as sock:
            sock.sendall(b"vmmove\x01\x00")
            assert sock.recv(8) == b"vmmove\x02\x01"
            assert sock.recv(1) == b""
        with socket.create_server(("127.0.0.1", 0)) as server:

            def answer() -> None:
                with server.accept()[0] as sock:
                    sock.recv(8)
                    sock.sendall(b"vmmove\x07\x01")

            thread = threading.Thread(target=answer)
            thread.start()
            with pytest.raises(MigrationError, match="version: 7") as told:
                machine.migrate(f"tcp:127.0.0.1:{server.getsockname()[1]}")
            assert told.value.runs
            thread.join()


def test_a_stalled_link_is_given_up(config: Callable[..., MachineConfig]) -> None:
    """A peer that accepts and then says nothing: the machine runs on."""
    with (
        Machine(config()) as machine,
        socket.create_server(("127.0.0.1", 0)) as server,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(wire, "SILENCE", 0.5)
        kept: list[socket.socket] = []

        def answer() -> None:
            kept.append(server.accept()[0])
            kept[0].recv(8)
            kept[0].sendall(b"vmmove\x02\x00")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(MigrationError, match="too long") as told:
            machine.migrate(f"tcp:127.0.0.1:{server.getsockname()[1]}")
        assert told.value.runs
        thread.join()
        kept[0].close()
        machine.pause()
        machine.resume()


def test_a_pager_that_dies_is_replaced(
    config: Callable[..., MachineConfig], twin: tuple[Remains, bytes]
) -> None:
    """While pages are missing: the source recovers, and nothing is lost."""
    processes: list[int] = []
    real = subprocess.Popen

    def popen(*arguments: Any, **named: Any) -> subprocess.Popen[bytes]:
        process = real(*arguments, **named)
        processes.append(process.pid)
        return process

    begin = PostCopy.begin

    def killed(post_copy: PostCopy, missing: bytes) -> None:
        os.kill(processes[0], signal.SIGKILL)
        begin(post_copy, missing)

    with pytest.MonkeyPatch.context() as patch, Incoming("tcp:127.0.0.1:0") as incoming:
        patch.setattr(subprocess, "Popen", popen)
        patch.setattr(PostCopy, "begin", killed)
        with Machine(config()) as machine:
            try:
                machine.migrate(incoming.address, post_copy=0)
            except MigrationError as cut:
                if cut.runs:  # the death was noticed before the decision
                    patch.setattr(PostCopy, "begin", begin)
                    machine.migrate(incoming.address, post_copy=0)
                else:
                    machine.recover()
            output = bytes(machine.console._output)
        with incoming.receive(30) as there:
            there.console.send("g" * PIECES)
            assert there.wait(60) is Outcome.POWER_OFF
            assert (Remains.of(there), output + bytes(there.console._output)) == twin


def test_the_death_of_the_source_at_each_step(config: Callable[..., MachineConfig]) -> None:
    """The destination forgets what it has not whole; what it has whole waits, and is resolved."""
    resolved = moved = 0
    for number in range(100):
        with Incoming("tcp:127.0.0.1:0") as incoming:
            command = side("source", incoming.address, Role.CONTROL, number, config().kernel)
            done = subprocess.run(command, timeout=60, check=False)
            if done.returncode == 0:
                incoming.receive(30).close()
                break
            steady = (Destination.ABSENT, Destination.HOLDING, Destination.OWNING)
            for _ in range(600):
                if incoming.side.phase in steady and incoming._link is None:
                    break
                time.sleep(0.05)
            if incoming.side.phase is Destination.HOLDING:
                incoming.resolve()
                resolved += 1
            if incoming.side.phase is Destination.OWNING:
                moved += 1
                with incoming.receive(30) as there:
                    there.console.send("g" * PIECES)
                    assert there.wait(60) is Outcome.POWER_OFF
            else:
                assert incoming.side.phase is Destination.ABSENT
                with pytest.raises(HostError, match="nothing to resolve"):
                    incoming.resolve()
    assert number == 5  # instead of OFFER, STATES, STATE, COMMIT and BYE
    assert moved >= resolved == 1


def test_the_death_of_the_destination_at_each_step(config: Callable[..., MachineConfig]) -> None:
    """The machine runs on, or stands still, whole, until somebody says that the other is dead."""
    resolved = 0
    for number in range(100):
        command = side("destination", "tcp:127.0.0.1:0", Role.CONTROL, number)
        with (
            subprocess.Popen(command, stdout=subprocess.PIPE) as process,
            Machine(config()) as machine,
        ):
            assert process.stdout is not None
            address = process.stdout.readline().decode().strip()
            try:
                machine.migrate(address)
            except MigrationError as cut:
                if not cut.runs:
                    with pytest.raises(MigrationError):
                        machine.recover()
                    machine.resolve()
                    resolved += 1
                assert machine._outgoing is not None
                assert machine._outgoing.side.phase is Source.RUNNING
                machine.console.send("g" * PIECES)
                assert machine.wait(60) is Outcome.POWER_OFF
                process.wait(60)
            else:
                process.kill()
                break
    assert number >= 2
    assert resolved == 1


def test_missing_pages_refuse_what_is_no_page() -> None:
    """Addresses of nothing, and halves of pages."""
    missing = Missing([(0, 1 << 16), (1 << 20, 1 << 16)])
    missing.add(1 << 20, 8192)
    for address, length in ((1, 4096), (0, 100), (1 << 16, 4096), (0xF000, 8192), (0, 0)):
        with pytest.raises(ProtocolError):
            missing.add(address, length)
    assert missing.ranges() == [(1 << 20, 8192)]
