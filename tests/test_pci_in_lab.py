"""A stock kernel finds its root disk on the PCI bus, and devices that come and go by itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from lab.direct import Direct
from lab.lab import Lab

from vmm_reference.image.kernels import Kernel

pytestmark = [pytest.mark.linux, pytest.mark.timeout(900)]

SCRIPT = Path(__file__).parent / "guests" / "pci.py"


def test_linux_lives_on_the_pci_bus(
    linux: Lab | Direct,
    kernels: dict[str, Kernel],
    initrds: dict[str, Path],
    root_disk: Path,
) -> None:
    """Root disk, hotplug, discard, resize, exchange; again after pause, restore and reset."""
    kernel, initrd = kernels["cloud"].vmlinuz, initrds["cloud"]
    done = linux.run([sys.executable, SCRIPT, kernel, initrd, root_disk], timeout=600)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    found = json.loads(done.stdout)
    assert found.pop("root").endswith("/0000:00:02.0/virtio1"), found
    assert found.pop("msix") >= 4, found
    assert found.pop("freed") >= 1 << 20, found
    assert not any(found.pop("refused").values()), found
    assert found == {
        "name": "drive1",
        "plugged": True,
        "serial": "second",
        "queues": ["0", "1"],
        "same": True,
        "cache": "write through",
        "resized": True,
        "swapped": True,
        "same after a pause": True,
        "unplugged": True,
        "slots": ["0000:00:00.0", "0000:00:01.0", "0000:00:02.0"],
        "button": True,
        "cpus came": True,
        "cpus work": ["4", "1"],
        "cpus went": True,
        "a cpu came again": True,
        "plugged again": True,
        "same after a restore": True,
        "unplugged after a restore": True,
        "resets": 1,
        "cpus after a reset": "3",
        "plugged after a reset": True,
        "same after a reset": True,
        "off": True,
    }
