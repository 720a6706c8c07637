"""A stock kernel notices by itself what its machine's owner does, on virtio-mmio too."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from lab.direct import Direct
from lab.lab import Lab

from vmm_reference.image.initramfs import guest_initramfs
from vmm_reference.image.kernels import Kernel

pytestmark = [pytest.mark.linux, pytest.mark.timeout(600)]

SCRIPT = Path(__file__).parent / "guests" / "control.py"


def test_linux_notices_what_its_owner_does(linux: Lab | Direct, kernels: dict[str, Kernel]) -> None:
    """Drives, balloon, processors, power button; after a pause and a reset too; all is counted.

    Of the balloon also what a guest gives back unasked, and what it takes back in need.
    """
    initrd = guest_initramfs(kernels["cloud"], modules=("virtio_balloon",))
    done = linux.run([sys.executable, SCRIPT, kernels["cloud"].vmlinuz, initrd], timeout=400)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    found = json.loads(done.stdout)
    counted = ["balloon0", "bus", "cpus", "drive0", "i8042", "power", "pvpanic", "rng0", "rtc",
               "serial", "system-control"]  # fmt: skip
    assert found.pop("counted") == counted
    assert (found.pop("refused"), found.pop("off")) == (0, True)
    assert list(found) == ["first", "after a reset"]
    for name, results in found.items():
        assert len(results) == (12 if name == "first" else 8), name
        assert all(results.values()), (name, results)
