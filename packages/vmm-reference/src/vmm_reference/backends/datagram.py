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
from typing import Final

from vmm_reference.errors import HostError

__all__ = ["DatagramLink", "bind_unix"]

_BUFFER = 4 << 20  # bytes in flight that the sender's socket may hold


class DatagramLink:
    """One end of the cable.

    Args:
        path: of this end's socket, which is made and, at the end, removed.
        peer: of the other's.

    Attributes:
        fds: the socket's descriptor, non-blocking.

    Raises:
        HostError: the socket can't be made.
    """

    vnet_header = False
    offloads = 0
    queues = 1
    kind: Final = "datagrams"

    def __init__(self, path: str, peer: str) -> None:
        self.peer = peer
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        try:
            bind_unix(self._socket, path)
        except BaseException:
            self._socket.close()
            raise
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
        self.fds = [self._socket.fileno()]

    def close(self) -> None:
        """Pull the cable."""
        self._socket.close()
        with suppress(FileNotFoundError):
            os.unlink(self._path)  # noqa: PTH108

    def set_offloads(self, offloads: int) -> None:
        """Nothing is offered."""

    def set_queues(self, pairs: int) -> None:
        """There is one."""


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
