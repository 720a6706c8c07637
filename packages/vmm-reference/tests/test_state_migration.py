"""Machines that move: the guest can't tell, one side at most runs it, and every cut is survived."""

import gc
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import attrs
import pytest
import trustme

from vm_memory import GuestAddress, GuestMemory, sharing
from vmm_reference.backends.file import FileBackend
from vmm_reference.board import Board
from vmm_reference.config import Drive, MachineConfig
from vmm_reference.devices.vmgenid import Generation
from vmm_reference.errors import ConfigError, HostError
from vmm_reference.layout import VM_GENERATION
from vmm_reference.machine import Machine
from vmm_reference.outcome import Outcome
from vmm_reference.ram import Ram
from vmm_reference.state.connection import Tls
from vmm_reference.state.handover import Destination, Source
from vmm_reference.state.incoming import Incoming
from vmm_reference.state.moving import MigrationError, Options, Progress, Report
from vmm_reference.state.testing import COMPUTE, PIECES, Remains
from vmm_reference.state.throttle import Throttle
from vmm_reference.state.wire import Frame, Kind, Link, LinkLost

pytestmark = pytest.mark.kvm

WAYS: dict[str, dict[str, Any]] = {
    "tcp": {},
    "unix": {"unix": True},
    "streams": {"streams": 4, "bandwidth": 1 << 30},
    "zstd": {"compress": True, "streams": 2},
    "tls": {"tls": True, "streams": 2},
    "local": {"local": True, "unix": True},
    "post-copy": {"post_copy": 0},
    "post-copy-unix-zstd": {"post_copy": 0, "unix": True, "compress": True},
    "post-copy-tls": {"post_copy": 0, "tls": True},
    "switched": {"post_copy": 1, "downtime": 1e-9, "auto_converge": True},
}

# Writes one word in each of 1024 pages, again and again; says so after each 16 rounds.
WRITE = """
    movl $1, %eax
1:  movl $0x200000, %ebx
2:  movl %eax, (%ebx)
    addl $4096, %ebx
    cmpl $0x600000, %ebx
    jb 2b
    incl %eax
    testl $15, %eax
    jnz 1b
    PUT '.'
    jmp 1b
"""
WRITE = WRITE.replace("    PUT '.'", "    movl %eax, %edi\n    PUT '.'\n    movl %edi, %eax")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one authority, and in `other` of another."""
    folder = tmp_path_factory.mktemp("tls")
    for path in (folder, folder / "other"):
        path.mkdir(exist_ok=True)
        authority = trustme.CA()
        authority.cert_pem.write_to_path(str(path / "ca.pem"))
        mine = authority.issue_cert("127.0.0.1", "localhost")
        mine.private_key_pem.write_to_path(str(path / "key.pem"))
        for number, blob in enumerate(mine.cert_chain_pems):
            blob.write_to_path(str(path / "cert.pem"), append=number > 0)
    return folder


@pytest.fixture
def restless(monkeypatch: pytest.MonkeyPatch) -> None:
    """However short a round is, the guest has written meanwhile."""
    real, pause, still = Ram.dirty, Board.pause, set()

    def paused(board: Board) -> None:
        pause(board)
        still.add(board.ram)

    def dirty(ram: Ram) -> list[tuple[int, int]]:
        found = real(ram)
        while not found and ram not in still:  # it runs
            time.sleep(0.001)
            found = real(ram)
        return found

    monkeypatch.setattr(Board, "pause", paused)
    monkeypatch.setattr(Ram, "dirty", dirty)


@attrs.define
class Hop:
    """One migration in this process."""

    report: Report
    machine: Machine


def hop(machine: Machine, folder: Path, tls: Path, way: dict[str, Any]) -> Hop:
    """Move a machine, which then has ended, to another one, which is the caller's."""
    options = dict(way)
    unix = options.pop("unix", False)
    if options.get("tls"):
        options["tls"] = Tls(str(tls))
    address = f"unix:{folder / 'socket'}" if unix else "tcp:127.0.0.1:0"
    with Incoming(address, tls=options.get("tls")) as incoming:
        report = machine.migrate(incoming.address, **options)
        assert machine.outcome is Outcome.MIGRATED
        return Hop(report, incoming.receive(30))


def finished(machine: Machine, output: bytes) -> tuple[Remains, bytes]:
    machine.console.send("g" * PIECES)
    assert machine.wait(60) is Outcome.POWER_OFF
    return Remains.of(machine), output + bytes(machine.console._output)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("hops", [3, pytest.param(300, marks=pytest.mark.soak)])
@pytest.mark.timeout(1800)
def test_the_end_is_that_of_an_uninterrupted_twin(
    config: Callable[..., MachineConfig],
    twin: tuple[Remains, bytes],
    certificates: Path,
    tmp_path: Path,
    way: str,
    hops: int,
) -> None:
    """Memory, registers and output, after a chain of migrations under load."""
    fields = {"shared_memory": way == "local"}
    machine, output = Machine(config(COMPUTE, **fields)), b""
    machine.start()
    with ExitStack() as stack:
        for number in range(hops):
            stack.callback(machine.close)
            if number < PIECES - 1:
                machine.console.send("g")
            time.sleep(0.01 * (number % 3))
            moved = hop(machine, tmp_path, certificates, WAYS[way])
            output += bytes(machine.console._output)
            assert moved.report.downtime > 0
            machine.close()
            machine = moved.machine
        stack.callback(machine.close)
        assert finished(machine, output) == twin


@pytest.mark.parametrize("first", ["tcp", "post-copy", "local", "eager"])
def test_memory_stays_shared(
    config: Callable[..., MachineConfig],
    twin: tuple[Remains, bytes],
    tmp_path: Path,
    first: str,
) -> None:
    """A machine that came over a link, or back from a snapshot, can be handed over."""
    with ExitStack() as stack:
        machine = stack.enter_context(Machine(config(COMPUTE, shared_memory=True)))
        if first == "eager":
            machine.pause()
            machine.snapshot(tmp_path / "a")
            output = bytes(machine.console._output)
            machine.close()
            machine = stack.enter_context(Machine.restore(tmp_path / "a", "eager"))
        else:
            moved = hop(machine, tmp_path, tmp_path, WAYS[first])
            output = bytes(machine.console._output)
            machine = stack.enter_context(moved.machine)
        last = stack.enter_context(hop(machine, tmp_path, tmp_path, WAYS["local"]).machine)
        output += bytes(machine.console._output)
        assert finished(last, output) == twin


@pytest.mark.parametrize("paused", [False, True])
def test_a_guest_that_never_leaves_the_kernel_moves(
    config: Callable[..., MachineConfig], tmp_path: Path, paused: bool
) -> None:
    """Nothing waits for an exit of it: an idle guest has none for as long as it is idle."""
    with Machine(config("PUT 's'; 1: hlt; jmp 1b")) as machine:
        machine.console.expect("s", 30)
        time.sleep(0.05)  # until it halts; a host that is slower sees it move earlier
        if paused:
            machine.pause()
            machine.pause()  # again: it stands still already
        with hop(machine, tmp_path, tmp_path, {}).machine as there:
            assert there.describe()["state"] == "Running"


def test_a_paused_machine_moves_and_stays_paused_nowhere_else(
    config: Callable[..., MachineConfig], twin: tuple[Remains, bytes], tmp_path: Path
) -> None:
    """Who moves it wants it to run: it does, on the other side."""
    with Machine(config(COMPUTE)) as machine:
        machine.pause()
        moved = hop(machine, tmp_path, tmp_path, {})
        output = bytes(machine.console._output)
    with moved.machine as machine_there:
        assert finished(machine_there, output) == twin


@pytest.mark.parametrize("way", ["local", "tcp", "post-copy"])
def test_a_machine_that_moves_stays_the_same(
    config: Callable[..., MachineConfig], tmp_path: Path, way: str
) -> None:
    """Its generation is no other, before and after: whoever waits for it does not touch it yet."""

    def generation(machine: Machine) -> bytes:
        assert machine._board is not None
        return machine._board.memory.read(GuestAddress(VM_GENERATION), 16)

    fields = {"devices": [Generation()], "shared_memory": way == "local"}
    seen = []
    with Machine(config(COMPUTE, **fields)) as machine:
        before = generation(machine)
        offered = Incoming._offered

        def note(incoming: Incoming, frame: Frame, payload: bytes) -> None:
            offered(incoming, frame, payload)
            seen.append(generation(machine))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Incoming, "_offered", note)
            moved = hop(machine, tmp_path, tmp_path, WAYS[way])
        assert seen == [before]
        with moved.machine as there:
            assert generation(there) == before


def test_a_disk_is_locked_by_one_side_at_a_time(
    config: Callable[..., MachineConfig], tmp_path: Path
) -> None:
    """Both have it open on the way; the lock goes over with the machine."""
    image = tmp_path / "disk"
    image.write_bytes(bytes(1 << 20))

    def locked() -> bool:
        try:
            FileBackend(str(image)).close()
        except HostError:
            return True
        return False

    with Machine(config(WRITE, drives=[Drive(str(image))])) as machine:
        assert locked()
        moved = hop(machine, tmp_path, tmp_path, {})
        assert locked()
    assert locked()
    moved.machine.close()
    assert not locked()


def test_a_disk_that_is_taken_leaves_it_where_it_was(
    config: Callable[..., MachineConfig], tmp_path: Path
) -> None:
    """The destination can't lock it at the last moment: it is asked again, and then it can."""
    image = tmp_path / "disk"
    image.write_bytes(bytes(1 << 20))
    thief: list[FileBackend] = []
    unlock = FileBackend.unlock

    def steal(backend: FileBackend) -> None:
        unlock(backend)
        thief.append(FileBackend(str(image)))

    with pytest.MonkeyPatch.context() as patch, Incoming("tcp:127.0.0.1:0") as incoming:
        patch.setattr(FileBackend, "unlock", steal)
        with Machine(config(WRITE, drives=[Drive(str(image))])) as machine:
            with pytest.raises(MigrationError, match="another machine uses it") as told:
                machine.migrate(incoming.address)
            assert not told.value.runs
            with pytest.raises(HostError, match="being handed over"):
                machine.resume()
            thief[0].close()
            machine.recover()
            with incoming.receive(30) as there:
                there.console.expect(r"\.", 60)


def test_another_round_is_made_where_the_pause_gets_shorter_by_it(
    config: Callable[..., MachineConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although what is left could be sent in the time that is allowed; not where it stays alike."""
    real, left = Ram.dirty, [[(4 << 20, 3 << 20)], [(4 << 20, 2 << 20)]]

    def dirty(ram: Ram) -> list[tuple[int, int]]:
        found = real(ram)  # nothing but what the test says: the guest is idle
        return left.pop(0) if dirty_calls.pop(0) and left else found

    dirty_calls = [False, True, True, False]
    with Machine(config("1: hlt; jmp 1b")) as machine:
        assert machine._board is not None
        machine._board.memory.write(GuestAddress(4 << 20), os.urandom(8 << 20))
        monkeypatch.setattr(Ram, "dirty", dirty)
        moved = hop(machine, tmp_path, tmp_path, {"downtime": 3600})
        with moved.machine:
            first, second, third = (done.pages for done in moved.report.rounds)
    assert first >= 2048
    assert second == 768
    assert 512 <= third < 768


@pytest.mark.usefixtures("restless")
def test_it_is_given_up_when_the_guest_writes_too_fast(
    config: Callable[..., MachineConfig],
) -> None:
    """After so many rounds, or so many seconds: the machine runs on, and can be moved again."""
    with Machine(config(WRITE)) as machine:
        machine.console.expect(r"\.", 60)
        for options in ({"timeout": 0.2}, {}):
            with Incoming("tcp:127.0.0.1:0") as incoming:
                seen: list[Progress] = []
                with pytest.raises(MigrationError, match="writes faster") as told:
                    machine.migrate(
                        incoming.address, downtime=1e-9, progress=seen.append, **options
                    )
                assert told.value.runs
                assert seen[-1].phase == "memory"
            machine.console.expect(r"\.", 60)
        with Incoming("tcp:127.0.0.1:0") as incoming:
            report = machine.migrate(
                incoming.address, downtime=0.01, bandwidth=100 << 20, auto_converge=True,
                timeout=100,
            )  # fmt: skip
            with incoming.receive(30) as there:
                there.console.expect(r"\.", 60)
        assert report.rounds[-1].pages <= 1024


@pytest.mark.usefixtures("restless")
def test_vcpus_are_slowed_down_more_and_more(
    config: Callable[..., MachineConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the guest keeps writing as much as is carried; and get all their time back."""
    seen: list[int] = []
    more = Throttle.more

    def note(throttle: Throttle) -> None:
        more(throttle)
        seen.append(throttle.percent)

    monkeypatch.setattr(Throttle, "more", note)
    with Machine(config(WRITE)) as machine, Incoming("tcp:127.0.0.1:0") as incoming:
        machine.console.expect(r"\.", 60)
        with pytest.raises(MigrationError, match="writes faster") as told:
            machine.migrate(
                incoming.address, downtime=1e-9, auto_converge=True, bandwidth=200 << 20
            )
        assert told.value.runs
        assert seen == [20, 30, 40, 50, 60, 70, 80, 90, 99, *[99] * (len(seen) - 9)][: len(seen)]
        assert len(seen) >= 3
        assert machine._outgoing is not None
        throttles = [done.throttle for done in machine._outgoing._rounds]
        assert sorted(throttles) == throttles
        assert throttles[-1] == seen[-1]
        assert "throttle" not in [thread.name for thread in threading.enumerate()]
        machine.console.expect(r"\.", 60)


class Clockwork(threading.Event):
    """Time as a `Throttle` asks for it; ends it after a while."""

    def __init__(self, parked: Callable[[], bool]) -> None:
        super().__init__()
        self.parked = parked
        self.spent = {True: 0.0, False: 0.0}
        self.left = 20

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        self.spent[self.parked()] += timeout
        self.left -= 1
        if not self.left:
            self.set()
        return self.is_set()


@pytest.mark.parametrize("steps", range(1, 12))
def test_a_throttle_takes_its_share_of_the_time(steps: int) -> None:
    """So many per cent of it, and leaves the vCPUs running."""

    class Vcpus:
        parked = False

        def park(self) -> None:
            self.parked = True

        def unpark(self) -> None:
            self.parked = False

    vcpus: Any = Vcpus()
    throttle = Throttle(vcpus)
    throttle.percent = min(20 + 10 * (steps - 2), 99) if steps > 1 else 0
    clock = Clockwork(lambda: vcpus.parked)
    throttle._end = clock
    throttle.more()
    assert clock._flag or threading.Event.wait(clock, 30)  # type: ignore[attr-defined]
    throttle.close()
    assert not vcpus.parked
    share = clock.spent[True] / (clock.spent[True] + clock.spent[False])
    assert share == pytest.approx(throttle.percent / 100)
    assert throttle.percent == min(10 + 10 * steps, 99)


@pytest.mark.usefixtures("restless")
def test_it_is_cancelled(config: Callable[..., MachineConfig]) -> None:
    """At each time that a progress is told: before the decision, the machine stays."""
    with Machine(config(WRITE)) as machine, Incoming("tcp:127.0.0.1:0") as incoming:

        def stop(progress: Progress) -> None:
            if progress.rounds == 2:
                machine.cancel_migration()

        with pytest.raises(MigrationError, match="cancelled") as told:
            machine.migrate(incoming.address, downtime=1e-9, progress=stop)
        assert told.value.runs
        machine.console.expect(r"\.", 60)
        assert incoming.side.phase in (Destination.ABSENT, Destination.RECEIVING)


@pytest.mark.parametrize("way", ["tcp", "tls", "local", "post-copy"])
@pytest.mark.parametrize(
    ("side", "part", "parts"), [("destination", 0, 1), *(("source", part, 2) for part in range(2))]
)
def test_a_cut_at_every_frame_is_survived(
    config: Callable[..., MachineConfig],
    twin: tuple[Remains, bytes],
    certificates: Path,
    tmp_path: Path,
    way: str,
    side: str,
    part: int,
    parts: int,
) -> None:
    """One side runs it, or it is paused whole and says so; recovered, nothing is lost.

    A source has many frames: every second is one test's.
    """
    recovered = 0
    for number in range(part, 1000, parts):
        done = cut_at(number, side, config, certificates, tmp_path, WAYS[way])
        if done.machine is None:
            break
        recovered += done.recovered
        with done.machine:
            assert finished(done.machine, done.output) == twin, (number, done)
    else:
        pytest.fail("there is no end of frames")
    assert number > 2
    if way == "post-copy" and side == "source":
        assert recovered


def test_a_link_that_is_lost_while_it_carries_the_memory_s_files(
    config: Callable[..., MachineConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine runs on, and whoever moves it is told so."""
    real = sharing.send

    def send(sock: socket.socket, memory: GuestMemory) -> None:
        sock.shutdown(socket.SHUT_RDWR)
        real(sock, memory)

    monkeypatch.setattr(sharing, "send", send)
    with (
        Incoming(f"unix:{tmp_path / 'socket'}") as incoming,
        Machine(config(WRITE, shared_memory=True)) as machine,
    ):
        with pytest.raises(MigrationError, match="Broken pipe") as told:
            machine.migrate(incoming.address, local=True)
        assert told.value.runs
        machine.console.expect(r"\.", 60)


@pytest.mark.parametrize("lost", [Kind.COMMIT, Kind.STARTED])
@pytest.mark.parametrize("way", ["tcp", "tls", "local", "post-copy"])
def test_a_word_that_is_lost_is_said_again(
    config: Callable[..., MachineConfig],
    twin: tuple[Remains, bytes],
    certificates: Path,
    tmp_path: Path,
    way: str,
    lost: Kind,
) -> None:
    """The source waits, paused and whole, until the two have met; nothing is lost."""
    if way == "post-copy" and lost is Kind.STARTED:
        lost = Kind.FILLING
    real, cut = Link.send_parts, threading.Event()

    def send(link: Link, kind: Kind, *rest: Any, **named: Any) -> None:
        if kind is lost and not cut.is_set():
            cut.set()
            link.close()
            raise LinkLost("migration link", "cut")
        real(link, kind, *rest, **named)

    options = dict(WAYS[way])
    address = f"unix:{tmp_path / 'socket'}" if options.pop("unix", False) else "tcp:127.0.0.1:0"
    if options.get("tls"):
        options["tls"] = Tls(str(certificates))
    with (
        Incoming(address, tls=options.get("tls")) as incoming,
        Machine(config(COMPUTE, shared_memory=way == "local")) as machine,
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Link, "send_parts", send)
            with pytest.raises(MigrationError, match="--recover") as told:
                machine.migrate(incoming.address, **options)
        assert not told.value.runs
        machine.recover()
        output = bytes(machine.console._output)
        with incoming.receive(30) as there:
            assert finished(there, output) == twin


@attrs.define
class Cut:
    """What came of a migration that was cut; no machine if it came to its end first."""

    machine: Machine | None
    output: bytes = b""
    recovered: bool = False


def cut_at(
    number: int,
    side: str,
    config: Callable[..., MachineConfig],
    certificates: Path,
    folder: Path,
    way: dict[str, Any],
) -> Cut:
    """Migrate, and break the control link instead of sending the frame of that number."""
    options = {**way, "streams": 1}  # or else it is luck which of them sends what
    if options.get("tls"):
        options["tls"] = Tls(str(certificates))
    address = f"unix:{folder / 'socket'}" if options.pop("unix", False) else "tcp:127.0.0.1:0"
    machine = Machine(config(COMPUTE, shared_memory=bool(options.get("local"))))
    real, count, here = Link.send_parts, 0, threading.current_thread()
    faults = ("faults", "MainThread") if options.get("post_copy") is not None else ("MainThread",)

    def send(link: Link, kind: Kind, *rest: Any, **named: Any) -> None:
        nonlocal count
        mine = threading.current_thread()
        ours = mine is here or mine.name in faults
        if ours == (side == "source"):
            count += 1
            if count == number + 1:
                link.close()
                raise LinkLost("migration link", f"cut at {kind.name}")
        real(link, kind, *rest, **named)

    machine.start()
    with Incoming(address, tls=options.get("tls")) as incoming:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Link, "send_parts", send)
            cut: MigrationError | None = None
            try:
                machine.migrate(incoming.address, **options)
            except MigrationError as error:
                cut = error
            whole = count <= number
        if whole:
            incoming.receive(30).close()
            machine.close()
            return Cut(None)
        if cut is None:  # the link broke when nobody needed it any more
            there, before = incoming.receive(30), bytes(machine.console._output)
            machine.close()
            return Cut(there, before)
        if cut.runs:
            assert machine._outgoing is not None
            assert machine._outgoing.side.phase is Source.RUNNING
            assert incoming.side.phase not in (Destination.OWNING, Destination.FILLING)
            return Cut(machine)
        assert "--recover" in str(cut)
        for attempt in range(3):
            try:
                machine.recover()
                break
            except MigrationError:
                time.sleep(0.1 * attempt)
        there, before = incoming.receive(30), bytes(machine.console._output)
        machine.close()
        return Cut(there, before, recovered=True)


def test_both_sides_can_be_resolved(
    config: Callable[..., MachineConfig], twin: tuple[Remains, bytes], tmp_path: Path
) -> None:
    """The commit is lost: whoever knows that the other one is gone lets this one run."""
    for survivor in ("source", "destination"):
        real = Link.send_parts

        def send(link: Link, kind: Kind, *rest: Any, **named: Any) -> None:
            if kind is Kind.COMMIT:
                link.close()
                raise LinkLost("migration link", "cut")
            real(link, kind, *rest, **named)  # noqa: B023

        machine = Machine(config(COMPUTE))
        machine.start()
        with Incoming("tcp:127.0.0.1:0") as incoming:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Link, "send_parts", send)
                with pytest.raises(MigrationError) as told:
                    machine.migrate(incoming.address)
            assert not told.value.runs
            output = bytes(machine.console._output)
            if survivor == "source":
                machine.resolve()
                with machine:
                    assert finished(machine, b"") == twin
            else:
                machine.close()
                incoming.resolve()
                with incoming.receive(30) as there:
                    assert finished(there, output) == twin
                with pytest.raises(HostError, match="nothing to resolve"):
                    incoming.resolve()


def test_certificates_are_proved(config: Callable[..., MachineConfig], certificates: Path) -> None:
    """Of another authority, or none at all: refused, and the machine runs on."""
    mine, other = Tls(str(certificates)), Tls(str(certificates / "other"))
    with Machine(config(WRITE)) as machine:
        for theirs in (other, None):
            with Incoming("tcp:127.0.0.1:0", tls=mine) as incoming:
                with pytest.raises(MigrationError) as told:
                    machine.migrate(incoming.address, tls=theirs)
                assert told.value.runs
                assert incoming.side.phase is Destination.ABSENT
                machine.migrate(incoming.address, tls=mine) if theirs is None else None
                machine.console.expect(r"\.", 60) if theirs is not None else None
    with pytest.raises(ConfigError, match=r"cert\.pem"):
        Incoming("tcp:127.0.0.1:0", tls=Tls("/nowhere"))


@pytest.mark.parametrize(
    "options",
    [{"streams": 0}, {"streams": 17}, {"downtime": 0}, {"timeout": -1}, {"bandwidth": 0},
     {"post_copy": -1}, {"local": True, "post_copy": 0}, {"compress": 1}],
)  # fmt: skip
def test_options_that_are_none_are_refused(options: dict[str, Any]) -> None:
    """Named, with the rule."""
    with pytest.raises(ConfigError):
        Options(**options)


def test_nothing_is_left_open(
    config: Callable[..., MachineConfig], certificates: Path, tmp_path: Path
) -> None:
    """Descriptors, threads and processes after migrations in every way."""

    def count() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))  # noqa: PTH208

    def once(way: dict[str, Any]) -> None:
        fields = {"shared_memory": bool(way.get("local"))}
        with Machine(config(WRITE, **fields)) as machine:
            hop(machine, tmp_path, certificates, way).machine.close()

    def all_ways() -> Iterator[None]:
        for way in WAYS.values():
            once(way)
            gc.collect()
            yield

    list(all_ways())
    before = count()
    for _ in all_ways():
        # Threads that take leave of a closed link do so in their own time.
        for _ in range(600):
            if count() <= before:
                break
            time.sleep(0.05)
        assert count() <= before
