"""Linux uses a PC's own devices: `legacy.py KERNEL INITRD [MEMORY]`.

Runs where unmodified kernels run. The host types, and the guest's input device tells of each key;
the guest's clock shows the host's time, and rings; its memory keeps bytes, over a snapshot too,
where the kernel shows it as the file MEMORY. Prints a JSON object.
"""

from __future__ import annotations

import json
import struct
import sys
import time
from typing import Any

from shell import PATIENCE, ready, tell

from vmm_reference.config import MachineConfig
from vmm_reference.deviceconfig import parse_device
from vmm_reference.devices.scan_codes import KEYS
from vmm_reference.machine import Machine
from vmm_reference.outcome import Outcome

EVENT = struct.Struct("<16xHHi")  # struct input_event
EV_KEY = 1


def typed(machine: Machine, *keys: str) -> list[tuple[str, int]]:
    """Press keys together; which keys the guest's input device says went down or up."""
    count = 6 * len(keys)  # a scan code, a key and a report for each stroke
    tell(machine, f"rm -f /tmp/e; (dd if=$(ls /dev/input/event*) of=/tmp/e bs=24 count={count} "
         "2>/dev/null &); sleep 0.2")  # fmt: skip
    machine.device("keyboard0").press(*keys)
    dump = tell(machine, f"n=0; until [ $(wc -c </tmp/e) = {24 * count} ] || [ $n = 50 ]; do "
                "n=$((n+1)); usleep 100000; done; od -An -v -tx1 /tmp/e")  # fmt: skip
    names = {code: name for name, (extended, code) in KEYS.items() if not extended}
    events = list(EVENT.iter_unpack(bytes.fromhex("".join(dump.split()))))
    return [(names.get(code, str(code)), value) for kind, code, value in events if kind == EV_KEY]


def rings(machine: Machine) -> bool:
    """Set the clock's alarm, and wait for the interrupt."""
    count = "$(awk '/rtc0/ {print $2}' /proc/interrupts)"
    return tell(machine, f"old={count}; echo 0 >/sys/class/rtc/rtc0/wakealarm; "
                "echo +2 >/sys/class/rtc/rtc0/wakealarm; n=0; "
                f"until [ {count} -gt $old ] || [ $n = 100 ]; do n=$((n+1)); usleep 100000; done; "
                f"[ {count} -gt $old ] && echo yes || echo no") == "yes"  # fmt: skip


def main(kernel: str, initrd: str, memory: str = "") -> None:
    """See the module."""
    found: dict[str, Any] = {}
    config = MachineConfig(
        kernel=kernel, initrd=initrd, memory="192M", devices=[parse_device("keyboard")],
        cmdline="console=ttyS0 quiet panic=-1 mitigations=off",
    )  # fmt: skip
    with Machine(config) as machine:
        ready(machine)
        tell(machine, "modprobe -q evdev; true")
        tell(machine, "n=0; until ls /dev/input/event* || [ $n = 50 ]; do n=$((n+1)); "
             "usleep 100000; done")  # fmt: skip
        found["keyboard"] = tell(machine, "grep Name /proc/bus/input/devices")
        found["typed"] = typed(machine, "leftshift", "a")
        lights = tell(machine, "ls -d /sys/class/leds/*capslock")
        tell(machine, f"echo 1 >{lights}/brightness; usleep 300000")
        found["lights"] = machine.metrics()["keyboard0"]["leds"]
        clock = int(tell(machine, "cat /sys/class/rtc/rtc0/since_epoch"))
        found["clock"] = abs(clock - time.time()) < 5
        found["hwclock"] = tell(machine, "hwclock -u >/dev/null && echo read")
        found["rings"] = rings(machine)
        if memory:
            found["memory"] = tell(machine, f"wc -c <{memory}")
            tell(machine, f"printf abcd | dd of={memory} bs=1 seek=100 conv=notrunc 2>/dev/null")
            tell(machine, f"printf wxyz | dd of={memory} bs=1 seek=200 conv=notrunc 2>/dev/null")
        machine.snapshot("/tmp/legacy-snapshot")
    with Machine.restore("/tmp/legacy-snapshot") as machine:
        machine.console.send("\n")
        if memory:
            read = f"dd if={memory} bs=1 count=4 2>/dev/null skip="
            found["kept"] = [tell(machine, f"{read}{place}") for place in (100, 200)]
        found["typed after a restore"] = typed(machine, "b")
        found["rings after a restore"] = rings(machine)
        machine.console.send("poweroff -f\n")
        found["off"] = machine.wait(PATIENCE) is Outcome.POWER_OFF
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
