"""A lab that is kept, and the jobs it runs one after the other."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from lab import outer, wire
from lab.cpus import Cpu
from lab.dialogue import STDERR, STDOUT, Dialogue
from lab.emulator import Emulator
from lab.errors import LabDied, LabError, LabTimeout

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = ["Job", "Lab"]

STEP = 0.25
"""The longest single wait, in seconds: so often the heart is listened to."""

T = TypeVar("T")


class Job(Dialogue):
    """A command that runs in a lab: made by `Lab.popen`."""

    def __init__(
        self, lab: Lab, number: int, argv: list[str], sink: Callable[[int, bytes], None] | None
    ) -> None:
        super().__init__(argv)
        self._lab = lab
        self._number = number
        self._sink = sink
        self._input = bytearray()
        self._flying = 0  # bytes of input on their way
        self._closing = False
        self._closed = False

    def write(self, data: str | bytes) -> None:
        if self._closing:
            raise LabError(f"the input of {self.argv[0]} is closed already")
        self._input += data.encode() if isinstance(data, str) else data
        self._feed()

    def close_stdin(self) -> None:
        self._closing = True
        self._feed()

    def send_signal(self, number: int) -> None:
        self._send(wire.SIGNAL, wire.NUMBER.pack(number))

    def resize(self, rows: int, columns: int) -> None:
        self._send(wire.RESIZE, wire.WINDOW.pack(rows, columns))

    def close(self) -> None:
        if self.returncode is None and self._lab.job is self:
            self.send_signal(signal.SIGKILL)
            try:
                self.wait(20)
            except LabTimeout:
                self._lab.kill("a job that was killed did not end within 20 s")

    @property
    def backlog(self) -> int:
        """How many bytes of its input wait here for it to take those before."""
        return len(self._input)

    def receive(self, kind: int, body: bytes) -> None:
        """Take a frame that the agent has sent for this job."""
        if kind == wire.EXIT:
            (self.returncode,) = wire.NUMBER.unpack(body)
        elif kind == wire.TAKEN:
            self._flying -= wire.NUMBER.unpack(body)[0]
            self._feed()
        else:
            stream = STDERR if kind == wire.STDERR else STDOUT
            if self._sink is not None:
                self._sink(stream, body)
            else:
                self._written[stream] += body

    def _pump(self, timeout: float) -> None:
        self._lab.pump(timeout)

    def _send(self, kind: int, body: bytes = b"") -> None:
        if self.returncode is None:
            self._lab.send(kind, self._number, body)

    def _feed(self) -> None:
        """Send as much input as the agent has room for."""
        while self._input and self._flying < wire.STDIN_WINDOW:
            piece = bytes(self._input[: wire.STDIN_WINDOW - self._flying])
            del self._input[: len(piece)]
            self._flying += len(piece)
            self._send(wire.STDIN, piece)
        if self._closing and not self._input and not self._closed:
            self._closed = True
            self._send(wire.STDIN)


class Lab:
    """An outer virtual machine that runs commands on the host's files, one at a time.

    A lab takes one host CPU, for reasons that `lab.cpus` gives; two labs need two. It belongs to
    the thread that starts it, and ends with it. Its files are the host's as they are when a job
    starts; what a job writes is gone at its end, except in the folders that are shared. A lab that
    falls silent is ended, and started again for the next job.

    Args:
        memory: of the outer machine, as QEMU's `-m` takes it.
        append: more arguments for the outer kernel.
        modules: more modules of the outer kernel, loaded at boot with what they depend on.
        cpu: the host CPU to run on; None takes one that no other lab has.
        shares: folders of the host in which a job's writes reach the host.
        silence: after how many seconds without a heartbeat the lab is taken for dead.
        restarts: how often it may be started again before its run has failed.
        patience: how long to wait for a CPU while other labs have them all, in seconds.
        report: told, in one text each, what a person should know, such as a restart.

    Attributes:
        job: the one that runs.
        restarted: the reason of each restart, with the last lines of the log.
    """

    def __init__(
        self,
        *,
        memory: str = "3G",
        append: str = "",
        modules: Sequence[str] = (),
        cpu: int | None = None,
        shares: Sequence[str | Path] = (),
        silence: float = 30,
        restarts: int = 2,
        patience: float = 900,
        report: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
    ) -> None:
        self.memory = memory
        self.append = append
        self.modules = tuple(modules)
        self.shares = tuple(Path(share).resolve(strict=True) for share in shares)
        self.silence = silence
        self.patience = patience
        self.report = report
        self.job: Job | None = None
        self.restarted: list[str] = []
        self.restarts = restarts
        self._wanted = cpu
        self._cpu: Cpu | None = None
        self._emulator: Emulator | None = None
        self._died: LabDied | None = None
        self._agent: socket.socket | None = None
        self._incoming = bytearray()
        self._outgoing = bytearray()
        self._ready = False
        self._warm: set[str] = set()
        self._jobs = 0
        self._beat = b""
        self._silent = 0.0
        self._listened = 0.0

    def __enter__(self) -> Lab:
        try:
            self.start()
        except BaseException:
            self.stop()  # or its CPU would be taken for as long as somebody has this object
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """The emulator's process, 0 when there is none."""
        return self._emulator.pid if self._emulator is not None else 0

    @property
    def cpu(self) -> int | None:
        """The host CPU that the lab runs on, None before its start."""
        return None if self._cpu is None else self._cpu.number

    def start(self) -> None:
        """Boot, unless it runs; start a dead lab again.

        Raises:
            LabError: the lab cannot start, or has been started again too often.
        """
        while self._emulator is None:
            if self._died is not None:
                if len(self.restarted) == self.restarts:
                    raise LabError(f"the lab died {self.restarts + 1} times; at last: {self._died}")
                self.restarted.append(str(self._died))
                self.report(f"lab: starting it again: {self._died}")
            with contextlib.suppress(LabDied):
                self._boot()
        self._died = None

    def stop(self) -> None:
        """End the lab and everything in it, and leave nothing behind."""
        self._end()
        if self._cpu is not None:
            self._cpu.release()
            self._cpu = None

    def popen(
        self,
        argv: Sequence[str | os.PathLike[str]],
        *,
        pty: bool = False,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        sink: Callable[[int, bytes], None] | None = None,
    ) -> Job:
        """Start a command and return at once; a context manager that ends it.

        Args:
            argv: the command, sought along the environment's PATH as it is in the lab.
            pty: whether it gets a terminal instead of three pipes.
            env: its environment; None takes this process's.
            cwd: its working directory; None takes this process's.
            sink: called with each piece of output (1 for output, 2 for errors) instead
                of keeping it.

        Raises:
            LabError: another job runs, or the lab cannot start.
        """
        if self.job is not None:
            raise LabError(f"the lab runs {self.job.argv[0]}: one job at a time")
        self.start()
        self._jobs += 1
        self._warm |= _mapped_files()
        environment = os.environ if env is None else env
        start = wire.Start(
            pty,
            os.fsencode(os.getcwd() if cwd is None else cwd),  # noqa: PTH109
            [os.fsencode(argument) for argument in argv],
            [os.fsencode(f"{name}={value}") for name, value in environment.items()],
            [os.fsencode(share) for share in self.shares],
            [_as_it_is_now(path) for path in sorted(self._warm)],
        )
        job = Job(self, self._jobs, [os.fsdecode(argument) for argument in argv], sink)
        self.job = job
        self.send(wire.START, self._jobs, start.pack())
        return job

    def run(
        self,
        argv: Sequence[str | os.PathLike[str]],
        *,
        input: str | bytes | None = None,  # noqa: A002
        timeout: float = 120,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end; in a lab that dies meanwhile, from the beginning again.

        Args:
            argv: the command.
            input: all of its standard input; None is none.
            timeout: for each try, in seconds.
            env: its environment; None takes this process's.
            cwd: its working directory; None takes this process's.

        Raises:
            LabTimeout: it did not end in time, and has been killed.
            LabError: the lab cannot start, or died too often.
        """

        def dialogue(job: Job) -> subprocess.CompletedProcess[str]:
            if input is not None:
                job.write(input)
            job.close_stdin()
            status = job.wait(timeout)
            return subprocess.CompletedProcess(job.argv, status, job.stdout, job.stderr)

        return self.converse(argv, dialogue, env=env, cwd=cwd)

    def converse(
        self,
        argv: Sequence[str | os.PathLike[str]],
        dialogue: Callable[[Job], T],
        *,
        pty: bool = False,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
    ) -> T:
        """Start a command and hand it to a function; both again in a lab that died meanwhile.

        Returns:
            What the function returns. The job is ended then.
        """
        while True:
            with self.popen(argv, pty=pty, env=env, cwd=cwd) as job:
                try:
                    return dialogue(job)
                except LabDied:
                    pass  # `start`, by the next `popen`, counts and reports it

    def send(self, kind: int, job: int, body: bytes = b"") -> None:
        """Send the agent a frame."""
        self._outgoing += wire.frame(kind, job, body)
        self._flush()

    def kill(self, reason: str) -> None:
        """End a lab that is of no more use, and raise LabDied."""
        assert self._emulator is not None
        died = LabDied(reason, self._emulator.log())
        self._end()
        self._died = died
        raise died

    def pump(self, timeout: float, also: Sequence[int] = ()) -> list[int]:
        """Wait for the lab once, at most a moment, and take what it sends.

        Args:
            timeout: in seconds; shortened to the step in which the heart is listened to.
            also: more descriptors to wait for.

        Returns:
            Those of `also` that are ready to read.

        Raises:
            LabDied: it is silent or ended; it has been cleared away.
        """
        if self._agent is None or self._emulator is None:
            raise self._died or LabError("the lab does not run")
        poll = select.poll()
        agent = self._agent.fileno()
        poll.register(agent, select.POLLIN | (select.POLLOUT if self._outgoing else 0))
        for descriptor in also:
            poll.register(descriptor, select.POLLIN)
        ready = dict(poll.poll(max(0, min(timeout, STEP)) * 1000))
        if ready.pop(agent, 0) & ~select.POLLOUT:
            # An emulator that has ended is noticed below.
            with contextlib.suppress(BlockingIOError, ConnectionResetError):
                self._incoming += self._agent.recv(1 << 20)
            for kind, number, body in wire.frames(self._incoming):
                if kind == wire.READY:
                    self._ready = True
                elif self.job is not None and number == self._jobs:
                    job = self.job
                    if kind == wire.EXIT:
                        self.job = None
                    job.receive(kind, body)
        self._flush()
        self._listen()
        return list(ready)

    def _listen(self) -> None:
        """Listen to the heart, and raise LabDied when it has been silent for too long.

        Only time that was spent listening counts: a host that was suspended, or a caller that did
        something else for a while, says nothing about the lab.
        """
        assert self._emulator is not None
        now = time.monotonic()
        passed, self._listened = now - self._listened, now
        beat = self._emulator.heartbeat()
        if beat != self._beat:
            self._beat = beat
            self._silent = 0.0
        else:
            self._silent += min(passed, 4 * STEP)
        status = self._emulator.ended()
        if status is not None and not self._beat:
            log = self._emulator.log()
            self._end()
            raise LabError(f"the lab does not start, its emulator ended with {status}:\n{log}")
        if status is not None:
            self.kill(f"the emulator ended with status {status}")
        # Its kernel's own start has no heart yet, and may share its CPU with other work.
        if self._silent > (self.silence if self._beat else max(self.silence, 60)):
            self.kill(f"silent for {self._silent:.0f} s")

    def _flush(self) -> None:
        if self._outgoing and self._agent is not None:
            with contextlib.suppress(BlockingIOError, BrokenPipeError):
                del self._outgoing[: self._agent.send(self._outgoing)]

    def _boot(self) -> None:
        """Start the emulator and wait until the agent takes jobs."""
        made = outer.make(self.modules)
        if self._cpu is None:
            self._cpu = Cpu.take(self._wanted, self.patience, self.report)
        self._cpu.clear()
        self._beat, self._silent, self._listened = b"", 0.0, time.monotonic()
        self._ready = False
        self._incoming.clear()
        self._outgoing.clear()
        self._agent, theirs = socket.socketpair()
        self._agent.setblocking(False)
        with theirs:
            self._emulator = Emulator(
                made,
                self._cpu,
                theirs,
                command=_agent_command(),
                memory=self.memory,
                append=self.append,
                shares=self.shares,
            )
        while not self._ready:
            self.pump(STEP)

    def _end(self) -> None:
        """End the emulator, whatever state it is in."""
        emulator, self._emulator = self._emulator, None
        agent, self._agent = self._agent, None
        self.job = None
        if agent is not None:
            agent.close()
        if emulator is not None:
            emulator.end()


def _mapped_files() -> set[str]:
    """The programs and libraries of this process, which jobs will most likely use as well."""
    mapped = set()
    for line in os.fsdecode(Path("/proc/self/maps").read_bytes()).splitlines():
        _, rights, _, _, _, *path = line.split(maxsplit=5)
        if path and "x" in rights and path[0].startswith("/"):
            mapped.add(path[0])
    return mapped


def _as_it_is_now(path: str) -> bytes:
    """A file by its size and time, as the agent expects it; of size -1 where there is none."""
    try:
        status = Path(path).stat()
    except OSError:
        return os.fsencode(f"-1:0:{path}")
    return os.fsencode(f"{status.st_size}:{status.st_mtime_ns}:{path}")


def _agent_command() -> str:
    """The shell words that start the agent on this process's own interpreter."""
    import compileall
    import shlex

    rooms = Path(__file__).parent
    for room in ("__init__.py", "wire.py", "agent.py"):
        compileall.compile_file(rooms / room, quiet=2)  # inside, that would take a second
    code = (
        f"import sys; sys.path.insert(0, {str(rooms.parent)!r}); from lab.agent import main; main()"
    )
    return shlex.join([sys.executable, "-E", "-s", "-S", "-c", code])
