"""Puts guest memory under NUMA policies, on huge pages, through KSM and swap; prints findings.

Run by `test_memory_in_lab.py` as root of a machine that is thrown away afterwards.
"""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

from vm_memory import (
    Advice,
    Anonymous,
    GuestAddress,
    GuestMemory,
    Lock,
    MappingError,
    NumaMode,
    NumaPolicy,
    Options,
)

A = GuestAddress
KSM = Path("/sys/kernel/mm/ksm")
FREE = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")


def account(memory: GuestMemory, field: str) -> int:
    """A field of the kernel's account of the first region, in KiB."""
    start = f"{memory.regions[0].host_address:x}-"
    _, _, ours = Path("/proc/self/smaps").read_text().partition(start)
    line = next(line for line in ours.splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1])


def numa() -> dict[str, object]:
    """Where pages are, under each policy."""
    found: dict[str, object] = {
        "online": Path("/sys/devices/system/node/online").read_text().strip()
    }
    for name, mode, nodes in (
        ("bind 0", NumaMode.BIND, (0,)),
        ("bind 1", NumaMode.BIND, (1,)),
        ("preferred 1", NumaMode.PREFERRED, (1,)),
        ("interleave", NumaMode.INTERLEAVE, (0, 1)),
    ):
        options = Options(numa=NumaPolicy(mode, nodes), prefault=1, transparent_hugepages=False)
        with GuestMemory.from_ranges([(A(0), 64 * 4096)], options=options) as memory:
            found[name] = memory.regions[0].numa_nodes()
    return found


def huge() -> dict[str, object]:
    """Memory on huge pages, and more of it than there is."""
    backing, free = Anonymous(hugetlb="2M"), [int(FREE.read_text())]
    memory = GuestMemory.from_ranges(
        [(A(0), 8 << 20)], backing=backing, options=Options(prefault=1)
    )
    free.append(int(FREE.read_text()))
    memory.write(A((2 << 20) - 4), b"12345678")
    found = {
        "huge page": f"{account(memory, 'KernelPageSize')} kB",
        "huge content": memory.read(A((2 << 20) - 4), 8) == b"12345678",
    }
    memory.close()
    del memory
    try:
        GuestMemory.from_ranges([(A(0), 64 << 20)], backing=backing)
    except MappingError as error:
        found["huge refused"] = str(error)
    return {**found, "huge free": [*free, int(FREE.read_text())]}


def merging() -> dict[str, object]:
    """Equal pages of mergeable memory, merged by the kernel, told apart again by a write."""
    options = Options(mergeable=True, transparent_hugepages=False)
    with GuestMemory.from_ranges([(A(0), 256 * 4096)], options=options) as memory:
        memory.fill(A(0), 256 * 4096, 0x5A)
        (KSM / "pages_to_scan").write_text("10000")
        (KSM / "sleep_millisecs").write_text("10")
        (KSM / "run").write_text("1")
        merged, deadline = 0, time.monotonic() + 60
        while merged < 200 and time.monotonic() < deadline:
            time.sleep(0.1)
            merged = int((KSM / "pages_sharing").read_text())
        memory.write(A(4096), b"x")
        same = memory.read(A(0), 1) + memory.read(A(4096), 2) == b"ZxZ"
    (KSM / "run").write_text("2")
    return {"merged": merged, "merged content": same}


def swapping() -> dict[str, object]:
    """Memory that is asked to be swapped out, and memory that is locked."""
    Path("/sys/block/zram0/disksize").write_text("64M")
    for command in ("mkswap", "swapon"):
        subprocess.run(["/sbin/" + command, "/dev/zram0"], check=True, capture_output=True)
    plain = Options(transparent_hugepages=False)
    locked = Options(transparent_hugepages=False, lock=Lock.ALL)
    with (
        GuestMemory.from_ranges([(A(0), 1 << 20)], options=plain) as one,
        GuestMemory.from_ranges([(A(0), 1 << 20)], options=locked) as other,
    ):
        for memory in (one, other):
            memory.fill(A(0), 1 << 20, 7)
        one.regions[0].advise(Advice.PAGEOUT)
        try:
            other.regions[0].advise(Advice.PAGEOUT)
        except MappingError as error:
            if error.errno != 22:  # EINVAL: locked memory is not paged out
                raise
        found: dict[str, object] = {
            "swapped": account(one, "Swap"),
            "locked swapped": account(other, "Swap"),
            "locked": account(other, "Locked"),
        }
        found["swapped content"] = one.read(A(0), 1 << 20) == b"\7" * (1 << 20)
    return found


if __name__ == "__main__":
    print(json.dumps({**numa(), **huge(), **merging(), **swapping()}))
