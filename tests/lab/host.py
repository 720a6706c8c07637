"""Whether the KVM of this very machine runs unmodified kernels."""

from __future__ import annotations

import functools

from kvm_ioctls import Kvm, KvmError
from vmm_reference.probe import probe

__all__ = ["runs_linux"]


@functools.cache
def runs_linux() -> bool:
    """Ask the probe guest; False too where there is no KVM that this user may open."""
    try:
        with Kvm() as kvm:
            return probe(kvm).runs_linux
    except KvmError:
        return False
