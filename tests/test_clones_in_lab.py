"""Ten copies of one stock kernel, each alive and with what it must have for itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from lab.direct import Direct
from lab.lab import Lab

from vmm_reference.image.initramfs import guest_initramfs
from vmm_reference.image.kernels import Kernel
from vmm_reference.outcome import Outcome

pytestmark = [pytest.mark.linux, pytest.mark.soak, pytest.mark.timeout(1200)]

GUESTS = Path(__file__).parent / "guests"
COUNT = 10


def test_ten_copies_share_nothing_that_they_must_not(
    linux: Lab | Direct, kernels: dict[str, Kernel], tmp_path: Path
) -> None:
    """Each has the copied disk and what is its own; the generic kernel has a driver for vmgenid."""
    program = tmp_path / "vsock"
    subprocess.run(["gcc", "-static", "-Os", "-o", program, GUESTS / "vsock.c"], check=True)
    modules = ("virtio_net", "vmw_vsock_virtio_transport")
    kernel = kernels["generic"]
    initrd = guest_initramfs(kernel, modules=modules, files={"bin/vsock": program})
    done = linux.run(
        ["unshare", "--net", sys.executable, GUESTS / "clones.py", kernel.vmlinuz, initrd],
        timeout=900,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-30000:]}"
    generation, forked, cloned = json.loads(done.stdout)
    assert len(forked) == COUNT
    for number, found in enumerate(forked):
        assert found["mac"] == found["seen"] == f"02:00:00:00:01:{number + 1:02x}", found
        assert found["address"] == f"192.0.2.{number + 10}", found
        assert found["cid"] == str(6 + number), found
        assert (found["disk"], found["parent"]) == ("common", "parent"), found
        assert found["own"] == str(number), found
        assert found["alive"] == str(number), found
        assert (found["tcp"], found["vsock"]) == ("heard", "heard"), found
        assert int(found["reseeded"]) == 1, found
    assert len({generation, *(found["generation"] for found in forked)}) == 1 + COUNT
    assert len({found["random"] for found in forked}) == COUNT
    assert len({found["last"] for found in cloned}) == COUNT
    for number in range(COUNT):
        said = f"clone {number} ended with status {Outcome.STOPPED.status}"
        assert said in cloned[number]["said"], cloned
