"""What this host's own KVM can do."""

from __future__ import annotations

import functools

__all__ = ["runs_linux"]


@functools.cache
def runs_linux() -> bool:
    """Whether it runs an unmodified kernel, so that no lab is needed; asked once a process."""
    from kvm_ioctls import Kvm, KvmError
    from vmm_reference.probe import probe

    try:
        with Kvm() as kvm:
            return probe(kvm).runs_linux
    except KvmError:
        return False
