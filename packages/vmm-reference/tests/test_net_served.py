"""A network interface in the machine: its pumps follow the control queue, pauses and resets."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vmm_reference.devices.net.setup import Controls, Interface, build
from vmm_reference.errors import ConfigError, HostError
from vmm_reference.testing import PumpBench, turn

RX, TX, CONTROL = range(3)
MAC, OTHER, GROUP = (bytes.fromhex(n) for n in ("0200000000fe", "020000000099", "01005e000001"))
HEADER = bytes(12)
ME = b"\x02\0\0\0\0\1"


def frame(target: bytes = MAC, kind: bytes = b"\x88\xb5", size: int = 60) -> bytes:
    return (target + ME + kind).ljust(size, b"f")


class Guest:
    """An interface on a cable, its driver, and the other end."""

    def __init__(self, folder: Path, options: str = "") -> None:
        self.bench = PumpBench()
        text = f"socket={folder}/a,peer={folder}/b,mac={MAC.hex(':')}{options}"
        self.controls: Controls = build(Interface.parse(text), self.bench)  # type: ignore[arg-type]
        self.net = self.controls.net
        self.wire = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.wire.bind(f"{folder}/b")
        self.wire.connect(f"{folder}/a")
        self.wire.settimeout(60)
        self.bench.driver.start((1 << 64) - 1)

    def arrive(self, *frames: bytes) -> list[bytes]:
        """Send frames and a last one that passes; those that came before it."""
        ring = self.bench.driver.queues[RX]
        for _ in range(len(frames) + 1):
            ring.add([], [200])
        self.bench.kick(RX)
        got: list[bytes] = []
        last = frame(b"\xff" * 6)
        for each in (*frames, last):
            self.wire.send(each)
        while not got or got[-1] != last:
            found: list[bytes] = []

            def reap(found: list[bytes] = found) -> bool:
                found.extend(used.data[12:] for used in ring.reap())
                return bool(found)

            turn(self.bench.loop, reap)
            got += found
        return got[:-1]

    def command(self, kind: int, command: int, data: bytes) -> bool:
        """By the control queue."""
        ring = self.bench.driver.queues[CONTROL]
        ring.add([bytes([kind, command]) + data], [1])
        self.bench.kick(CONTROL)
        answers: list[bytes] = []

        def answered() -> bool:
            answers.extend(used.data for used in ring.reap())
            return bool(answers)

        turn(self.bench.loop, answered)
        return answers == [b"\0"]

    def send(self, data: bytes) -> None:
        self.bench.driver.queues[TX].add([HEADER, data], [])
        self.bench.kick(TX)

    def close(self) -> None:
        self.wire.close()
        self.bench.close()


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Guest]:
    guest = Guest(tmp_path)
    yield guest
    guest.close()


def test_filters_follow_what_the_driver_says(guest: Guest) -> None:
    """Own address and broadcast pass; the rest as the control queue has it, until a reset."""
    tagged = frame(kind=b"\x81\0\0\5")
    everything = (frame(), frame(OTHER), frame(GROUP), tagged)
    assert guest.arrive(*everything) == [frame()]
    assert guest.command(2, 0, b"\5\0")
    assert guest.arrive(*everything) == [frame(), tagged]
    assert guest.command(1, 0, b"\1\0\0\0" + OTHER + b"\1\0\0\0" + GROUP)
    guest.bench.stop()
    guest.bench.go()
    assert guest.arrive(*everything) == list(everything)
    assert guest.command(1, 0, b"\x41\0\0\0" + bytes(6) * 65 + bytes(4))  # more than are kept
    assert guest.arrive(*everything) == [frame(), frame(OTHER), tagged]
    assert guest.command(0, 4, b"\1")  # no unicast at all
    assert guest.arrive(*everything) == []
    assert guest.command(0, 0, b"\1")  # promiscuous
    assert guest.arrive(*everything) == list(everything)
    assert not guest.command(0, 9, b"\1")
    assert guest.net.metrics()["dropped_filtered"] == 3 + 2 + 1 + 4
    guest.bench.driver.write_status(0)
    guest.bench.driver.start((1 << 64) - 1)
    assert guest.arrive(*everything) == [frame()]


def test_a_driver_without_the_control_queue_gets_everything(guest: Guest) -> None:
    guest.bench.driver.write_status(0)
    guest.bench.driver.start(((1 << 64) - 1) & ~(1 << 18))
    assert guest.arrive(frame(OTHER)) == [frame(OTHER)]


def test_filters_outlast_a_state(guest: Guest, tmp_path: Path) -> None:
    """What a driver wanted is saved, and goes on in the next machine."""
    assert guest.command(1, 0, b"\1\0\0\0" + OTHER + bytes(4))
    guest.bench.stop()
    state = guest.net.save()
    assert state.unicast == (OTHER,)
    (tmp_path / "there").mkdir()
    there = Guest(tmp_path / "there")
    there.bench.driver.write_status(0)
    there.net.restore(state)
    there.bench.driver.start((1 << 64) - 1)
    there.net.restore(state)
    there.net._filter()
    assert there.arrive(frame(OTHER), frame(GROUP)) == [frame(OTHER)]
    there.close()


def test_limits_change_while_it_runs(tmp_path: Path) -> None:
    """What is configured holds; a lifted limit lets what waited through."""
    guest = Guest(tmp_path, ",tx_ops=1/1000000000")
    guest.send(frame())
    guest.send(frame(OTHER))
    assert guest.wire.recv(200) == frame()
    guest.bench.wait(lambda: guest.net.metrics()["throttled"] == 1)
    with pytest.raises(ConfigError, match="tx_ops"):
        guest.controls.limit(tx_ops="none")
    guest.controls.limit(rx_ops="1/1000000000", tx_ops="")
    assert guest.wire.recv(200) == frame(OTHER)
    guest.controls.limit(rx_ops="")
    assert guest.arrive(frame()) == [frame()]
    guest.close()


def test_the_kernel_limits_nothing(guest: Guest) -> None:
    controls = Controls(Interface(tap="tap0", vhost=True), guest.net, guest.bench)  # type: ignore[arg-type]
    with pytest.raises(HostError, match="use tc"):
        controls.limit(rx_ops="5")


def test_its_owner_pulls_the_cable_and_has_it_announced(guest: Guest) -> None:
    """The status field has both (5.1.4), with a new generation; the driver acknowledges one."""

    def status() -> int:
        return int.from_bytes(guest.bench.device.read_config(6, 2), "little")

    assert status() == 1
    changes: list[tuple[Callable[[], None], int]] = [
        (lambda: guest.controls.set_link(up=False), 0),
        (guest.controls.announce, 2),
        (lambda: guest.controls.set_link(up=True), 3),
    ]
    for change, expected in changes:
        before = guest.bench.device.read_config_generation()
        change()
        assert guest.bench.device.read_config_generation() != before
        assert status() == expected
    assert guest.command(3, 0, b"")
    assert status() == 1


def test_an_interface_of_a_clone_shares_nothing() -> None:
    """Addresses count up within the maker's own; so do names and ports of the host."""
    tap = Interface.parse("tap0,mac=02:00:00:ff:ff:fe")
    assert [tap.cloned(n).tap for n in (0, 1)] == ["tap0-0", "tap0-1"]
    assert [tap.cloned(n).mac for n in (0, 1)] == ["02:00:00:ff:ff:ff", "02:00:00:00:00:00"]
    cable = Interface.parse("socket=/run/a,peer=/run/b").cloned(3)
    assert (cable.socket, cable.peer) == ("/run/a-3", "/run/b-3")
    assert cable.mac != Interface.parse("socket=/run/a,peer=/run/b").cloned(3).mac
    assert Interface.parse("ports=2222:22 80").cloned(1).ports == "2224:22 82:80"
