"""`vmm merge`: see its help."""

from __future__ import annotations

import click

from vmm_reference.state.snapshot import merge as merge_snapshots

__all__ = ["merge"]


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False))
@click.argument("target", type=click.Path(file_okay=False))
def merge(folder: str, target: str) -> int:
    """Make one whole snapshot in TARGET of the difference in FOLDER and all that it builds on."""
    click.echo("merging ...", err=True)
    click.echo(merge_snapshots(folder, target))
    return 0
