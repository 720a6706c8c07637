"""The real Linux driver drives our virtqueues over virtio-mmio and PCI, and its data is compared.

Split and packed, with and without indirect descriptors and EVENT_IDX, entropy from size 2 and block
from size 4 up to 1024: one machine has up to fifteen rings, so that few boots show all of them.
"""

from __future__ import annotations

import json
import sys
from itertools import product
from pathlib import Path

import pytest
from lab.direct import Direct
from lab.lab import Lab

from vmm_reference.image.kernels import Kernel

pytestmark = [pytest.mark.linux, pytest.mark.timeout(1800)]

SCRIPT = Path(__file__).parent / "guests" / "queues.py"

Ring = tuple[int, bool, bool, bool]  # size, packed, indirect, event_idx

BOTH = (False, True)
SOAK = pytest.mark.soak
BLOCK: list[Ring] = [(16, *features) for features in product(BOTH, BOTH, BOTH)]
BLOCK += [(size, packed, True, True) for size in (4, 256, 1024) for packed in BOTH]
ENTROPY: list[Ring] = [(2, packed, False, event_idx) for packed, event_idx in product(BOTH, BOTH)]
ENTROPY += [(size, packed, True, True) for size in (4, 16, 64, 256, 1024) for packed in BOTH]
# For a long evening: each size with all features and with none, around the ring and further.
MORE: list[Ring] = [
    (1 << bits, packed, on, on) for bits, packed, on in product(range(2, 11), BOTH, BOTH)
]
PCI = [ring for ring in BLOCK if ring[2] == ring[3]]
LONG: list[Ring] = [(16, packed, True, True) for packed in BOTH]

# Kind, rings, rounds, and how many chains each ring carries at least.
RUNS = [
    pytest.param("block", BLOCK, 1, 64, "mmio", id="block"),
    pytest.param("entropy", ENTROPY, 1, 64, "mmio", id="entropy"),
    pytest.param("block", PCI, 1, 64, "pci", id="block-pci"),
    *(
        pytest.param("block", MORE[at : at + 12], 2, 2000, "mmio", id=f"block-{at}", marks=SOAK)
        for at in range(0, len(MORE), 12)
    ),
    pytest.param("block", LONG, 65, 1 << 16, "mmio", id="block-long", marks=SOAK),
]


@pytest.mark.parametrize(("kind", "rings", "rounds", "chains", "transport"), RUNS)
def test_linux_drives_our_rings(
    kind: str,
    rings: list[Ring],
    rounds: int,
    chains: int,
    transport: str,
    linux: Lab | Direct,
    share: Path,
    kernels: dict[str, Kernel],
    initrds: dict[str, Path],
) -> None:
    """Each ring is negotiated as offered, and carries the data it was given."""
    kernel, initrd = kernels["cloud"].vmlinuz, initrds["cloud"]
    done = linux.run(
        [sys.executable, SCRIPT, kind, kernel, initrd, share, str(rounds), transport],
        input=json.dumps(rings),
        timeout=300 if rounds == 1 else 1700,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    print(done.stderr)
    found = json.loads(done.stdout)
    assert len(found) == len(rings)
    for (size, _, indirect, _), finding in zip(rings, found, strict=True):
        assert finding["same"], finding
        assert finding["negotiated"], finding
        assert (finding["status"], finding["size"]) == (15, size), finding
        assert (finding["refused"], finding["reason"]) == (0, ""), finding
        assert finding["chains"] >= chains, finding
        if kind == "block":
            assert bool(finding["indirect"]) is indirect, finding
