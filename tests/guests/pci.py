"""Linux on a PCI bus: `pci.py KERNEL INITRD ROOT`.

Runs where unmodified kernels run. The root file system is on virtio-blk; a second disk is plugged
in, used, resized, exchanged and unplugged while the guest runs, and the guest has to notice by
itself; then everything goes on after a pause, a snapshot and a reset. Prints a JSON object.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from shell import PATIENCE, ready, tell, until

from vmm_reference.config import Drive, MachineConfig
from vmm_reference.machine import Machine
from vmm_reference.outcome import Outcome

MIB = 1 << 20
PROMPT = r"# \x1b?"  # the root disk's shell says nothing else


def same(machine: Machine, disk: str) -> bool:
    """Whether what is written to a disk comes back from it."""
    tell(machine, "dd if=/dev/urandom of=/tmp/x bs=64k count=16 2>/dev/null")
    tell(machine, f"dd if=/tmp/x of={disk} bs=64k conv=fsync 2>/dev/null")
    tell(machine, "echo 3 >/proc/sys/vm/drop_caches")
    return tell(machine, f"cmp -n 1048576 /tmp/x {disk} && echo same") == "same"


def blocks(path: Path) -> int:
    """What the host spends on a file, in bytes."""
    os.sync()
    return path.stat().st_blocks * 512


def main(kernel: str, initrd: str, root: str) -> None:
    """See the module."""
    found: dict[str, Any] = {}
    second, third = Path("/tmp/pci-2.img"), Path("/tmp/pci-3.img")  # tmpfs can punch holes
    for path, size in ((second, 16 * MIB), (third, 8 * MIB)):
        with path.open("wb") as file:
            file.truncate(size)
    config = MachineConfig(
        kernel=kernel, initrd=initrd, drives=[Drive(root)], transport="pci", cpus=2, max_cpus=4,
        memory="256M", cmdline="console=ttyS0 quiet panic=-1 root=/dev/vda",
    )  # fmt: skip
    with Machine(config) as machine:
        ready(machine, PROMPT)
        found["root"] = tell(machine, "readlink -f /sys/block/vda/device")
        found["msix"] = int(tell(machine, "grep -c 'PCI-MSI.*virtio' /proc/interrupts"))
        found["name"] = machine.plug(Drive(str(second), serial="second", queues=2))
        found["plugged"] = until(machine, "[ -b /dev/vdb ]")
        found["serial"] = tell(machine, "cat /sys/block/vdb/serial")
        found["queues"] = tell(machine, "ls /sys/block/vdb/mq").split()
        found["same"] = same(machine, "/dev/vdb")
        used = blocks(second)
        tell(machine, "blkdiscard /dev/vdb")
        found["freed"] = used - blocks(second)
        tell(machine, "echo 'write through' >/sys/block/vdb/cache_type")
        found["cache"] = tell(machine, "cat /sys/block/vdb/cache_type")
        machine.resize_drive("drive1", 32 * MIB)
        found["resized"] = until(machine, "[ $(cat /sys/block/vdb/size) = 65536 ]")
        machine.swap_drive("drive1", str(third))
        found["swapped"] = until(machine, "[ $(cat /sys/block/vdb/size) = 16384 ]")
        machine.pause()
        machine.resume()
        found["same after a pause"] = same(machine, "/dev/vdb")
        machine.unplug("drive1", timeout=PATIENCE)
        found["unplugged"] = until(machine, "[ ! -e /sys/block/vdb ]")
        found["slots"] = tell(machine, "ls /sys/bus/pci/devices").split()
        ged = "awk '/ACPI:Ged/ {print $2 + $3}' /proc/interrupts"
        before = int(tell(machine, ged))
        machine.press_power_button()
        found["button"] = until(machine, f"[ $({ged}) -gt {before} ]")
        machine.set_cpus(4)
        present = "$(cat /sys/devices/system/cpu/present)"
        found["cpus came"] = until(machine, f"[ {present} = 0-3 ]")
        tell(machine, "cd /sys/devices/system/cpu; echo 1 >cpu2/online; echo 1 >cpu3/online; cd /")
        found["cpus work"] = tell(machine, "taskset -p 8 $$ >/dev/null; nproc --all; nproc").split()
        tell(machine, "taskset -p f $$ >/dev/null")
        machine.set_cpus(2, timeout=PATIENCE)
        found["cpus went"] = until(machine, f"[ {present} = 0-1 ]")
        machine.set_cpus(3)
        found["a cpu came again"] = until(machine, f"[ {present} = 0-2 ]")
        tell(machine, "echo 1 >/sys/devices/system/cpu/cpu2/online")
        machine.plug(Drive(str(third)))
        found["plugged again"] = until(machine, "[ -b /dev/vdb ]")
        machine.snapshot("/tmp/pci-snapshot")
    with Machine.restore("/tmp/pci-snapshot") as machine:
        machine.console.send("\n")
        found["same after a restore"] = same(machine, "/dev/vdb")
        machine.unplug("drive1", timeout=PATIENCE)
        found["unplugged after a restore"] = until(machine, "[ ! -e /sys/block/vdb ]")
        machine.console.send("reboot -f\n")
        deadline = time.monotonic() + PATIENCE
        while not machine.resets and time.monotonic() < deadline:
            time.sleep(0.1)
        ready(machine, PROMPT)
        found["resets"] = machine.resets
        found["cpus after a reset"] = tell(machine, "nproc")
        machine.plug(Drive(str(second)))
        found["plugged after a reset"] = until(machine, "[ -b /dev/vdb ]")
        found["same after a reset"] = same(machine, "/dev/vdb")
        found["refused"] = {n: m["refused"] for n, m in machine.metrics().items() if "refused" in m}
        machine.console.send("poweroff -f\n")
        found["off"] = machine.wait(PATIENCE) is Outcome.POWER_OFF
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
