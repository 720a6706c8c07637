"""Stock kernels use the keyboard, the clock and its memory."""

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

SCRIPT = Path(__file__).parent / "guests" / "legacy.py"
# The generic kernel shows the clock's memory, both banks of it.
MEMORY = {"cloud": "", "generic": "/sys/bus/nvmem/devices/cmos_nvram0/nvmem"}


@pytest.mark.parametrize("flavour", ["cloud", pytest.param("generic", marks=pytest.mark.soak)])
def test_linux_uses_a_pcs_own_devices(
    flavour: str, linux: Lab | Direct, kernels: dict[str, Kernel]
) -> None:
    """Keys arrive, lights go on, the clock is read and rings; after a restore too."""
    initrd = guest_initramfs(kernels[flavour], modules=("evdev",))
    kernel = kernels[flavour].vmlinuz
    done = linux.run([sys.executable, SCRIPT, kernel, initrd, MEMORY[flavour]], timeout=400)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    found = json.loads(done.stdout)
    if MEMORY[flavour]:
        assert (found.pop("memory"), found.pop("kept")) == ("242", ["abcd", "wxyz"])
    assert found == {
        "keyboard": 'N: Name="AT Translated Set 2 keyboard"',
        "typed": [["leftshift", 1], ["a", 1], ["a", 0], ["leftshift", 0]],
        "lights": 4,
        "clock": True,
        "hwclock": "read",
        "rings": True,
        "typed after a restore": [["b", 1], ["b", 0]],
        "rings after a restore": True,
        "off": True,
    }
