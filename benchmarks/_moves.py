"""Migrations under load, ours and QEMU's, in one lab run: `guest/moves.py` and its rows.

The downtime is what each of them reports; the silence is that of the guest's own 1 ms ticks, as the
host hears them: the reported downtime, what the network needs to find the guest again, and what a
tick is late in any case.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.boot import place
from benchmarks.harness import Bench, Goal, Row, Skip

HERE = Path(__file__).parent
LIMITS = (300, 1)
FIGURES = {"downtime": "downtime", "total": "total time", "gap": "the guest's silence"}


def rows(bench: Bench) -> Iterator[Row]:
    """A row a figure and a limit."""
    from vmm_reference.image.initramfs import guest_initramfs
    from vmm_reference.image.kernels import debian_kernel

    if os.geteuid():
        raise Skip("taps need root")
    program = bench.compile(HERE / "guest" / "moves_load.c", "-static", name="load")
    kernel = debian_kernel("cloud")
    initrd = guest_initramfs(kernel, modules=("virtio_net",), files={"bin/load": program})
    where, booter = place(bench, modules=("tun", "bridge"))
    from lab.errors import LabError  # `place` has made it known where

    bench.note(f"migrations in {where}, of a guest that writes 16 MiB again and again")
    command = [sys.executable, str(HERE / "guest" / "moves.py"), str(kernel.vmlinuz), str(initrd)]
    try:
        done = booter.run(  # type: ignore[attr-defined]  # Lab and Direct share no base
            ["unshare", "--net", *command, str(bench.rounds)], timeout=60 + 30 * bench.rounds
        )
    except LabError as error:
        raise Skip(str(error)) from error
    finally:
        if hasattr(booter, "stop"):
            booter.stop()
    if done.returncode:
        raise Skip(done.stderr.strip()[-300:])
    yield from compared(bench, json.loads(done.stdout))


def compared(bench: Bench, moves: list[dict[str, Any]]) -> Iterator[Row]:
    """The rows of what the job has printed; the first round of each is discarded."""
    failed = {move["vmm"]: move["failed"] for move in moves if "failed" in move}
    if "ours" in failed:
        raise Skip(f"a migration of ours failed: {failed['ours']}")
    skipped = {"peer": failed["qemu"]} if "qemu" in failed else {}
    moves = [move for move in moves if "failed" not in move and move["round"]]
    quiet = sorted(move["quiet"] for move in moves)
    bench.note(f"without a migration a tick is up to {quiet[len(quiet) // 2]:.0f} ms late there")
    for limit in LIMITS:
        for figure, words in FIGURES.items():
            ours, peer = (
                [move[figure] for move in moves if (move["vmm"], move["limit"]) == (vmm, limit)]
                for vmm in ("ours", "qemu")
            )
            yield Row.of(
                f"migration, downtime limit {limit} ms: {words}", "ms",
                ours=ours, peer=() if skipped else peer, peer_name="qemu",
                goal=Goal.peer(1.0) if figure == "downtime" else (), skipped=skipped,
            )  # fmt: skip
