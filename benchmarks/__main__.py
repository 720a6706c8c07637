"""Run one suite: `python -m benchmarks SUITE [PART...] [--json FILE] [--peer NAME=PATH]`."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import harness


def suites() -> list[str]:
    """The names of the suites: the files here that are neither private nor the harness."""
    names = (path.stem for path in Path(__file__).parent.glob("[!_]*.py"))
    return sorted(name for name in names if name != "harness")


def peer(text: str) -> tuple[str, Path]:
    """A value of --peer, NAME=PATH."""
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH")
    return name, Path(path).absolute()


def count(text: str) -> int:
    """A value of --rounds, 1 or more."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of rounds; give 1 or more")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a suite, print its table, write its JSON form; the exit status is 0 unless it failed."""
    parser = argparse.ArgumentParser(
        prog="benchmarks", description="Measure ours against the floor and a peer."
    )
    parser.add_argument("suite", choices=suites())
    parser.add_argument("parts", nargs="*", metavar="PART", help="only these parts of the suite")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there as JSON")
    parser.add_argument(
        "--peer", type=peer, action="append", default=[], metavar="NAME=PATH",
        help="a peer's program built by hand; may be given more than once",
    )  # fmt: skip
    parser.add_argument("--rounds", type=count, default=harness.ROUNDS, metavar="N")
    options = parser.parse_args(arguments)
    if (load := os.getloadavg()[0]) > 0.5 * (os.cpu_count() or 1):
        print(f"this machine is busy (load {load:.1f}): figures will be worse than they are")
    suite = importlib.import_module(f"benchmarks.{options.suite}")
    parts = getattr(suite, "PARTS", None) or {"all": suite.rows}
    if unknown := [name for name in options.parts if name not in parts]:
        parser.error(f"{options.suite} has no part {unknown[0]!r}; it has {', '.join(parts)}")
    bench = harness.Bench(rounds=options.rounds, peers=dict(options.peer))
    rows = [row for name in options.parts or parts for row in harness.measure(parts[name], bench)]
    print(harness.table(rows))
    if options.json:
        options.json.write_text(harness.report(options.suite, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
