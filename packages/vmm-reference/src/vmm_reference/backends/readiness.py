"""Waiting for a descriptor on the I/O loop, once for each time it is asked for.

A device takes from its backend as long as there is something, and only then has to hear of more.
So a descriptor that nobody asks about costs nothing, however busy it is, and one that has hung up
does not call without end.
"""

from __future__ import annotations

from vmm_reference.loop import HANGUP, ONESHOT, READ, WRITE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm_reference.loop import Loop

__all__ = ["Readiness"]


class Readiness:
    """Calls `readable` or `writable`, on the loop's thread, once after each `wait`.

    A descriptor that has hung up counts as ready: who reads or writes then, learns why.

    Args:
        loop: not started yet, or this is its thread.
        fd: non-blocking; it belongs to the caller, who calls `close` before closing it.
        readable: called after `wait(READ)`.
        writable: called after `wait(WRITE)`.
    """

    def __init__(
        self,
        loop: Loop,
        fd: int,
        readable: Callable[[], object] = lambda: None,
        writable: Callable[[], object] = lambda: None,
    ) -> None:
        self._loop = loop
        self._fd = fd
        self._readable = readable
        self._writable = writable
        self._wanted = 0
        loop.add(fd, ONESHOT, self._fired)

    def wait(self, events: int) -> None:
        """Call back when one of `events` is there: READ, WRITE, or HANGUP, which is read too."""
        if events & ~self._wanted:
            self._wanted |= events
            self._loop.modify(self._fd, self._wanted | ONESHOT)

    def close(self) -> None:
        """Call nobody any more."""
        self._loop.remove(self._fd)

    def _fired(self, events: int) -> None:
        ready = self._wanted if events & ~(READ | WRITE) else self._wanted & events
        self._wanted &= ~ready
        if self._wanted:
            self._loop.modify(self._fd, self._wanted | ONESHOT)
        if ready & (READ | HANGUP):
            self._readable()
        if ready & WRITE:
            self._writable()
