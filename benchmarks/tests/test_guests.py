"""Comparisons of Linux guests: which rows come of what was printed."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

from lab.direct import Direct

from benchmarks._guests import Job, Side, followed, rows_of
from benchmarks.guest.alternate import Guest
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


def test_what_a_guest_prints_comes_in_pieces_and_is_looked_through_once(tmp_path: Path) -> None:
    """A log of 3 MB: whoever begins anew with each piece needs hours for it."""
    script = tmp_path / "script.py"
    script.write_text(
        "for n in range(40_000): print(n, 'end-of a line of many characters-' * 2, flush=True)\n"
        "print('end-0-end')\nprint(input())"
    )
    guest = Guest(f"{sys.executable} {script}")
    printed, status = guest.expect(r"end-(\d+)-end\n")
    lines = printed.splitlines()
    assert (len(lines), lines[-1][:5], status[1]) == (40_000, "39999", "0")
    guest.send("the rest\n")
    assert guest.expect("rest")[0] == "the "
    guest.close()


def test_what_a_job_says_is_passed_on_before_its_end(tmp_path: Path) -> None:
    """Each line once, the last one too that has no end."""
    heard: list[str] = []
    script = (
        "import pathlib, sys, time; print('first', file=sys.stderr, flush=True)\n"
        "while not pathlib.Path(sys.argv[1]).exists(): time.sleep(0.01)\n"
        "print('result'); sys.stderr.write('second\\nlast'); sys.exit(3)"
    )

    def note(text: str) -> None:
        heard.append(text)
        (tmp_path / "heard").touch()

    done = Direct().converse(
        [sys.executable, "-c", script, tmp_path / "heard"], partial(followed, note)
    )
    assert (done.returncode, done.stdout) == (3, "result\n")
    assert heard == ["first", "second", "last"]
