"""The I/O thread: one epoll loop for kicks, timers, terminals and other threads' requests.

Callbacks run on the loop's thread, one at a time. They must not block: a device's request that
takes long belongs to a backend of its own. Other threads reach the loop through `call_soon`, and
`call_within`, the only methods that are safe from anywhere.
"""

from __future__ import annotations

import os
import select
import threading
import time
from contextlib import contextmanager

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["HANGUP", "ONESHOT", "READ", "WRITE", "Loop"]

READ = select.EPOLLIN
WRITE = select.EPOLLOUT
HANGUP = select.EPOLLHUP  # comes unasked too
ONESHOT = select.EPOLLONESHOT  # with the others: no further call before `modify`

_NEVER = float("inf")


class Loop:
    """An epoll loop on a thread of its own.

    `failed` is called with an exception that a callback let out, and the loop goes on: one broken
    backend must not silence the others. The owner decides what becomes of the machine.
    """

    def __init__(self, failed: Callable[[BaseException], None]) -> None:
        self._epoll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._callbacks: dict[int, Callable[[int], None]] = {}
        self._added: set[int] = set()  # in this turn
        self._soon: list[Callable[[], None]] = []
        self._timers: list[tuple[float, Callable[[], None]]] = []
        self._lazy: list[Callable[[], None]] = []
        self._latest = _NEVER  # when they have to be called
        self._asleep_until = 0.0  # 0: not asleep, and looks at all of this before it sleeps again
        # Re-entrant: a signal handler may call `call_soon` while its own thread does so.
        self._lock = threading.RLock()
        self._failed = failed
        self._stopping = False
        self._closed = False
        self._thread: threading.Thread | None = None
        self._started = threading.Event()
        self._epoll.register(self._wake, READ)

    def stand_by(self) -> None:
        """Have the thread ready for `start`; until then the loop counts as not started."""
        self._thread = threading.Thread(target=self._run, name="io", daemon=True)
        self._thread.start()

    def start(self) -> None:
        """Let the thread run, and start it unless it stands by. A loop is started once."""
        if self._thread is None:
            self.stand_by()
        self._started.set()

    def stop(self) -> None:
        """End the thread after what it is doing now, and close what the loop owns. Idempotent."""
        if self._closed:
            return
        self._stopping = True
        self._started.set()
        os.eventfd_write(self._wake, 1)
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        with self._lock:
            self._closed = True
            self._epoll.close()
            os.close(self._wake)

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Run `callback` on the loop's thread; safe from any thread, a no-op after `stop`."""
        with self._lock:
            if self._closed:
                return
            self._soon.append(callback)
            if len(self._soon) == 1:
                os.eventfd_write(self._wake, 1)

    def call_within(self, seconds: float, callback: Callable[[], None]) -> None:
        """Run `callback` on the loop's thread when it is awake next, after `seconds` at the latest.

        For what is many times: it costs no switch of threads of its own. Safe from any thread, a
        no-op after `stop`.
        """
        with self._lock:
            if self._closed:
                return
            self._lazy.append(callback)
            self._latest = min(self._latest, time.monotonic() + seconds)
            if self._asleep_until > self._latest:
                self._asleep_until = 0.0
                os.eventfd_write(self._wake, 1)

    def call(self, callback: Callable[[], None]) -> None:
        """Run `callback` on the loop's thread and wait for its end; from another thread.

        Raises:
            RuntimeError: the loop does not run.
            Exception: what the callback raises.
        """
        done = threading.Event()
        errors: list[BaseException] = []

        def run() -> None:
            try:
                callback()
            except BaseException as error:
                errors.append(error)
            finally:
                done.set()

        thread = self._thread
        if self._closed or thread is None or not self._started.is_set():
            raise RuntimeError("the I/O loop does not run")
        self.call_soon(run)
        while not done.wait(1):
            if not thread.is_alive():
                raise RuntimeError("the I/O loop has ended")
        if errors:
            raise errors[0]

    @contextmanager
    def hold(self) -> Iterator[Callable[[Callable[[], None]], None]]:
        """Nothing runs on the loop's thread while the block does; from another thread.

        Gives a function that takes what the loop is to do first when it goes on.

        Raises:
            RuntimeError: the loop does not run.
        """
        held, release = threading.Event(), threading.Event()
        then: list[Callable[[], None]] = []

        def stand_still() -> None:
            held.set()
            release.wait()
            for callback in then:
                callback()

        thread = self._thread
        if self._closed or thread is None or not self._started.is_set():
            raise RuntimeError("the I/O loop does not run")
        self.call_soon(stand_still)
        try:
            while not held.wait(1):
                if not thread.is_alive():
                    raise RuntimeError("the I/O loop has ended")
            yield then.append
        finally:
            release.set()

    def call_later(self, seconds: float, callback: Callable[[], None]) -> None:
        """Run `callback` after `seconds`. Only from the loop's own thread."""
        self._timers.append((time.monotonic() + seconds, callback))

    def add(self, fd: int, events: int, callback: Callable[[int], None]) -> None:
        """Call `callback(events)` whenever `fd` is ready. Before `start`, or from the loop."""
        self._callbacks[fd] = callback
        self._added.add(fd)
        self._epoll.register(fd, events)

    def modify(self, fd: int, events: int) -> None:
        """Wait for other events of `fd`; 0 waits for none but errors and hang-ups."""
        self._epoll.modify(fd, events)

    def remove(self, fd: int) -> None:
        """Forget `fd`; on the loop, or when it does not run. The caller closes the descriptor."""
        if self._callbacks.pop(fd, None) is not None and not self._closed:
            self._epoll.unregister(fd)

    def turn(self, seconds: float | None = None) -> None:
        """Wait for something, at most so long, and call who waits for it: one turn of `start`.

        For an owner who has not started the loop and turns it on a thread of its own.
        """
        self._added.clear()
        ready = self._epoll.poll(self._fall_asleep(seconds))
        self._asleep_until = 0.0
        for fd, events in ready:
            if fd == self._wake:
                self._run_soon()
            elif fd in self._added:  # another descriptor had the number; this one is told next time
                continue
            elif callback := self._callbacks.get(fd):
                self._call(callback, events)
        self._run_timers()
        if self._lazy:
            self._run_lazy()

    def _run(self) -> None:
        self._started.wait()
        while not self._stopping:
            self.turn()

    def _run_soon(self) -> None:
        with self._lock:
            os.eventfd_read(self._wake)
            callbacks, self._soon = self._soon, []
        for callback in callbacks:
            self._call(callback)

    def _run_lazy(self) -> None:
        with self._lock:
            callbacks, self._lazy, self._latest = self._lazy, [], _NEVER
        for callback in callbacks:
            self._call(callback)

    def _fall_asleep(self, seconds: float | None) -> float | None:
        """For how long, at most so many seconds; who calls `call_within` from now on looks."""
        with self._lock:
            until = min(self._latest, min((when for when, _ in self._timers), default=_NEVER))
            now = time.monotonic()
            if seconds is not None:
                until = min(until, now + seconds)
            self._asleep_until = until
        return None if until == _NEVER else max(0.0, until - now)

    def _run_timers(self) -> None:
        if not self._timers:
            return
        now = time.monotonic()
        due = [callback for when, callback in self._timers if when <= now]
        self._timers = [timer for timer in self._timers if timer[0] > now]
        for callback in due:
            self._call(callback)

    def _call(self, callback: Callable[..., None], *arguments: int) -> None:
        try:
            callback(*arguments)
        except BaseException as error:
            self._failed(error)
