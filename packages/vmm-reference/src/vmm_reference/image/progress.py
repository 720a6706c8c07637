"""Tells a waiting person what is going on."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

__all__ = ["Progress"]

_PATIENCE = 2.0  # seconds of silence that need no explanation
_TERMINAL_EVERY = 0.2
_PLAIN_EVERY = 10.0


class Progress:
    """Reports on a long task: one line rewritten on a terminal, sparse lines elsewhere.

    Nothing is printed by a task that ends within two seconds.

    Args:
        task: what is done, such as "unpacking linux-image-6.1".
        total: the amount of work, 0 where it is not known.
        unit: of the work, such as "MB".
        stream: where to print; standard error if None.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        task: str,
        total: float = 0,
        unit: str = "",
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._task = task
        self._total = total
        self._unit = unit
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._start = clock()
        self._next = self._start + _PATIENCE
        self._printed = False

    def update(self, done: float = 0) -> None:
        """Say how much of the work is done, if it is time to say anything."""
        now = self._clock()
        if now < self._next:
            return
        terminal = self._stream.isatty()
        self._next = now + (_TERMINAL_EVERY if terminal else _PLAIN_EVERY)
        text = f"{self._task}: {self._amount(done)}{now - self._start:.0f} s"
        self._stream.write(f"\r{text}\033[K" if terminal else f"{text}\n")
        self._stream.flush()
        self._printed = True

    def end(self) -> None:
        """Leave a clean line behind; call it also when the task has failed."""
        if self._printed and self._stream.isatty():
            self._stream.write("\r\033[K")
            self._stream.flush()

    def _amount(self, done: float) -> str:
        if self._total:
            return f"{done:.0f} of {self._total:.0f} {self._unit}, "
        return ""
