"""The socket device with real Unix sockets behind it, by Firecracker's convention."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmm_reference.backends import vsock as backend
from vmm_reference.backends.vsock import UnixSockets
from vmm_reference.devices.vsock.connection import BUFFER
from vmm_reference.devices.vsock.model import FIRST_HOST_PORT, Vsock
from vmm_reference.devices.vsock.packet import (
    CREDIT_REQUEST,
    CREDIT_UPDATE,
    HEADER,
    REQUEST,
    RESPONSE,
    RST,
    RW,
    SHUTDOWN,
    SHUTDOWN_BOTH,
    SHUTDOWN_SEND,
    Packet,
)
from vmm_reference.devices.vsock.setup import Socket
from vmm_reference.errors import ConfigError, HostError
from vmm_reference.loop import Loop
from vmm_reference.testing import Bench, turn

CID = 3


class Guest(Bench):
    """A device, its Unix sockets, and a driver that keeps what comes."""

    def __init__(self, path: str) -> None:
        self.errors: list[BaseException] = []
        self.loop = Loop(self.errors.append)
        self.sockets = UnixSockets(self.loop, path)
        self.vsock = Vsock(CID, self.sockets.connect, kick=lambda index: self.kick_later(index))
        self.sockets.opened = self.vsock.open
        super().__init__(self.vsock, memory=16 << 20)
        for _ in range(64):
            self.queue(0).add([], [4096])
        self.driver.kick(0)
        self.packets: list[Packet] = []
        self.data = bytearray()
        self.credit = 0

    def tell(self, op: int, port: int, to: int, data: bytes = b"", flags: int = 0) -> None:
        header = Packet(CID, 2, port, to, len(data), 1, op, flags, 1 << 18, len(self.data))
        self.queue(1).add([HEADER.pack(*header) + data])
        self.driver.kick(1)
        self.work()

    def work(self) -> bool:
        """Take what came; whether there was something."""
        self.settle()
        self.queue(1).reap()
        used = self.queue(0).reap()
        asked: Packet | None = None
        for each in used:
            header = Packet(*HEADER.unpack_from(each.data))
            self.packets.append(header)
            self.data += each.data[HEADER.size :]
            self.credit = header.fwd_cnt
            if header.op == CREDIT_REQUEST:
                asked = header
            self.queue(0).add([], [4096])
        if used:
            self.driver.kick(0)
        if asked is not None:
            self.tell(CREDIT_UPDATE, asked.dst_port, asked.src_port)
        return bool(used)

    def until(self, op: int) -> Packet:
        """Wait for a packet of that kind."""
        turn(self.loop, lambda: self.work() or any(each.op == op for each in self.packets))
        while True:
            for number, each in enumerate(self.packets):
                if each.op == op:
                    del self.packets[: number + 1]
                    return each
            turn(self.loop, self.work)

    def close(self) -> None:
        self.vsock.reset()
        self.sockets.close()
        self.loop.stop()
        super().close()
        assert self.errors == []


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Guest]:
    guest = Guest(f"{tmp_path}/v.sock")
    yield guest
    guest.close()


def client(tmp_path: Path, hello: bytes) -> socket.socket:
    stream = socket.socket(socket.AF_UNIX)
    stream.settimeout(20)
    stream.connect(f"{tmp_path}/v.sock")
    stream.sendall(hello)
    return stream


@pytest.mark.parametrize("hello", [b"CONNECT 52\n", b"CONNECT 52\nearly"])
def test_a_client_connects_to_the_guest(guest: Guest, tmp_path: Path, hello: bytes) -> None:
    """It hears of a port when the guest has agreed; what it said early is not lost."""
    with client(tmp_path, hello) as stream:
        request = guest.until(REQUEST)
        assert (request.src_port, request.dst_port) == (FIRST_HOST_PORT, 52)
        guest.tell(RESPONSE, 52, FIRST_HOST_PORT)
        assert stream.recv(100) == b"OK %d\n" % FIRST_HOST_PORT
        stream.sendall(b" and late")
        turn(guest.loop, lambda: guest.work() or guest.data.endswith(b"late"))
        assert guest.data == hello.partition(b"\n")[2] + b" and late"
        guest.tell(RW, 52, FIRST_HOST_PORT, b"reply")
        assert stream.recv(100) == b"reply"
        stream.shutdown(socket.SHUT_WR)
        assert guest.until(SHUTDOWN).flags == SHUTDOWN_SEND
        guest.tell(RW, 52, FIRST_HOST_PORT, b"after")
        assert stream.recv(100) == b"after"
        stream.close()
        assert guest.until(SHUTDOWN).flags == SHUTDOWN_BOTH
    assert guest.vsock.connections == {}


def test_the_guest_refuses(guest: Guest, tmp_path: Path) -> None:
    with client(tmp_path, b"CONNECT 52\n") as stream:
        guest.until(REQUEST)
        guest.tell(RST, 52, FIRST_HOST_PORT)
        assert stream.recv(100) == b""


@pytest.mark.parametrize(
    "hello",
    [b"GET / HTTP/1.1\n", b"CONNECT\n", b"CONNECT x\n", b"CONNECT 4294967296\n", b"x" * 40,
     b"CONNECT -1\n", b"\n", b"CONNECT 1"],
)  # fmt: skip
def test_a_client_that_says_something_else(guest: Guest, tmp_path: Path, hello: bytes) -> None:
    with client(tmp_path, hello) as stream:
        stream.shutdown(socket.SHUT_WR)
        turn(guest.loop, lambda: guest.sockets.refused)
        with contextlib.suppress(ConnectionResetError):  # closed with some of it unread
            assert stream.recv(100) == b""
    assert guest.vsock.connections == {}


def test_clients_that_say_nothing_are_bounded(
    guest: Guest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next ones wait in the kernel until one of them has spoken or gone."""
    monkeypatch.setattr(backend, "_MOST_WAITING", 4)
    silent = [client(tmp_path, b"") for _ in range(6)]
    turn(guest.loop, lambda: len(guest.sockets._waiting) == 4)
    with client(tmp_path, b"CONNECT 9\n"):
        for stream in silent:
            stream.close()
        guest.until(REQUEST)
    assert guest.sockets.refused == 6


def test_the_guest_connects_to_whoever_listens(guest: Guest, tmp_path: Path) -> None:
    """Port N is the socket with _N behind its name; a full or missing one refuses."""
    guest.tell(REQUEST, 1000, 80)
    guest.until(RST)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{tmp_path}/v.sock_80")
        listener.listen(4)
        listener.settimeout(20)
        guest.tell(REQUEST, 1000, 80)
        guest.until(RESPONSE)
        stream, _ = listener.accept()
        guest.tell(RW, 1000, 80, b"hello")
        stream.settimeout(20)
        assert stream.recv(10) == b"hello"
        guest.tell(SHUTDOWN, 1000, 80, flags=SHUTDOWN_BOTH)
        assert stream.recv(10) == b""
        guest.until(RST)
        stream.close()


def test_megabytes_both_ways(guest: Guest, tmp_path: Path) -> None:
    """More than any buffer holds, with a client that reads and writes at its own pace."""
    size = 3 << 20
    data = bytes(n * 7 % 251 for n in range(1 << 20)) * 3
    got = bytearray()
    with client(tmp_path, b"CONNECT 1\n") as stream:
        guest.until(REQUEST)
        guest.tell(RESPONSE, 1, FIRST_HOST_PORT)
        assert stream.recv(100).startswith(b"OK")
        writer = threading.Thread(target=stream.sendall, args=(data,))

        def read() -> None:
            while len(got) < size:
                got.extend(stream.recv(70_000))

        reader = threading.Thread(target=read)
        writer.start()
        reader.start()
        sent = 0
        while sent < size or len(guest.data) < size:
            room = min(BUFFER - (sent - guest.credit), 60_000, size - sent)
            if room > 0:
                guest.tell(RW, 1, FIRST_HOST_PORT, data[sent : sent + room])
                sent += room
            guest.loop.turn(0.01)
            guest.work()
        writer.join()
        turn(guest.loop, lambda: guest.work() or len(got) == size)
        reader.join()
    assert guest.data == data
    assert got == data
    assert guest.vsock.resets == {}


def test_the_path_is_taken_and_given_back(tmp_path: Path) -> None:
    loop = Loop(lambda error: None)
    path = f"{tmp_path}/v.sock"
    first = UnixSockets(loop, path)
    with pytest.raises(HostError, match="another process listens there"):
        UnixSockets(loop, path)
    first.close()
    assert list(tmp_path.iterdir()) == []
    loop.stop()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "path"),
        ("x" * 97, "at most 96 bytes"),
        ("/a,cid=2", "cid"),
        ("/a,cid=4294967295", "cid"),
    ],
)
def test_configurations_that_can_not_be(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        Socket.parse(text).check("vsock")
