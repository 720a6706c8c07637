"""The command `vmm`: one file a verb, and a verb's file is imported only when it is used."""

from __future__ import annotations

import sys

import click

from ..errors import ConfigError, VmmError

__all__ = ["main"]

_VERBS = {
    "boot": "Boot Debian's own kernel: a shell on a terminal, a self-check otherwise.",
    "doctor": "Say what this host can do, and what to do about what is missing.",
    "image": "Build guest images: an initramfs, a root disk.",
    "run": "Run a machine until its guest powers off.",
}


class _Verbs(click.Group):
    """A group whose commands live in the modules of their names."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _VERBS:
            return None
        module = __import__(f"{__name__}.{cmd_name}", fromlist=[cmd_name])
        command: click.Command = getattr(module, cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_VERBS.items()))


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="vmm-reference", prog_name="vmm")
def _vmm() -> None:
    """A virtual machine monitor for Linux KVM."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    0 success, 1 the host failed, 2 a mistake in the arguments or the configuration; `vmm run`
    adds those of the guest's end (see `vmm_reference.outcome`).
    """
    try:
        status = _vmm.main(arguments, prog_name="vmm", standalone_mode=False)
    except click.exceptions.Exit as leave:
        status = leave.exit_code
    except click.Abort:
        return 130
    except click.ClickException as mistake:
        mistake.show()
        status = mistake.exit_code
    except ConfigError as mistake:
        print(f"vmm: {mistake}", file=sys.stderr)
        status = 2
    except (VmmError, OSError) as failure:
        print(f"vmm: {failure}", file=sys.stderr)
        status = 1
    return status if isinstance(status, int) else 0
