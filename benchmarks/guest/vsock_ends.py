"""The host's ends of `benchmarks/vsock.py`: `vsock_ends.py SOCKET...`, until it is ended.

What arrives at port 52 is read to its end, and answered with one byte. Who connects to port 53 says
in eight bytes how many he wants. Ports are those of AF_VSOCK, and of user-space devices with these
sockets.
"""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Callable

CHUNK = 1 << 18


def take(stream: socket.socket) -> None:
    """Read everything."""
    buffer = bytearray(CHUNK)
    while stream.recv_into(buffer):
        pass
    stream.sendall(b"!")


def give(stream: socket.socket) -> None:
    """Write as much as is asked for."""
    left = int.from_bytes(stream.recv(8, socket.MSG_WAITALL), "little")
    data = bytes(CHUNK)
    while left:
        left -= stream.send(data[:left] if left < CHUNK else data)
    stream.recv(1)  # until the other end closes


def serve(listener: socket.socket, end: Callable[[socket.socket], None]) -> None:
    """Take one connection after the other."""
    listener.listen(8)
    while True:
        stream, _ = listener.accept()
        with stream:
            end(stream)


def main() -> None:
    """See the module."""
    for port, end in ((52, take), (53, give)):
        listeners = [socket.socket(socket.AF_VSOCK)]
        listeners[0].bind((socket.VMADDR_CID_ANY, port))
        for path in sys.argv[1:]:
            listeners.append(socket.socket(socket.AF_UNIX))
            listeners[-1].bind(f"{path}_{port}")
        for listener in listeners:
            threading.Thread(target=serve, args=(listener, end)).start()


if __name__ == "__main__":
    main()
