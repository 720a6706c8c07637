"""Tearing, ordering and atomicity between real threads and real processes."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

import pytest

from vm_memory import GuestAddress, GuestMemory, Memfd, Order, fence

A = GuestAddress
SECONDS = 0.4


def beside(child: Callable[[], object], parent: Callable[[], object]) -> None:
    """Run one function in a forked child, another here meanwhile, and check that both end well."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            child()
            status = 0
        finally:
            os._exit(status)
    try:
        parent()
    finally:
        assert os.waitpid(pid, 0)[1] == 0


@pytest.mark.parametrize("size", [2, 4, 8])
def test_i6_aligned_scalars_never_tear(size: int) -> None:
    """I6: a process that writes all zeros and all ones in turn is never seen halfway."""
    memory = GuestMemory.from_ranges([(A(0), 4096), (A(4096), 4096)], backing=Memfd())
    name = f"_u{8 * size}"
    full = (1 << 8 * size) - 1
    addresses = [A(64), A(4096 - size), A(4096)]
    deadline = time.monotonic() + SECONDS

    def write() -> None:
        store = getattr(memory, "write" + name)
        scalars = [memory.scalar(address, size) for address in addresses]
        while time.monotonic() < deadline:
            for value in (0, full) * 20:
                for address, scalar in zip(addresses, scalars, strict=True):
                    store(address, value)
                    scalar.store(full - value)
                    memory.atomic_store(address, size, value)

    def read() -> None:
        load = getattr(memory, "read" + name)
        seen = set()
        while time.monotonic() < deadline:
            for address in addresses:
                seen |= {load(address), memory.atomic_load(address, size)}
        assert seen <= {0, full}

    beside(write, read)


def test_release_and_acquire_order_a_message() -> None:
    """Who sees a number that was stored with release sees the data written before it."""
    memory = GuestMemory.from_ranges([(A(0), 4096)], backing=Memfd())
    rounds = 3000

    def produce() -> None:
        for turn in range(1, rounds + 1):
            memory.write(A(256), turn.to_bytes(4, "little") * 16)
            memory.atomic_store(A(0), 4, turn, Order.RELEASE)
            while memory.atomic_load(A(64), 4) != turn:
                os.sched_yield()

    def consume() -> None:
        for turn in range(1, rounds + 1):
            while memory.atomic_load(A(0), 4, Order.ACQUIRE) != turn:
                os.sched_yield()
            assert memory.read(A(256), 64) == turn.to_bytes(4, "little") * 16
            memory.atomic_store(A(64), 4, turn, Order.RELEASE)

    beside(produce, consume)


def test_a_full_fence_orders_a_store_with_a_later_load() -> None:
    """Two processes raise a flag, fence and look at the other's: one of them sees it."""
    memory = GuestMemory.from_ranges([(A(0), 1 << 16)], backing=Memfd())
    rounds = 500

    def play(me: int) -> None:
        for turn in range(rounds):
            at = 256 * (turn % 200)
            memory.atomic_fetch_add(A(0xF000), 4, 1)
            while memory.atomic_load(A(0xF000), 4) < 2 * (turn + 1) - 1:
                os.sched_yield()
            memory.write_u32(A(at + 64 * me), turn + 1)
            fence()
            seen = memory.read_u32(A(at + 64 * (1 - me))) == turn + 1
            memory.atomic_fetch_or(A(0xE000 + 4 * turn), 4, 1 << 8 * me if not seen else 0)

    beside(lambda: play(0), lambda: play(1))
    neither = [turn for turn in range(rounds) if memory.read_u32(A(0xE000 + 4 * turn)) == 0x101]
    assert neither == []


@pytest.mark.parametrize("processes", [False, True])
def test_updates_are_not_lost(processes: bool) -> None:
    """Additions, and increments by compare-exchange, of two sides all arrive."""
    memory = GuestMemory.from_ranges([(A(0), 4096)], backing=Memfd())
    rounds = 3000

    def add() -> None:
        for _ in range(rounds):
            memory.atomic_fetch_add(A(8), 8, 1, Order.RELAXED)
            done, found = False, memory.atomic_load(A(16), 4, Order.RELAXED)
            while not done:
                done, found = memory.atomic_compare_exchange(A(16), 4, found, found + 1)

    if processes:
        beside(add, add)
    else:
        threads = [threading.Thread(target=add) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert memory.read_u64(A(8)) == 2 * rounds == memory.read_u32(A(16))
