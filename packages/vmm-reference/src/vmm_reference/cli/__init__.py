"""The command `vmm`: one file a verb, and a verb's file is imported only when it is used."""

from __future__ import annotations

import os
import sys

from vmm_reference.errors import ConfigError, VmmError

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    0 success, 1 the host failed, 2 a mistake in the arguments or the configuration; `vmm run`
    adds those of the guest's end (see `vmm_reference.outcome`).
    """
    words = sys.argv[1:] if arguments is None else arguments
    # The folder of the command itself: no module of ours is there, and each import would look.
    if sys.path[:1] == [os.path.dirname(os.path.realpath(sys.argv[0]))]:  # noqa: PTH120
        del sys.path[0]
    try:
        if words[:1] == ["run"]:
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
