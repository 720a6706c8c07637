"""The lab: real hardware virtualization on any machine.

An outer virtual machine, emulated by QEMU with AMD's virtualization and pinned to one host CPU,
runs Debian's stock kernel and `kvm_amd`. A command run inside it sees the host's files, read-only
under a writable overlay, and a `/dev/kvm` that boots unmodified kernels.

    with Lab() as lab:
        print(lab.run(["uname", "-r"]).stdout)

The rooms, outside in: `__main__` is the command, `terminal` joins a job to it, `lab` keeps a lab
and its jobs, `emulator` is QEMU's process, `cpus` shares the host's CPUs out, `outer` makes what
the outer machine boots, `init` is its first process, `agent` runs the jobs, and `wire` is what
the two sides say to each other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lab.errors import LabDied, LabError, LabTimeout
    from lab.lab import Job, Lab

__all__ = ["Job", "Lab", "LabDied", "LabError", "LabTimeout"]


def __getattr__(name: str) -> object:
    # Lazily, because the agent imports this package too, on an interpreter 25 times slower.
    if name in ("Job", "Lab"):
        from lab import lab as room
    elif name in ("LabDied", "LabError", "LabTimeout"):
        from lab import errors as room  # type: ignore[no-redef]
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(room, name)
