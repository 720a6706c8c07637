"""The socket device with real Unix sockets behind it, by Firecracker's convention."""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from virtio_queue import PumpError
from vm_memory import GuestAddress
from vmm_reference.backends import pumps
from vmm_reference.backends import vsock as backend
from vmm_reference.backends.pumps import SocketPump
from vmm_reference.backends.vsock import UnixSockets
from vmm_reference.devices.vsock.connection import BUFFER
from vmm_reference.devices.vsock.model import FIRST_HOST_PORT
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
from vmm_reference.devices.vsock.setup import Socket, build
from vmm_reference.errors import ConfigError, HostError
from vmm_reference.loop import Loop
from vmm_reference.testing import PumpBench, turn

CID = 3


class Guest:
    """A device as a machine has it, its Unix sockets, and a driver that keeps what comes."""

    def __init__(self, path: str) -> None:
        self.bench = PumpBench(16 << 20)
        self.vsock = build(Socket(path), self.bench)  # type: ignore[arg-type]
        ((pump, _),) = self.vsock.offload._servers
        assert isinstance(pump, SocketPump)
        self.sockets = pump.sockets
        self.packets: list[Packet] = []
        self.data = bytearray()
        self.credit = 0
        self.start()

    def start(self) -> None:
        """Bring the device up, with buffers."""
        self.bench.driver.start()
        for _ in range(64):
            self.bench.driver.queues[0].add([], [4096])
        self.bench.kick(0)

    def tell(self, op: int, port: int, to: int, data: bytes = b"", flags: int = 0) -> None:
        """Send one packet, which the device has taken when this returns."""
        header = Packet(CID, 2, port, to, len(data), 1, op, flags, 1 << 18, len(self.data))
        queue = self.bench.driver.queues[1]
        queue.add([HEADER.pack(*header) + data])
        self.bench.kick(1)

        def taken() -> bool:
            queue.reap()
            return not queue.outstanding

        self.wait(taken)

    def work(self) -> None:
        """Take what came."""
        used = self.bench.driver.queues[0].reap()
        asked: Packet | None = None
        for each in used:
            header = Packet(*HEADER.unpack_from(each.data))
            self.packets.append(header)
            self.data += each.data[HEADER.size :]
            self.credit = header.fwd_cnt
            if header.op == CREDIT_REQUEST:
                asked = header
            self.bench.driver.queues[0].add([], [4096])
        if used:
            self.bench.kick(0)
        if asked is not None:
            self.tell(CREDIT_UPDATE, asked.dst_port, asked.src_port)

    def wait(self, until: Callable[[], object]) -> None:
        """Work, and turn the machine's loop, until something holds."""

        def worked() -> object:
            self.work()
            return until()

        turn(self.bench.loop, worked)

    def until(self, op: int) -> Packet:
        """Wait for a packet of that kind; those before it are forgotten."""
        self.wait(lambda: any(each.op == op for each in self.packets))
        number = next(n for n, each in enumerate(self.packets) if each.op == op)
        packet = self.packets[number]
        del self.packets[: number + 1]
        return packet

    def gone(self) -> None:
        """Wait until there are no connections."""
        self.wait(lambda: self.vsock.metrics()["connections"] == 0)

    def close(self) -> None:
        self.bench.close()


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
        guest.wait(lambda: guest.data.endswith(b"late"))
        assert guest.data == hello.partition(b"\n")[2] + b" and late"
        guest.tell(RW, 52, FIRST_HOST_PORT, b"reply")
        assert stream.recv(100) == b"reply"
        stream.shutdown(socket.SHUT_WR)
        assert guest.until(SHUTDOWN).flags == SHUTDOWN_SEND
        guest.tell(RW, 52, FIRST_HOST_PORT, b"after")
        assert stream.recv(100) == b"after"
        stream.close()
        assert guest.until(SHUTDOWN).flags == SHUTDOWN_BOTH
    guest.gone()


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
        guest.wait(lambda: guest.vsock.metrics()["refused_clients"])
        with contextlib.suppress(ConnectionResetError):  # closed with some of it unread
            assert stream.recv(100) == b""
    guest.gone()


def test_clients_that_say_nothing_are_bounded(
    guest: Guest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next ones wait in the kernel until one of them has spoken or gone."""
    monkeypatch.setattr(backend, "_MOST_WAITING", 4)
    silent = [client(tmp_path, b"") for _ in range(6)]
    guest.wait(lambda: len(guest.sockets._waiting) == 4)
    with client(tmp_path, b"CONNECT 9\n"):
        for stream in silent:
            stream.close()
        guest.until(REQUEST)
    assert guest.vsock.metrics()["refused_clients"] == 6


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
            guest.bench.loop.turn(0.01)
            guest.work()
        writer.join()
        guest.wait(lambda: len(got) == size)
        reader.join()
    assert guest.data == data
    assert got == data
    assert not [name for name, n in guest.vsock.metrics().items() if n and "reset" in name]


def test_over_a_pause_a_connection_stays(guest: Guest, tmp_path: Path) -> None:
    """Who comes meanwhile is let in when the machine goes on; what was said arrives."""
    with client(tmp_path, b"CONNECT 52\n") as stream:
        guest.until(REQUEST)
        guest.tell(RESPONSE, 52, FIRST_HOST_PORT)
        assert stream.recv(100).startswith(b"OK")
        guest.bench.stop()
        stream.sendall(b"said while it stood still")
        with client(tmp_path, b"CONNECT 53\n"):
            guest.wait(lambda: not guest.sockets._waiting and not guest.packets)
            guest.bench.go()
            assert guest.until(REQUEST).dst_port == 53
        guest.wait(lambda: guest.data == b"said while it stood still")
        guest.tell(RW, 52, FIRST_HOST_PORT, b"and heard")
        assert stream.recv(100) == b"and heard"


def test_a_reset_ends_all_connections(guest: Guest, tmp_path: Path) -> None:
    """The guest starts anew, and so do its clients."""
    with client(tmp_path, b"CONNECT 52\n") as stream:
        guest.until(REQUEST)
        guest.tell(RESPONSE, 52, FIRST_HOST_PORT)
        assert stream.recv(100).startswith(b"OK")
        guest.bench.driver.write_status(0)
        assert stream.recv(100) == b""
    with client(tmp_path, b"CONNECT 52\n") as stream:  # nobody is there
        guest.wait(lambda: select.select([stream], [], [], 0)[0])
        assert stream.recv(100) == b""
    assert guest.vsock.metrics()["refused_guest"] == 1
    guest.start()
    with client(tmp_path, b"CONNECT 52\n") as stream:
        assert guest.until(REQUEST).dst_port == 52
        guest.tell(RESPONSE, 52, FIRST_HOST_PORT + 1)
        assert stream.recv(100) == b"OK %d\n" % (FIRST_HOST_PORT + 1)


def test_a_broken_ring_asks_for_a_reset(guest: Guest) -> None:
    """The driver learns of it, and after a reset all is well."""
    at = guest.bench.device.queues[1].descriptor_area
    guest.bench.driver.queues[1].add([bytes(44)], [])
    for offset in range(0, 2048, 16):
        guest.bench.memory.write(GuestAddress(at + offset), b"\xff" * 8)
    guest.bench.kick(1)
    guest.wait(lambda: guest.bench.device.status & 64)
    guest.bench.driver.write_status(0)
    guest.start()
    guest.tell(REQUEST, 1000, 80)
    guest.until(RST)


def test_a_state_without_connections(guest: Guest, tmp_path: Path) -> None:
    """A restored guest hears that they are gone; the host's clients are not its own."""
    with client(tmp_path, b"CONNECT 52\n") as stream:
        guest.until(REQUEST)
        guest.tell(RESPONSE, 52, FIRST_HOST_PORT)
        assert stream.recv(100).startswith(b"OK")
        guest.bench.stop()
        state = guest.vsock.save()
        assert state.transport_reset
        guest.bench.go()
        guest.tell(RW, 52, FIRST_HOST_PORT, b"it goes on")
        assert stream.recv(100) == b"it goes on"
        guest.bench.driver.write_status(0)
        guest.start()
        guest.vsock.restore(state)
        guest.bench.driver.queues[2].add([], [4])
        guest.bench.kick(2)
        events: list[bytes] = []

        def heard() -> list[bytes]:
            events.extend(used.data for used in guest.bench.driver.queues[2].reap())
            return events

        guest.wait(heard)
        assert events == [bytes(4)]


def test_clients_that_wait_are_let_go_with_the_device(guest: Guest, tmp_path: Path) -> None:
    with client(tmp_path, b"CONN") as stream:
        guest.wait(lambda: guest.sockets._waiting)
        guest.bench.close()
        with contextlib.suppress(ConnectionResetError):  # its beginning is unread, perhaps
            assert stream.recv(100) == b""
        guest.bench = PumpBench(1 << 20)  # for `close`
    assert list(tmp_path.iterdir()) == []


def refuse(*_arguments: object) -> None:
    """A pump that can't be made."""
    raise PumpError("sockets", errno.EMFILE, "raise the limit of open files")


def test_a_host_without_descriptors_keeps_no_path(tmp_path: Path) -> None:
    bench = PumpBench(1 << 20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pumps, "SocketPump", refuse)
        with pytest.raises(PumpError, match="open files"):
            build(Socket(f"{tmp_path}/v.sock"), bench)  # type: ignore[arg-type]
    bench.close()
    assert list(tmp_path.iterdir()) == []


def test_a_clone_has_a_name_of_its_own() -> None:
    assert Socket("/a", cid=7).cloned(2) == Socket("/a-2", cid=10)
    assert Socket(cid=7, vhost=True).cloned(0) == Socket(cid=8, vhost=True)


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
