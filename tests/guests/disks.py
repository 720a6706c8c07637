"""Disks and persistent memory: `disks.py KERNEL INITRD TOOLS PMEM TRANSPORT RING SIZE`.

Runs where unmodified kernels run. One machine has a disk for each engine, and one with fio; what
fio writes it reads back and verifies, and what the guest writes into a file system in a file that
it has as memory is in that file: at first, after a pause, and after the guest has taken its drivers
off the devices and put them on again. Prints a JSON object.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import rings
from fio import MOUNT, command
from shell import power_off, ready, tell

from vmm_reference.config import Drive, MachineConfig
from vmm_reference.deviceconfig import parse_device
from vmm_reference.machine import Machine

ENGINES = ("python", "sync", "io_uring")
DISK = 16 << 20
REBIND = (
    "for driver in virtio_blk virtio_pmem; do cd /sys/bus/virtio/drivers/$driver; "
    "for it in virtio*; do echo $it >unbind && echo $it >bind || exit; done; done; cd /; "
    "until [ -b /dev/vdd ] && [ -b /dev/pmem0 ]; do usleep 100000; done"
)


def fio(size: str) -> str:
    """The command: all disks at once, and a line for each of them."""
    disks = {engine: f"/dev/vd{letter}" for engine, letter in zip(ENGINES, "bcd", strict=True)}
    return (
        f"{MOUNT.format('/dev/vda')} && {command(disks, size, '/tmp/fio')} && umount /mnt && "
        # Terse version 3: name, error, KiB read, KiB written. One line of many fields would be cut
        # in two by what the kernel has to say on the console.
        "cut -d ';' -f 3,5,6,47 /tmp/fio"
    )


def in_memory(machine: Machine, file: Path, text: str) -> bool:
    """Whether what the guest writes into the file system in its memory is in the file, durable."""
    tell(
        machine,
        "mkdir -p /pmem && mount -o dax /dev/pmem0 /pmem && grep -q 'pmem.*dax' /proc/mounts && "
        f"echo {text} >/pmem/file && sync /pmem/file && umount /pmem",
    )
    return text.encode() in file.read_bytes()


def main(
    kernel: str, initrd: str, tools: str, pmem: str, transport: str, ring: str, size: str
) -> None:
    """See the module."""
    rings.offer(ring)
    drives = [Drive(tools, read_only=True)]
    for engine in ENGINES:
        path = Path(f"/tmp/disk-{engine}.img")
        with path.open("wb") as file:
            file.truncate(DISK)
        drives.append(Drive(str(path), engine=engine, queues=2, serial=engine))
    memory = Path("/tmp/pmem.img")
    shutil.copy(pmem, memory)
    config = MachineConfig(
        kernel=kernel, initrd=initrd, drives=drives, transport=transport, cpus=2, memory="256M",
        cmdline="console=ttyS0 quiet panic=-1 mitigations=off",
        devices=[parse_device(f"pmem,{memory}")],
    )  # fmt: skip
    found: dict[str, Any] = {}
    with Machine(config) as machine:
        ready(machine)
        serials = "for disk in b c d; do cat /sys/block/vd$disk/serial; echo; done"
        found["rings"] = [
            rings.negotiated(machine, f"/sys/block/vd{disk}/device") for disk in "bcd"
        ]
        found["serials"] = tell(machine, serials).split()
        for name in ("first", "after a pause", "after a reset"):
            start = time.monotonic()
            if name == "after a pause":
                machine.pause()
                time.sleep(0.5)
                machine.resume()
            elif name == "after a reset":
                tell(machine, REBIND)
            jobs = [line.split(";") for line in tell(machine, fio(size)).split()]
            found[name] = {job: int(error) for job, error, _, _ in jobs}
            found[name] |= {
                f"{job} wrote": int(read) > 0 and int(written) > 0 for job, _, read, written in jobs
            }
            found[name]["memory"] = in_memory(machine, memory, name.replace(" ", "-"))
            print(f"{name}: {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
        metrics = machine.metrics()
        found["flushes"] = metrics["pmem0"]["flushes"] > 2
        found["served by a thread of C"] = [
            metrics[f"drive{n}"].get("chains", 0) > 100 for n in (1, 2, 3)
        ]
        power_off(machine)
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
