"""`vmm clone`: see its help."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vmm_reference.state.clone import Template

if TYPE_CHECKING:
    from types import FrameType

    from vmm_reference.machine import Machine

__all__ = ["clone"]


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False))
@click.option("-n", "--count", type=click.IntRange(1, 10000), default=1, show_default=True,
              help="How many.")  # fmt: skip
@click.option("--run-folder", type=click.Path(file_okay=False), default=".", show_default=True,
              help="Gets NUMBER.log and the control socket NUMBER.sock of each.")  # fmt: skip
def clone(folder: str, count: int, run_folder: str) -> int:
    """Run copies of the machine in the snapshot FOLDER, each in a process of its own.

    They share the memory that none of them writes, and have overlays in the place of drives that
    they may write. Ends when the last one has; Ctrl-C ends all. The exit status is the highest.
    """
    out = Path(run_folder)
    out.mkdir(parents=True, exist_ok=True)
    children: dict[int, int] = {}

    def end(_number: int, _frame: FrameType | None) -> None:
        for child in children:
            os.kill(child, signal.SIGTERM)

    with Template(folder) as template:
        for number in range(count):
            children[template.fork(number, partial(_run, out, number))] = number
        click.echo(f"{count} clones run, with logs and control sockets in {out}", err=True)
        before = [(n, signal.signal(n, end)) for n in (signal.SIGINT, signal.SIGTERM)]
        worst = 0
        while children:
            child, status = os.wait()
            number = children.pop(child)
            code = os.waitstatus_to_exitcode(status)
            if code:
                click.echo(f"clone {number} ended with status {code}", err=True)
            worst = max(worst, code if code >= 0 else 128 - code)
        for signum, handler in before:
            signal.signal(signum, handler)
    return worst


def _run(out: Path, number: int, machine: Machine) -> int:
    from vmm_reference.api.server import Control, Server

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent tells
    signal.signal(signal.SIGTERM, lambda _number, _frame: machine.stop())
    with machine, Server(str(out / f"{number}.sock"), Control(machine)):
        outcome = machine.wait()
        (out / f"{number}.log").write_text(machine.console.output)
    return outcome.status
