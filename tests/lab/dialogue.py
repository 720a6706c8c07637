"""A command that runs, as the one who talks to it sees it."""

from __future__ import annotations

import re
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from lab.errors import LabError, LabTimeout

if TYPE_CHECKING:
    from typing import Self

__all__ = ["STDERR", "STDOUT", "Dialogue"]

STDOUT, STDERR = 1, 2


class Dialogue(ABC):
    """A command with its input, and all it has written; in a lab or on this host.

    A context manager that ends it.

    Attributes:
        argv: the command.
        returncode: None until it has ended; 128 + n after signal n, as shells count.
    """

    def __init__(self, argv: list[str]) -> None:
        self.argv = argv
        self.returncode: int | None = None
        self._written = {STDOUT: bytearray(), STDERR: bytearray()}
        self._searched = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def stdout(self) -> str:
        """All it has written to its standard output, or to its terminal, so far."""
        return self._written[STDOUT].decode(errors="replace")

    @property
    def stderr(self) -> str:
        """All it has written to its standard error so far."""
        return self._written[STDERR].decode(errors="replace")

    def read_until(self, pattern: str, timeout: float = 60) -> str:
        """Wait until it writes what a regular expression describes.

        Returns:
            What it wrote to its standard output since the last call, up to the end of the match.

        Raises:
            LabTimeout: it did not in time, in seconds.
            LabError: it ended without.
            LabDied: the lab died meanwhile.
        """
        expression = re.compile(pattern.encode(), re.MULTILINE)
        written = self._written[STDOUT]
        deadline = time.monotonic() + timeout
        while True:
            match = expression.search(written, self._searched)
            if match is not None:
                text = written[self._searched : match.end()].decode(errors="replace")
                self._searched = match.end()
                return text
            if self.returncode is not None:
                raise LabError(
                    f"{self.argv[0]} ended with status {self.returncode} before it wrote "
                    f"{pattern!r}; its output ends with:\n{self._tail()}"
                )
            self._wait_more(deadline, f"did not write {pattern!r} within {timeout} s")

    def wait(self, timeout: float = 60) -> int:
        """Wait for its end, in seconds, and return its status.

        Raises:
            LabTimeout: it did not end in time. It runs on.
            LabDied: the lab died meanwhile.
        """
        deadline = time.monotonic() + timeout
        while self.returncode is None:
            self._wait_more(deadline, f"did not end within {timeout} s")
        return self.returncode

    @abstractmethod
    def write(self, data: str | bytes) -> None:
        """Give it input; does not wait until it is taken."""

    @abstractmethod
    def close_stdin(self) -> None:
        """End its input; on a terminal, what was typed so far is ended by the caller's Ctrl-D."""

    @abstractmethod
    def send_signal(self, number: int) -> None:
        """Send the command a signal; SIGKILL ends all that it has started as well."""

    @abstractmethod
    def resize(self, rows: int, columns: int) -> None:
        """Tell it the size of its terminal."""

    @abstractmethod
    def close(self) -> None:
        """End it, if it has not ended, together with all that it has started."""

    @abstractmethod
    def _pump(self, timeout: float) -> None:
        """Wait once, for at most so many seconds, and take what it has written."""

    def _wait_more(self, deadline: float, complaint: str) -> None:
        rest = deadline - time.monotonic()
        if rest <= 0:
            raise LabTimeout(f"{self.argv[0]} {complaint}", self._tail())
        self._pump(rest)

    def _tail(self) -> str:
        return self.stdout[-3000:] + self.stderr[-3000:]
