"""A cable between two machines of this host: Unix datagram sockets, one frame a datagram.

Each end has a socket of its own and knows the path of the other's. Either may start first, go and
come again; while one is away, its frames are lost, as on a cable that is pulled. QEMU's `-netdev
dgram` speaks the same.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from contextlib import suppress
from typing import TYPE_CHECKING

from vmm_reference.devices.net.features import MAX_FRAME
from vmm_reference.errors import HostError
from vmm_reference.loop import READ, WRITE

from .readiness import Readiness

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vmm_reference.loop import Loop

__all__ = ["DatagramLink", "bind_unix"]

_AWAY = (errno.ENOENT, errno.ECONNREFUSED, errno.ENOTCONN, errno.ECONNRESET, errno.EDESTADDRREQ)
_MOST_PIECES = 1000
_BUFFER = 4 << 20  # bytes in flight that the sender's socket may hold


class DatagramLink:
    """One end of the cable.

    Args:
        loop: where `readable` and `writable` are called.
        path: of this end's socket, which is made and, at the end, removed.
        peer: of the other's.

    Attributes:
        away: frames that found nobody at the other end.

    Raises:
        HostError: the socket can't be made.
    """

    vnet_header = False
    offloads = 0
    queues = 1

    def __init__(self, loop: Loop, path: str, peer: str) -> None:
        self.readable: Callable[[int], object] = lambda _: None
        self.writable: Callable[[int], object] = lambda _: None
        self.away = 0
        self._path, self._peer = path, peer
        self._buffer = memoryview(bytearray(MAX_FRAME))
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        try:
            bind_unix(self._socket, path)
        except BaseException:
            self._socket.close()
            raise
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
        self._readiness = Readiness(
            loop, self._socket.fileno(), lambda: self.readable(0), lambda: self.writable(0)
        )

    def close(self) -> None:
        """Pull the cable."""
        self._readiness.close()
        self._socket.close()
        with suppress(FileNotFoundError):
            os.unlink(self._path)  # noqa: PTH108

    def send(self, queue: int, pieces: Sequence[bytes | memoryview]) -> bool:
        """Send one frame; False if the other end has no room."""
        if len(pieces) > _MOST_PIECES:
            pieces = [b"".join(pieces)]
        try:
            self._send(pieces)
        except BlockingIOError:
            self._readiness.wait(WRITE)
            return False
        except OSError as error:
            if error.errno not in _AWAY:
                raise
            self.away += 1
        return True

    def receive(self, queue: int) -> memoryview | None:
        """The next frame."""
        while True:
            try:
                return self._buffer[: self._socket.recv_into(self._buffer)]
            except BlockingIOError:
                self._readiness.wait(READ)
                return None
            except ConnectionError:  # the other end went; it may come again
                continue

    def set_offloads(self, offloads: int) -> None:
        """Nothing is offered."""

    def set_queues(self, pairs: int) -> None:
        """There is one."""

    def _send(self, pieces: Sequence[bytes | memoryview]) -> None:
        try:
            self._socket.sendmsg(pieces)
        except OSError as error:
            if error.errno not in _AWAY:
                raise
            # Connected, so that the kernel says when the other end has room.
            self._socket.connect(self._peer)
            self._socket.sendmsg(pieces)


def bind_unix(socket_: socket.socket, path: str) -> None:
    """Bind a socket to a path, in the place of one that nobody listens to any more.

    Raises:
        HostError: the path is in use, or no socket can be there.
    """
    try:
        socket_.bind(path)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            cause = error.strerror or str(error)
            raise HostError(f"socket {path}", cause, "choose another path") from None
        _remove_stale(path, socket_.type)
        socket_.bind(path)


def _remove_stale(path: str, kind: int) -> None:
    if not stat.S_ISSOCK(os.stat(path).st_mode):  # noqa: PTH116
        raise HostError(f"socket {path}", "a file is there", "choose another path, or remove it")
    with socket.socket(socket.AF_UNIX, kind) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)  # noqa: PTH108
            return
        except OSError:
            pass
    raise HostError(f"socket {path}", "another process listens there", "choose another path")
