"""Linux uses its devices: `devices.py KERNEL INITRD TRANSPORT user|kernel RING`.

Runs where unmodified kernels run. One machine has all the devices; what its shell is told to send
and receive is compared with what the host sent and received, then again after a pause, and after
the guest has taken its drivers off the devices and put them on again. Prints a JSON object.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rings
import shell
from shell import PATIENCE

from vmm_reference.config import MachineConfig
from vmm_reference.deviceconfig import parse_device
from vmm_reference.machine import Machine

if TYPE_CHECKING:
    from collections.abc import Callable

SIZE = 1 << 19  # bytes of a transfer
STORM = 100  # connections at once
HOST, GUEST = "192.0.2.1", "192.0.2.2"
CID = 5


def ip(*words: str) -> None:
    """Configure the network of this machine."""
    subprocess.run(["ip", *words], check=True)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def receive(listener: socket.socket, into: list[bytes]) -> threading.Thread:
    """Take one connection and all that comes over it, on a thread."""

    def run() -> None:
        listener.settimeout(PATIENCE)
        stream, _ = listener.accept()
        with stream:
            stream.settimeout(PATIENCE)
            parts = []
            while data := stream.recv(1 << 16):
                parts.append(data)
        into.append(b"".join(parts))

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def send_all(stream: socket.socket, data: bytes) -> None:
    """Send data and its end."""
    stream.sendall(data)
    stream.shutdown(socket.SHUT_WR)


class Guest:
    """A machine with a shell on its serial console."""

    def __init__(self, kernel: str, initrd: str, transport: str, devices: list[str]) -> None:
        self.machine = Machine(
            MachineConfig(
                kernel=kernel,
                initrd=initrd,
                cpus=1,
                memory="160M",
                transport=transport,
                cmdline="console=ttyS0 panic=-1 quiet mitigations=off",
                devices=[parse_device(text) for text in devices],
            )
        )
        self.machine.start()
        shell.ready(self.machine)

    def tell(self, command: str) -> str:
        """Run a command in the guest; it has to succeed. Returns what it printed."""
        return shell.tell(self.machine, command)

    def rings(self) -> dict[str, str]:
        """What kind of rings each device has."""
        folder = "/sys/bus/virtio/devices"
        names = self.tell(f"ls {folder}").split()
        return {name: rings.negotiated(self.machine, f"{folder}/{name}") for name in names}

    def start(self, command: str) -> None:
        """Begin a command, without waiting for its end."""
        self.machine.console.send(f"{command}\n")

    def stand_still(self) -> None:
        """Pause for a while."""
        self.machine.pause()
        time.sleep(1)
        self.machine.resume()

    def power_off(self) -> None:
        shell.power_off(self.machine)
        self.machine.close()


def over_network(guest: Guest, data: bytes) -> dict[str, bool]:
    """Ping, and a transfer each way."""
    guest.tell(
        f"ip link set eth0 up && ip addr replace {GUEST}/24 dev eth0 && ping -c 3 -w 30 {HOST}"
    )
    got: list[bytes] = []
    with socket.create_server((HOST, 5000)) as listener:
        thread = receive(listener, got)
        sent = guest.tell(
            f"head -c {SIZE} /dev/urandom >/tmp/out; nc {HOST} 5000 </tmp/out; sha256sum </tmp/out"
        )
        thread.join()
    guest.start("nc -l -p 5001 </dev/null >/tmp/in; echo all of it")
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            with socket.create_connection((GUEST, 5001), 5) as stream:
                stream.sendall(data)
            break
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
    guest.machine.console.expect("all of it", PATIENCE)
    back = guest.tell("sha256sum </tmp/in")
    return {
        "net to host": sent.startswith(digest(got[0])) and len(got[0]) == SIZE,
        "net to guest": back.startswith(digest(data)),
    }


def listen(kind: str, folder: Path, port: int) -> socket.socket:
    """Where the guest's connections to a port of the host arrive."""
    if kind == "kernel":
        listener = socket.socket(socket.AF_VSOCK)
        listener.bind((socket.VMADDR_CID_ANY, port))
    else:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(f"{folder}/v.sock_{port}")
    listener.listen(STORM)
    return listener


def connect(kind: str, folder: Path, port: int) -> socket.socket:
    """A connection to a port of the guest."""
    if kind == "kernel":
        stream = socket.socket(socket.AF_VSOCK)
        stream.settimeout(PATIENCE)
        stream.connect((CID, port))
        return stream
    stream = socket.socket(socket.AF_UNIX)
    stream.settimeout(PATIENCE)
    stream.connect(f"{folder}/v.sock")
    stream.sendall(b"CONNECT %d\n" % port)
    answer = b""
    while not answer.endswith(b"\n"):
        answer += stream.recv(1)
    if not answer.startswith(b"OK "):
        raise RuntimeError(f"the guest refuses the host's connection: {answer!r}")
    return stream


def over_sockets(guest: Guest, data: bytes, folder: Path, kind: str) -> dict[str, bool]:
    """A transfer each way, over connections of each side's making."""
    found = {}
    got: list[bytes] = []
    with listen(kind, folder, 52) as listener:
        thread = receive(listener, got)
        sent = guest.tell(
            f"head -c {SIZE} /dev/urandom >/tmp/out; vsock 2 52 </tmp/out; sha256sum </tmp/out"
        )
        thread.join()
    Path(f"{folder}/v.sock_52").unlink(missing_ok=True)
    found["vsock to host"] = sent.startswith(digest(got[0])) and len(got[0]) == SIZE
    guest.start("vsock - 53 </tmp/out 2>&1 >/tmp/in; echo all of it")
    guest.machine.console.expect("listening", PATIENCE)
    with connect(kind, folder, 53) as client:
        # Both ways at once, then the host half closes.
        writer = threading.Thread(target=send_all, args=(client, data))
        writer.start()
        parts = []
        while part := client.recv(1 << 16):
            parts.append(part)
        writer.join()
    guest.machine.console.expect("all of it", PATIENCE)
    found["vsock both ways: to host"] = sent.startswith(digest(b"".join(parts)))
    there = guest.tell("sha256sum </tmp/in")
    found["vsock both ways: to guest"] = there.startswith(digest(data))
    if kind == "user":
        found["vsock storm"] = storm_of_sockets(guest, folder)
    return found


def storm_of_sockets(guest: Guest, folder: Path) -> bool:
    """Whether many connections at once each bring back what went out, and the end."""
    with listen("user", folder, 54) as listener:
        thread = threading.Thread(target=echo_all, args=(listener,))
        thread.start()
        right = guest.tell(f"vsock 2 54 {STORM}")
        thread.join()
    Path(f"{folder}/v.sock_54").unlink()
    return right == str(STORM)


def echo_all(listener: socket.socket) -> None:
    """Take a storm's connections, then give each back what it sends, and the end."""
    listener.settimeout(PATIENCE)
    streams = [listener.accept()[0] for _ in range(STORM)]
    for stream in streams:
        with stream:
            stream.settimeout(PATIENCE)
            data = b""
            while part := stream.recv(100):
                data += part
            stream.sendall(data)


def resident() -> int:
    """Bytes of this process that are in memory, with those of the guest."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Look again and again until something holds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what} does not come")
        time.sleep(0.1)


def with_balloon(guest: Guest) -> dict[str, bool]:
    """What the guest has used and freed goes back to the host, and what it uses comes again."""
    balloon = guest.machine.device("balloon0")
    guest.tell("head -c 50000000 /dev/zero >/tmp/big; rm /tmp/big")
    full = resident()
    balloon.set_size("64M")
    wait_until(lambda: balloon.balloon.actual == 1 << 14, "a full balloon")
    squeezed = resident()
    balloon.ask_for_statistics()
    wait_until(lambda: balloon.balloon.statistics, "statistics")
    free = balloon.balloon.statistics["free"]
    balloon.set_size(0)
    wait_until(lambda: balloon.balloon.actual == 0, "an empty balloon")
    guest.tell("head -c 50000000 /dev/zero >/tmp/big; rm /tmp/big")
    print(f"resident: {full >> 20}, {squeezed >> 20}, {resident() >> 20} MiB", file=sys.stderr)
    hinted = balloon.balloon.hinted
    balloon.start_hinting()
    wait_until(lambda: balloon.balloon.hints_done, "an answer of free pages")
    return {
        "balloon takes memory": full - squeezed > 30 << 20,
        "balloon statistics": 0 < free < 96 << 20,
        "balloon hints": balloon.balloon.hinted - hinted > 5_000,
    }


def over_ports(guest: Guest, data: bytes, folder: Path) -> dict[str, bool]:
    """A console on a terminal of its own, and a port on a socket, both ways."""
    found = {}
    console = guest.machine.device("console0")
    fd = os.open(console.ends[0].path, os.O_RDWR | os.O_NOCTTY)
    guest.tell("echo hello from hvc0 >/dev/hvc0")
    text = b""
    while not text.endswith(b"hello from hvc0\r\n"):  # behind what the terminal has echoed
        text += os.read(fd, 100)
    found["console to host"] = text.count(b"hello from hvc0") == 1
    guest.start("read line </dev/hvc0; echo got $line")
    os.write(fd, b"typed at hvc0\n")
    guest.machine.console.expect("got typed at hvc0", PATIENCE)
    os.close(fd)
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(PATIENCE)
        client.connect(f"{folder}/agent.sock")
        name = guest.tell("cat /sys/class/virtio-ports/vport*p1/name")
        found["port has its name"] = name == "agent"
        port = guest.tell("basename $(ls -d /sys/class/virtio-ports/vport*p1)")
        guest.tell(f"[ -e /dev/{port} ] || mknod /dev/{port} c "
                   f"$(tr : ' ' </sys/class/virtio-ports/{port}/dev)")  # fmt: skip
        small = data[:200_000]
        # A port lets one opener in at a time.
        guest.start(
            f"exec 3<>/dev/{port}; head -c {len(small)} <&3 >/tmp/in; cat /tmp/in >&3; "
            "exec 3>&-; sha256sum </tmp/in"
        )
        writer = threading.Thread(target=client.sendall, args=(small,))
        writer.start()
        back = b""
        while len(back) < len(small):
            back += client.recv(1 << 16)
        writer.join()
        match = guest.machine.console.expect(r"([0-9a-f]{64})", PATIENCE)
        found["port to guest"] = match[1] == digest(small)
        found["port to host"] = back == small
    return found


def main() -> None:
    """See the module."""
    kernel, initrd, transport, kind, ring = sys.argv[1:]
    rings.offer(ring)
    folder = Path("/tmp/devices")  # sockets live on no file system of the host's
    folder.mkdir()
    ip("tuntap", "add", "dev", "tap0", "mode", "tap", "vnet_hdr")
    ip("addr", "add", f"{HOST}/24", "dev", "tap0")
    ip("link", "set", "tap0", "up")
    data = random.Random(1).randbytes(SIZE)
    guest = Guest(
        kernel, initrd, transport,
        [
            f"net,tap0,mac=02:00:00:00:00:02{',vhost' if kind == 'kernel' else ''}",
            f"vsock,{'vhost' if kind == 'kernel' else f'{folder}/v.sock'},cid={CID}",
            f"console,pty agent=socket:{folder}/agent.sock",
            "balloon,reporting=false",
        ],
    )  # fmt: skip
    parts = [partial(over_network, guest, data), partial(over_sockets, guest, data, folder, kind)]
    if kind == "user":
        parts += [partial(over_ports, guest, data, folder), partial(with_balloon, guest)]
    rounds: dict[str, Callable[[], object]] = {
        "first": lambda: None,
        "after a pause": guest.stand_still,
        "after a reset": lambda: guest.tell(REBIND),
    }
    findings: dict[str, Any] = {"rings": guest.rings()}
    for name, before in rounds.items():
        before()
        found = findings[name] = {}
        for part in parts:
            start = time.monotonic()
            found |= part()
            took = time.monotonic() - start
            print(f"{name}, {part.func.__name__}: {took:.1f} s", file=sys.stderr)
    guest.power_off()
    print(json.dumps(findings))


# Takes every device but disks from its driver, which resets it, and gives it back.
REBIND = (
    "for kind in net:virtio_net vsock:vmw_vsock_virtio_transport console:virtio_console "
    "balloon:virtio_balloon; do "
    "for device in /sys/bus/virtio/drivers/${kind#*:}/virtio*; do name=${device##*/}; "
    "echo $name >/sys/bus/virtio/drivers/${kind#*:}/unbind && "
    "echo $name >/sys/bus/virtio/drivers/${kind#*:}/bind || exit; done; done"
)


if __name__ == "__main__":
    main()
