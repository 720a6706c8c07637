"""`vmm pause`: see its help."""

from __future__ import annotations

import click

from vmm_reference.api.client import ask

__all__ = ["pause"]


@click.command()
@click.argument("socket", type=click.Path(exists=True))
def pause(socket: str) -> int:
    """Pause a running machine.

    SOCKET is the one that `vmm run --api-socket` made.
    """
    ask(socket, "PATCH", "/vm", {"state": "Paused"})
    return 0
