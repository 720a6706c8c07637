"""Stock kernels under load are saved, restored, moved and cloned; they and their devices go on."""

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

pytestmark = [pytest.mark.linux, pytest.mark.timeout(3600)]

GUESTS = Path(__file__).parent / "guests"
MODULES = (
    "virtio_net", "vmw_vsock_virtio_transport", "virtio_console", "virtio_balloon",
)  # fmt: skip
RESTORES = ["copy-on-write", "on-demand", "eager"]
MOVES = ["pre-copy", "post-copy", "switched", "hand-over"]


@pytest.fixture(scope="module")
def initrd(kernels: dict[str, Kernel], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An initial file system with the drivers and the load."""
    program = tmp_path_factory.mktemp("load") / "load"
    subprocess.run(["gcc", "-static", "-Os", "-o", program, GUESTS / "load.c"], check=True)
    return guest_initramfs(kernels["cloud"], modules=MODULES, files={"bin/load": program})


@pytest.mark.parametrize(
    ("transport", "kind", "steps"),
    [
        ("mmio", "user", ["pause", "on-demand"]),
        ("pci", "kernel", ["copy-on-write", "on-demand"]),  # the second is a difference
        *(
            pytest.param(transport, kind, steps, marks=pytest.mark.soak)
            for transport in ("mmio", "pci")
            for kind in ("user", "kernel")
            for steps in (["pause", *RESTORES], MOVES)
        ),
        # Twenty in a row. What is restored otherwise than eagerly has no memory to hand over.
        pytest.param(
            "pci",
            "kernel",
            ["eager", "hand-over", *RESTORES[:2], *MOVES[:3]] * 3,
            marks=pytest.mark.soak,
        ),
    ],
)
def test_linux_goes_on_in_another_vmm(
    transport: str,
    kind: str,
    steps: list[str],
    linux: Lab | Direct,
    kernels: dict[str, Kernel],
    initrd: Path,
    fio_disk: Path,
) -> None:
    """Its load without an error and its TCP connection unbroken; then every device is used."""
    images = [str(kernels["cloud"].vmlinuz), str(initrd), str(fio_disk)]
    script = [sys.executable, str(GUESTS / "state.py"), *images, transport, kind, ",".join(steps)]
    done = linux.run(
        ["unshare", "--net", "--mount", *script],
        timeout=600 + 60 * len(steps),
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-30000:]}"
    print(done.stderr, file=sys.stderr)
    found = json.loads(done.stdout)
    assert [finding["step"] for finding in found] == steps
    used = ["rng", "rtc", "terminal", "port", "balloon"] + ["hotplug"] * (transport == "pci")
    for finding in found:
        assert finding["errors"] == {}, finding
        assert finding["restarts"] == 0, finding
        assert finding["complaints"] == "", finding
        assert all(finding[name] for name in used), finding
