"""Memory orders and fences, with the meaning that C11 gives them."""

from __future__ import annotations

import enum

from vm_memory._native import lib

__all__ = ["Order", "fence"]

_fence = lib.vmm_fence


class Order(enum.IntEnum):
    """How an atomic access is ordered with other accesses of the same thread (C11, 7.17.3)."""

    RELAXED = 0
    ACQUIRE = 1
    RELEASE = 2
    ACQ_REL = 3
    SEQ_CST = 4


def fence(order: Order = Order.SEQ_CST) -> None:
    """Order the accesses before the call with those after it (`atomic_thread_fence`).

    Only `SEQ_CST` orders an earlier store with a later load, which virtqueue notification needs.
    """
    _fence(order)
