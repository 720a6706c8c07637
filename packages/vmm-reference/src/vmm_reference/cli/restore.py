"""`vmm restore`: see its help."""

from __future__ import annotations

import sys
from typing import Any

import click

from vmm_reference.config import Drive
from vmm_reference.machine import Machine
from vmm_reference.state.snapshot import Restore

from .run import run_on_terminal

__all__ = ["restore"]


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False))
@click.option("--how", type=click.Choice([way.value for way in Restore]),
              default=Restore.COPY_ON_WRITE.value, show_default=True,
              help="Read all memory first, map it, or read what is touched.")  # fmt: skip
@click.option("--drive", "drives", multiple=True, metavar="PATH[,ro]",
              help="Other drives than those that were saved; all of them.")  # fmt: skip
@click.option("--track", is_flag=True, help="Let the next snapshot be a difference to this one.")
@click.option("--api-socket", type=click.Path(), help="Make a control socket.")
def restore(
    folder: str, how: str, drives: tuple[str, ...], track: bool, api_socket: str | None
) -> int:
    """Let a machine go on from the snapshot in FOLDER, its console on the standard streams."""
    overrides: dict[str, Any] = {}
    if drives:
        overrides["drives"] = [Drive.parse(text) for text in drives]
    machine = Machine.restore(folder, how, console=(0, 1), track=track, **overrides)
    status = run_on_terminal(machine, api_socket)
    if machine.outcome is not None and status:
        print(f"vmm: {machine.outcome.value}: {machine.detail}", file=sys.stderr)
    return status
