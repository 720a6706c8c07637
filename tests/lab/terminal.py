"""Joins a job to this process's own standard input and output, be they a terminal or not."""

from __future__ import annotations

import contextlib
import os
import signal
from typing import TYPE_CHECKING

from lab.errors import LabDied
from vmm_reference.backends.terminal import RawTerminal

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lab.lab import Job, Lab

__all__ = ["attach"]

REPLAYED = 16 << 20
"""So much input is kept for a job that has to run again; one that took more cannot."""


def attach(lab: Lab, argv: Sequence[str], *, pty: bool) -> int:
    """Run a command as if it ran here, and return its exit status.

    Args:
        lab: where.
        argv: the command.
        pty: give it a terminal, whose keys and size are this process's terminal's.

    Raises:
        LabError: as `Lab.popen`; or the lab died, and the job's input is not known any more.
    """
    lab.start()
    typed = bytearray()
    while True:
        try:
            with RawTerminal(0) if pty else contextlib.nullcontext():
                return _serve(lab, argv, pty, typed)
        except LabDied:
            # The next `popen` says so, and starts the lab again.
            if pty:
                typed.clear()  # nobody can say which keys were meant for which question
            elif len(typed) > REPLAYED:
                raise


def _serve(lab: Lab, argv: Sequence[str], pty: bool, typed: bytearray) -> int:
    """One try, which begins with the input that earlier ones took."""

    def show(stream: int, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(stream, view) :]

    with (
        lab.popen(argv, pty=pty, sink=show) as job,
        _resized(job) if pty else contextlib.nullcontext(),
    ):
        sources = [0]
        if typed:
            job.write(bytes(typed))
        while job.returncode is None:
            # Input is read no faster than the job takes it.
            if lab.pump(1, sources if job.backlog == 0 else ()):
                try:
                    data = os.read(0, 1 << 16)
                except OSError:  # how a terminal says that it is gone
                    data = b""
                if not data and pty:
                    return 128 + signal.SIGHUP
                if data:
                    if len(typed) <= REPLAYED:
                        typed += data
                    job.write(data)
                else:
                    sources = []
                    job.close_stdin()
        return job.returncode


@contextlib.contextmanager
def _resized(job: Job) -> Iterator[None]:
    """Tell the job the size of this terminal, now and when it changes."""

    def tell(*_: object) -> None:
        with contextlib.suppress(OSError):
            columns, rows = os.get_terminal_size(0)
            job.resize(rows, columns)

    before = signal.signal(signal.SIGWINCH, tell)
    try:
        tell()
        yield
    finally:
        signal.signal(signal.SIGWINCH, before)
