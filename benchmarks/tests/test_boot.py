"""The boot suite: what the driver prints, how it is read, and which rows come of it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks import boot
from benchmarks.harness import Bench, Goal, Row, Skip

PRINTED = """\
100000000 line vmm: warning
500000000 entry
700000000 line [    0.151977] HugeTLB: unsupported hugepagesz=1
750000000 line [    0.250000] another line
2000000000 line init 1.23
2010000000 line off 1.25
2020000000 line [    1.300000] reboot: machine restart
2500000000 exit 4
"""
STAMPS = {
    "entry": 0.5, "kernel": 0.7, "init": 2.0, "clock_init": 1.23, "clock_off": 1.25, "exit": 2.5,
}  # fmt: skip


@pytest.fixture(scope="module")
def driver() -> Path:
    """The compiled driver."""
    try:
        return Bench().compile(boot.HERE / "native" / "boot_driver.c", name="boot_driver")
    except Skip as skip:
        pytest.skip(skip.reason)


def printed(text: str, **seconds: float) -> str:
    """The driver's output with each exit stamped otherwise."""
    return text.replace("2500000000 exit", f"{int(seconds['exit'] * 1e9)} exit")


def test_the_drivers_output_is_read_stage_by_stage() -> None:
    """The first line of each kind gives its stamp, the guest's own clock included."""
    found = boot.Boot.parse(PRINTED)
    assert found.stamps == STAMPS
    assert found.status == 4
    assert not found.failure
    assert found.lines[0] == "vmm: warning"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1 line init 1.0\n9 timeout ./x\n10 exit 137\n", "did not end within"),
        ("1 line init 1.0\n10 exit 1\n", "status 1 before the guest's reset"),
        ("", "before the guest's reset"),
    ],
)
def test_a_boot_that_stops_early_is_a_failure(text: str, words: str) -> None:
    """A boot counts only if the guest came to its reset and the process ended by itself."""
    assert words in boot.Boot.parse(text).failure


def output(*, qemu: float = 5.0, rounds: int = 3) -> str:
    """A job's output in which QEMU takes so long and the first round is far off."""
    text = ""
    for turn in range(rounds + 1):
        for cpus in boot.CPUS:
            for name, seconds in (("ours", 2.5), ("qemu", qemu)):
                text += f"== {name} {cpus} {turn}\n"
                text += printed(PRINTED, exit=100.0 if turn == 0 else seconds)
    return text


def rows_of(text: str) -> list[Row]:
    """The rows of a job's output on a machine without Firecracker."""
    bench = Bench(write=lambda _text: None)
    return list(boot.compared(bench, text, {"firecracker": "not here"}))


def test_every_stage_has_a_row_for_each_peer_and_cpu_count() -> None:
    """The rows hold medians without the first round, and the goals where they belong."""
    rows = rows_of(output())
    assert len(rows) == len(boot.STAGES) * len(boot.CPUS) * 2
    whole = next(row for row in rows if row.name == "whole process, 1 vCPU")
    assert (whole.ours, whole.peer, whole.peer_name) == (2.5, 5.0, "qemu")
    assert whole.goals == (Goal.peer(0.75),)
    assert whole.met is True
    assert sum(len(row.goals) for row in rows) == len(boot.GOALS)


def test_a_missed_goal_is_shown_as_missed() -> None:
    """Where QEMU is as fast as we are, the row says that the goal is missed."""
    whole = next(row for row in rows_of(output(qemu=2.5)) if row.name.startswith("whole"))
    assert whole.met is False


def test_an_absent_peer_is_a_skipped_column() -> None:
    """Firecracker's rows hold our figures, and its reason instead of its own."""
    row = next(row for row in rows_of(output()) if row.peer_name == "firecracker")
    assert row.ours is not None
    assert row.peer is None
    assert row.skipped == {"peer": "not here"}


def test_a_peer_that_fails_is_a_skipped_column() -> None:
    """A peer whose boot failed once is told with its last lines, and none of its runs count."""
    text = output() + "== qemu 1 4\n1 line no such device\n2 exit 1\n"
    row = next(row for row in rows_of(text) if row.peer_name == "qemu")
    assert row.peer is None
    assert "no such device" in row.skipped["peer"]


def test_a_boot_of_ours_that_fails_ends_the_suite() -> None:
    """No figures stand for a VMM that does not boot."""
    with pytest.raises(RuntimeError, match="no such file"):
        rows_of("== ours 1 0\n1 line no such file\n2 exit 1\n")


def test_the_dearest_imports_come_first() -> None:
    """The note names the modules by their own time, the dearest at the top."""
    text = "".join(
        f"1 line import time: {own:>9} | {own + 5:>10} | {name}\n"
        for own, name in ((100, "small"), (900, "big"), (500, "  middle"))
    )
    words = boot.imports(boot.Boot.parse(text)).split()
    assert words.index("big") < words.index("middle") < words.index("small")


def test_the_job_is_a_script_the_shell_accepts() -> None:
    """Whatever the paths hold, the script is well-formed and names every VMM."""
    vmms = [boot.Vmm("ours", "", "vmm run"), boot.qemu(Path("/opt/my qemu/bin/q"))]
    vmms.append(boot.firecracker(Path("/a 'quoted' path/firecracker")))
    script = boot.job(vmms, {"vmlinux": Path("/with space/vmlinux")}, 2)
    shell = shutil.which("sh")
    assert shell is not None
    subprocess.run([shell, "-n", "-c", script], check=True)
    assert all(f'"== {vmm.name} $N $round"' in script for vmm in vmms)


def test_each_round_has_every_boot_once_and_an_order_of_its_own(tmp_path: Path) -> None:
    """As what happens every few boots should not always happen to the same."""
    driver = tmp_path / "driver"
    driver.write_text("#!/bin/sh\n")
    driver.chmod(0o755)
    vmms = [boot.Vmm("ours", "", "a"), boot.Vmm("b", "", "b"), boot.Vmm("c", "", "c")]
    script = boot.job(vmms, {"driver": driver}, 4)
    assert script == boot.job(vmms, {"driver": driver}, 4)
    done = subprocess.run(["sh", "-c", script], check=True, capture_output=True, text=True)
    heads = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("== ")]
    orders = [
        [(name, cpus) for name, cpus, turn in heads if turn == str(number) and name != "imports"]
        for number in range(5)
    ]
    every = sorted((vmm.name, str(cpus)) for vmm in vmms for cpus in boot.CPUS)
    assert all(sorted(order) == every for order in orders)
    assert len({tuple(order) for order in orders}) == len(orders)


def test_the_driver_stamps_lines_and_the_end(driver: Path) -> None:
    """Lines come in order with rising stamps, and the exit status is the process's."""
    script = "echo init 1.5; sleep 0.05; echo off 1.6; exit 4"
    done = subprocess.run(
        [driver, "20", "sh", "-c", script], check=True, capture_output=True, text=True, timeout=30
    )
    found = boot.Boot.parse(done.stdout)
    assert found.lines == ("init 1.5", "off 1.6")
    assert found.status == 4
    assert 0 < found.stamps["init"] < found.stamps["init"] + 0.04 < found.stamps["exit"]


def test_the_driver_ends_what_runs_too_long(driver: Path) -> None:
    """A VMM that does not end in time is killed and the timeout told."""
    done = subprocess.run(
        [driver, "1", "sleep", "60"], check=True, capture_output=True, text=True, timeout=30
    )
    assert boot.Boot.parse(done.stdout).failure.startswith("it did not end")


def test_the_driver_tells_of_a_program_that_is_not_there(driver: Path) -> None:
    """Starting nothing is status 127 with the reason as a line."""
    done = subprocess.run(
        [driver, "5", "/no/such/vmm"], check=True, capture_output=True, text=True, timeout=30
    )
    found = boot.Boot.parse(done.stdout)
    assert found.status == 127
    assert "No such file" in found.lines[0]
