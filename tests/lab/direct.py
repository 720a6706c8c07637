"""The same as a lab, on a host whose own KVM runs unmodified kernels: commands run right here."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import subprocess
import termios
from typing import TYPE_CHECKING, TypeVar

from lab import wire
from lab.dialogue import STDERR, STDOUT, Dialogue
from lab.errors import LabError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = ["Direct", "Process"]

T = TypeVar("T")


class Process(Dialogue):
    """A command that runs on this host: made by `Direct.popen`."""

    def __init__(
        self,
        argv: Sequence[str | os.PathLike[str]],
        pty: bool,
        env: Mapping[str, str] | None,
        cwd: str | os.PathLike[str] | None,
    ) -> None:
        super().__init__([os.fspath(argument) for argument in argv])
        self._input = bytearray()
        self._closing = False
        self._terminal = -1
        if pty:
            self._terminal, inner = os.openpty()
            ends = (inner, inner, inner)
            self._stdin = self._terminal
            self._outputs = {self._terminal: STDOUT}
        else:
            (stdin, self._stdin), (out, stdout), (err, stderr) = os.pipe(), os.pipe(), os.pipe()
            ends = (stdin, stdout, stderr)
            self._outputs = {out: STDOUT, err: STDERR}
        try:
            # A session of its own, so that all of it can be ended; the first terminal that its
            # leader opens becomes its own, which Popen leaves to a shell.
            command = ["sh", "-c", f'exec "$@" <{os.ttyname(inner)}', "sh"] if pty else []
            self._process = subprocess.Popen(
                [*command, *self.argv],
                stdin=ends[0],
                stdout=ends[1],
                stderr=ends[2],
                env=env,
                cwd=cwd,
                start_new_session=True,
            )
        except OSError:
            for end in {self._stdin, *self._outputs}:
                os.close(end)
            raise
        finally:
            for end in {*ends}:
                os.close(end)
        for end in {self._stdin, *self._outputs}:
            os.set_blocking(end, False)

    def write(self, data: str | bytes) -> None:
        if self._closing:
            raise LabError(f"the input of {self.argv[0]} is closed already")
        self._input += data.encode() if isinstance(data, str) else data
        self._feed()

    def close_stdin(self) -> None:
        self._closing = True
        self._feed()

    def send_signal(self, number: int) -> None:
        if number == signal.SIGKILL:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
        else:
            self._process.send_signal(number)

    def resize(self, rows: int, columns: int) -> None:
        if self._terminal >= 0:
            size = wire.WINDOW.pack(rows, columns) + bytes(4)
            fcntl.ioctl(self._terminal, termios.TIOCSWINSZ, size)

    def close(self) -> None:
        self.send_signal(signal.SIGKILL)
        self._process.wait()
        for end in {self._stdin, self._terminal, *self._outputs} - {-1}:
            os.close(end)
        self._outputs.clear()
        self._stdin = self._terminal = -1

    def _pump(self, timeout: float) -> None:
        poll = select.poll()
        for end in self._outputs:
            poll.register(end, select.POLLIN)
        if self._input and self._stdin >= 0:
            both = select.POLLOUT | (select.POLLIN if self._stdin in self._outputs else 0)
            poll.register(self._stdin, both)
        for end, _ in poll.poll(min(timeout, 0.25) * 1000):
            if end in self._outputs:
                self._drain(end)
        self._feed()
        # What it has started may hold its outputs open for ever: its own end is what counts.
        status = self._process.poll()
        if status is not None:
            while self._outputs and select.select([*self._outputs], [], [], 0)[0]:
                for end in select.select([*self._outputs], [], [], 0)[0]:
                    self._drain(end)
            self.returncode = status if status >= 0 else 128 - status

    def _drain(self, end: int) -> None:
        try:
            data = os.read(end, 1 << 16)
        except BlockingIOError:
            return
        except OSError:  # how a pseudo-terminal says that nobody has it open any more
            data = b""
        self._written[self._outputs[end]] += data
        if not data:
            del self._outputs[end]
            if end != self._terminal:
                os.close(end)

    def _feed(self) -> None:
        if self._stdin < 0:
            return
        try:
            while self._input:
                del self._input[: os.write(self._stdin, self._input[: 1 << 16])]
        except BlockingIOError:
            return
        except OSError:  # nobody reads it any more
            self._input.clear()
        if self._closing and self._stdin != self._terminal:
            os.close(self._stdin)
            self._stdin = -1


class Direct:
    """Runs commands on this host, with the methods of a `Lab`."""

    def popen(
        self,
        argv: Sequence[str | os.PathLike[str]],
        *,
        pty: bool = False,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
    ) -> Process:
        """As `Lab.popen`."""
        return Process(argv, pty, env, cwd)

    def run(
        self,
        argv: Sequence[str | os.PathLike[str]],
        *,
        input: str | bytes | None = None,  # noqa: A002
        timeout: float = 120,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """As `Lab.run`."""

        def dialogue(process: Dialogue) -> subprocess.CompletedProcess[str]:
            if input is not None:
                process.write(input)
            process.close_stdin()
            status = process.wait(timeout)
            return subprocess.CompletedProcess(process.argv, status, process.stdout, process.stderr)

        return self.converse(argv, dialogue, env=env, cwd=cwd)

    def converse(
        self,
        argv: Sequence[str | os.PathLike[str]],
        dialogue: Callable[[Dialogue], T],
        *,
        pty: bool = False,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
    ) -> T:
        """As `Lab.converse`."""
        with self.popen(argv, pty=pty, env=env, cwd=cwd) as process:
            return dialogue(process)
