"""Clones of a snapshot, and what each keeps for itself: `clones.py SNAPSHOT COUNT`.

The guest answers each byte. Prints a JSON object: `fan_out`, milliseconds from the first fork to
the last clone's answer, and `private`, the MiB of each idle clone that no other process shares,
but for the pages of guest memory that its guest has touched.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from functools import partial
from typing import TYPE_CHECKING

from vmm_reference.state.clone import Template

if TYPE_CHECKING:
    from vmm_reference.machine import Machine


re.compile(r"\.")  # what a clone waits for is no part of what it costs


def private(process: int) -> float:
    """MiB that a process has for itself; the snapshot's file is its guest's memory."""
    total, counts = 0, False
    with open(f"/proc/{process}/smaps", encoding="ascii") as file:  # noqa: PTH123
        for line in file:
            words = line.split()
            if not words[0].endswith(":"):
                counts = not line.rstrip().endswith("/memory")
            elif words[0] in ("Private_Clean:", "Private_Dirty:") and counts:
                total += int(words[1])
    return total / 1024


def run(told: int, machine: Machine) -> int:
    """Let the guest answer, and stand by."""
    with machine:
        machine.console.send("x")
        machine.console.expect(r"\.", 60)
        os.write(told, b"x")
        signal.pause()
    return 0


def main(folder: str, count: str) -> None:
    """See the module."""
    told, tell = os.pipe()
    with Template(folder) as template:
        start = time.perf_counter()
        children = [template.fork(number, partial(run, tell)) for number in range(int(count))]
        answers = 0
        while answers < len(children):
            answers += len(os.read(told, 100))
        took = time.perf_counter() - start
        time.sleep(0.2)  # until they are idle
        found = [private(child) for child in children]
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    print(json.dumps({"fan_out": took * 1e3, "private": found}))


if __name__ == "__main__":
    main(*sys.argv[1:])
