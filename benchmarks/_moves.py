"""Migrations under load, ours and QEMU's, one lab run a limit: `guest/moves.py` and its rows.

The downtime is what each of them reports; the silence is that of the guest's own 1 ms ticks, as the
host hears them: the reported downtime, what the network needs to find the guest again, and what a
tick is late in any case. What QEMU reports ends when its source has sent the states; what ours
reports, when the other side runs. The silence has all of it in both. Of QEMU's knobs
`downtime-limit` alone is set, as ours; the rest is as it comes (one TCP connection, 128 MiB/s at
most, no throttling). The second limit is about the smallest at which QEMU's migration of this load
comes to an end in the lab.
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
LIMITS = (300, 10)  # ms
PATIENCE = 150.0  # seconds for one move, or for a guest to come up and the first of its moves
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
    for limit in LIMITS:
        moves = piece(bench, [str(kernel.vmlinuz), str(initrd), str(limit), str(bench.rounds)])
        yield from compared(bench, limit, moves)


def piece(bench: Bench, arguments: list[str]) -> list[dict[str, Any]]:
    """What `guest/moves.py` prints where unmodified kernels run, told as it comes."""
    where, booter = place(bench, modules=("tun", "bridge"))
    from lab.errors import LabError  # `place` has made it known where

    bench.note(f"migrations in {where}, of a guest that writes 16 MiB again and again")
    command = ["unshare", "--net", sys.executable, str(HERE / "guest" / "moves.py"), *arguments]
    moves: list[dict[str, Any]] = []

    def follow(job: Any) -> None:
        job.close_stdin()
        moves.clear()  # in a lab that died it begins anew
        while (line := job.read_until(r".*\n", PATIENCE).strip()) != "done":
            bench.note(f"  {line}")
            moves.append(json.loads(line))

    try:
        booter.converse(command, follow)  # type: ignore[attr-defined]
    except LabError as error:
        raise Skip(str(error)) from error
    finally:
        if hasattr(booter, "stop"):
            booter.stop()
    return moves


def compared(bench: Bench, limit: int, moves: list[dict[str, Any]]) -> Iterator[Row]:
    """The rows of what the job has printed; the first round of each is discarded."""
    skipped = {{"ours": "ours", "qemu": "peer"}[move["vmm"]]: str(move["failed"])
               for move in moves if "failed" in move}  # fmt: skip
    moves = [move for move in moves if "failed" not in move and move["round"]]
    quiet = sorted(move["quiet"] for move in moves)
    if quiet:
        bench.note(f"without a migration a tick is {quiet[len(quiet) // 2]:.0f} ms late there")
    for figure, words in FIGURES.items():
        ours, peer = (
            [] if column in skipped else [move[figure] for move in moves if move["vmm"] == vmm]
            for vmm, column in (("ours", "ours"), ("qemu", "peer"))
        )
        yield Row.of(
            f"migration, downtime limit {limit} ms: {words}", "ms",
            ours=ours, peer=peer, peer_name="qemu",
            goal=Goal.peer(1.0) if figure == "downtime" else (), skipped=skipped,
        )  # fmt: skip
