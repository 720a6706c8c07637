"""Ends of console ports on the host: files, terminals, sockets."""

from __future__ import annotations

import contextlib
import os
import socket
import tty
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vmm_reference.backends.ports import FilePort, GuestSide, PtyPort, SocketPort, TtyPort
from vmm_reference.devices.console.setup import Ports
from vmm_reference.errors import ConfigError, HostError
from vmm_reference.loop import Loop
from vmm_reference.testing import turn


class Guest:
    """The device's side of a port."""

    def __init__(self) -> None:
        self.errors: list[BaseException] = []
        self.loop = Loop(self.errors.append)
        self.typed = bytearray()
        self.room = 1 << 30
        self.gone = 0
        self.open: list[bool] = []

    def receive(self, data: bytes) -> int:
        taken = min(self.room, len(data))
        self.room -= taken
        self.typed += data[:taken]
        return taken

    def written(self, count: int) -> None:
        self.gone += count

    def port(self, kind: Any, path: object) -> Any:
        side = GuestSide(self.loop, str(path), self.receive, self.written, self.open.append)
        return kind(side)


@pytest.fixture
def guest() -> Iterator[Guest]:
    guest = Guest()
    yield guest
    guest.loop.stop()
    assert guest.errors == []


def test_a_file_gets_all_output(guest: Guest, tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("before\n")
    port = guest.port(FilePort, path)
    port.send(b"one ")
    port.send(b"two")
    turn(guest.loop, lambda: guest.gone == 7)
    port.send(b" three")
    port.close()
    assert path.read_text() == "before\none two three"
    with pytest.raises(HostError, match="Is a directory"):
        guest.port(FilePort, tmp_path)


def test_a_pipe_that_nobody_reads_holds_nobody_up(guest: Guest, tmp_path: Path) -> None:
    """It takes what it has room for; the rest stays outstanding and the loop goes on."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    port = guest.port(FilePort, path)
    port.send(bytes(1 << 20))
    turn(guest.loop, lambda: guest.gone >= 1 << 15)
    before = -1
    while before != guest.gone:
        before = guest.gone
        for _ in range(3):
            guest.loop.turn(0.01)
    assert guest.gone < 1 << 20
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    got = bytearray()

    def read() -> bool:
        with contextlib.suppress(BlockingIOError):
            got.extend(os.read(reader, 1 << 16))
        return len(got) == 1 << 20

    turn(guest.loop, read)
    turn(guest.loop, lambda: guest.gone == 1 << 20)
    os.close(reader)
    port.close()


def test_a_terminal_of_its_own(guest: Guest, tmp_path: Path) -> None:
    """Its name is told and linked to; programs come and go; nothing is changed on the way."""
    link = tmp_path / "console"
    port = guest.port(PtyPort, link)
    assert str(link.readlink()) == port.path
    for _ in range(2):
        fd = os.open(link, os.O_RDWR | os.O_NOCTTY)
        guest.typed.clear()
        os.write(fd, b"\x03typed\r")
        turn(guest.loop, lambda: len(guest.typed) == 7)
        assert guest.typed == b"\x03typed\r"
        port.send(b"line\n")
        got = bytearray()
        os.set_blocking(fd, False)

        def read(fd: int = fd, got: bytearray = got) -> bool:
            with contextlib.suppress(BlockingIOError):
                got.extend(os.read(fd, 100))
            return len(got) >= 5

        turn(guest.loop, read)
        assert got == b"line\n"
        os.close(fd)
    with pytest.raises(HostError, match="exists"):
        guest.port(PtyPort, link)
    port.close()
    assert not link.is_symlink()


def test_a_terminal_of_the_host_is_given_back(guest: Guest, tmp_path: Path) -> None:
    master, slave = os.openpty()
    before = tty.tcgetattr(slave)  # type: ignore[attr-defined]
    port = guest.port(TtyPort, os.ttyname(slave))
    assert tty.tcgetattr(slave) != before  # type: ignore[attr-defined]
    os.write(master, b"\x1a\n")
    turn(guest.loop, lambda: len(guest.typed) == 2)
    assert guest.typed == b"\x1a\n"
    port.send(b"hello")
    port.close()
    assert os.read(master, 100) == b"hello"
    assert tty.tcgetattr(slave) == before  # type: ignore[attr-defined]
    os.close(master)
    os.close(slave)
    path = tmp_path / "file"
    path.touch()
    with pytest.raises(HostError, match="is no terminal"):
        guest.port(TtyPort, path)


def test_a_socket_has_one_client_at_a_time(guest: Guest, tmp_path: Path) -> None:
    """Who comes late reads what was said before; who leaves makes room for the next."""
    port = guest.port(SocketPort, tmp_path / "s")
    port.send(b"early ")
    turn(guest.loop, lambda: guest.gone == 6)
    for turns in range(2):
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(20)
            client.connect(str(tmp_path / "s"))
            turn(guest.loop, lambda: guest.open[-1:] == [True])
            port.send(b"late")
            turn(guest.loop, lambda turns=turns: guest.gone == 6 + 4 * (turns + 1))  # type: ignore[misc]
            wanted = b"late" if turns else b"early late"
            got = b""
            while len(got) < len(wanted):
                got += client.recv(100)
            assert got == wanted
            client.sendall(b"typed")
            turn(guest.loop, lambda turns=turns: len(guest.typed) == 5 * (turns + 1))  # type: ignore[misc]
        turn(guest.loop, lambda: guest.open[-1] is False)
    port.close()
    assert list(tmp_path.iterdir()) == []


def test_a_client_that_goes_leaves_nothing_outstanding(guest: Guest, tmp_path: Path) -> None:
    """What was on its way to it counts as gone, so that the guest's port is not stuck."""
    port = guest.port(SocketPort, tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_path / "s"))
        turn(guest.loop, lambda: guest.open == [True])
        port.send(bytes(4 << 20))
        turn(guest.loop, lambda: guest.gone > 0)
    turn(guest.loop, lambda: guest.open[-1] is False)
    assert guest.gone == 4 << 20
    port.close()


def test_history_is_bounded(guest: Guest, tmp_path: Path) -> None:
    port = guest.port(SocketPort, tmp_path / "s")
    for _ in range(100):
        port.send(bytes(10_000))
    assert len(port._history) == 64 << 10
    turn(guest.loop, lambda: guest.gone == 1_000_000)
    port.close()


@pytest.mark.parametrize(
    ("ports", "complaint"),
    [("", "1 to 31"), ("stdio", "must be"), ("file", "must be"), ("a=pty a=pty", "name of another"),
     ("pty " * 32, "1 to 31"), ("b/d=pty", "must be")],
)  # fmt: skip
def test_configurations_that_can_not_be(ports: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        Ports(ports).check("console")


def test_configurations_that_can_be() -> None:
    Ports.parse("pty file:/tmp/a,b agent=socket:/run/agent").check("console")
    Ports().check("console")
