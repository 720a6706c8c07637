"""The lab's interface on the host itself, for machines whose KVM needs no lab."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import time
from typing import TYPE_CHECKING, TypeVar

from lab.errors import LabError, LabTimeout

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = ["Direct", "DirectJob"]

T = TypeVar("T")


class DirectJob:
    """A command on the host, with the methods of `lab.lab.Job` that tests use."""

    def __init__(
        self,
        argv: list[str],
        *,
        terminal: bool,
        env: Mapping[str, str] | None,
        cwd: str | os.PathLike[str] | None,
    ) -> None:
        self.argv = argv
        self._output = bytearray()
        self._searched = 0
        if terminal:
            self._near, far = pty.openpty()
            self._process = subprocess.Popen(
                argv, stdin=far, stdout=far, stderr=far, env=env, cwd=cwd, start_new_session=True
            )
            os.close(far)
            self._input = self._near
        else:
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=env,
                cwd=cwd,
            )
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            self._near = self._process.stdout.fileno()
            self._input = self._process.stdin.fileno()

    @property
    def returncode(self) -> int | None:
        """None until it has ended; 128 + n after signal n, as shells count."""
        status = self._process.poll()
        return status if status is None or status >= 0 else 128 - status

    @property
    def stdout(self) -> str:
        """All it has written so far."""
        return self._output.decode(errors="replace")

    def read_until(self, pattern: str, timeout: float = 60) -> str:
        """Wait until it writes what a regular expression describes, and return up to there.

        Raises:
            LabTimeout: it did not in time, in seconds.
            LabError: it ended without.
        """
        expression = re.compile(pattern.encode())
        deadline = time.monotonic() + timeout
        while (match := expression.search(self._output, self._searched)) is None:
            if not self._read(deadline):
                raise LabError(f"{self.argv[0]} ended before it wrote {pattern!r}:\n{self.stdout}")
            if time.monotonic() > deadline:
                what = f"{self.argv[0]} did not write {pattern!r} within {timeout} s"
                raise LabTimeout(what, self.stdout)
        text = self._output[self._searched : match.end()].decode(errors="replace")
        self._searched = match.end()
        return text

    def write(self, data: str | bytes) -> None:
        """Give it input."""
        os.write(self._input, data.encode() if isinstance(data, str) else data)

    def close_stdin(self) -> None:
        """End its input."""
        if self._process.stdin is not None:
            self._process.stdin.close()

    def send_signal(self, number: int) -> None:
        """Send the command a signal."""
        self._process.send_signal(number)

    def wait(self, timeout: float = 60) -> int:
        """Wait for its end, in seconds, and return its status.

        Raises:
            LabTimeout: it did not end in time. It runs on.
        """
        deadline = time.monotonic() + timeout
        while self._read(deadline):
            if time.monotonic() > deadline:
                raise LabTimeout(f"{self.argv[0]} did not end within {timeout} s", self.stdout)
        self._process.wait()
        assert self.returncode is not None
        return self.returncode

    def close(self) -> None:
        """End it, if it has not ended."""
        self._process.kill()
        self._process.wait()
        if self._process.stdout is None:
            os.close(self._near)
        else:
            self._process.stdout.close()
        self.close_stdin()

    def __enter__(self) -> DirectJob:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, deadline: float) -> bool:
        """Take what it has written; False once it will write no more."""
        left = max(0.0, min(deadline - time.monotonic(), 1.0))
        if not select.select([self._near], [], [], left)[0]:
            return True
        try:
            data = os.read(self._near, 1 << 16)
        except OSError:  # a terminal whose other end is closed
            data = b""
        self._output += data
        return bool(data)


class Direct:
    """Runs commands on this host, as `lab.lab.Lab` runs them in a lab."""

    def popen(
        self,
        argv: Sequence[str | os.PathLike[str]],
        *,
        pty: bool = False,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
    ) -> DirectJob:
        """Start a command and return at once; a context manager that ends it."""
        return DirectJob([os.fspath(word) for word in argv], terminal=pty, env=env, cwd=cwd)

    def run(
        self,
        argv: Sequence[str | os.PathLike[str]],
        *,
        input: str | bytes | None = None,  # noqa: A002 - as subprocess.run calls it
        timeout: float = 120,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        text = input.decode() if isinstance(input, bytes) else input
        return subprocess.run(
            [os.fspath(word) for word in argv],
            input=text or "",
            capture_output=True,
            text=True,
            timeout=timeout,
            env=env,
            cwd=cwd,
            check=False,
        )

    def converse(
        self,
        argv: Sequence[str | os.PathLike[str]],
        dialogue: Callable[[DirectJob], T],
        *,
        pty: bool = False,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
    ) -> T:
        """Start a command and hand it to a function."""
        with self.popen(argv, pty=pty, env=env, cwd=cwd) as job:
            return dialogue(job)
