"""A machine of virtio-mmio devices is controlled while it runs: `control.py KERNEL INITRD`.

Runs where unmodified kernels run. What the owner does the guest has to notice by itself: an image
that grows or is exchanged, a balloon's target, processors, the power button; again after a pause
and after a reset. Prints a JSON object.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from shell import PATIENCE, ready, tell, until

from vmm_reference.config import Drive, MachineConfig
from vmm_reference.deviceconfig import parse_device
from vmm_reference.machine import Machine
from vmm_reference.outcome import Outcome

MIB = 1 << 20


def controlled(machine: Machine, images: list[Path]) -> dict[str, bool]:
    """What the guest noticed of each thing that was done."""
    found = {}
    machine.resize_drive("drive0", 24 * MIB)
    found["resized"] = until(machine, "[ $(cat /sys/block/vda/size) = 49152 ]")
    machine.swap_drive("drive0", str(images[1]))
    found["swapped"] = until(machine, "[ $(head -c 6 /dev/vda) = second ]")
    machine.swap_drive("drive0", str(images[0]))
    found["swapped back"] = until(machine, "[ $(head -c 5 /dev/vda) = first ]")
    free = "$(awk '/MemFree/ {print $2}' /proc/meminfo)"
    before = int(tell(machine, f"echo 3 >/proc/sys/vm/drop_caches; echo {free}"))
    balloon = machine.device("balloon0")
    balloon.set_size("64M")
    found["inflated"] = until(machine, f"[ {free} -lt {before - 60 * 1024} ]")
    balloon.set_size(0)
    found["deflated"] = until(machine, f"[ {free} -gt {before - 8 * 1024} ]")
    present = "$(cat /sys/devices/system/cpu/present)"
    machine.set_cpus(2)
    found["a cpu came"] = until(machine, f"[ {present} = 0-1 ]")
    machine.set_cpus(1, timeout=PATIENCE)
    found["a cpu went"] = until(machine, f"[ {present} = 0 ]")
    interrupts = "$(awk '/ACPI:Ged/ {print $2}' /proc/interrupts)"
    before = int(tell(machine, f"echo {interrupts}"))
    machine.press_power_button()
    found["button"] = until(machine, f"[ {interrupts} -gt {before} ]")
    return found


def main(kernel: str, initrd: str) -> None:
    """See the module."""
    images = [Path("/tmp/control-1.img"), Path("/tmp/control-2.img")]
    for path, name, size in zip(images, (b"first ", b"second "), (16, 8), strict=True):
        path.write_bytes(name.ljust(size * MIB, b"\0"))
    config = MachineConfig(
        kernel=kernel, initrd=initrd, memory="192M", max_cpus=2, drives=[Drive(str(images[0]))],
        devices=[parse_device("balloon")],
        cmdline="console=ttyS0 quiet panic=-1 mitigations=off",
    )  # fmt: skip
    found: dict[str, Any] = {}
    with Machine(config) as machine:
        ready(machine)
        found["first"] = controlled(machine, images)
        machine.pause()
        machine.resume()
        machine.reset()
        ready(machine)
        found["after a reset"] = controlled(machine, images)
        metrics = machine.metrics()
        found["counted"] = sorted(name for name, counters in metrics.items() if counters)
        found["refused"] = sum(counters.get("refused", 0) for counters in metrics.values())
        machine.console.send("poweroff -f\n")
        deadline = time.monotonic() + PATIENCE
        found["off"] = machine.wait(deadline - time.monotonic()) is Outcome.POWER_OFF
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
