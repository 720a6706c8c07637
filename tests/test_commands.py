"""The README's first command as a person types it: at a terminal, in a script, without a network.

The second command is what runs these tests.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import termios
from pathlib import Path

import pytest
from lab.direct import Direct, Process
from lab.lab import Lab

pytestmark = [pytest.mark.linux, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[1]
PATIENCE = 500
"""Seconds until a boot has its lab: those of other tests may have all CPUs first."""


@pytest.fixture
def boot(linux: Lab | Direct, kernels: object, initrds: object) -> list[str]:
    """The command, with all in the caches that it would fetch, and a CPU for a lab of its own."""
    if not (ROOT / ".nox" / "env").is_dir():
        pytest.skip("these tests don't run in the environment that ./dev makes")
    if isinstance(linux, Lab):
        linux.stop()
    return ["./dev", "boot"]


def test_a_boot_needs_no_network_once_all_is_cached(boot: list[str]) -> None:
    """In a network namespace with nothing in it, a script gets the self-check and the times."""
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("unshare of util-linux is not here to make a network namespace with")
    user = [] if os.geteuid() == 0 else ["--map-current-user"]
    done = subprocess.run(
        [unshare, *user, "--net", *boot], cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True,
        text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    facts = dict(re.findall(r"^vmm-check: (\w+)=(\S*)", done.stdout, re.MULTILINE))
    assert facts["result"] == facts["disk"] == facts["entropy"] == "ok"
    assert re.search(r"^first KVM_RUN +\d+\.\d\d s", done.stdout, re.MULTILINE)


def test_a_boot_at_a_terminal_ends_in_a_shell(boot: list[str]) -> None:
    """What is typed there is answered there; Ctrl-A x leaves with status 0 and all as it was."""
    with Process(boot, pty=True, env=None, cwd=ROOT) as terminal:
        modes = os.dup(terminal._terminal)
        before = termios.tcgetattr(modes)
        terminal.read_until(r"# ", PATIENCE)
        terminal.write("echo $((6 * 7)) $(uname -s)\n")
        terminal.read_until(r"^42 Linux", 60)
        terminal.write("\x01x")
        assert terminal.wait(60) == 0
    assert termios.tcgetattr(modes) == before
    os.close(modes)
