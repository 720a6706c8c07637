"""`vmm image`: kernels, initial file systems and root disks for guests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from vmm_reference.image.initramfs import build_initramfs, guest_initramfs
from vmm_reference.image.kernels import FLAVOURS, Kernel, debian_kernel, local_kernel

__all__ = ["image"]

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
_OUTPUT = click.Path(dir_okay=False, writable=True, path_type=Path)


class _Addition(click.ParamType):
    """SOURCE:PLACE, a file or folder of the host and its path in the image."""

    name = "source:place"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, Path]:
        source, _, place = str(value).rpartition(":")
        if not source or not place.startswith("/"):
            self.fail(f"{value!r} is not SOURCE:/PLACE", param, ctx)
        if not Path(source).exists():
            self.fail(f"{source!r} does not exist", param, ctx)
        return place, Path(source)


_flavour = click.option(
    "--flavour",
    type=click.Choice([*FLAVOURS]),
    default="cloud",
    show_default=True,
    help="Which of Debian's kernels.",
)
_add = click.option(
    "--add",
    "added",
    type=_Addition(),
    multiple=True,
    metavar="SOURCE:/PLACE",
    help="A file or folder of the host to put into the image; may be repeated.",
)


@click.group()
def image() -> None:
    """Build guest images: an initramfs, a root disk; fetch Debian's kernels.

    Packages are downloaded once and unpacked into a cache, never installed: ~/.cache/vmm-reference,
    or the folder that the environment variable VMM_CACHE names. Each command prints the path of
    what it made on standard output.
    """


@image.command()
@_flavour
@click.option("--update", is_flag=True, help="Take a newer one if apt's lists name it.")
def kernel(flavour: str, update: bool) -> None:
    """Fetch Debian's kernel, if the cache does not have it, and print its path."""
    click.echo(debian_kernel(flavour, update=update).vmlinuz)


@image.command()
@click.option("-o", "--output", type=_OUTPUT, help="Where to write it; else it stays in the cache.")
@_flavour
@click.option("--kernel", "own", type=_FILE, help="A kernel of your own instead of Debian's.")
@click.option("--modules", type=_FOLDER, help="Its folder lib/modules/VERSION, if not beside it.")
@click.option("--module", "names", multiple=True, metavar="NAME", help="A further module.")
@click.option("--init", type=_FILE, help="An init of your own instead of the guest's.")
@_add
def initramfs(
    output: Path | None,
    flavour: str,
    own: Path | None,
    modules: Path | None,
    names: tuple[str, ...],
    init: Path | None,
    added: tuple[tuple[str, Path], ...],
) -> None:
    """Build an initial file system for a kernel and print its path."""
    if modules is not None and own is None:
        raise click.UsageError("--modules goes with --kernel")
    target: Kernel = debian_kernel(flavour) if own is None else local_kernel(own, modules)
    files = dict(added)
    if init is None:
        click.echo(guest_initramfs(target, output=output, modules=names, files=files))
    else:
        click.echo(build_initramfs(output, target, names, init=init, files=files))
