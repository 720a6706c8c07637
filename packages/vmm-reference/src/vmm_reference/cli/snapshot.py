"""`vmm snapshot`: see its help."""

from __future__ import annotations

from pathlib import Path

import click

from vmm_reference.api.client import ask

__all__ = ["snapshot"]


@click.command()
@click.argument("socket", type=click.Path(exists=True))
@click.argument("folder", type=click.Path(file_okay=False))
@click.option("--base", type=click.Path(exists=True, file_okay=False),
              help="Write only what has changed since this snapshot.")  # fmt: skip
@click.option("--track", is_flag=True, help="Let the next snapshot be a difference to this one.")
def snapshot(socket: str, folder: str, base: str | None, track: bool) -> int:
    """Save a running machine to FOLDER; it goes on.

    SOCKET is the one that `vmm run --api-socket` made.
    """
    click.echo("saving ...", err=True)
    body = {
        "snapshot_path": str(Path(folder).absolute()),
        "base": None if base is None else str(Path(base).absolute()),
        "track": track,
    }
    click.echo(ask(socket, "PUT", "/snapshot/create", body)["sha256"])
    return 0
