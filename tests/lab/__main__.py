"""Run a command in the lab: `python tests/lab [OPTIONS] -- COMMAND...`, or `python -m lab`."""

from __future__ import annotations

import argparse
import os
import signal
import sys

if not __package__:  # started by its path, which puts this folder where the one above belongs
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # noqa: PTH100, PTH120

from lab.errors import LabError
from lab.lab import Lab
from lab.terminal import attach
from vmm_reference.image import ImageError

FAILED = 125


def main() -> int:
    """Parse the arguments, run the command, return its exit status."""
    parser = argparse.ArgumentParser(
        prog="lab",
        description="Run a command with real hardware virtualization and the host's files, which "
        "it can change for itself alone. Ends with the command's status, 128 + n after signal n, "
        f"and {FAILED} where the lab itself failed.",
    )
    parser.add_argument("--memory", default="3G", metavar="SIZE", help="of the lab (default: 3G)")
    parser.add_argument("--append", default="", metavar="ARGS", help="more kernel arguments")
    parser.add_argument(
        "--module", action="append", default=[], metavar="NAME", help="a kernel module to load"
    )
    parser.add_argument("--cpu", type=int, metavar="N", help="the host CPU to run on")
    parser.add_argument(
        "--share", action="append", default=[], metavar="DIR", help="writes in it reach the host"
    )
    parser.add_argument("command", nargs="+", metavar="COMMAND")
    options = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    lab = Lab(
        memory=options.memory,
        append=options.append,
        modules=options.module,
        cpu=options.cpu,
        shares=options.share,
    )
    try:
        with lab:
            return attach(lab, options.command, pty=os.isatty(0) and os.isatty(1))
    except (LabError, ImageError, OSError) as error:
        print(f"lab: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:
        return 128 + signal.SIGPIPE


if __name__ == "__main__":
    sys.exit(main())
