"""`vmm image`: kernels, initial file systems and root disks for guests."""

from __future__ import annotations

from pathlib import Path

import click

from vmm_reference.image.disk import build_disk
from vmm_reference.image.initramfs import build_initramfs, guest_initramfs
from vmm_reference.image.kernels import FLAVOURS, Kernel, debian_kernel, local_kernel

__all__ = ["image"]

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
_OUTPUT = click.Path(dir_okay=False, writable=True, path_type=Path)


def _additions(
    context: click.Context, parameter: click.Parameter, values: tuple[str, ...]
) -> dict[str, Path]:
    """SOURCE:/PLACE pairs as the files of an image: by place."""
    files: dict[str, Path] = {}
    for value in values:
        source, _, place = value.rpartition(":")
        if not source or not place.startswith("/"):
            raise click.BadParameter(f"{value!r} is not SOURCE:/PLACE", context, parameter)
        if not Path(source).exists():
            raise click.BadParameter(f"{source!r} does not exist", context, parameter)
        files[place] = Path(source)
    return files


def _bytes(context: click.Context, parameter: click.Parameter, value: str) -> int:
    """A size such as 256M in bytes."""
    units = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
    number = value.rstrip("KMGTkmgt")
    unit = value[len(number) :].upper()
    if not (number.isascii() and number.isdigit()) or unit not in units:
        raise click.BadParameter(f"{value!r} is not a size such as 256M", context, parameter)
    return int(number) * units[unit]


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
    callback=_additions,
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
    added: dict[str, Path],
) -> None:
    """Build an initial file system for a kernel and print its path."""
    if modules is not None and own is None:
        raise click.UsageError("--modules goes with --kernel")
    target: Kernel = debian_kernel(flavour) if own is None else local_kernel(own, modules)
    if init is None:
        click.echo(guest_initramfs(target, output=output, modules=names, files=added))
    else:
        click.echo(build_initramfs(output, target, names, init=init, files=added))


@image.command()
@click.argument("output", type=_OUTPUT)
@click.option("--size", callback=_bytes, default="256M", show_default=True, help="As 256M or 2G.")
@click.option("--label", default="root", show_default=True, help="Of the file system.")
@click.option("--force", is_flag=True, help="Replace OUTPUT if it is there.")
@_add
def disk(output: Path, size: int, label: str, force: bool, added: dict[str, Path]) -> None:
    """Build a root disk, an ext4 file system in the raw file OUTPUT, and print its path."""
    if output.exists() and not force:
        raise click.UsageError(f"{output} is there already; --force replaces it")
    click.echo(build_disk(output, size=size, files=added, label=label))
