"""`vmm memory`: see its help."""

from __future__ import annotations

import json

import click

from vmm_reference.api.client import ask
from vmm_reference.config import parse_size

__all__ = ["memory"]


@click.command()
@click.argument("socket", type=click.Path(exists=True))
@click.option("--add", metavar="SIZE", help="put a module into a free slot; its number is printed")
@click.option("--remove", metavar="SLOT", type=int, help="ask the guest for a slot's module")
@click.option("--resize", metavar="SIZE", help="how much the guest should have of a memory device")
@click.option("--device", default="memory0", show_default=True, help="which one")
def memory(
    socket: str, add: str | None, remove: int | None, resize: str | None, device: str
) -> int:
    """Give a running machine more memory, or take some; say what it has.

    SOCKET is the one that `vmm run --api-socket` made.
    """
    if add is not None:
        done = ask(socket, "PUT", "/hotplug/memory/modules", {"size": parse_size(add, "--add")})
        click.echo(json.dumps(done))
    if remove is not None:
        ask(socket, "DELETE", "/hotplug/memory/modules", {"slot": remove})
    if resize is not None:
        size = parse_size(resize, "--resize")
        ask(socket, "PATCH", "/hotplug/memory", {"id": device, "requested_size": size})
    if add is None and remove is None and resize is None:
        click.echo(json.dumps(ask(socket, "GET", "/hotplug/memory", {})))
    return 0
