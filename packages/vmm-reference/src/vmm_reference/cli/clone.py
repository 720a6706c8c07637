"""`vmm clone`: see its help."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vmm_reference.state.clone import Template

from .run import Signals

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmm_reference.machine import Machine

__all__ = ["clone"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False))
@click.option("-n", "--count", type=click.IntRange(1, 10000), default=1, show_default=True,
              help="How many.")  # fmt: skip
@click.option("--run-folder", type=click.Path(file_okay=False), default=".", show_default=True,
              help="Gets NUMBER.log and the control socket NUMBER.sock of each.")  # fmt: skip
def clone(folder: str, count: int, run_folder: str) -> int:
    """Run copies of the machine in the snapshot FOLDER, each in a process of its own.

    They share the memory that none of them writes, and have overlays in the place of drives that
    they may write, whose images must be as they were: no machine may write them any more. Ends when
    the last one has; Ctrl-C ends all. The exit status is the highest.
    """
    out = Path(run_folder)
    out.mkdir(parents=True, exist_ok=True)
    children: dict[int, int] = {}
    worst = 0
    # They are waited for, not handled: one that comes before the wait is not missed.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        with Template(folder) as template, Path(os.devnull).open("rb") as nothing:
            for number in range(count):
                with (out / f"{number}.log").open("wb") as log:
                    console = nothing.fileno(), log.fileno()
                    run = partial(_run, out, number)
                    children[template.fork(number, run, console=console)] = number
            click.echo(f"{count} clones run, with logs and control sockets in {out}", err=True)
            while children:
                if signal.sigwait(_SIGNALS) != signal.SIGCHLD:
                    for child in children:
                        os.kill(child, signal.SIGTERM)
                for number, code in _ended(children):
                    if code:
                        click.echo(f"clone {number} ended with status {code}", err=True)
                    worst = max(worst, code if code >= 0 else 128 - code)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return worst


def _ended(children: dict[int, int]) -> Iterator[tuple[int, int]]:
    """Take those that have ended out of the children: their numbers and statuses."""
    while children:
        child, status = os.waitpid(-1, os.WNOHANG)
        if not child:
            return
        yield children.pop(child), os.waitstatus_to_exitcode(status)


def _run(out: Path, number: int, machine: Machine) -> int:
    from vmm_reference.api.server import Control, Server

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent tells
    with Signals(machine, lambda _: machine.stop(), signal.SIGTERM):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        with machine, Server(str(out / f"{number}.sock"), Control(machine)):
            machine.wait()
            return machine.status
