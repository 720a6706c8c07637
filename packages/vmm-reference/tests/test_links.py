"""Links of network devices: taps in a namespace of their own, sockets, the real passt."""

from __future__ import annotations

import ctypes
import os
import select
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from vmm_reference.backends.datagram import DatagramLink
from vmm_reference.backends.passt import Passt
from vmm_reference.backends.tap import Tap
from vmm_reference.devices.net import features
from vmm_reference.devices.net.setup import Interface
from vmm_reference.errors import ConfigError, HostError

_CLONE_NEWNET = 0x40000000


# Datagram sockets.


def test_a_path_that_is_taken(tmp_path: Path) -> None:
    """A socket that nobody holds is replaced, one in use and a file are not."""
    path = tmp_path / "a"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stale:
        stale.bind(str(path))
    link = DatagramLink(str(path), f"{tmp_path}/b")
    assert not os.get_blocking(link.fds[0])
    with pytest.raises(HostError, match="another process listens there"):
        DatagramLink(str(path), f"{tmp_path}/b")
    link.close()
    assert not path.exists()
    path.write_text("precious")
    with pytest.raises(HostError, match="a file is there"):
        DatagramLink(str(path), f"{tmp_path}/b")
    assert path.read_text() == "precious"
    with pytest.raises(HostError, match="choose another path"):
        DatagramLink(f"{tmp_path}/none/a", f"{tmp_path}/b")


# passt.


def test_passt_answers_for_the_network() -> None:
    """The real passt answers an ARP request for its gateway, and ends with the link."""
    if shutil.which("passt") is None:
        pytest.skip("passt is not installed (apt install passt)")
    me = bytes.fromhex("020000000001")
    request = bytes.fromhex("0001080006040001") + me + bytes([192, 0, 2, 2])
    request += bytes(6) + bytes([192, 0, 2, 1])
    frame = b"\xff" * 6 + me + b"\x08\x06" + request
    answer = b""
    with closing(Passt(["-a", "192.0.2.2", "-n", "24", "-g", "192.0.2.1", "-4"])) as link:
        (fd,) = link.fds
        assert os.write(fd, len(frame).to_bytes(4, "big") + frame) == 4 + len(frame)
        while len(answer) < 4 + 42:  # its length comes by itself
            assert select.select([fd], [], [], 30)[0], f"passt says no more than {answer!r}"
            answer += os.read(fd, 1 << 16) or pytest.fail("passt hangs up")
        pid = link.pid
    assert answer[:4] == (42).to_bytes(4, "big")
    assert answer[4:10] == me
    assert answer[16:26] == bytes.fromhex("08060001080006040002")
    assert answer[32:36] == bytes([192, 0, 2, 1])
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_without_passt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(HostError, match="passt: is not installed; apt install passt"):
        Passt()


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
        tap = Tap("tap9")
        tap.set_offloads(0)
        me = bytes.fromhex("020000000001")
        request = bytes.fromhex("0001080006040001") + me + bytes([192, 0, 2, 2])
        request += bytes(6) + bytes([192, 0, 2, 1])
        arp = b"\xff" * 6 + me + b"\x08\x06" + request
        (fd,) = tap.fds
        assert not os.get_blocking(fd)
        answer = b""
        while answer[12:18] != me or answer[24:26] != b"\x08\x06":  # the host says other things too
            # Asked again, since an interface sends nothing until its carrier is noticed.
            os.writev(fd, [bytes(12), arp])
            if select.select([fd], [], [], 0.05)[0]:
                answer = os.read(fd, 1 << 17)
        assert answer[34:40] == bytes.fromhex("020000000009")
        with pytest.raises(OSError, match="Invalid"):
            os.write(fd, bytes(12))
        with pytest.raises(HostError, match="another process uses it"):
            Tap("tap9")
        with pytest.raises(HostError, match=r"another number of queues.*multi_queue"):
            Tap("tap9", 2)
        tap.close()
        with pytest.raises(HostError, match="there is no such interface; make it with: ip tuntap"):
            Tap("tap8")

    in_a_namespace(test)


def test_a_tap_with_several_queues() -> None:
    """Queues that are not in use get no frames; each attached one can send."""

    def test() -> None:
        ip("tuntap", "add", "dev", "tap9", "mode", "tap", "vnet_hdr", "multi_queue")
        ip("link", "set", "tap9", "up")
        tap = Tap("tap9", 3)
        tap.set_queues(1)
        tap.set_offloads(features.F_GUEST_CSUM)
        tap.set_queues(3)
        tap.set_offloads(features.GUEST_OFFLOADS & tap.offloads)
        frame = bytes(12) + b"\xff" * 6 + b"\x02\0\0\0\0\1\x88\xb5".ljust(54)
        for fd in tap.fds:
            assert os.write(fd, frame) == len(frame)
        tap.set_queues(2)
        tap.set_offloads(0)  # a detached queue would refuse
        tap.close()

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
