"""What guest memory needs of a host that a development machine seldom has, in a lab that has it.

Two NUMA nodes, huge pages of 2 MiB, KSM and swap: the lab's kernel is told to have the first two,
and has the others by nature. Each finding is the kernel's own account, not ours.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from lab.lab import Lab

pytestmark = [pytest.mark.linux, pytest.mark.timeout(600)]

SCRIPT = Path(__file__).parent / "guests" / "memory.py"


def test_memory_on_a_host_with_everything() -> None:
    """Policy, huge pages, merging and swap are what the kernel says they are."""
    if shutil.which("qemu-system-x86_64") is None:
        pytest.skip("qemu-system-x86_64 is not here")
    with Lab(memory="1G", append="numa=fake=2 hugepages=8", modules=["zram"]) as lab:
        done = lab.run([sys.executable, SCRIPT], timeout=300)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    found = json.loads(done.stdout)
    assert found["online"] == "0-1"
    assert found["bind 0"] == {"0": 64}
    assert found["bind 1"] == {"1": 64}
    assert found["preferred 1"] == {"1": 64}
    assert found["interleave"] == {"0": 32, "1": 32}
    assert found["huge page"] == "2048 kB"
    assert found["huge content"]
    assert found["huge free"] == [8, 4, 8]
    assert "free_hugepages" in found["huge refused"]
    assert found["merged"] >= 200
    assert found["merged content"]
    assert found["swapped"] > 0
    assert found["swapped content"]
    assert found["locked swapped"] == 0
    assert found["locked"] == 1024
