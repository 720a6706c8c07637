"""A guest under load is moved, by ours and by QEMU: `moves.py KERNEL INITRD LIMIT ROUNDS`.

Runs where unmodified kernels run, as root. Both have two vCPUs, virtio-net on a tap of the same
bridge, and the same kernel, initrd and load (`moves_load.c`): memory that is written all the time,
and a datagram each millisecond to this host, whose longest silence is measured here by the host's
clock. Prints a JSON object a move, one a line, and `done` behind the last.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from typing import Any

PATIENCE = 100.0
HOST, GUEST = "192.0.2.1", "192.0.2.2"
MEMORY = 192  # MiB
CMDLINE = "console=ttyS0 panic=-1 quiet mitigations=off"


def ip(*words: str) -> None:
    """Configure the network of this machine."""
    subprocess.run(["ip", *words], check=True)


class Ears:
    """Hears the guest's ticks."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind((HOST, 5000))
        self._last = time.monotonic()
        self.gap = 0.0
        self.heard = 0
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            self._socket.recv(64)
            now = time.monotonic()
            self.gap = max(self.gap, now - self._last)
            self._last = now
            self.heard += 1

    def settle(self) -> float:
        """The longest gap since the last call, once ticks have come for a while."""
        before = self.heard
        deadline = time.monotonic() + PATIENCE
        while self.heard < before + 300:
            if time.monotonic() > deadline:
                raise RuntimeError("the guest is silent")
            time.sleep(0.05)
        gap, self.gap = self.gap, 0.0
        return gap


START = f"ip link set eth0 up && ip addr add {GUEST}/24 dev eth0 && load {HOST} 5000 &\n"


class Ours:
    """Two VMMs of this project, each a process; the machine goes from one to the other."""

    def __init__(self, kernel: str, initrd: str) -> None:
        from vmm_reference.api.client import ask, stream

        self._ask, self._stream = ask, stream
        self._count = 0
        self._process = self._vmm(
            "--kernel", kernel, "--initrd", initrd, "--cpus", "2", "--memory", f"{MEMORY}M",
            "--cmdline", CMDLINE, "--device", f"net,tap0,mac={MAC}",
        )  # fmt: skip
        speak(self._process, START)

    def _vmm(self, *arguments: str) -> subprocess.Popen[bytes]:
        self._count += 1
        return subprocess.Popen(
            [sys.executable, "-m", "vmm_reference", "run", "--api-socket", self._api, *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    @property
    def _api(self) -> str:
        return f"/tmp/ours-{self._count}"

    def move(self, limit: int) -> dict[str, float]:
        """To another process; what it cost, in milliseconds."""
        here, api = self._process, self._api
        there = self._vmm("--incoming", "tcp:127.0.0.1:0",
                          "--device", f"net,tap{self._count % 2},mac={MAC}")  # fmt: skip
        assert there.stderr is not None
        said = there.stderr.readline().decode()
        address = said.split()[-1]
        if not address.startswith("tcp:"):
            raise RuntimeError(f"{said}{there.stderr.read().decode()}")
        options = {"address": address, "downtime": limit / 1e3}
        report = next(line["result"] for line in self._stream(api, "PUT", "/migration", options)
                  if "result" in line)  # fmt: skip
        here.wait(PATIENCE)
        self._process = there
        return {"downtime": report["downtime"] * 1e3, "total": report["seconds"] * 1e3,
                "parts": {name: round(report[name] * 1e3) for name in
                          ("pause", "memory", "states", "restore", "start")},
                "rounds": len(report["rounds"])}  # fmt: skip

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


class Qemu:
    """The same with QEMU."""

    def __init__(self, kernel: str, initrd: str) -> None:
        self._arguments = ["-kernel", kernel, "-initrd", initrd, "-append", CMDLINE]
        self._count = 0
        self._process, self._monitor = self._start()
        speak(self._process, START)

    def _start(self, *more: str) -> tuple[subprocess.Popen[bytes], Any]:
        path = f"/tmp/qmp-{self._count}"
        tap = f"tap{2 + self._count % 2}"
        self._count += 1
        process = subprocess.Popen(
            ["qemu-system-x86_64", "-accel", "kvm", "-cpu", "host", "-M", "q35", "-smp", "2",
             "-m", str(MEMORY), "-nodefaults", "-display", "none", "-serial", "stdio",
             "-netdev", f"tap,id=n,ifname={tap},script=no,downscript=no,vhost=off",
             "-device", f"virtio-net-pci,netdev=n,mac={MAC},romfile=",
             "-qmp", f"unix:{path},server=on,wait=off", *self._arguments, *more],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        monitor = socket.socket(socket.AF_UNIX)
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                monitor.connect(path)
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        file = monitor.makefile("rw")
        file.readline()
        self._tell(file, "qmp_capabilities")
        return process, file

    @staticmethod
    def _tell(file: Any, command: str, **arguments: Any) -> Any:
        file.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        file.flush()
        while True:
            answer = json.loads(file.readline())
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                raise RuntimeError(f"qemu: {answer['error']}")

    def move(self, limit: int) -> dict[str, float]:
        """To another process; what it cost, in milliseconds."""
        port = 6000 + self._count
        there, monitor = self._start("-incoming", f"tcp:127.0.0.1:{port}")
        self._tell(self._monitor, "migrate-set-parameters", **{"downtime-limit": limit})
        self._tell(self._monitor, "migrate", uri=f"tcp:127.0.0.1:{port}")
        deadline = time.monotonic() + PATIENCE
        while True:
            state = self._tell(self._monitor, "query-migrate")
            if state.get("status") == "completed":
                break
            if state.get("status") == "failed" or time.monotonic() > deadline:
                raise RuntimeError(f"qemu: {state}")
            time.sleep(0.1)
        self._tell(self._monitor, "quit")
        self._process.wait(PATIENCE)
        self._process, self._monitor = there, monitor
        return {"downtime": state["downtime"], "total": state["total-time"],
                "rounds": state["ram"]["dirty-sync-count"]}  # fmt: skip

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()


MAC = "02:00:00:00:00:02"


def speak(process: subprocess.Popen[bytes], line: str) -> None:
    """Wait for the guest's shell, and type a line."""
    assert process.stdout is not None
    assert process.stdin is not None
    text = b""
    while b"guest:" not in text:
        more = os.read(process.stdout.fileno(), 4096)
        if not more:
            raise RuntimeError(f"the guest does not come up: {text[-300:]!r}")
        text += more
    process.stdin.write(line.encode())
    process.stdin.flush()
    threading.Thread(target=drain, args=(process.stdout.fileno(),), daemon=True).start()


def drain(fd: int) -> None:
    """Nobody reads what the guest prints from here on, and it must not wait for that."""
    while os.read(fd, 4096):
        pass


def main(kernel: str, initrd: str, limit: str, rounds: str) -> None:
    """Go through all moves, of so many milliseconds of allowed downtime."""
    ip("link", "set", "lo", "up")
    ip("link", "add", "br0", "type", "bridge")
    ip("addr", "add", f"{HOST}/24", "dev", "br0")
    ip("link", "set", "br0", "up")
    for number in range(4):
        ip("tuntap", "add", "dev", f"tap{number}", "mode", "tap", "vnet_hdr")
        ip("link", "set", f"tap{number}", "master", "br0", "up")
    ears = Ears()
    for name, kind in (("ours", Ours), ("qemu", Qemu)):
        try:
            vmm = kind(kernel, initrd)
        except (OSError, RuntimeError) as error:
            tell({"vmm": name, "failed": str(error)})
            continue
        try:
            for number in range(int(rounds) + 1):
                ears.settle()
                quiet = ears.settle()
                cost = vmm.move(int(limit))
                tell({"vmm": name, "round": number, "quiet": quiet * 1e3,
                      "gap": ears.settle() * 1e3, **cost})  # fmt: skip
        except (OSError, RuntimeError) as error:
            tell({"vmm": name, "failed": str(error)})
        finally:
            vmm.close()
    print("done", flush=True)


def tell(move: dict[str, object]) -> None:
    """Say what came of a move."""
    print(json.dumps(move), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
