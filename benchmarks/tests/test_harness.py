"""The harness: medians and ratios, goals, skipped columns, the JSON form and the command line."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import __main__ as command
from benchmarks.harness import Bench, Goal, Row, Skip, per_call, report, table

POSITIVE = st.floats(min_value=1e-6, max_value=1e12)
RUNS = st.lists(POSITIVE, min_size=1, max_size=9)
ABSENT_OR = st.lists(POSITIVE, max_size=9)
GOALS = st.builds(
    Goal,
    st.sampled_from(["ours", "ratio_floor", "ratio_peer", "ours - floor", "ours - peer"]),
    st.sampled_from(["<=", ">="]),
    POSITIVE,
)
ROWS = st.builds(
    Row.of,
    st.text(max_size=20),
    st.sampled_from(["ns", "s", "GB/s"]),
    ours=ABSENT_OR,
    floor=ABSENT_OR,
    peer=ABSENT_OR,
    peer_name=st.none() | st.just("peer"),
    goal=st.lists(GOALS, max_size=3),
)
FIELDS = [
    "name", "unit", "ours", "floor", "peer", "peer_name", "ratio_floor", "ratio_peer",
    "goal", "met",
]  # fmt: skip


@given(RUNS, RUNS, RUNS)
def test_ratios_are_ratios_of_medians(
    ours: list[float], floor: list[float], peer: list[float]
) -> None:
    """A row's ratios divide the median of our runs by the median of the other's."""
    row = Row.of("x", "ns", ours=ours, floor=floor, peer=peer)
    assert row.ratio_floor == statistics.median(ours) / statistics.median(floor)
    assert row.ratio_peer == statistics.median(ours) / statistics.median(peer)


@given(RUNS, RUNS)
def test_runs_in_another_order_give_the_same_row(ours: list[float], floor: list[float]) -> None:
    """Only the values of the runs count, not their order."""
    row = Row.of("x", "ns", ours=ours, floor=floor)
    assert row == Row.of("x", "ns", ours=ours[::-1], floor=sorted(floor))


@given(ROWS)
def test_a_goal_is_met_missed_or_open(row: Row) -> None:
    """The answer is false once one goal is missed, and open where a value it needs is absent."""
    answers = [goal.met(row) for goal in row.goals]
    if not answers:
        assert row.met is None
        assert row.goal is None
    elif False in answers:
        assert row.met is False
    else:
        assert row.met is (None if None in answers else True)


@pytest.mark.parametrize(
    ("goal", "met"),
    [
        (Goal.floor(2.0), True),
        (Goal.floor(1.9), False),
        (Goal.peer(0.5), True),
        (Goal.peer(0.4), False),
        (Goal.floor_rate(2.0), True),
        (Goal.floor_rate(2.1), False),
        (Goal.peer_rate(0.5), True),
        (Goal.peer_rate(0.6), False),
        (Goal.at_most(10), True),
        (Goal.at_most(9), False),
        (Goal.floor_plus(5), True),
        (Goal.floor_plus(4), False),
        (Goal.peer_plus(-10), True),
        (Goal.peer_plus(-11), False),
    ],
)
def test_each_kind_of_goal_is_compared_as_it_reads(goal: Goal, met: bool) -> None:
    """A goal just reached is met, and one just beyond it is missed."""
    assert Row.of("x", "ns", ours=[10], floor=[5], peer=[20], goal=goal).met is met


@given(st.lists(ROWS, max_size=5))
def test_the_json_form_has_exactly_its_fields(rows: list[Row]) -> None:
    """The file reads back, with every field of every row there and absent values null."""
    content = json.loads(report("memory", rows))
    assert list(content) == ["suite", "host", "rows"]
    assert content["suite"] == "memory"
    assert {"cpu", "cores", "memory", "kernel", "python", "kvm"} <= set(content["host"])
    for row, written in zip(rows, content["rows"], strict=True):
        assert list(written) == FIELDS
        assert written["ours"] == row.ours
        assert (written["floor"] is None) == (row.floor is None)
        assert written["met"] is row.met


@given(st.lists(ROWS, max_size=5))
def test_the_table_has_a_line_for_each_row(rows: list[Row]) -> None:
    """Whatever is absent, the table can be printed and holds every goal."""
    lines = table(rows)
    for row in rows:
        assert row.goal is None or row.goal in lines


def test_rounds_alternate_and_the_first_is_discarded() -> None:
    """The columns run in turn in every round, and the first round enters no median."""
    order: list[str] = []

    def column(name: str) -> float:
        order.append(name)
        return 1000.0 if order.count(name) == 1 else float(order.count(name))

    row = Bench(rounds=3).compare(
        "x", "ns",
        ours=lambda: column("ours"), floor=lambda: column("floor"), peer=lambda: column("peer"),
    )  # fmt: skip
    assert order == ["ours", "floor", "peer"] * 4
    assert (row.ours, row.floor, row.peer) == (3.0, 3.0, 3.0)


def test_a_skipped_column_is_null_with_its_reason() -> None:
    """A peer that is absent leaves the other columns as they are and is explained in the table."""

    def absent() -> float:
        raise Skip("no cargo here")

    row = Bench(rounds=2).compare(
        "x", "ns", ours=lambda: 2.0, floor=Skip("no gcc"), peer=absent, peer_name="rust-vmm",
        goal=Goal.peer(1),
    )  # fmt: skip
    assert (row.ours, row.floor, row.peer, row.met) == (2.0, None, None, None)
    assert row.skipped == {"floor": "no gcc", "peer": "no cargo here"}
    assert "rust-vmm skipped: no cargo here" in table([row])


def test_a_column_that_skips_late_keeps_no_half_median() -> None:
    """Runs made before a column gave up do not stand for it."""
    calls: Iterator[int] = iter(range(9))

    def fails_in_the_third_round() -> float:
        if next(calls) == 2:
            raise Skip("gone")
        return 1.0

    row = Bench(rounds=3).compare("x", "ns", ours=lambda: 1.0, peer=fails_in_the_third_round)
    assert row.peer is None


def test_a_failure_that_is_no_skip_is_not_hidden() -> None:
    """An exception of a column other than Skip ends the suite."""
    with pytest.raises(ZeroDivisionError):
        Bench(rounds=1).compare("x", "ns", ours=lambda: 1 / 0)


@given(st.floats(min_value=0.1, max_value=1e9))
def test_a_floor_of_zero_has_no_ratio(ours: float) -> None:
    """Dividing by nothing gives an absent ratio, not an error or an infinity."""
    row = Row.of("x", "ns", ours=[ours], floor=[0.0], goal=Goal.floor(1))
    assert row.ratio_floor is None
    assert row.met is None


def test_per_call_gives_nanoseconds_of_one_call() -> None:
    """The figure of a call is positive, finite and far from that of the whole loop."""
    figure = per_call("a + a", calls=10_000, scope={"a": 1})()
    assert math.isfinite(figure)
    assert 0 < figure < 100_000


def test_a_peer_is_found_by_name_or_on_the_path(tmp_path: Path) -> None:
    """A named program wins, one on PATH is next, and an absent one says how to give it."""
    program = tmp_path / "firecracker"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    bench = Bench(peers={"firecracker": program, "folder": tmp_path})
    assert bench.peer("firecracker") == program
    assert bench.peer("shell", where="sh").name == "sh"
    with pytest.raises(Skip, match="--peer qemu=PATH"):
        bench.peer("qemu", where="no-such-command-anywhere")
    with pytest.raises(Skip, match="not a program"):
        bench.peer("folder")


def test_the_command_measures_and_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A suite named on the command line is run with its options, printed and written."""

    class Suite:
        @staticmethod
        def rows(bench: Bench) -> Iterator[Row]:
            assert bench.peers == {"firecracker": Path("/fc")}
            yield bench.compare("x", "ns", ours=lambda: 1.0, goal=Goal.at_most(0.5))

    monkeypatch.setattr(command, "suites", lambda: ["demo"])
    monkeypatch.setattr("importlib.import_module", lambda _name: Suite)
    written = tmp_path / "demo.json"
    arguments = ["demo", "--json", str(written), "--peer", "firecracker=/fc", "--rounds", "2"]
    assert command.main(arguments) == 0
    assert "MISSED" in capsys.readouterr().out
    assert json.loads(written.read_text())["rows"][0]["met"] is False


def test_parts_of_a_suite_run_by_name(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The named parts run, or all of them; another name ends with those that there are."""

    def part(name: str) -> Callable[[Bench], Iterator[Row]]:
        return lambda bench: iter([bench.compare(f"row {name}", "ns", ours=lambda: 1.0)])

    class Suite:
        PARTS: ClassVar = {name: part(name) for name in ("a", "b")}

    monkeypatch.setattr(command, "suites", lambda: ["demo"])
    monkeypatch.setattr("importlib.import_module", lambda _name: Suite)
    for chosen, expected in ((["b"], ["b"]), ([], ["a", "b"])):
        assert command.main(["demo", *chosen, "--rounds", "1"]) == 0
        printed = capsys.readouterr().out
        assert [name for name in ("a", "b") if f"row {name}" in printed] == expected
    with pytest.raises(SystemExit) as stop:
        command.main(["demo", "c"])
    assert stop.value.code == 2
    assert "no part 'c'; it has a, b" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["no-such-suite"], ["boot", "--peer", "firecracker"], ["boot", "--rounds", "0"], []],
)
def test_a_wrong_command_line_is_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """An unknown suite, a peer without a path and no rounds end with status 2 and a message."""
    with pytest.raises(SystemExit) as stop:
        command.main(arguments)
    assert stop.value.code == 2
    assert "error:" in capsys.readouterr().err
