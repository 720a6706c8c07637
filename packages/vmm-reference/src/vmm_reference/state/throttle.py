"""Slowing vCPUs down, so that memory is sent faster than it is written."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from vmm_reference.board import Board

__all__ = ["Throttle"]

_PERIOD = 0.05
_FIRST, _STEP, _MOST = 20, 10, 99


class Throttle:
    """Takes a share of the time from all vCPUs; usable as a context manager that gives it back.

    Attributes:
        percent: 0 to 99.
    """

    def __init__(self, board: Board) -> None:
        self._board = board
        self.percent = 0
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def more(self) -> None:
        """Take more: 20 per cent at first, then 10 more each time, 99 at most."""
        self.percent = min(self.percent + _STEP if self.percent else _FIRST, _MOST)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="throttle", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Give it all back. Idempotent."""
        self._end.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _run(self) -> None:
        while not self._end.is_set():
            self._board.park()
            self._end.wait(_PERIOD * self.percent / 100)
            self._board.unpark()
            self._end.wait(_PERIOD * (100 - self.percent) / 100)
