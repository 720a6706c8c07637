"""Links of network devices: taps in a namespace of their own, sockets, the real passt."""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vmm_reference.backends.datagram import DatagramLink
from vmm_reference.backends.passt import Passt, StreamLink
from vmm_reference.backends.tap import Tap
from vmm_reference.devices.net import features
from vmm_reference.devices.net.setup import Interface
from vmm_reference.errors import ConfigError, HostError
from vmm_reference.loop import Loop
from vmm_reference.testing import turn

_CLONE_NEWNET = 0x40000000


@pytest.fixture
def loop() -> Iterator[Loop]:
    """A loop that the test turns by itself: callbacks run in `turn`."""
    errors: list[BaseException] = []
    loop = Loop(errors.append)
    yield loop
    loop.stop()
    assert errors == []


def frame(size: int = 60, target: bytes = b"\xff" * 6, kind: bytes = b"\x88\xb5") -> bytes:
    start = target + b"\x02\0\0\0\0\1" + kind
    return start + bytes(n & 0xFF for n in range(size - len(start)))


def drain(link: Any, loop: Loop, count: int) -> list[bytes]:
    """Receive so many frames, waiting as a device does."""
    frames: list[bytes] = []
    ready = [True]
    link.readable = lambda _: ready.append(True)
    while len(frames) < count:
        turn(loop, lambda: ready)
        ready.clear()
        while (got := link.receive(0)) is not None:
            frames.append(bytes(got))
    return frames


# Datagram sockets.


def test_two_ends_of_a_cable(tmp_path: Path, loop: Loop) -> None:
    """Frames pass both ways, in order, whatever end was plugged in first."""
    a = DatagramLink(loop, f"{tmp_path}/a", f"{tmp_path}/b")
    assert a.send(0, [frame()])  # nobody there: lost, as on a cable
    assert a.away == 1
    b = DatagramLink(loop, f"{tmp_path}/b", f"{tmp_path}/a")
    frames = [frame(60 + 1000 * n) for n in range(5)]
    for each in frames:
        assert a.send(0, [each[:20], each[20:]])
        assert b.send(0, [each])
    assert drain(b, loop, 5) == frames
    assert drain(a, loop, 5) == frames
    b.close()
    a.send(0, [frame()])
    assert a.away == 2
    b = DatagramLink(loop, f"{tmp_path}/b", f"{tmp_path}/a")
    assert a.send(0, [frame(99)])
    assert drain(b, loop, 1) == [frame(99)]
    a.close()
    b.close()
    assert list(tmp_path.iterdir()) == []


def test_a_full_cable_says_when_there_is_room(tmp_path: Path, loop: Loop) -> None:
    """No frame is lost between two that are there: the sender is told when to go on."""
    a = DatagramLink(loop, f"{tmp_path}/a", f"{tmp_path}/b")
    b = DatagramLink(loop, f"{tmp_path}/b", f"{tmp_path}/a")
    told: list[int] = []
    a.writable = told.append
    sent = 0
    while a.send(0, [frame(60 + sent % 1000)]):
        sent += 1
        assert sent < 1 << 16
    got = drain(b, loop, sent)
    turn(loop, lambda: told)
    assert a.send(0, [frame()])
    assert got == [frame(60 + n % 1000) for n in range(sent)]
    a.close()
    b.close()


def test_a_path_that_is_taken(tmp_path: Path, loop: Loop) -> None:
    """A socket that nobody holds is replaced, one in use and a file are not."""
    path = tmp_path / "a"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stale:
        stale.bind(str(path))
    link = DatagramLink(loop, str(path), f"{tmp_path}/b")
    with pytest.raises(HostError, match="another process listens there"):
        DatagramLink(loop, str(path), f"{tmp_path}/b")
    link.close()
    path.write_text("precious")
    with pytest.raises(HostError, match="a file is there"):
        DatagramLink(loop, str(path), f"{tmp_path}/b")
    assert path.read_text() == "precious"
    with pytest.raises(HostError, match="choose another path"):
        DatagramLink(loop, f"{tmp_path}/none/a", f"{tmp_path}/b")


# Streams and passt.


def test_frames_over_a_stream(loop: Loop) -> None:
    """Each behind its length, however the stream is cut; a full socket makes the sender wait."""
    ours, theirs = socket.socketpair()
    link = StreamLink(loop, ours)
    told: list[int] = []
    link.writable = told.append
    frames = [frame(60 + n * 7) for n in range(300)]
    data = b"".join(len(each).to_bytes(4, "big") + each for each in frames)
    theirs.setblocking(True)

    def feed() -> None:
        for at in range(0, len(data), 1003):
            theirs.sendall(data[at : at + 1003])

    thread = threading.Thread(target=feed)
    thread.start()
    assert drain(link, loop, len(frames)) == frames
    thread.join()
    sent = 0
    while link.send(0, [frame(9000)]):
        sent += 1
    received = b""
    while len(received) < sent * 9004:
        received += theirs.recv(1 << 20)
    turn(loop, lambda: told)
    assert link.send(0, [frame()])
    assert received[:4] == (9000).to_bytes(4, "big")
    assert received[-9000:] == frame(9000)
    theirs.close()
    with pytest.raises(ConnectionError, match="gone"):
        drain(link, loop, 1)
    assert link.receive(0) is None
    link.close()


def test_hostile_length_on_a_stream(loop: Loop) -> None:
    """The other end is no guest, but it makes nobody allocate gigabytes either."""
    ours, theirs = socket.socketpair()
    link = StreamLink(loop, ours)
    theirs.sendall(b"\xff\xff\xff\xff")
    with pytest.raises(ConnectionError, match="4294967295 bytes"):
        link.receive(0)
    assert link.receive(0) is None
    link.close()
    theirs.close()


def test_passt_answers_for_the_network(loop: Loop) -> None:
    """The real passt answers an ARP request for its gateway, and ends with the link."""
    if shutil.which("passt") is None:
        pytest.skip("passt is not installed (apt install passt)")
    link = Passt(loop, ["-a", "192.0.2.2", "-n", "24", "-g", "192.0.2.1", "-4"])
    pid = link.pid
    me = bytes.fromhex("020000000001")
    request = bytes.fromhex("0001080006040001") + me + bytes([192, 0, 2, 2])
    request += bytes(6) + bytes([192, 0, 2, 1])
    assert link.send(0, [b"\xff" * 6 + me + b"\x08\x06" + request])
    (answer,) = drain(link, loop, 1)
    assert answer[:6] == me
    assert answer[12:22] == bytes.fromhex("08060001080006040002")
    assert answer[28:32] == bytes([192, 0, 2, 1])
    link.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_without_passt(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(HostError, match="passt: is not installed; apt install passt"):
        Passt(loop)


# Taps.


def in_a_namespace(test: Callable[[], None]) -> None:
    """Run in a thread that has a network of its own."""
    result: list[BaseException | str] = []

    def run() -> None:
        try:
            if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
                result.append("/dev/net/tun can't be opened")
            elif ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET):
                result.append(f"no network namespace: {os.strerror(ctypes.get_errno())}")
            elif shutil.which("ip", path="/usr/sbin:/sbin:/usr/bin:/bin") is None:
                result.append("no ip command (apt install iproute2)")
            else:
                test()
        except BaseException as error:
            result.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    for item in result:
        if isinstance(item, str):
            pytest.skip(item)
        raise item


def ip(*arguments: str) -> None:
    path = "/usr/sbin:/sbin:/usr/bin:/bin"
    subprocess.run(["ip", *arguments], check=True, capture_output=True, env={"PATH": path})


def test_a_tap_carries_frames_with_headers() -> None:
    """What the host sends comes with a header; what is sent with one the host receives."""

    def test() -> None:
        ip("tuntap", "add", "dev", "tap9", "mode", "tap", "vnet_hdr")
        ip("link", "set", "tap9", "up", "address", "02:00:00:00:00:09")
        ip("addr", "add", "192.0.2.1/24", "dev", "tap9")
        errors: list[BaseException] = []
        loop = Loop(errors.append)
        tap = Tap(loop, "tap9")
        tap.set_offloads(0)
        me = bytes.fromhex("020000000001")
        request = bytes.fromhex("0001080006040001") + me + bytes([192, 0, 2, 2])
        request += bytes(6) + bytes([192, 0, 2, 1])
        arp = b"\xff" * 6 + me + b"\x08\x06" + request
        answers: list[bytes] = []

        def answered() -> bool:
            """Ask again, since an interface sends nothing until its carrier is noticed."""
            while (got := tap.receive(0)) is not None:
                each = bytes(got)  # the host says other things too, such as router solicitations
                if each[12:18] == me and each[24:26] == b"\x08\x06":
                    answers.append(each)
            return bool(answers) or not tap.send(0, [bytes(12), arp])

        turn(loop, answered)
        assert answers[0][34:40] == bytes.fromhex("020000000009")
        with pytest.raises(OSError, match="Invalid"):
            tap.send(0, [bytes(12)])
        with pytest.raises(HostError, match="another process uses it"):
            Tap(loop, "tap9")
        with pytest.raises(HostError, match=r"another number of queues.*multi_queue"):
            Tap(loop, "tap9", 2)
        tap.close()
        with pytest.raises(HostError, match="there is no such interface; make it with: ip tuntap"):
            Tap(loop, "tap8")
        loop.stop()
        assert errors == []

    in_a_namespace(test)


def test_a_tap_with_several_queues() -> None:
    """Queues that are not in use get no frames; each attached one can send."""

    def test() -> None:
        ip("tuntap", "add", "dev", "tap9", "mode", "tap", "vnet_hdr", "multi_queue")
        ip("link", "set", "tap9", "up")
        loop = Loop(lambda error: None)
        tap = Tap(loop, "tap9", 3)
        tap.set_queues(1)
        tap.set_offloads(features.F_GUEST_CSUM)
        tap.set_queues(3)
        tap.set_offloads(features.GUEST_OFFLOADS & tap.offloads)
        for queue in range(3):
            assert tap.send(queue, [bytes(12), frame()])
        tap.set_queues(2)
        tap.set_offloads(0)  # a detached queue would refuse
        tap.close()
        loop.stop()

    in_a_namespace(test)


# Configuration.


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("tap0,socket=/x,peer=/y", "exclude"), ("socket=/x", r"peer: \(none\): goes with socket"),
        ("peer=/x", "goes with socket"), ("vhost", "needs a tap"),
        ("tap0,vhost,rx_ops=5", "limits no rates"),
        ("queues=0,tap=tap0", "queues"),
        ("queues=2", "needs a tap"), ("mac=01:00:00:00:00:01", "unicast"), ("mac=x", "unicast"),
        ("mac=00:00:00:00:00:00", "unicast"), ("mtu=67", "mtu"), ("ports=http", "ports"),
        ("rx_bandwidth=fast", "rx_bandwidth: fast: must be SIZE"), ("tx_ops=1/0", "tx_ops"),
        ("tap=a/b", "tap"), ("tap=0123456789abcdef", "tap"),
    ],
)  # fmt: skip
def test_configurations_that_can_not_be(text: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        Interface.parse(text).check("net")


@pytest.mark.parametrize(
    "text",
    ["", "tap0", "tap0,vhost,queues=4", "socket=/a,peer=/b", "ports=2222:22 80",
     "tap0,mac=02:00:00:00:00:01,mtu=9000,rx_bandwidth=10M/100+1G,tx_ops=500"],
)  # fmt: skip
def test_configurations_that_can_be(text: str) -> None:
    Interface.parse(text).check("net")
