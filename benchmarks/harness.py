"""The one harness of all benchmark suites: ours, the floor and a peer, alternating, in one run.

The floor is the same work done in the barest way there is (a C loop, memcpy, pread); the peer is
another project's code or program for the same work. A suite is a file beside this one:

    from benchmarks.harness import Bench, Goal, Row, per_call

    def rows(bench: Bench) -> Iterator[Row]:
        yield bench.compare(
            "read of 8 bytes", "ns",
            ours=per_call(lambda: memory.read(address, 8), calls=10_000),
            floor=per_call(lambda: view[8:16], calls=10_000),
            peer=rust_vmm, peer_name="rust-vmm",
            goal=Goal.floor(2.0),
        )

Every column is a callable without arguments that does one run and returns its figure in the row's
unit. The runs of a row alternate, the first round is discarded, and what counts is the median. A
column that can't be measured here raises `Skip` with the reason, which is printed; its values are
null in the JSON form. A missed goal is shown as missed and changes nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import attrs

__all__ = ["Bench", "Goal", "Measure", "Row", "Skip", "host", "per_call", "report", "table"]

Measure = Callable[[], float]
"""One run of one column: returns its figure in the row's unit."""

Figure = Literal["ours", "ratio_floor", "ratio_peer", "ours - floor", "ours - peer"]

ROUNDS: Final = 7
"""How many rounds count unless a suite or the command line says otherwise."""

CACHE: Final = Path(__file__).parent.parent / ".nox" / "benchmarks"
"""Where programs built for benchmarks stay from one run to the next."""


class Skip(Exception):
    """Raised by a column, or by what prepares it, that can't be measured on this machine.

    Attributes:
        reason: what is missing, and how to get it.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@attrs.frozen
class Goal:
    """What a figure of a row must reach.

    Attributes:
        figure: which figure is compared.
        relation: `<=` where less is better, `>=` where more is.
        bound: the figure may be this at worst; a ratio, or in the row's unit.
    """

    figure: Figure
    relation: Literal["<=", ">="]
    bound: float

    @classmethod
    def floor(cls, bound: float) -> Goal:
        """Ours takes at most `bound` times the floor's time."""
        return cls("ratio_floor", "<=", bound)

    @classmethod
    def peer(cls, bound: float) -> Goal:
        """Ours takes at most `bound` times the peer's time."""
        return cls("ratio_peer", "<=", bound)

    @classmethod
    def floor_rate(cls, bound: float) -> Goal:
        """Ours reaches at least `bound` times the floor's rate (for units such as GB/s)."""
        return cls("ratio_floor", ">=", bound)

    @classmethod
    def peer_rate(cls, bound: float) -> Goal:
        """Ours reaches at least `bound` times the peer's rate (for units such as GB/s)."""
        return cls("ratio_peer", ">=", bound)

    @classmethod
    def at_most(cls, bound: float) -> Goal:
        """Ours is at most `bound`, in the row's unit."""
        return cls("ours", "<=", bound)

    @classmethod
    def floor_plus(cls, bound: float) -> Goal:
        """Ours is at most the floor plus `bound`, in the row's unit."""
        return cls("ours - floor", "<=", bound)

    @classmethod
    def peer_plus(cls, bound: float) -> Goal:
        """Ours is at most the peer plus `bound`, in the row's unit."""
        return cls("ours - peer", "<=", bound)

    def __str__(self) -> str:
        return f"{self.figure} {self.relation} {self.bound:g}"

    def met(self, row: Row) -> bool | None:
        """Whether a row reaches this goal; None where a value it needs is absent."""
        ours, floor, peer = row.ours, row.floor, row.peer
        match self.figure:
            case "ours":
                value = ours
            case "ratio_floor":
                value = row.ratio_floor
            case "ratio_peer":
                value = row.ratio_peer
            case "ours - floor":
                value = None if ours is None or floor is None else ours - floor
            case "ours - peer":
                value = None if ours is None or peer is None else ours - peer
        if value is None:
            return None
        return value <= self.bound if self.relation == "<=" else value >= self.bound


def ratio(ours: float | None, other: float | None) -> float | None:
    """Ours divided by the other; None where one is absent or the other is zero."""
    return None if ours is None or other is None or other == 0 else ours / other


@attrs.frozen
class Row:
    """One line of a suite: the medians of its columns and what was asked of them.

    Attributes:
        name: what was measured.
        unit: the unit of `ours`, `floor` and `peer`.
        ours: median of our runs; None where it could not be measured.
        floor: median of the floor's runs.
        peer: median of the peer's runs.
        peer_name: who the peer is.
        goals: what was asked; all must be met.
        skipped: why a column is absent, by column.
    """

    name: str
    unit: str
    ours: float | None = None
    floor: float | None = None
    peer: float | None = None
    peer_name: str | None = None
    goals: tuple[Goal, ...] = ()
    skipped: Mapping[str, str] = attrs.field(factory=dict)

    @classmethod
    def of(
        cls,
        name: str,
        unit: str,
        *,
        ours: Sequence[float] = (),
        floor: Sequence[float] = (),
        peer: Sequence[float] = (),
        peer_name: str | None = None,
        goal: Goal | Sequence[Goal] = (),
        skipped: Mapping[str, str] | None = None,
    ) -> Row:
        """A row from runs that the suite made itself, alternating, the first round discarded."""

        def median(values: Sequence[float]) -> float | None:
            return statistics.median(values) if values else None

        goals = (goal,) if isinstance(goal, Goal) else tuple(goal)
        return cls(
            name, unit, median(ours), median(floor), median(peer), peer_name, goals, skipped or {}
        )

    @property
    def ratio_floor(self) -> float | None:
        """Ours as a multiple of the floor."""
        return ratio(self.ours, self.floor)

    @property
    def ratio_peer(self) -> float | None:
        """Ours as a multiple of the peer."""
        return ratio(self.ours, self.peer)

    @property
    def goal(self) -> str | None:
        """All goals in words; None where there is none."""
        return " and ".join(map(str, self.goals)) or None

    @property
    def met(self) -> bool | None:
        """Whether all goals are met; None where there is none or a value is absent."""
        answers = [goal.met(self) for goal in self.goals]
        if False in answers:
            return False
        return None if not answers or None in answers else True

    def as_json(self) -> dict[str, Any]:
        """The row as it stands in the JSON form."""
        names = ("name", "unit", "ours", "floor", "peer", "peer_name", "ratio_floor", "ratio_peer")
        return {name: getattr(self, name) for name in (*names, "goal", "met")}


def per_call(
    statement: Callable[[], object] | str,
    *,
    calls: int,
    setup: str = "pass",
    scope: dict[str, Any] | None = None,
) -> Measure:
    """Measure the nanoseconds of one call, over a loop of many, the garbage collector off.

    Args:
        statement: a callable, or source text, which saves the cost of the call (some 30 ns).
        calls: how many are timed at once; choose so that a run takes 10 ms or more.
        setup: source text run before each loop.
        scope: the names that the source text may use.
    """
    timer = timeit.Timer(statement, setup, globals=scope)
    return lambda: timer.timeit(calls) / calls * 1e9


def _say(text: str) -> None:
    print(text, flush=True)  # a pipe too is to show how far a suite is


@attrs.define
class Bench:
    """What a suite is given: how many rounds to make, which peers are there, where notes go.

    Attributes:
        rounds: rounds that count, besides the first, which is discarded.
        peers: programs named on the command line by `--peer NAME=PATH`.
        write: where progress and notes are written.
    """

    rounds: int = ROUNDS
    peers: Mapping[str, Path] = attrs.field(factory=dict)
    write: Callable[[str], object] = _say

    def note(self, text: str) -> None:
        """Print what a reader of the table should know; it does not enter the JSON form."""
        self.write(text)

    def peer(self, name: str, *, where: str | None = None) -> Path:
        """The program of a peer.

        Args:
            name: the name for `--peer`.
            where: a command to look for on PATH when none is named.

        Raises:
            Skip: when it is not here.
        """
        named = self.peers.get(name)
        if named is not None:
            if not os.access(named, os.X_OK) or named.is_dir():
                raise Skip(f"{named}, given as --peer {name}, is not a program that can run")
            return named
        found = shutil.which(where) if where else None
        if found is None:
            raise Skip(f"{name} is not here; give it as --peer {name}=PATH")
        return Path(found)

    def compare(
        self,
        name: str,
        unit: str,
        *,
        ours: Measure,
        floor: Measure | Skip | None = None,
        peer: Measure | Skip | None = None,
        peer_name: str | None = None,
        goal: Goal | Sequence[Goal] = (),
        rounds: int | None = None,
    ) -> Row:
        """Run the columns in turn, round by round, and give their medians.

        Args:
            name: what is measured.
            unit: the unit of the figures.
            ours: our way of doing it.
            floor: the barest way of doing it; a Skip instead stands for a column known to fail.
            peer: another project's way of doing it.
            peer_name: who that is.
            goal: what is asked of the row.
            rounds: rounds that count, where this row needs another number than the suite.
        """
        given = {"ours": ours, "floor": floor, "peer": peer}
        skipped = {key: value.reason for key, value in given.items() if isinstance(value, Skip)}
        columns = {key: value for key, value in given.items() if callable(value)}
        runs: dict[str, list[float]] = {key: [] for key in columns}
        told = time.monotonic()
        for count in range((rounds or self.rounds) + 1):
            if time.monotonic() - told > 2:
                print(f"  {name}: round {count} of {rounds or self.rounds}", file=sys.stderr)
                told = time.monotonic()
            for key in [key for key in columns if key not in skipped]:
                try:
                    figure = columns[key]()
                except Skip as skip:
                    skipped[key] = skip.reason
                    runs[key].clear()
                    continue
                if count:
                    runs[key].append(figure)
        return Row.of(name, unit, peer_name=peer_name, goal=goal, skipped=skipped, **runs)

    def compile(self, source: Path, *flags: str, name: str | None = None) -> Path:
        """Compile a C program or, with `-shared` among the flags, a library, once per content.

        Raises:
            Skip: when there is no compiler.
            subprocess.CalledProcessError: when the source does not compile.
        """
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            raise Skip("no C compiler; install gcc and libc6-dev")
        files = [source, *sorted(source.parent.glob("*.h"))]
        content = (
            b"".join(file.read_bytes() for file in files)
            + repr((flags, platform.machine())).encode()
        )
        built = CACHE / f"{name or source.stem}-{hashlib.sha256(content).hexdigest()[:16]}"
        if not built.exists():
            CACHE.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=CACHE) as folder:
                fresh = Path(folder, built.name)
                command = [compiler, "-O2", "-std=gnu11", "-o", str(fresh), str(source), *flags]
                subprocess.run(command, check=True)
                fresh.replace(built)
        return built

    def cargo(self, project: Path, program: str) -> Path:
        """Build a Cargo project of ours that drives a peer's crate, and give its program.

        Raises:
            Skip: when cargo is missing or the build fails (a crate can't be fetched, say).
        """
        if (named := self.peers.get(program)) is not None:
            return named
        tool = shutil.which("cargo")
        if tool is None:
            raise Skip(f"no cargo here; with a Rust toolchain {project.name} is built at once")
        target = CACHE / "cargo" / project.name
        self.note(f"building {project.name} with cargo")
        done = subprocess.run(
            [tool, "build", "--release", "--quiet", "--target-dir", target],
            cwd=project,
            check=False,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            last = (done.stderr.strip() or "no message").splitlines()[-1]
            raise Skip(f"cargo could not build {project.name}: {last}")
        return target / "release" / program


def host() -> dict[str, Any]:
    """What this machine is: processor, cores, memory, kernel, Python, the KVM module."""
    facts: dict[str, Any] = {
        "cpu": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "kvm": None,
    }
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                facts["cpu"] = line.partition(":")[2].strip()
                break
    modules = (name for name in ("kvm_intel", "kvm_amd", "kvm_pvm") if _loaded(name))
    if Path("/dev/kvm").exists():
        facts["kvm"] = next(modules, "unknown")
    return facts


def _loaded(module: str) -> bool:
    return Path("/sys/module", module).exists()


def _figure(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"


def table(rows: Iterable[Row]) -> str:
    """The rows as a table for a terminal, with the reasons of skipped columns below."""
    head = ("", "unit", "ours", "floor", "peer", "/floor", "/peer", "goal", "met")
    words = {True: "met", False: "MISSED", None: "-"}
    lines = [head]
    reasons: dict[str, list[str]] = {}
    for row in rows:
        peer = _figure(row.peer) + (f" ({row.peer_name})" if row.peer_name else "")
        ratios = (_figure(row.ratio_floor), _figure(row.ratio_peer))
        met = words[row.met] if row.goals else ""
        ours, floor = _figure(row.ours), _figure(row.floor)
        lines.append((row.name, row.unit, ours, floor, peer, *ratios, row.goal or "", met))
        for column, reason in row.skipped.items():
            who = row.peer_name if column == "peer" and row.peer_name else column
            reasons.setdefault(f"{who} skipped: {reason}", []).append(row.name)
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    text = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
    text.insert(1, "-" * max(map(len, text)))
    return "\n".join(text + list(reasons))


def report(suite: str, rows: Sequence[Row]) -> str:
    """The JSON form of a suite's run."""
    content = {"suite": suite, "host": host(), "rows": [row.as_json() for row in rows]}
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def measure(suite: Callable[[Bench], Iterable[Row]], bench: Bench) -> Iterator[Row]:
    """The rows of a suite, each told on the standard error output as it becomes known."""
    for row in suite(bench):
        print(f"  {row.name}: {_figure(row.ours)} {row.unit}", file=sys.stderr, flush=True)
        yield row
