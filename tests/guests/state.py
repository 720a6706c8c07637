"""Linux is saved, restored and moved under load: `state.py KERNEL INITRD FIO TRANSPORT KIND STEPS`.

Runs where unmodified kernels run, as root: it makes two network namespaces with a VMM in each,
joined by a bridge. A guest with every device there is, two vCPUs and a load that proves what it
reads (`load.c`, and fio from the disk FIO) goes from one to the other and back by each of the
steps, named with commas: `eager`, `copy-on-write` and `on-demand` by a snapshot, where every second
one is a difference; `pre-copy`, `post-copy`, `switched` and `hand-over` by a migration; `pause`
stays where it is. After each of them the load has to go on without an error, its TCP connection
unbroken, every device is used, and the kernel's log is read. KIND is who serves packets: `user` or
`kernel` (vhost). Prints a JSON array of findings.
"""

from __future__ import annotations

import json
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, ClassVar

from fio import MOUNT, command
from standstill import GUEST_OPTIONS, kernel_stacks

HERE = Path(__file__).parent
PATIENCE = 200.0
HOST, GUEST = "192.0.2.1", "192.0.2.2"
LINK = {"a": "198.51.100.1", "b": "198.51.100.2"}  # between the VMMs
RUN = Path(tempfile.mkdtemp(prefix="state-"))  # images, sockets and snapshots
CID = {"a": 5, "b": 5}
MOVES: dict[str, dict[str, Any]] = {
    "pre-copy": {"downtime": 0.3, "streams": 2},
    "post-copy": {"post_copy": 0},
    "switched": {"post_copy": 1, "downtime": 1e-3, "compress": True},
    "hand-over": {"local": True},
}
# One run after the other on a disk of its own; a line for each of them, with its exit status.
FIO = (
    f"(while :; do {command({'fio': '/dev/vdc'}, '1m', '/tmp/fio')}; echo $? >>/tmp/fio.runs; "
    "sleep 1; done) </dev/null 2>/dev/null & true"
)
FIO_COUNTERS = "touch /tmp/fio.runs; wc -l </tmp/fio.runs; grep -vc '^0$' /tmp/fio.runs || true"
COMPLAINTS = "grep -iE 'lockup|stall|unstable|BUG:|WARNING|hung|call trace|error'"


def ip(*words: str) -> None:
    """Configure the network of this machine."""
    subprocess.run(["ip", *words], check=True)


def build_network() -> None:
    """A bridge, and for each VMM a namespace whose own bridge joins a tap with the other's."""
    ip("link", "add", "br0", "type", "bridge")
    ip("addr", "add", f"{HOST}/24", "dev", "br0")
    ip("link", "set", "br0", "up")
    for name, link in LINK.items():
        ip("netns", "add", name)
        ip("link", "add", f"to-{name}", "type", "veth", "peer", "name", "out", "netns", name)
        ip("link", "set", f"to-{name}", "master", "br0", "up")
        inside = ("-n", name)
        ip(*inside, "link", "set", "lo", "up")
        ip(*inside, "link", "add", "br0", "type", "bridge")
        ip(*inside, "addr", "add", f"{link}/24", "dev", "br0")
        ip(*inside, "tuntap", "add", "dev", "tap0", "mode", "tap", "vnet_hdr")
        for end in ("out", "tap0"):
            ip(*inside, "link", "set", end, "master", "br0", "up")
        ip(*inside, "link", "set", "br0", "up")


def echo(listener: socket.socket) -> None:
    """Send back whatever comes over any connection, for ever."""

    def serve(stream: socket.socket) -> None:
        with stream:
            try:
                while data := stream.recv(1 << 16):
                    stream.sendall(data)
            except OSError:
                pass  # the guest's end is gone

    def accept() -> None:
        while True:
            stream = listener.accept()[0]
            threading.Thread(target=serve, args=(stream,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()


class Remote:
    """A `host.Host` in its process and its network namespace."""

    everyone: ClassVar[list[Remote]] = []

    def __init__(self, name: str, transport: str, kind: str) -> None:
        self.everyone.append(self)
        self.name = name
        self._asked = ""
        self.folder = RUN / name
        self.folder.mkdir()
        vhost = ",vhost" if kind == "kernel" else ""
        engine = "sync" if vhost else "python"
        self.devices = [
            f"drive,{RUN}/first.img,engine={engine}",
            f"drive,{RUN}/fio.img,ro",
            f"drive,{RUN}/third.img,engine={engine}",
            f"net,tap0,mac=02:00:00:00:00:02{vhost}",
            f"vsock,{'vhost' if vhost else self.folder / 'v.sock'},cid={CID[name]}",
            f"console,pty agent=socket:{self.folder}/agent.sock",
            "balloon,reporting=false",
            "vmgenid",
        ]
        self._process = subprocess.Popen(
            ["ip", "netns", "exec", name, sys.executable, HERE / "host.py"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        if not vhost:
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(f"{self.folder}/v.sock_52")
            listener.listen()
            echo(listener)

    def __call__(self, method: str, *arguments: object) -> Any:
        """Do something there."""
        self.begin(method, *arguments)
        return self.end()

    def begin(self, method: str, *arguments: object) -> None:
        """Ask for something."""
        assert self._process.stdin is not None
        self._asked = method
        self._process.stdin.write(json.dumps([method, *arguments]) + "\n")
        self._process.stdin.flush()

    def end(self) -> Any:
        """The answer to what was asked for."""
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], 1.5 * PATIENCE)[0]:
            for host in self.everyone:
                host.say_where()
            raise RuntimeError(f"{self.name} does not answer to {self._asked}")
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else {"error": "it died"}
        if "error" in answer:
            raise RuntimeError(f"{self.name}: {answer['error']}")
        return answer["done"]

    def say_where(self) -> None:
        """Print the stacks of all its threads, in the kernel and in Python."""
        print(f"{self.name} was asked for {self._asked}", file=sys.stderr)
        for line in kernel_stacks(self._process.pid):
            print(line, file=sys.stderr, flush=True)
        self._process.send_signal(signal.SIGUSR1)
        time.sleep(2)

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(PATIENCE)


def look(host: Remote) -> dict[str, dict[str, Any]]:
    """The counters of the load; the gaps are those since the last look."""
    counters, runs, failed = host("tell", f"load look; {FIO_COUNTERS}").splitlines()
    found: dict[str, dict[str, Any]] = json.loads(counters)
    return {**found, "fio": {"rounds": int(runs), "errors": int(failed)}}


def load_goes_on(host: Remote, before: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Wait until each worker has done something, and add up what it found wrong."""
    deadline = time.monotonic() + PATIENCE
    gap = 0.0
    while True:
        now = look(host)
        gap = max(gap, now["ticks"]["gap"])
        standing = [
            name for name in now
            if now[name]["rounds"] < before[name]["rounds"] + (1 if name == "fio" else 3)
        ]  # fmt: skip
        if not standing:
            break
        if time.monotonic() > deadline:
            raise RuntimeError(f"{standing} stand still: {before}, {now}")
    return {
        "errors": {name: row["errors"] for name, row in now.items() if row["errors"]},
        "restarts": now["tcp"]["restarts"] - before["tcp"]["restarts"],
        "gap": gap,
    }


def over_port(host: Remote) -> bool:
    """Whether the named port carries bytes each way."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(PATIENCE)
        client.connect(f"{host.folder}/agent.sock")
        host.begin("tell", 'read line <&3; echo "back: $line" >&3; echo "$line"')
        client.sendall(b"through a port\n")
        back = b""
        while not back.endswith(b"\n"):
            back += client.recv(100)
        return host.end() == "through a port" and back == b"back: through a port\n"


def devices_work(host: Remote, transport: str) -> dict[str, Any]:
    """Use what the load does not."""
    since = time.time()
    words = host(
        "tell",
        f"dmesg -c | {COMPLAINTS} | head -c 500; echo +; "
        "head -c 32 /dev/hwrng | wc -c; cat /sys/class/rtc/rtc0/since_epoch",
    ).split("+")
    random, clock = words[-1].split()
    found = {
        "complaints": words[0].strip(),
        "rng": random == "32",
        "rtc": since - 2 < int(clock) < time.time() + 2,
        "terminal": host("terminal"),
        "port": over_port(host),
    }
    host("balloon", 32 << 20)
    wait_for_balloon(host, 32 << 20)
    wait_for_balloon(host, 0)
    found["balloon"] = True
    if transport == "pci":
        name = host("plug", str(RUN / "second.img"))
        host("tell", "n=0; until [ -b /dev/vdd ] || [ $n = 300 ]; do n=$((n+1)); usleep 50000; done"
             "; dd if=/dev/vdd bs=64k count=1 2>/dev/null | cmp -n 65536 - /dev/zero")  # fmt: skip
        host("unplug", name)
        host("set_cpus", 3)
        present = "/sys/devices/system/cpu/cpu2"
        host("tell", f"n=0; until [ -e {present}/online ] || [ $n = 300 ]; do n=$((n+1)); "
             f"usleep 50000; done; echo 1 >{present}/online; taskset 4 true")  # fmt: skip
        host("set_cpus", 2)
        found["hotplug"] = True
    return found


def wait_for_balloon(host: Remote, size: int) -> None:
    """Until the guest has given so much, or has it all back."""
    deadline = time.monotonic() + PATIENCE
    while host("balloon", size) != size >> 12:
        if time.monotonic() > deadline:
            raise RuntimeError("the balloon does not get its size")


def move(here: Remote, there: Remote, step: str, number: int, base: str | None) -> dict[str, Any]:
    """Let the machine go from one VMM to the other."""
    if step == "pause":
        # Longer than the guest's watchdogs would stand, if it saw the time pass.
        here("tell", "echo 2 >/proc/sys/kernel/watchdog_thresh")
        here("pause")
        time.sleep(6)
        here("resume")
        here("tell", "echo 10 >/proc/sys/kernel/watchdog_thresh")
        return {}
    if step in MOVES:
        where = f"unix:{RUN}/move" if step == "hand-over" else f"tcp:{LINK[there.name]}:0"
        address = there("wait_for", where, there.devices)
        there.begin("receive")
        report: dict[str, Any] = here("migrate", address, MOVES[step])
        there.end()
        return report
    folder = f"{RUN}/snapshot-{number}"
    here("pause")
    here("snapshot", folder, base, base is None)
    here("close")
    there("restore", folder, step, there.devices, base is None)
    return {}


def main(kernel: str, initrd: str, fio_disk: str, transport: str, kind: str, steps: str) -> None:
    """Go through all steps."""
    build_network()
    for name in ("first", "second", "third"):
        (RUN / f"{name}.img").write_bytes(bytes(8 << 20))
    (RUN / "fio.img").symlink_to(fio_disk)
    here, there = (Remote(name, transport, kind) for name in "ab")
    echo(socket.create_server((HOST, 5000)))
    if kind == "kernel":
        listener = socket.socket(socket.AF_VSOCK)
        listener.bind((socket.VMADDR_CID_ANY, 52))
        listener.listen()
        echo(listener)
    fields = {
        "kernel": kernel, "initrd": initrd, "cpus": 2, "memory": "256M",
        "transport": transport, "shared_memory": "hand-over" in steps,
        "cmdline": f"console=ttyS0 panic=-1 quiet mitigations=off {GUEST_OPTIONS}",
        **({"max_cpus": 4} if transport == "pci" else {}),
    }  # fmt: skip
    here("run", here.devices, fields)
    here("tell", f"ip link set eth0 up && ip addr add {GUEST}/24 dev eth0")
    here("tell", "port=$(basename $(ls -d /sys/class/virtio-ports/vport*p1)); "
         "[ -e /dev/$port ] || mknod /dev/$port c $(tr : ' ' </sys/class/virtio-ports/$port/dev); "
         "exec 3<>/dev/$port; dmesg -c >/dev/null")  # fmt: skip
    here("tell", f"load start /dev/vda {HOST} 5000 52; {MOUNT.format('/dev/vdb')}; {FIO}")
    findings: list[dict[str, Any]] = []
    base = None
    for number, step in enumerate(steps.split(",")):
        load_goes_on(here, look(here))
        before, start = look(here), time.monotonic()
        report = move(here, there, step, number, base)
        saved = step not in MOVES and step != "pause"
        base = f"{RUN}/snapshot-{number}" if saved and base is None else None
        moved = time.monotonic() - start
        if step != "pause":
            here, there = there, here
        finding = {"step": step, **load_goes_on(here, before), **devices_work(here, transport)}
        finding |= {"report": report, "moved": moved, "seconds": time.monotonic() - start}
        print(finding, file=sys.stderr, flush=True)
        findings.append(finding)
    here("power_off")
    for host in (here, there):
        host.close()
    print(json.dumps(findings))


if __name__ == "__main__":
    main(*sys.argv[1:])
