"""A machine of virtio-mmio devices is controlled while it runs: `control.py KERNEL INITRD`.

Runs where unmodified kernels run. What the owner does the guest has to notice by itself: an image
that grows or is exchanged, a balloon's target, processors, the power button; again after a pause
and after a reset. Prints a JSON object.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shell import PATIENCE, ready, tell, until

from vmm_reference.config import Drive, MachineConfig
from vmm_reference.deviceconfig import parse_device
from vmm_reference.machine import Machine
from vmm_reference.outcome import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm_reference.devices.balloon import Balloon

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


def gave_up(machine: Machine) -> dict[str, bool]:
    """Pages that the guest does not use, unasked; and pages of a full balloon that it needs.

    The machine has just started: what is free was not used before, and lies together.
    """
    control = machine.device("balloon0")
    balloon: Balloon = control.balloon
    # What it no longer uses it reports after two seconds, in pieces of 4 MiB.
    reported = balloon.reported
    tell(machine, "head -c 50000000 /dev/zero >/tmp/big")
    full = resident()
    tell(machine, "rm /tmp/big")
    found = {"given back": soon(lambda: full - resident() > 16 * MIB)}
    found["reported"] = balloon.reported - reported > 16 * MIB >> 12
    # All but 32 MiB are in the balloon when the guest wants 50: it takes back what it needs.
    free = int(tell(machine, "awk '/MemFree/ {print $2}' /proc/meminfo")) // 1024
    control.set_size((free - 32) * MIB)
    found["nearly all taken"] = soon(lambda: balloon.actual > (free - 40) * MIB >> 12)
    squeezed, deflated = balloon.actual, balloon.deflated
    tell(machine, "head -c 50000000 /dev/zero >/tmp/big; rm /tmp/big")
    found["taken back"] = balloon.deflated > deflated and balloon.actual < squeezed
    control.set_size(0)
    soon(lambda: balloon.actual == 0)
    return found


def resident() -> int:
    """Bytes of this process that are in memory, with those of the guest."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def soon(condition: Callable[[], object]) -> bool:
    """Whether something comes to be."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


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
        found["first"] = gave_up(machine) | controlled(machine, images)
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
