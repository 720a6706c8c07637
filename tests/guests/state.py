"""Linux is saved and comes back: `state.py KERNEL INITRD FOLDER ROUNDS`.

Runs where unmodified kernels run. A guest under load, a ticker and a loop that hashes its memory,
is saved while it runs, its machine ends, and another one goes on from the folder, in each way in
turn. After each the load is looked at, the disk written and read, and the clock compared. Prints a
JSON array of findings, one object a restore.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from vmm_reference.config import Drive, MachineConfig
from vmm_reference.machine import Machine
from vmm_reference.outcome import Outcome

PATIENCE = 200.0
WAYS = ("copy-on-write", "on-demand", "eager")
LOAD = (
    "dd if=/dev/urandom of=/tmp/data bs=64k count=32 2>/dev/null; md5sum /tmp/data >/tmp/sum",
    "(while usleep 1000; do cat /proc/uptime; done >/tmp/ticks) &",
    "(while md5sum -cs /tmp/sum; do echo; done >/tmp/rounds; echo >/tmp/bad) &",
)
COMPLAINTS = "grep -iE 'lockup|stall|unstable|BUG:|hung' || true"


def tell(machine: Machine, command: str) -> str:
    """Run a command in the guest; it has to succeed. Returns what it printed."""
    machine.console.send(f"{command}\necho end-$?-end\n")
    match = machine.console.expect(r"(?s)(.*)end-(\d+)-end", PATIENCE)
    if match[2] != "0":
        raise RuntimeError(f"{command!r} exits with {match[2]}: {match[1][-500:]}")
    return match[1].strip()


def lines(machine: Machine, name: str) -> int:
    """How many lines a file of the load has by now."""
    return int(tell(machine, f"wc -l </tmp/{name}"))


def look(machine: Machine, before: dict[str, int], number: int) -> dict[str, Any]:
    """Whether the load goes on, the disk works, and the kernel is content."""
    deadline = time.monotonic() + PATIENCE
    while any(lines(machine, name) <= before[name] for name in before):
        if time.monotonic() > deadline:
            raise RuntimeError(f"the load stands still at {before}")
    disk = f"dd if=/tmp/data of=/dev/vda bs=64k seek={number} conv=fsync 2>/dev/null"
    back = f"dd if=/dev/vda bs=64k skip={number} count=32 iflag=direct 2>/dev/null | md5sum"
    wanted = tell(machine, "cut -c1-32 /tmp/sum")
    tell(machine, f"{disk}; echo 3 >/proc/sys/vm/drop_caches")
    gaps = "awk '{d = $1 - l; if (NR > 1 && d > m) m = d; l = $1} END {print m}' /tmp/ticks"
    return {
        "disk": tell(machine, back)[:32] == wanted,
        "memory": tell(machine, "ls /tmp | grep -c bad || true") == "0",
        "complaints": tell(machine, f"dmesg | {COMPLAINTS}"),
        "gap": float(tell(machine, gaps)),
        "uptime": float(tell(machine, "cut -d' ' -f1 /proc/uptime")),
    }


def main(kernel: str, initrd: str, folder: str, rounds: str) -> None:
    """Go through all ways, so many times."""
    image = Path(folder) / "state.img"
    image.write_bytes(bytes(8 << 20))
    config = MachineConfig(
        kernel=kernel, initrd=initrd, drives=[Drive(str(image))], cpus=2, memory="128M",
        cmdline="console=ttyS0 pci=off panic=-1 quiet",
    )  # fmt: skip
    findings: list[dict[str, Any]] = []
    with Machine(config) as machine:
        machine.console.expect(r"guest:", PATIENCE)
        machine.console.send("stty -echo; PS1=\n")
        for command in ("true", *LOAD, "dmesg -c >/dev/null"):
            tell(machine, command)
        before = {name: lines(machine, name) for name in ("ticks", "rounds")}
        machine.snapshot(Path("/tmp/0"), track=True)
    for number in range(len(WAYS) * int(rounds)):
        how = WAYS[number % len(WAYS)]
        track = bool(number % 2)
        source = Path(f"/tmp/{number}")
        restored = Machine.restore(source, how, track=track)
        with restored as machine:
            finding = look(machine, before, number)
            findings.append({"how": how, **finding})
            before = {name: lines(machine, name) for name in before}
            machine.snapshot(
                Path(f"/tmp/{number + 1}"), base=source if track else None, track=not track
            )
            if number == len(WAYS) * int(rounds) - 1:
                machine.console.send("poweroff -f\n")
                findings[-1]["off"] = machine.wait(PATIENCE) is Outcome.POWER_OFF
    print(json.dumps(findings))


if __name__ == "__main__":
    main(*sys.argv[1:])
