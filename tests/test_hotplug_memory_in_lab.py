"""Stock kernels notice memory that comes and goes, by ACPI and by virtio."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from lab.direct import Direct
from lab.lab import Lab

from vmm_reference.image.initramfs import guest_initramfs
from vmm_reference.image.kernels import Kernel

pytestmark = [pytest.mark.linux, pytest.mark.timeout(900)]

SCRIPT = Path(__file__).parent / "guests" / "hotplug_memory.py"


@pytest.mark.parametrize("transport", ["mmio", pytest.param("pci", marks=pytest.mark.soak)])
def test_memory_of_linux_grows_and_shrinks(
    transport: str, linux: Lab | Direct, kernels: dict[str, Kernel]
) -> None:
    """Used, kept by a snapshot and by a reset, given back; nobody tells the guest to look."""
    initrd = guest_initramfs(kernels["cloud"], modules=("virtio_mem",))
    kernel = kernels["cloud"].vmlinuz
    done = linux.run([sys.executable, SCRIPT, kernel, initrd, transport], timeout=600)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    assert json.loads(done.stdout) == {
        "announced": [
            "Node 0 PXM 0 [mem 0x100000000-0x11fffffff] hotplug",
            "Node 1 PXM 1 [mem 0x140000000-0x17fffffff] hotplug",
        ],
        "module came": True,
        "memory came": True,
        "on its node": True,
        "used": True,
        "same after a restore": True,
        "as much after a restore": True,
        "memory went": True,
        "module went": True,
        "config": [[], 192],
        "as much after a reset": True,
        "slot": 0,
        "module came again": True,
        "all memory went": True,
        "left behind": True,
        "metrics": 0,
        "off": True,
    }
