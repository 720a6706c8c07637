"""Whether a vCPU runs, waits or has not been started."""

from __future__ import annotations

import enum

__all__ = ["MpState"]


class MpState(enum.IntEnum):
    """KVM_MP_STATE_*: x86 knows the first five; the others belong to other architectures."""

    RUNNABLE = 0
    UNINITIALIZED = 1
    INIT_RECEIVED = 2
    HALTED = 3
    SIPI_RECEIVED = 4
    STOPPED = 5
    CHECK_STOP = 6
    OPERATING = 7
    LOAD = 8
    AP_RESET_HOLD = 9
    SUSPENDED = 10
