"""The host's end of a guest's sockets: Unix sockets, by Firecracker's convention.

A client of the host connects to the machine's socket and writes `CONNECT port` and a newline; when
the guest has accepted, it reads `OK` and a port of the host, and a newline, and from then on the
stream is the guest's. A guest that connects to port N of the host (CID 2) is connected to whoever
listens on the socket whose path is the machine's with `_N` behind it.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from vmm_reference.loop import READ

from .datagram import bind_unix
from .readiness import Readiness

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm_reference.loop import Loop

__all__ = ["UnixSockets"]

_LONGEST_REQUEST = 32  # bytes of `CONNECT port` and its newline
_BACKLOG = 1024
_SEND_BUFFER = 1 << 20  # bytes, or as much as the host gives: a guest's credit fits into it
_MOST_WAITING = 1024  # clients that have not said yet what they want


class UnixSockets:
    """All sockets of one machine.

    Args:
        loop: where clients are served.
        path: of the machine's socket, which is made and, at the end, removed.

    Attributes:
        opened: is given a client's socket and the port of the guest that it wants; says whether
            it has taken the socket. What the client has said behind its wish is still to be read.
        refused: clients that said something else than what they should.

    Raises:
        HostError: the socket can't be made.
    """

    def __init__(self, loop: Loop, path: str) -> None:
        self.opened: Callable[[socket.socket, int], bool] = lambda _client, _port: False
        self.refused = 0
        self._loop = loop
        self._path = path
        # What clients have said so far.
        self._waiting: dict[socket.socket, tuple[Readiness, bytearray]] = {}
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            bind_unix(self._listener, path)
        except BaseException:
            self._listener.close()
            raise
        self._listener.listen(_BACKLOG)
        self._readiness = Readiness(loop, self._listener.fileno(), self._accept)
        self._readiness.wait(READ)

    def close(self) -> None:
        """Hear nobody any more."""
        for client in list(self._waiting):
            self._forget(client)
            client.close()
        self._readiness.close()
        self._listener.close()
        with suppress(FileNotFoundError):
            os.unlink(self._path)  # noqa: PTH108

    def connect(self, port: int) -> socket.socket | None:
        """A socket to whoever listens for a guest's connections to that port, or None."""
        stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            stream.connect(f"{self._path}_{port}")
        except OSError:  # nobody there, or more wait there already than are let in
            stream.close()
            return None
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        return stream

    def _accept(self) -> None:
        while len(self._waiting) < _MOST_WAITING:
            try:
                client, _ = self._listener.accept()
            except BlockingIOError:
                break
            except OSError:  # out of descriptors, or it is gone again
                break
            client.setblocking(False)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
            readiness = Readiness(self._loop, client.fileno(), partial(self._hear, client))
            self._waiting[client] = readiness, bytearray()
            readiness.wait(READ)
        else:
            return  # `_forget` goes on
        self._readiness.wait(READ)

    def _forget(self, client: socket.socket) -> bytearray:
        readiness, said = self._waiting.pop(client)
        readiness.close()
        self._readiness.wait(READ)
        return said

    def _hear(self, client: socket.socket) -> None:
        readiness, said = self._waiting[client]
        try:
            data = client.recv(_LONGEST_REQUEST - len(said), socket.MSG_PEEK)
            line, newline, _ = data.partition(b"\n")
            data = client.recv(len(line + newline))  # the rest is the guest's
        except BlockingIOError:
            readiness.wait(READ)
            return
        except OSError:
            data = b""
        said += data
        line, newline, _ = bytes(said).partition(b"\n")
        if data and not newline and len(said) < _LONGEST_REQUEST:
            readiness.wait(READ)
            return
        self._forget(client)
        port = _port(line) if newline else None
        self.refused += port is None
        if port is None or not self.opened(client, port):
            client.close()


def _port(line: bytes) -> int | None:
    """The port of `CONNECT port`, or None."""
    word, _, number = line.rstrip(b"\r").partition(b" ")
    if word.upper() != b"CONNECT" or not number.isdigit() or len(number) > 10:
        return None
    port = int(number)
    return port if port <= 0xFFFFFFFF else None
