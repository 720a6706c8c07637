"""A stock kernel is saved under load and goes on in another machine, in each way of restoring."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from lab.direct import Direct
from lab.lab import Lab

from vmm_reference.image.kernels import Kernel

pytestmark = [pytest.mark.linux, pytest.mark.timeout(3600)]

SCRIPT = Path(__file__).parent / "guests" / "state.py"


@pytest.mark.parametrize("rounds", [1, pytest.param(7, marks=pytest.mark.soak)])
def test_linux_goes_on_after_a_restore(
    rounds: int,
    linux: Lab | Direct,
    share: Path,
    kernels: dict[str, Kernel],
    initrds: dict[str, Path],
) -> None:
    """Ticker and hash loop go on, the disk works, the kernel does not complain, it powers off."""
    done = linux.run(
        [sys.executable, SCRIPT, kernels["cloud"].vmlinuz, initrds["cloud"], share, str(rounds)],
        timeout=500 * rounds,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    found = json.loads(done.stdout)
    assert [finding["how"] for finding in found] == [
        "copy-on-write",
        "on-demand",
        "eager",
    ] * rounds
    for finding in found:
        print(finding, file=sys.stderr)
        assert finding["disk"], finding
        assert finding["memory"], finding
        assert finding["complaints"] == "", finding
    assert found[-1]["off"]
