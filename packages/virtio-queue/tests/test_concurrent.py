"""A driver in another process on shared memory: order, completeness, no lost notification."""

from __future__ import annotations

import os
import select
import sys
import traceback

import pytest

from virtio_queue import Queue
from virtio_queue.constants import F_EVENT_IDX, F_IN_ORDER, F_INDIRECT_DESC
from virtio_queue.testing import PackedDriver, SplitDriver
from vm_memory import GuestAddress, GuestMemory, Memfd

ROUNDS = 2000
PATIENCE = 20.0

KINDS: list[type[SplitDriver | PackedDriver]] = [SplitDriver, PackedDriver]


def _wait(fd: int, what: str) -> None:
    ready, _, _ = select.select([fd], [], [], PATIENCE)
    assert ready, f"{what} was lost"
    os.read(fd, 4096)


def _drive(driver: SplitDriver | PackedDriver, kick: int, interrupt: int) -> None:
    """Send numbered requests as fast as the ring takes them and check each answer."""
    sent = received = 0
    expected: dict[int, int] = {}
    indirect = bool(driver.features & F_INDIRECT_DESC)
    while received < ROUNDS:
        while sent < ROUNDS and driver.free >= 3:
            head = driver.add([b"%d" % sent, b"!"], [10], indirect=indirect and sent % 2 == 0)
            expected[head] = sent
            sent += 1
        if driver.kick_needed():
            os.write(kick, b"k")
        used = driver.reap()
        if not used:
            # `reap` asked for an interrupt; look once more before sleeping.
            used = driver.reap()
            if not used:
                _wait(interrupt, "an interrupt")
                used = driver.reap()
        for item in used:
            assert item.data == b"%d!" % expected.pop(item.head)
            received += 1


def _serve(queue: Queue, memory: GuestMemory, kick: int, interrupt: int, *, batched: bool) -> int:
    served = 0
    while served < ROUNDS:
        queue.disable_notifications(memory)
        if batched:
            batch = queue.pop_batch(memory, 7)
            lengths = [chain.writer(memory).write(chain.reader(memory).read(10)) for chain in batch]
            queue.complete_batch(memory, batch, lengths)
            served += len(batch)
        else:
            for chain in queue.chains(memory):
                writer = chain.writer(memory)
                writer.write(chain.reader(memory).read(10))
                queue.add_used(memory, chain.head, writer.used_length)
                served += 1
        if queue.needs_notification(memory):
            os.write(interrupt, b"i")
        if served < ROUNDS and not queue.enable_notifications(memory):
            _wait(kick, "a kick")
    return served


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("features", [0, F_EVENT_IDX, F_EVENT_IDX | F_INDIRECT_DESC | F_IN_ORDER])
@pytest.mark.parametrize("kind", KINDS)
def test_driver_in_another_process(
    kind: type[SplitDriver | PackedDriver], features: int, batched: bool
) -> None:
    """2.7.13, 2.7.14, 2.8.21, 2.8.22: every buffer arrives whole and once, and nobody sleeps on."""
    with GuestMemory.from_ranges([(GuestAddress(0), 1 << 20)], backing=Memfd()) as memory:
        driver = kind(memory, 16, features=features)
        queue = Queue(16)
        driver.configure(queue)
        kick_read, kick_write = os.pipe()
        interrupt_read, interrupt_write = os.pipe()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                _drive(driver, kick_write, interrupt_read)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        try:
            served = _serve(queue, memory, kick_read, interrupt_write, batched=batched)
        finally:
            _, status = os.waitpid(child, 0)
            for fd in (kick_read, kick_write, interrupt_read, interrupt_write):
                os.close(fd)
        assert served == ROUNDS
        assert status == 0
        assert queue.in_flight == ()
