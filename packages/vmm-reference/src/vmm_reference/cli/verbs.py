"""The verbs that click parses; `run`, which has no time for it, is listed here all the same."""

from __future__ import annotations

from importlib import import_module

import click

__all__ = ["verbs"]

_VERBS = {
    "boot": "Boot Debian's own kernel: a shell on a terminal, a self-check otherwise.",
    "clone": "Run many copies of the machine in a snapshot.",
    "doctor": "Say what this host can do, and what to do about what is missing.",
    "image": "Build guest images: an initramfs, a root disk.",
    "memory": "Give a running machine more memory, or take some.",
    "merge": "Make one whole snapshot of a difference and its bases.",
    "migrate": "Move a running machine to another VMM.",
    "pause": "Pause a running machine.",
    "restore": "Let a machine go on from a snapshot.",
    "resume": "Let a paused machine run on.",
    "run": "Run a machine until its guest powers off.",
    "snapshot": "Save a running machine to a folder.",
}


class _Verbs(click.Group):
    """A group whose commands live in the modules of their names."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _VERBS or cmd_name == "run":
            return None
        module = import_module(f"vmm_reference.cli.{cmd_name}")
        command: click.Command = getattr(module, cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_VERBS.items()))


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="vmm-reference", prog_name="vmm")
def _vmm() -> None:
    """A virtual machine monitor for Linux KVM."""


def verbs(arguments: list[str]) -> int:
    """Run a verb other than `run`; returns the exit status."""
    try:
        status = _vmm.main(arguments, prog_name="vmm", standalone_mode=False)
    except click.exceptions.Exit as leave:
        return leave.exit_code
    except click.Abort:
        return 130
    except click.ClickException as mistake:
        mistake.show()
        return mistake.exit_code
    return status if isinstance(status, int) else 0
