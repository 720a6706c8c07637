"""Stock kernels drive their devices, and everything again after a pause and a reset."""

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

pytestmark = [pytest.mark.linux, pytest.mark.timeout(1800)]

GUESTS = Path(__file__).parent / "guests"
MODULES = (
    "virtio_net", "vmw_vsock_virtio_transport", "virtio_console", "virtio_balloon",
)  # fmt: skip


@pytest.fixture(scope="module")
def initrd(kernels: dict[str, Kernel], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An initial file system with the drivers, and a pipe over sockets."""
    program = tmp_path_factory.mktemp("vsock") / "vsock"
    source = GUESTS / "vsock.c"
    subprocess.run(["gcc", "-static", "-Os", "-o", program, source], check=True)
    return guest_initramfs(kernels["cloud"], modules=MODULES, files={"bin/vsock": program})


@pytest.mark.parametrize(
    ("transport", "kind", "ring"),
    [
        ("pci", "user", "packed"),
        ("mmio", "kernel", "split"),
        pytest.param("mmio", "user", "split", marks=pytest.mark.soak),
        pytest.param("pci", "kernel", "split", marks=pytest.mark.soak),
    ],
)
def test_linux_uses_its_devices(
    transport: str,
    kind: str,
    ring: str,
    linux: Lab | Direct,
    kernels: dict[str, Kernel],
    initrd: Path,
) -> None:
    """Each transfer arrives as it was sent, at first, after a pause, and after a reset."""
    script = GUESTS / "devices.py"
    kernel = kernels["cloud"].vmlinuz
    done = linux.run(
        ["unshare", "--net", sys.executable, script, kernel, initrd, transport, kind, ring],
        timeout=900,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    print(done.stderr, file=sys.stderr)
    found = json.loads(done.stdout)
    assert found.pop("rings") == {f"virtio{number}": ring for number in range(5)}
    assert list(found) == ["first", "after a pause", "after a reset"]
    for name, results in found.items():
        assert len(results) == (13 if kind == "user" else 5), (name, results)
        assert all(results.values()), (name, results)
