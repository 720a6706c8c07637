"""Linux uses network, sockets and consoles: `devices.py KERNEL INITRD TRANSPORT`.

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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmm_reference.config import MachineConfig
from vmm_reference.deviceconfig import parse_device
from vmm_reference.machine import Machine
from vmm_reference.outcome import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable

PATIENCE = 100.0
SIZE = 1 << 20  # bytes of a transfer
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
                memory="256M",
                transport=transport,
                cmdline="console=ttyS0 panic=-1 quiet mitigations=off",
                devices=[parse_device(text) for text in devices],
            )
        )
        self.machine.start()
        self.machine.console.expect(r"guest:", PATIENCE)
        self.machine.console.send("stty -echo; PS1=\n")
        self.tell("true")

    def tell(self, command: str) -> str:
        """Run a command in the guest; it has to succeed. Returns what it printed."""
        self.machine.console.send(f"{command}; echo end-$?-end\n")
        match = self.machine.console.expect(r"(?s)(.*)end-(\d+)-end", PATIENCE)
        if match[2] != "0":
            raise RuntimeError(f"{command!r} exits with {match[2]}: {match[1][-500:]}")
        return match[1].strip()

    def start(self, command: str) -> None:
        """Begin a command, without waiting for its end."""
        self.machine.console.send(f"{command}\n")

    def stand_still(self) -> None:
        """Pause for a while."""
        self.machine.pause()
        time.sleep(1)
        self.machine.resume()

    def power_off(self) -> None:
        self.machine.console.send("poweroff -f\n")
        if self.machine.wait(PATIENCE) is not Outcome.POWER_OFF:
            raise RuntimeError(f"the guest ended by {self.machine.outcome}")
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


def over_sockets(guest: Guest, data: bytes, folder: Path) -> dict[str, bool]:
    """A transfer each way, over connections of each side's making."""
    found = {}
    got: list[bytes] = []
    path = f"{folder}/v.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{path}_52")
        listener.listen(1)
        thread = receive(listener, got)
        sent = guest.tell(
            f"head -c {SIZE} /dev/urandom >/tmp/out; vsock 2 52 </tmp/out; sha256sum </tmp/out"
        )
        thread.join()
    Path(f"{path}_52").unlink()
    found["vsock to host"] = sent.startswith(digest(got[0])) and len(got[0]) == SIZE
    guest.start("vsock - 53 </tmp/out 2>&1 >/tmp/in")
    guest.machine.console.expect("listening", PATIENCE)
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(PATIENCE)
        client.connect(path)
        client.sendall(b"CONNECT 53\n")
        reader = client.makefile("rb")
        if not reader.readline().startswith(b"OK "):
            raise RuntimeError("the guest refuses the host's connection")
        # Both ways at once, then the host half closes.
        writer = threading.Thread(target=send_all, args=(client, data))
        writer.start()
        back = reader.read()
        writer.join()
    found["vsock both ways: to host"] = sent.startswith(digest(back))
    there = guest.tell("sha256sum </tmp/in")
    found["vsock both ways: to guest"] = there.startswith(digest(data))
    return found


def over_ports(guest: Guest, data: bytes, folder: Path) -> dict[str, bool]:
    """A console on a terminal of its own, and a port on a socket, both ways."""
    found = {}
    console = guest.machine.device("console0")
    fd = os.open(console.ends[0].path, os.O_RDWR | os.O_NOCTTY)
    guest.tell("echo hello from hvc0 >/dev/hvc0")
    text = b""
    while not text.endswith(b"\n"):
        text += os.read(fd, 100)
    found["console to host"] = text.rstrip() == b"hello from hvc0"
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
        guest.start(f"head -c {len(small)} /dev/{port} | tee /dev/{port} | sha256sum")
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
    kernel, initrd, transport = sys.argv[1:]
    folder = Path("/tmp/devices")  # sockets live on no file system of the host's
    folder.mkdir()
    ip("tuntap", "add", "dev", "tap0", "mode", "tap", "vnet_hdr")
    ip("addr", "add", f"{HOST}/24", "dev", "tap0")
    ip("link", "set", "tap0", "up")
    data = random.Random(1).randbytes(SIZE)
    guest = Guest(
        kernel, initrd, transport,
        [
            "net,tap0,mac=02:00:00:00:00:02",
            f"vsock,{folder}/v.sock,cid={CID}",
            f"console,pty agent=socket:{folder}/agent.sock",
        ],
    )  # fmt: skip
    rounds: dict[str, Callable[[], object]] = {
        "first": lambda: None,
        "after a pause": guest.stand_still,
        "after a reset": lambda: guest.tell(REBIND),
    }
    findings: dict[str, Any] = {}
    for name, before in rounds.items():
        start = time.monotonic()
        before()
        found = findings[name] = {}
        found |= over_network(guest, data)
        found |= over_sockets(guest, data, folder)
        found |= over_ports(guest, data, folder)
        print(f"{name}: {time.monotonic() - start:.1f} s", file=sys.stderr)
    guest.power_off()
    print(json.dumps(findings))


# Takes every device but disks from its driver, which resets it, and gives it back.
REBIND = (
    "for kind in net:virtio_net vsock:vmw_vsock_virtio_transport console:virtio_console; do "
    "for device in /sys/bus/virtio/drivers/${kind#*:}/virtio*; do name=${device##*/}; "
    "echo $name >/sys/bus/virtio/drivers/${kind#*:}/unbind && "
    "echo $name >/sys/bus/virtio/drivers/${kind#*:}/bind || exit; done; done"
)


if __name__ == "__main__":
    main()
