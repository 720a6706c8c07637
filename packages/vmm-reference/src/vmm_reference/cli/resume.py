"""`vmm resume`: see its help."""

from __future__ import annotations

import click

from vmm_reference.api.client import ask

__all__ = ["resume"]


@click.command()
@click.argument("socket", type=click.Path(exists=True))
def resume(socket: str) -> int:
    """Let a paused machine run on.

    SOCKET is the one that `vmm run --api-socket` made.
    """
    ask(socket, "PATCH", "/vm", {"state": "Resumed"})
    return 0
