"""Networking without privileges: the real `passt`, to which a guest's frames go over a socket.

passt (https://passt.top) turns what a guest sends into sockets of the host, and answers DHCP, NDP
and ARP. It is started for one machine and ends with it. Frames are in a stream, each behind its
length in four bytes, big-endian; QEMU's `-netdev stream` speaks the same.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
from typing import TYPE_CHECKING, Final

from vmm_reference.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Passt"]

_BUFFER = 4 << 20


class Passt:
    """A link to a passt of its own.

    Args:
        arguments: further ones for passt, such as `-t 2222:22`.

    Attributes:
        fds: the descriptor of our end, non-blocking.

    Raises:
        HostError: there is no passt, or it does not start.
    """

    vnet_header = False
    offloads = 0
    queues = 1
    kind: Final = "stream"
    peer = ""

    def __init__(self, arguments: Sequence[str] = ()) -> None:
        command = shutil.which("passt")
        if command is None:
            raise HostError("passt", "is not installed", "apt install passt, or use a tap")
        self._stream, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            fd = theirs.fileno()
            self._process = subprocess.Popen(
                [command, "--foreground", "--quiet", "--fd", str(fd), *arguments],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                pass_fds=(fd,),
            )  # fmt: skip
        self._stream.setblocking(False)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            self._stream.setsockopt(socket.SOL_SOCKET, option, _BUFFER)
        self.fds = [self._stream.fileno()]

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def close(self) -> None:
        """Hang up, which ends passt too."""
        self._stream.close()
        try:
            self._process.wait(2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def set_offloads(self, offloads: int) -> None:
        """Nothing is offered."""

    def set_queues(self, pairs: int) -> None:
        """There is one."""
