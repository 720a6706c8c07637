"""What the ports of a console device are on the host: files, terminals, Unix sockets.

Each takes the guest's bytes by `send`, says by `written` when they are gone, and offers what comes
the other way to `receive`, which says how much the guest took; `more` has it offered again.
"""

from __future__ import annotations

import os
import socket
import termios
import tty
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from vmm_reference.errors import HostError
from vmm_reference.loop import READ

from .datagram import bind_unix
from .readiness import Readiness
from .stream import StreamInput, StreamOutput

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm_reference.loop import Loop

__all__ = ["FilePort", "GuestSide", "PtyPort", "SocketPort", "TtyPort"]

_HISTORY = 64 << 10  # bytes of output that somebody who connects late still gets


class GuestSide(NamedTuple):
    """What a port meets of the guest.

    Attributes:
        loop: where the port is served.
        path: of what it is on the host, or of a link to make to it.
        receive: takes what comes from the host; returns how much the guest took.
        written: told how much of the guest's output is gone.
        opened: told when a client comes and goes.
    """

    loop: Loop
    path: str
    receive: Callable[[bytes], int]
    written: Callable[[int], None]
    opened: Callable[[bool], None]


class FilePort:
    """Output to a file, at its end; no input. A named pipe may stand in for a file.

    Attributes:
        output: what writes to it.

    Raises:
        HostError: the file can't be written.
    """

    is_open = True

    def __init__(self, guest: GuestSide) -> None:
        # For reading too: a named pipe is opened without waiting for a reader.
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
        self._fd = _open(guest.path, flags)
        self.output = StreamOutput(guest.loop, self._fd, guest.written)
        self.send = self.output.send

    def more(self) -> None:
        """There is no input."""

    def close(self) -> None:
        """Write what is left, and close the file."""
        self.output.drain(1.0)
        self.output.abandon()
        os.close(self._fd)


class TtyPort:
    """A terminal of the host, such as /dev/tty, in raw mode.

    Attributes:
        size: columns and rows.
        output: what writes to it.

    Raises:
        HostError: it can't be opened, or is no terminal.
    """

    is_open = True

    def __init__(self, guest: GuestSide) -> None:
        path = guest.path
        self._fd = _open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        try:
            self._mode = termios.tcgetattr(self._fd)
        except termios.error:
            os.close(self._fd)
            raise HostError(f"tty {path}", "is no terminal", "use file: or socket:") from None
        self.size = tuple(os.get_terminal_size(self._fd))
        tty.setraw(self._fd, termios.TCSANOW)
        self._serve(guest)

    def _serve(self, guest: GuestSide) -> None:
        self.output = StreamOutput(guest.loop, self._fd, guest.written)
        self._input_fd = os.dup(self._fd)  # the loop knows a descriptor once only
        self._input = StreamInput(guest.loop, self._input_fd, guest.receive)
        self._input.start()
        self.send, self.more = self.output.send, self._input.more

    def close(self) -> None:
        """Give the terminal back as it was."""
        self._input.stop()
        self.output.drain(1.0)
        self.output.abandon()
        with suppress(termios.error):
            termios.tcsetattr(self._fd, termios.TCSANOW, self._mode)
        os.close(self._input_fd)
        os.close(self._fd)


class PtyPort(TtyPort):
    """A terminal of its own, for `screen` and its like; the path is of a link to it, or empty.

    Attributes:
        path: of the terminal.
    """

    def __init__(self, guest: GuestSide) -> None:
        # This end keeps the other open, so that a program that leaves hangs up nothing.
        master, self._slave = os.openpty()
        os.set_blocking(master, False)
        path = guest.path
        self._fd, self._link = master, path
        self.path = os.ttyname(self._slave)
        tty.setraw(self._slave, termios.TCSANOW)
        if path:
            try:
                os.symlink(self.path, path)  # noqa: PTH211
            except OSError as error:
                os.close(master)
                os.close(self._slave)
                cause = error.strerror or str(error)
                raise HostError(f"pty {path}", cause, "choose another path") from None
        self.size = (0, 0)
        self._serve(guest)

    def close(self) -> None:
        """The terminal is gone, and the link to it."""
        self._input.stop()
        self.output.abandon()
        for fd in (self._input_fd, self._fd, self._slave):
            os.close(fd)
        if self._link:
            with suppress(OSError):
                os.unlink(self._link)  # noqa: PTH108


class SocketPort:
    """A Unix socket, on which one client at a time is connected.

    The end of what was sent while nobody was there is kept for who comes next.

    Attributes:
        output: nobody may write past what is kept.

    Raises:
        HostError: the socket can't be made.
    """

    is_open = False
    output = None

    def __init__(self, guest: GuestSide) -> None:
        self._loop, self._path, self._receive, self._written, self._opened = guest
        self._history = bytearray()
        self._client: socket.socket | None = None
        self._output: StreamOutput | None = None
        self._input: StreamInput | None = None
        self._duplicate = -1
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            bind_unix(self._listener, self._path)
        except BaseException:
            self._listener.close()
            raise
        self._listener.listen(1)
        self._readiness = Readiness(self._loop, self._listener.fileno(), self._accept)
        self._readiness.wait(READ)

    def send(self, data: bytes) -> None:
        """Send to the client, or keep for the next."""
        if self._output is not None:
            self._output.send(data)
            return
        self._history += data
        del self._history[:-_HISTORY]
        self._loop.call_soon(lambda: self._written(len(data)))

    def more(self) -> None:
        """The guest takes input again."""
        if self._input is not None:
            self._input.more()

    def close(self) -> None:
        """Let the client go, and remove the socket."""
        if self._output is not None:
            self._output.drain(1.0)
        self._hang_up()
        self._readiness.close()
        self._listener.close()
        with suppress(FileNotFoundError):
            os.unlink(self._path)  # noqa: PTH108

    def _accept(self) -> None:
        try:
            client, _ = self._listener.accept()
        except OSError:
            self._readiness.wait(READ)
            return
        client.setblocking(False)
        self._client = client
        self._duplicate = os.dup(client.fileno())
        kept, self._history = bytes(self._history), bytearray()
        late = len(kept)

        def gone(count: int) -> None:
            """What was kept was counted as gone already."""
            nonlocal late
            kept_gone = min(late, count)
            late -= kept_gone
            if count > kept_gone:
                self._written(count - kept_gone)

        self._output = StreamOutput(self._loop, client.fileno(), gone)
        if kept:
            self._output.send(kept)
        self._input = StreamInput(self._loop, self._duplicate, self._receive, self._left)
        self._input.start()
        self._opened(True)

    def _left(self) -> None:
        self._hang_up()
        self._opened(False)
        self._readiness.wait(READ)

    def _hang_up(self) -> None:
        if self._client is None or self._output is None or self._input is None:
            return
        self._input.stop()
        self._output.abandon()
        os.close(self._duplicate)
        self._client.close()
        self._client = self._output = self._input = None


def _open(path: str, flags: int) -> int:
    try:
        return os.open(path, flags, 0o600)
    except OSError as error:
        cause = error.strerror or str(error)
        raise HostError(f"console port {path}", cause, "choose another file") from None
