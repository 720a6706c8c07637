"""Linux guests of ours and of QEMU, in one lab, that do the same jobs in turn."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

from benchmarks.harness import Bench, Goal, Row, Skip

if TYPE_CHECKING:
    from lab.dialogue import Dialogue

__all__ = ["Job", "Side", "compare", "followed", "ours", "program_files", "qemu"]

HERE = Path(__file__).parent
CMDLINE = "console=ttyS0 quiet mitigations=off panic=-1"
MEMORY = 256  # MiB
_NO_WORSE = Goal.peer_rate(0.97)


@attrs.frozen
class Job:
    """Something that guests do.

    Attributes:
        name: as the rows call it.
        command: shell text for the guest.
        operations: how many its output says were done.
        unit: of the rate.
        rate: operations a second, or another figure, of the output and the seconds that it took.
        goal: for that figure.
    """

    name: str
    command: str
    operations: Callable[[str], float]
    unit: str
    rate: Callable[[str, float], float]
    goal: Goal = _NO_WORSE


@attrs.frozen
class Side:
    """A VMM with its guest.

    Attributes:
        name: as the rows call it.
        command: shell text, which may name files of the folder.
        ready: shell text for the guest.
    """

    name: str
    command: str
    ready: str = "true"


def ours(options: str, name: str = "ours", ready: str = "true") -> Side:
    """`vmm run` of this environment, on a PCI bus."""
    vmm = Path(sys.prefix, "bin", "vmm")
    if not vmm.exists():
        raise Skip(f"{vmm} is not there; install the five packages into this environment")
    command = (
        f"{sys.executable} {vmm} run --kernel vmlinuz --initrd initrd --transport pci "
        f"--memory {MEMORY}M --cmdline {shlex.quote(CMDLINE)} {options}"
    )
    return Side(name, command, ready)


def qemu(bench: Bench, options: str, name: str = "qemu", ready: str = "true") -> Side:
    """QEMU's machine with a PCI bus.

    Raises:
        Skip: there is no QEMU.
    """
    program = bench.peer("qemu", where="qemu-system-x86_64")
    command = (
        f"{shlex.quote(str(program))} -M q35,accel=kvm -cpu host -m {MEMORY} -nodefaults "
        "-no-user-config -no-reboot -display none -serial stdio -kernel vmlinuz -initrd initrd "
        f"-append {shlex.quote(CMDLINE)} {options}"
    )
    return Side(name, command, ready)


def program_files(program: str) -> dict[str, Path | bytes]:
    """A program and its libraries, as `lib/...` and its name, to be run by the loader among them.

    Raises:
        Skip: it is not here.
    """
    _with_tests()
    from programs import files_of

    try:
        return files_of(program)
    except FileNotFoundError as error:
        raise Skip(str(error)) from None


def _with_tests() -> None:
    tests = str(HERE.parent / "tests")
    if tests not in sys.path:
        sys.path.append(tests)


def compare(
    bench: Bench,
    pairs: Sequence[tuple[Side, Side]],
    jobs: Sequence[Job],
    setup: str,
    modules: Sequence[str] = (),
    namespace: str = "",
) -> Iterator[Row]:
    """Run every job in every guest in turn, and compare each pair: rate, and CPU an operation.

    Args:
        bench: says how many rounds.
        pairs: ours and the peer.
        jobs: what they do.
        setup: shell text, run first in the folder of the files.
        modules: the lab's kernel needs them.
        namespace: a command that runs another one, to run all of it in.
    """
    _with_tests()
    from lab.direct import Direct
    from lab.host import runs_linux
    from lab.lab import Lab

    sides = {side.name: side for pair in pairs for side in pair}
    wanted = {
        "setup": setup,
        "vmms": {name: side.command for name, side in sides.items()},
        "ready": {name: side.ready for name, side in sides.items()},
        "jobs": {job.name: job.command for job in jobs},
        "rounds": bench.rounds + 1,
    }
    place = Direct() if runs_linux() else Lab(modules=modules, memory="4G", report=bench.note)
    command = [*shlex.split(namespace), sys.executable, str(HERE / "guest" / "alternate.py")]
    try:
        done = place.converse([*command, json.dumps(wanted)], partial(followed, bench.note))
    finally:
        if isinstance(place, Lab):
            place.stop()
    if done.returncode:
        raise RuntimeError(f"the job ended with status {done.returncode}: {done.stderr[-2000:]}")
    yield from rows_of(done.stdout, pairs, jobs)


def followed(
    note: Callable[[str], object], job: Dialogue, seconds: float = 1500
) -> subprocess.CompletedProcess[str]:
    """Wait for a command's end, and pass on what it writes to its standard error meanwhile.

    Raises:
        LabTimeout: it did not end within so many seconds.
    """
    from lab.errors import LabTimeout

    job.close_stdin()
    deadline = time.monotonic() + seconds
    passed_on = 0
    while True:
        rest = deadline - time.monotonic()
        try:
            status = job.wait(min(rest, 1))
        except LabTimeout:
            if rest <= 1:
                raise
            status = None
        lines = job.stderr.splitlines(keepends=True)
        for line in lines[passed_on:]:
            if status is not None or line.endswith("\n"):
                note(line.rstrip())
                passed_on += 1
        if status is not None:
            return subprocess.CompletedProcess(job.argv, status, job.stdout, job.stderr)


def rows_of(output: str, pairs: Sequence[tuple[Side, Side]], jobs: Sequence[Job]) -> Iterator[Row]:
    """The rows of what `guest/alternate.py` has printed; the first round is discarded."""
    rates: dict[tuple[str, str], list[float]] = {}
    costs: dict[tuple[str, str], list[float]] = {}
    known: Mapping[str, Job] = {job.name: job for job in jobs}
    for line in output.splitlines():
        run = json.loads(line)
        job = known[run["job"]]
        if run["round"]:
            key = run["vmm"], job.name
            rates.setdefault(key, []).append(job.rate(run["printed"], run["seconds"]))
            count = job.operations(run["printed"])
            costs.setdefault(key, []).append(run["cpu"] * 1e6 / count)
    for mine, peer in pairs:
        for job in jobs:
            a, b = (mine.name, job.name), (peer.name, job.name)
            title = job.name if mine.name == "ours" else f"{mine.name}, {job.name}"
            yield Row.of(
                title, job.unit, ours=rates[a], peer=rates[b], peer_name=peer.name,
                goal=job.goal,
            )  # fmt: skip
            yield Row.of(
                f"{title}: CPU an operation", "us", ours=costs[a], peer=costs[b],
                peer_name=peer.name, goal=Goal.peer(1.03),
            )  # fmt: skip
