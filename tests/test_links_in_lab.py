"""Stock kernels on every link of their network, split and packed, and again after a reset."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from lab.direct import Direct
from lab.lab import Lab
from programs import files_of

from vmm_reference.image.initramfs import guest_initramfs
from vmm_reference.image.kernels import Kernel

pytestmark = [pytest.mark.linux, pytest.mark.timeout(600)]

SCRIPT = Path(__file__).parent / "guests" / "links.py"
SOAK = pytest.mark.soak


@pytest.fixture(scope="module")
def initrd(kernels: dict[str, Kernel]) -> Path:
    """An initial file system with the driver, and iperf3."""
    files = {f"iperf/{name}": source for name, source in files_of("iperf3").items()}
    return guest_initramfs(kernels["cloud"], modules=("virtio_net",), files=files)


@pytest.mark.parametrize(
    ("transport", "link", "ring"),
    [
        # Each takes a minute: a guest starts iperf3 slowly, and a cable has two of them.
        pytest.param("pci", "cable", "packed", marks=SOAK),
        pytest.param("mmio", "passt", "split", marks=SOAK),
        pytest.param("mmio", "cable", "split", marks=SOAK),
        pytest.param("pci", "passt", "packed", marks=SOAK),
        pytest.param("pci", "tap", "packed", marks=SOAK),
        pytest.param("mmio", "tap", "packed", marks=SOAK),
        pytest.param("pci", "tap", "split", marks=SOAK),
        pytest.param("mmio", "tap", "split", marks=SOAK),
        pytest.param("pci", "vhost", "split", marks=SOAK),
        pytest.param("mmio", "vhost", "split", marks=SOAK),
    ],
)
def test_linux_uses_its_network(
    transport: str,
    link: str,
    ring: str,
    linux: Lab | Direct,
    kernels: dict[str, Kernel],
    initrd: Path,
) -> None:
    """Pings are answered and iperf3's bytes arrive both ways, each time."""
    kernel = kernels["cloud"].vmlinuz
    done = linux.run(
        ["unshare", "--net", sys.executable, SCRIPT, kernel, initrd, transport, link, ring],
        timeout=500,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    print(done.stderr, file=sys.stderr)
    found = json.loads(done.stdout)
    assert (found.pop("ring"), found.pop("refused")) == (ring, 0)
    assert list(found) == ["first", "after a pause", "after a reset"]
    for name, results in found.items():
        assert list(results) == ["ping", "receives", "sends"], (name, results)
        assert all(results.values()), (name, results)
