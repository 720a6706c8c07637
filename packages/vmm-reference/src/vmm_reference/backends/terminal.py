"""The user's terminal while a guest's console is on it.

Raw mode hands every key to the guest; two keys after Ctrl-A are the VMM's own. Whatever ends the
VMM, the terminal comes back as it was: on a return, an exception and a catchable signal by the
context manager, after SIGKILL by a small process that waits for the VMM to be gone.
"""

from __future__ import annotations

import os
import signal
import termios
from contextlib import suppress

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

__all__ = ["Escape", "RawTerminal"]

_CTRL_A = 0x01


class Escape:
    r"""Finds Ctrl-A sequences in what the user types: `x` leaves, `a` sends a Ctrl-A itself.

    Example:
        >>> left = []
        >>> keys = Escape(lambda: left.append("left"))
        >>> keys.filter(b"ls" + bytes([1])), keys.filter(b"axyz"), left
        (b'ls', b'\x01xyz', [])
        >>> keys.filter(bytes([1]) + b"x"), left
        (b'', ['left'])
    """

    def __init__(self, leave: Callable[[], None]) -> None:
        self._leave = leave
        self._escaped = False

    def filter(self, data: bytes) -> bytes:
        """What of `data` is the guest's; calls `leave` for Ctrl-A x; others are swallowed."""
        if not self._escaped and _CTRL_A not in data:
            return data
        result = bytearray()
        for byte in data:
            if self._escaped:
                self._escaped = False
                if byte == ord("x"):
                    self._leave()
                elif byte in (ord("a"), _CTRL_A):
                    result.append(_CTRL_A)
            elif byte == _CTRL_A:
                self._escaped = True
            else:
                result.append(byte)
        return bytes(result)


class RawTerminal:
    """A terminal in raw mode, for as long as the context lasts.

    Enter it before any thread is started: the watcher is a fork.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._saved = termios.tcgetattr(fd)
        self._pipe = -1
        self._watcher = 0

    def __enter__(self) -> RawTerminal:
        self._watch()
        self.set_raw()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.restore()
        os.write(self._pipe, b"x")  # the watcher has nothing to do
        os.close(self._pipe)
        os.waitpid(self._watcher, 0)

    def set_raw(self) -> None:
        """Put the terminal into raw mode; again after SIGCONT, when a shell has changed it."""
        mode = termios.tcgetattr(self._fd)
        iflag, oflag, cflag, lflag = mode[:4]
        iflag &= ~(
            termios.BRKINT | termios.ICRNL | termios.INLCR | termios.IGNCR
            | termios.INPCK | termios.ISTRIP | termios.IXON
        )  # fmt: skip
        lflag &= ~(termios.ECHO | termios.ICANON | termios.IEXTEN | termios.ISIG)
        cflag = cflag & ~(termios.CSIZE | termios.PARENB) | termios.CS8
        termios.tcsetattr(
            self._fd, termios.TCSADRAIN, [iflag, oflag & ~termios.OPOST, cflag, lflag, *mode[4:]]
        )

    def restore(self) -> None:
        """Give the terminal back as it was found."""
        _set(self._fd, self._saved)

    def _watch(self) -> None:
        """Fork the process that restores the terminal if this one is killed."""
        reader, self._pipe = os.pipe()
        self._watcher = os.fork()
        if self._watcher == 0:
            try:
                self._wait_for_death(reader)
            finally:
                os._exit(0)
        os.close(reader)

    def _wait_for_death(self, reader: int) -> None:
        # A session of its own: no signal of the terminal reaches it, and it may set the mode.
        os.setsid()
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        low = 0
        for fd in sorted({reader, self._fd}):
            if low < fd:
                os.closerange(low, fd)
            low = fd + 1
        os.closerange(low, os.sysconf("SC_OPEN_MAX"))
        if not os.read(reader, 1):
            _set(self._fd, self._saved)


def _set(fd: int, mode: list[int | list[bytes | int]]) -> None:
    with suppress(termios.error):  # the terminal is gone, and with it the need
        termios.tcsetattr(fd, termios.TCSANOW, mode)
