"""The command `vmm`: one file a verb, and a verb's file is imported only when it is used."""

from __future__ import annotations

import atexit
import gc
import os
import sys

from vmm_reference.errors import ConfigError, VmmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

__all__ = ["command", "main"]


def command() -> NoReturn:
    """Be the process: run the command line and end with its status.

    What the interpreter would tidy up on its way out the kernel does in no time.
    """
    # The folder of the command itself: no module of ours is there, and each import would look.
    installed = sys.path[:1] == [os.path.dirname(os.path.realpath(sys.argv[0]))]  # noqa: PTH120
    if installed:
        del sys.path[0]
    codes = None
    if installed and sys.argv[1:2] == ["run"]:
        from .codes import Codes

        codes = Codes()
        codes.use()
    status = main()
    if codes is not None:
        codes.keep()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # nobody reads any more
            status = status or 1
    os._exit(status)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    0 success, 1 the host failed, 2 a mistake in the arguments or the configuration; `vmm run`
    adds those of the guest's end (see `vmm_reference.outcome`).
    """
    words = sys.argv[1:] if arguments is None else arguments
    try:
        if words[:1] == ["run"]:
            gc.disable()  # until the guest runs: what start-up makes is there to stay
            from .run import run

            return run(words[1:])
        from .verbs import verbs

        return verbs(words)
    except ConfigError as mistake:
        print(f"vmm: {mistake}", file=sys.stderr)
        return 2
    except (VmmError, OSError) as failure:
        print(f"vmm: {failure}", file=sys.stderr)
        return 1
    except SystemExit as leave:  # argparse has said what is to be said
        return leave.code if isinstance(leave.code, int) else 2
    except KeyboardInterrupt:
        return 130
    finally:
        gc.enable()
