"""Ten copies of one Linux: `clones.py KERNEL INITRD`.

Runs where unmodified kernels run, as root. A guest is saved while it runs and copied by
`Machine.fork`, and by `vmm clone`. Each copy has to be alive, with random numbers, a generation
identifier, a network, a context identifier and a disk of its own. Prints what was found as JSON.
"""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from shell import PATIENCE, power_off, ready, tell
from standstill import GUEST_OPTIONS

from vmm_reference.config import MachineConfig
from vmm_reference.deviceconfig import parse_device
from vmm_reference.machine import Machine

COUNT = 10
HOST = "192.0.2.1"
CID = 5
RANDOM = "head -c 16 /dev/urandom | od -An -tx1 | tr -d ' '"
RUN = Path(tempfile.mkdtemp(prefix="clones-"))
START = time.monotonic()


def ip(*words: str) -> str:
    """Configure the network of this machine."""
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


def done(what: str) -> None:
    """Tell how far this is, and when."""
    print(f"{time.monotonic() - START:.1f} s: {what}", file=sys.stderr, flush=True)


def build_network() -> None:
    """A bridge with a tap for each machine."""
    ip("link", "add", "br0", "type", "bridge")
    ip("addr", "add", f"{HOST}/24", "dev", "br0")
    for name in ["tap0", *(f"tap0-{number}" for number in range(COUNT))]:
        ip("tuntap", "add", "dev", name, "mode", "tap", "vnet_hdr")
        ip("link", "set", name, "master", "br0", "up")
    ip("link", "set", "br0", "up")


def hear(family: int, address: Any) -> dict[str, str]:
    """Who says what to a socket from now on: the peer's address by its first line."""
    heard: dict[str, str] = {}
    listener = socket.socket(family)
    listener.bind(address)
    listener.listen(COUNT)

    def serve() -> None:
        while True:
            stream, (peer, _) = listener.accept()
            with stream, stream.makefile() as lines:
                heard[lines.readline().strip()] = str(peer)
                stream.sendall(b"heard\n")

    threading.Thread(target=serve, daemon=True).start()
    return heard


def look(number: int, clone: Machine) -> dict[str, Any]:
    """What a clone has, as the guest sees it; and it uses its devices."""
    driver = "/sys/bus/virtio/drivers/virtio_net"
    tell(clone, f"n={number}; dev=$(basename $(ls -d {driver}/virtio*)); "
         f"echo $dev >{driver}/unbind; echo $dev >{driver}/bind; "
         f"ip link set eth0 up && ip addr add 192.0.2.{number + 10}/24 dev eth0")  # fmt: skip
    words = tell(
        clone,
        f"cat /sys/class/net/eth0/address; {RANDOM}; "
        "dmesg | grep -c 'crng reseeded due to virtual machine fork'; "
        "head -c 6 /dev/vda; echo; "
        "head -c 6 /dev/vdb; echo; echo $n | dd of=/dev/vdb oflag=direct bs=512 conv=sync "
        "2>/dev/null; head -n 1 /dev/vdb; "
        f"echo $n | nc {HOST} 5000; echo $n | vsock 2 52",
    ).split("\n")
    names = ("mac", "random", "reseeded", "disk", "parent", "own", "tcp", "vsock")
    found: dict[str, Any] = dict(zip(names, map(str.strip, words), strict=True))
    done(f"clone {number} has been looked at")
    return found | {"generation": clone.device("vmgenid0").identifier.hex()}


def by_fork(parent: Machine) -> list[dict[str, Any]]:
    """Ten copies in this process, all running before the first is looked at."""
    heard = hear(socket.AF_INET, (HOST, 5000)), hear(socket.AF_VSOCK, (socket.VMADDR_CID_ANY, 52))
    tell(parent, "echo parent | dd of=/dev/vdb oflag=direct bs=512 conv=sync 2>/dev/null")
    clones = parent.fork(COUNT, RUN / "forked")
    done("forked")
    tell(parent, "echo behind | dd of=/dev/vdb oflag=direct bs=512 conv=sync 2>/dev/null")
    try:
        for clone in clones:
            clone.start()
        done("all run")
        found = [look(number, clone) for number, clone in enumerate(clones)]
        neighbours = {row["dst"]: row.get("lladdr") for row in json.loads(ip("-j", "neigh"))}
        for number, row in enumerate(found):
            peer = heard[0][str(number)]
            row |= {"address": peer, "seen": neighbours[peer], "cid": heard[1][str(number)]}
            row |= {"alive": tell(clones[number], "echo $n")}
        if (said := tell(parent, "head -n 1 /dev/vdb")) != "behind":
            raise RuntimeError(f"the machine's own disk has {said!r}")
        for clone in clones:
            power_off(clone)
        done("all are off")
    finally:
        for clone in clones:
            clone.close()
    return found


def by_command(parent: Machine) -> list[dict[str, str]]:
    """Ten more by `vmm clone`, whose guests say by themselves that they are alive: their logs."""
    tell(parent, f"while :; do {RANDOM}; usleep 300000; done >/dev/console & usleep 1000000")
    parent.snapshot(RUN / "saved")
    before = parent.console.output[-500:]
    parent.close()
    done("saved")
    out = RUN / "out"
    command = [sys.executable, "-m", "vmm_reference", "clone", str(RUN / "saved"),
               "-n", str(COUNT), "--run-folder", str(out)]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        logs = [out / f"{number}.log" for number in range(COUNT)]
        deadline = time.monotonic() + PATIENCE
        while any(len(words(log)) < 3 for log in logs):
            if process.poll() is not None or time.monotonic() > deadline:
                process.terminate()
                said = f"status {process.wait(PATIENCE)}: {process.communicate()[1]}"
                tails = {log.name: log.read_bytes()[-500:] for log in logs if log.exists()}
                raise RuntimeError(f"{said}, {tails}; the machine before: {before!r}")
            time.sleep(0.1)
        done("all have said something")
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=PATIENCE)[1]
    done("all have ended")
    return [{"last": words(log)[-1], "said": said} for log in logs]


def words(log: Path) -> list[str]:
    """Whole random numbers that a clone's guest has printed."""
    return re.findall(r"\b[0-9a-f]{32}\n", log.read_text()) if log.exists() else []


def main(kernel: str, initrd: str) -> None:
    """Boot one, and copy it."""
    build_network()
    image = RUN / "disk.img"
    image.write_bytes(b"common".ljust(8 << 20, b"\0"))
    written = RUN / "written.img"
    written.write_bytes(bytes(8 << 20))
    config = MachineConfig(
        kernel=kernel,
        initrd=initrd,
        memory="192M",
        transport="pci",
        cmdline=f"console=ttyS0 panic=-1 quiet mitigations=off {GUEST_OPTIONS}",
        devices=[
            parse_device(text)
            for text in (
                f"drive,{image},ro",
                f"drive,{written}",
                "net,tap0,mac=02:00:00:00:01:00",
                "vmgenid",
                f"vsock,vhost,cid={CID}",
            )
        ],
    )
    with Machine(config) as parent:
        ready(parent)
        done("booted")
        generation = parent.device("vmgenid0").identifier.hex()
        print(json.dumps([generation, by_fork(parent), by_command(parent)]))


if __name__ == "__main__":
    main(*sys.argv[1:])
