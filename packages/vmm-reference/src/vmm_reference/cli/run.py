"""`vmm run`: one machine, its console on the terminal or the standard streams."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import click

from ..config import Drive, MachineConfig
from ..errors import ConfigError
from ..machine import Machine
from ..outcome import Outcome

if TYPE_CHECKING:
    from types import FrameType

__all__ = ["configuration", "run", "run_on_terminal"]

STATUSES = """
Exit status: 0 the guest powered off (or Ctrl-A x), 1 the host failed, 2 a mistake in the
arguments, 3 the guest panicked, 4 it reset itself with --on-reset exit, 5 triple fault,
6 KVM internal error, 128 + N ended by signal N.
"""


def configuration(path: str | None, options: dict[str, Any]) -> MachineConfig:
    """The machine of a TOML file, changed by what the command line gives.

    Raises:
        ConfigError: the file or a value is not a machine.
    """
    table: dict[str, Any] = {}
    if path is not None:
        import tomllib  # noqa: PLC0415 - only a run with a file pays for it

        try:
            with open(path, "rb") as file:  # noqa: PTH123
                table = tomllib.load(file)
        except OSError as error:
            raise ConfigError("config", path, error.strerror or str(error)) from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError("config", path, f"is not TOML: {error}") from None
    table |= {key: value for key, value in options.items() if value not in (None, (), False)}
    return MachineConfig.from_mapping(table, source=path or "vmm run")


def run_on_terminal(machine: Machine) -> Outcome:
    """Run a machine with its console on the standard streams, until it ends.

    On a terminal the keys are the guest's, but for Ctrl-A x. SIGTERM, SIGINT and SIGHUP stop the
    machine; SIGTERM's exit status is the outcome's, the caller of `run` tells the others apart.
    """
    caught: list[int] = []

    def stop(number: int, _frame: FrameType | None) -> None:
        caught.append(number)
        machine.stop(Outcome.STOPPED)

    with ExitStack() as stack:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            stack.callback(signal.signal, number, signal.signal(number, stop))
        if os.isatty(0):
            from ..backends.terminal import RawTerminal  # noqa: PLC0415 - and so here

            terminal = stack.enter_context(RawTerminal(0))
            previous = signal.signal(signal.SIGCONT, lambda _number, _frame: terminal.set_raw())
            stack.callback(signal.signal, signal.SIGCONT, previous)
        stack.enter_context(machine)
        outcome = machine.wait()
    if caught:
        raise click.exceptions.Exit(128 + caught[0])
    return outcome


@click.command(epilog=STATUSES)
@click.option("--kernel", metavar="PATH", help="Linux image: ELF vmlinux or bzImage.")
@click.option("--initrd", metavar="PATH", help="Initial RAM file system.")
@click.option(
    "--drive", "drives", metavar="PATH[,ro]", multiple=True,
    help="Raw disk image or block device; the first is /dev/vda. May be given many times.",
)  # fmt: skip
@click.option("--cpus", metavar="N", help="Number of vCPUs.  [default: 1]")
@click.option("--memory", metavar="SIZE", help="RAM, such as 256M or 2G.  [default: 256M]")
@click.option("--cmdline", metavar="TEXT", help="The kernel's command line.")
@click.option("--config", "path", metavar="FILE", help="TOML file; options given here win.")
@click.option("--on-reset", metavar="restart|exit", help="When the guest resets.  [default: restart]")
@click.option("--protocol", metavar="auto|linux64|pvh", help="How the kernel is entered.")
@click.option("--kaslr", is_flag=True, help="Start a bzImage in its own decompressor.")
def run(path: str | None, **options: Any) -> int:
    """Run a machine until its guest powers off.

    The guest's serial console is on the standard streams; on a terminal, Ctrl-A x leaves.
    """
    if options["cpus"] is not None:
        text = options["cpus"]
        options["cpus"] = int(text) if text.isascii() and text.isdigit() else text
    options["drives"] = tuple(Drive.parse(text) for text in options["drives"])
    machine = Machine(configuration(path, options), console=(0, 1))
    outcome = run_on_terminal(machine)
    if outcome is not Outcome.POWER_OFF:
        detail = f": {machine.detail}" if machine.detail else ""
        print(f"vmm: {outcome.value}{detail}", file=sys.stderr)
    return outcome.status
