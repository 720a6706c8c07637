"""Comparisons of Linux guests: which rows come of what was printed."""

from __future__ import annotations

import json

from benchmarks._guests import Job, Side, rows_of
from benchmarks.harness import Goal


def line(vmm: str, turn: int, seconds: float, cpu: float, job: str = "copy") -> str:
    """One run, in which 100 operations were done."""
    return json.dumps(
        {"vmm": vmm, "job": job, "round": turn, "seconds": seconds, "cpu": cpu, "printed": "100"}
    )


def test_rows_of_two_vmms() -> None:
    """Rate and CPU an operation, medians of all rounds but the first, with their goals."""
    job = Job("copy", "cp", float, "op/s", lambda printed, seconds: float(printed) / seconds)
    output = [line(name, 0, 99, 99) for name in ("ours", "qemu")]
    for turn in (1, 2, 3):
        output += [line("ours", turn, 2 + turn % 2, 1), line("qemu", turn, 4, 2)]
    rate, cost = rows_of("\n".join(output), [(Side("ours", ""), Side("qemu", ""))], [job])
    assert (rate.name, rate.unit, rate.peer_name) == ("copy", "op/s", "qemu")
    assert rate.ours == 100 / 3
    assert rate.peer == 25
    assert rate.met
    assert (cost.ours, cost.peer) == (10_000, 20_000)
    assert cost.met


def test_a_job_has_a_goal_of_its_own() -> None:
    """Seconds instead of a rate, and a goal that is missed shows as missed."""
    job = Job("log", "dmesg", lambda _: 1, "s", lambda _, seconds: seconds, Goal.peer(1.0))
    output = [line("a", 1, 3, 1, "log"), line("b", 1, 2, 1, "log")]
    pairs = [(Side("a", ""), Side("b", ""))]
    rows = list(rows_of("\n".join(output), pairs, [job]))
    assert [row.name for row in rows] == ["a, log", "a, log: CPU an operation"]
    assert [row.met for row in rows] == [False, True]
