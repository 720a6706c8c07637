"""Stock kernels on their disks, of every engine, and on a file as memory, on both transports."""

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

pytestmark = [pytest.mark.linux, pytest.mark.timeout(900)]

SCRIPT = Path(__file__).parent / "guests" / "disks.py"


@pytest.fixture(scope="module")
def pmem(share: Path) -> Path:
    """A file system whose blocks are pages, as direct access wants them."""
    path = share / "pmem.img"
    subprocess.run(
        ["/sbin/mkfs.ext4", "-q", "-b", "4096", "-O", "^has_journal", path, "32M"], check=True
    )
    return path


@pytest.fixture(scope="module")
def initrd(kernels: dict[str, Kernel]) -> Path:
    """An initial file system with the drivers of persistent memory."""
    return guest_initramfs(kernels["cloud"], modules=("virtio_pmem", "nd_pmem"))


@pytest.mark.parametrize(
    ("transport", "ring", "size"),
    [
        ("pci", "packed", "2m"),
        ("mmio", "split", "2m"),
        pytest.param("pci", "split", "14m", marks=pytest.mark.soak),
        pytest.param("mmio", "packed", "14m", marks=pytest.mark.soak),
    ],
)
def test_fio_verifies(
    transport: str, ring: str, size: str, linux: Lab | Direct, kernels: dict[str, Kernel],
    initrd: Path, fio_disk: Path, pmem: Path,
) -> None:  # fmt: skip
    """At random, many at once, of all sizes; again after a pause and after a reset."""
    kernel = kernels["cloud"].vmlinuz
    command: list[str | Path] = [
        sys.executable, SCRIPT, kernel, initrd, fio_disk, pmem, transport, ring, size,
    ]  # fmt: skip
    done = linux.run(command, timeout=600)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    print(done.stderr, file=sys.stderr)
    found = json.loads(done.stdout)
    assert found.pop("rings") == [ring] * 3
    assert found.pop("serials") == ["python", "sync", "io_uring"]
    assert found.pop("served by a thread of C") == [False, True, True]
    assert found.pop("flushes")
    good = {"python": 0, "sync": 0, "io_uring": 0}
    good |= {f"{name} wrote": True for name in good} | {"memory": True}
    for name in ("first", "after a pause", "after a reset"):
        assert found.pop(name) == good, name
    assert not found
