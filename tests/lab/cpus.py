"""Shares the host's CPUs out among labs: each lab has one to itself, across all processes.

A lab whose emulator is not pinned loses interrupts and stands still for ever: QEMU's emulation of
VMRUN changes its word of pending interrupts without a lock, which is harmless only while no other
of its threads can run at that moment.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

from lab.errors import LabError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Cpu", "runtime_folder"]


def runtime_folder() -> Path:
    """The folder of this user's running labs, the same for every process of the user.

    Raises:
        LabError: somebody else has made it.
    """
    folder = Path("/tmp") / f"vmm-lab-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise LabError(f"{folder} belongs to another user: remove it, it is this user's to make")
    return folder


class Cpu:
    """A host CPU taken for one lab, and the folder that goes with it.

    The emulator inherits the lock, so the CPU is free again only when it has ended as well.

    Attributes:
        number: which CPU.
        folder: empty at first; what lies in it is removed on release, or by the next taker.
        lock: the descriptor that holds the lock, for the emulator to inherit.
    """

    def __init__(self, number: int, folder: Path, lock: int) -> None:
        self.number = number
        self.folder = folder
        self.lock = lock

    @classmethod
    def take(cls, wanted: int | None, limit: float, report: Callable[[str], None]) -> Cpu:
        """Take a CPU, or wait until there is one.

        Args:
            wanted: which one; None takes any that this process may run on, the last ones first.
            limit: how long to wait, in seconds.
            report: told once that there is a wait.

        Raises:
            LabError: the CPU does not exist for this process, or none came free in time.
        """
        allowed = sorted(os.sched_getaffinity(0), reverse=True)
        if wanted is not None and wanted not in allowed:
            raise LabError(f"CPU {wanted} is not among those this process may run on: {allowed}")
        candidates = allowed if wanted is None else [wanted]
        deadline = time.monotonic() + limit
        told = False
        while True:
            for number in candidates:
                cpu = cls._try(number)
                if cpu is not None:
                    return cpu
            if time.monotonic() >= deadline:
                raise LabError(f"no CPU for a lab within {limit:.0f} s: {candidates} are taken")
            if not told:
                report(
                    f"lab: waiting for a CPU, up to {limit:.0f} s: other labs run on {candidates}"
                )
                told = True
            time.sleep(0.2)

    @classmethod
    def _try(cls, number: int) -> Cpu | None:
        base = runtime_folder()
        lock = os.open(base / f"cpu-{number}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return None
        folder = base / f"cpu-{number}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return cls(number, folder, lock)

    def clear(self) -> None:
        """Empty the folder, for the next lab on this CPU."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()

    def release(self) -> None:
        """Give the CPU back."""
        shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self.lock)
