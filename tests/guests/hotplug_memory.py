"""Linux's memory grows and shrinks: `hotplug_memory.py KERNEL INITRD TRANSPORT`.

Runs where unmodified kernels run. A module of ACPI and a virtio memory device come and go while the
guest runs, which has to notice by itself; what is written there outlives a snapshot, and a reset
finds as much again. Prints a JSON object.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from shell import PATIENCE, ready, tell

from vm_memory.looking import data_ranges
from vmm_reference.config import MachineConfig
from vmm_reference.devices.mem import Memory
from vmm_reference.machine import Machine
from vmm_reference.outcome import Outcome

MIB = 1 << 20


def total(machine: Machine) -> int:
    """What the guest's kernel manages, in MiB."""
    return int(tell(machine, "awk '/MemTotal/ {print $2}' /proc/meminfo")) // 1024


def grown(machine: Machine, base: int, by: int) -> bool:
    """Wait until the guest has so many MiB more than at first, give or take what it keeps books by.

    It is never told to look.
    """
    low, high = (base + by - by // 16) * 1024, (base + by + 1) * 1024
    memory = "$(awk '/MemTotal/ {print $2}' /proc/meminfo)"
    return tell(machine, f"n=0; until m={memory}; [ $m -ge {low} -a $m -le {high} ] || "
                "[ $n = 300 ]; do n=$((n+1)); usleep 100000; done; "
                f"[ $m -ge {low} -a $m -le {high} ] && echo yes || echo no") == "yes"  # fmt: skip


def behind(machine: Machine) -> int:
    """What the host spends on memory above 4 GiB, in bytes."""
    assert machine._board is not None
    return sum(size for at, size in data_ranges(machine._board.memory) if at >= 4 << 30)


def main(kernel: str, initrd: str, transport: str) -> None:
    """See the module."""
    found: dict[str, Any] = {}
    config = MachineConfig(
        kernel=kernel, initrd=initrd, transport=transport, memory="192M", max_memory="704M",
        devices=[Memory("1G", node=1)],
        cmdline="console=ttyS0 quiet panic=-1 mitigations=off memhp_default_state=online_movable",
    )  # fmt: skip
    with Machine(config) as machine:
        ready(machine)
        base = total(machine)
        words = tell(machine, "dmesg | grep 'SRAT.*hotplug' | sed 's/.*SRAT: //'")
        found["announced"] = words.splitlines()
        slot = machine.add_memory("128M")
        found["module came"] = grown(machine, base, 128)
        machine.resize_memory("256M", timeout=PATIENCE)
        found["memory came"] = grown(machine, base, 384)
        node = "awk '/MemTotal/ {print $4}' /sys/devices/system/node/node1/meminfo"
        found["on its node"] = 240 <= int(tell(machine, node)) // 1024 <= 256
        # File pages go to movable memory, which is what has come.
        tell(machine, "dd if=/dev/urandom of=/x bs=1M count=24 2>/dev/null")
        digest = tell(machine, "sha256sum /x")
        found["used"] = behind(machine) >= 24 * MIB
        machine.snapshot("/tmp/hotplug-snapshot")
    with Machine.restore("/tmp/hotplug-snapshot") as machine:
        machine.console.send("\n")
        found["same after a restore"] = tell(machine, "sha256sum /x") == digest
        found["as much after a restore"] = grown(machine, base, 384)
        tell(machine, "rm /x; echo 3 >/proc/sys/vm/drop_caches")
        machine.resize_memory("128M", timeout=PATIENCE)
        found["memory went"] = grown(machine, base, 256)
        machine.remove_memory(slot, timeout=PATIENCE)
        found["module went"] = grown(machine, base, 128)
        found["config"] = [list(machine.config.memory_modules), machine.config.memory >> 20]
        machine.console.send("reboot -f\n")
        deadline = time.monotonic() + PATIENCE
        while not machine.resets and time.monotonic() < deadline:
            time.sleep(0.1)
        ready(machine)
        found["as much after a reset"] = grown(machine, base, 128)
        found["slot"] = machine.add_memory("128M")
        found["module came again"] = grown(machine, base, 256)
        machine.resize_memory("0", timeout=PATIENCE)
        found["all memory went"] = grown(machine, base, 128)
        found["left behind"] = behind(machine) < 16 * MIB
        found["metrics"] = machine.metrics()["memory0"]["plugged_bytes"]
        machine.console.send("poweroff -f\n")
        found["off"] = machine.wait(PATIENCE) is Outcome.POWER_OFF
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
