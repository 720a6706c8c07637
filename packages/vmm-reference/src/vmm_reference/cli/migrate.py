"""`vmm migrate`: see its help."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from vmm_reference.api.client import ask, stream
from vmm_reference.config import parse_size

__all__ = ["migrate"]


@click.command()
@click.argument("socket", type=click.Path(exists=True))
@click.argument("address", required=False)
@click.option("--streams", type=int, help="Connections that carry memory.")
@click.option("--compress", is_flag=True, default=None, help="Try zstd on memory.")
@click.option("--tls", metavar="FOLDER", type=click.Path(exists=True, file_okay=False),
              help="cert.pem, key.pem and ca.pem; the other side needs some too.")  # fmt: skip
@click.option("--downtime", type=float, help="Seconds that the guest may stand still.")
@click.option("--bandwidth", metavar="SIZE", help="Bytes a second at most, such as 100M.")
@click.option("--timeout", type=float, help="Seconds, then it is given up.")
@click.option("--auto-converge", is_flag=True, default=None, help="Slow the vCPUs if need be.")
@click.option("--post-copy", type=int, metavar="ROUNDS",
              help="After so many rounds run it there; pages follow.")  # fmt: skip
@click.option("--local", is_flag=True, default=None,
              help="Hand over memory itself, to a VMM on this host.")  # fmt: skip
@click.option("--recover", is_flag=True, help="Bring a migration that was cut to its end.")
@click.option("--resolve", is_flag=True,
              help="Run it at SOCKET: the other side is dead, and you know it.")  # fmt: skip
@click.option("--cancel", is_flag=True, help="Let the machine stay, unless it was decided.")
def migrate(
    socket: str,
    address: str | None,
    recover: bool,
    resolve: bool,
    cancel: bool,
    **options: Any,
) -> int:
    """Move a running machine to ADDRESS, where `vmm run --incoming ADDRESS` waits.

    SOCKET is the one that `vmm run --api-socket` made; ADDRESS is tcp:HOST:PORT or unix:PATH.
    """
    if recover + resolve + cancel > 1:
        raise click.UsageError("choose one of --recover, --resolve and --cancel")
    if recover:
        _show(ask(socket, "PUT", "/migration/recover", {"address": address}))
    elif resolve:
        ask(socket, "PUT", "/migration/resolve", {})
    elif cancel:
        ask(socket, "DELETE", "/migration", {})
    elif address is None:
        raise click.UsageError("ADDRESS is missing: where does `vmm run --incoming` wait?")
    else:
        if options["bandwidth"] is not None:
            options["bandwidth"] = parse_size(options["bandwidth"], "bandwidth")
        if options["tls"] is not None:
            options["tls"] = str(Path(options["tls"]).absolute())
        for line in stream(socket, "PUT", "/migration", {"address": address, **options}):
            if "progress" in line:
                _progress(line["progress"])
            else:
                _show(line["result"])
    return 0


def _progress(progress: dict[str, Any]) -> None:
    rate = f", {progress['bandwidth'] / 1e6:.0f} MB/s" if progress["bandwidth"] else ""
    sent, left = progress["sent"] / 1e6, progress["left"] / 1e6
    done = int(20 * sent / (sent + left)) if sent + left else 20
    bar = "#" * done + "." * (20 - done)
    text = f"[{bar}] {progress['phase']}, round {progress['rounds']}: {sent:.0f} MB sent, "
    click.echo(f"{text}{left:.0f} MB left{rate}", err=True)


def _show(report: dict[str, Any]) -> None:
    parts = ("pause", "memory", "states", "restore", "start")
    split = ", ".join(f"{name} {report[name] * 1e3:.1f}" for name in parts)
    click.echo(f"moved in {report['seconds']:.2f} s, {report['sent'] / 1e6:.1f} MB in "
               f"{len(report['rounds'])} rounds")  # fmt: skip
    click.echo(f"downtime {report['downtime'] * 1e3:.1f} ms ({split})")
    if report["post_copy"]:
        click.echo(f"pages followed for {report['post_copy']:.2f} s")
