"""Networking without privileges: the real `passt`, to which a guest's frames go over a socket.

passt (https://passt.top) turns what a guest sends into sockets of the host, and answers DHCP, NDP
and ARP. It is started for one machine and ends with it. Frames are in a stream, each behind its
length in four bytes, big-endian; QEMU's `-netdev stream` speaks the same.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
from struct import Struct
from typing import TYPE_CHECKING

from vmm_reference.devices.net.features import MAX_FRAME
from vmm_reference.errors import HostError
from vmm_reference.loop import READ, WRITE

from .readiness import Readiness

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vmm_reference.loop import Loop

__all__ = ["Passt", "StreamLink"]

_LENGTH = Struct(">I")
_CHUNK = 256 << 10
_BUFFER = 4 << 20


class StreamLink:
    """Frames over a stream socket, each behind its length.

    Args:
        loop: where `readable` and `writable` are called.
        stream: connected; it is closed with the link.
    """

    vnet_header = False
    offloads = 0
    queues = 1

    def __init__(self, loop: Loop, stream: socket.socket) -> None:
        self.readable: Callable[[int], object] = lambda _: None
        self.writable: Callable[[int], object] = lambda _: None
        self._stream = stream
        self._received = bytearray()
        self._at = 0  # where the next frame begins in it
        self._unsent = b""  # the rest of a frame of which the socket has taken a part
        self._broken = False
        stream.setblocking(False)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            stream.setsockopt(socket.SOL_SOCKET, option, _BUFFER)
        self._readiness = Readiness(
            loop, stream.fileno(), lambda: self.readable(0), lambda: self.writable(0)
        )

    def close(self) -> None:
        """Hang up."""
        self._readiness.close()
        self._stream.close()

    def send(self, queue: int, pieces: Sequence[bytes | memoryview]) -> bool:
        """Send one frame; False if there is no room for its beginning."""
        try:
            if self._unsent:
                self._unsent = self._unsent[self._stream.send(self._unsent) :]
            if self._unsent:
                raise BlockingIOError
            frame = b"".join(pieces)
            data = _LENGTH.pack(len(frame)) + frame
            self._unsent = data[self._stream.send(data) :]
        except BlockingIOError:
            self._readiness.wait(WRITE)
            return False
        return True

    def receive(self, queue: int) -> memoryview | None:
        """The next frame.

        Raises:
            OSError: the other end is gone, or sent what is no frame; said once.
        """
        while not self._broken:
            frame = self._frame()
            if frame is not None:
                return frame
            try:
                data = self._stream.recv(_CHUNK)
            except BlockingIOError:
                self._readiness.wait(READ)
                return None
            except OSError:
                data = b""
            if not data:
                self._broken = True
                raise ConnectionError("the other end of the link is gone")
            del self._received[: self._at]
            self._at = 0
            self._received += data
        return None

    def set_offloads(self, offloads: int) -> None:
        """Nothing is offered."""

    def set_queues(self, pairs: int) -> None:
        """There is one."""

    def _frame(self) -> memoryview | None:
        start = self._at + _LENGTH.size
        if len(self._received) < start:
            return None
        (length,) = _LENGTH.unpack_from(self._received, self._at)
        if length > MAX_FRAME:
            self._broken = True
            raise ConnectionError(f"a frame of {length} bytes")
        if len(self._received) < start + length:
            return None
        self._at = start + length
        return memoryview(bytes(self._received[start : self._at]))


class Passt(StreamLink):
    """A link to a passt of its own.

    Args:
        loop: as `StreamLink`.
        arguments: further ones for passt, such as `-t 2222:22`.

    Raises:
        HostError: there is no passt, or it does not start.
    """

    def __init__(self, loop: Loop, arguments: Sequence[str] = ()) -> None:
        command = shutil.which("passt")
        if command is None:
            raise HostError("passt", "is not installed", "apt install passt, or use a tap")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            fd = theirs.fileno()
            self._process = subprocess.Popen(
                [command, "--foreground", "--quiet", "--fd", str(fd), *arguments],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                pass_fds=(fd,),
            )  # fmt: skip
        super().__init__(loop, ours)

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def close(self) -> None:
        """Hang up, which ends passt too."""
        super().close()
        try:
            self._process.wait(2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
