"""Virtqueues: walking and completing 128 descriptors, and whole request cycles.

The workloads are those of rust-vmm's own suite (128 descriptors in a queue of 256, in one region of
memory), then a cycle of what a device does for a request: take it, read its 16-byte header, use it,
decide on a notification. Ours is called from Python: one call for a batch where a batch is walked,
and one chain at a time through Python objects in the last row. What makes the ring ready for the
next turn is not timed, in any column. The peer has no packed rings: ours stand beside split ones.
"""

from __future__ import annotations

import statistics
import struct
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from time import perf_counter_ns

from benchmarks.harness import Bench, Goal, Measure, Row, Skip
from virtio_queue import Queue
from virtio_queue.constants import F_EVENT_IDX, F_INDIRECT_DESC
from virtio_queue.testing import Arena, PackedDriver, SplitDriver
from vm_memory import GuestAddress, GuestMemory

HERE = Path(__file__).parent
SIZE, COUNT, TURNS = 256, 128, 400
FEATURES = F_EVENT_IDX | F_INDIRECT_DESC
PEER = "rust-vmm virtio-queue, split"
BATCHES = (1, 8, 32, 128)


class Ring:
    """A ring that is made ready for the same buffers again and again.

    Attributes:
        queue: ours.
        memory: the guest's.
    """

    def __init__(
        self, memory: GuestMemory, kind: type[SplitDriver | PackedDriver],
        add: Callable[[SplitDriver | PackedDriver], object],
    ) -> None:  # fmt: skip
        self.memory = memory
        size = SIZE if kind is SplitDriver else COUNT
        self.driver = kind(memory, size, features=FEATURES, arena=Arena(0x1000, 1 << 19))
        add(self.driver)
        if kind is PackedDriver:
            # Exactly as long as what is in it, so that each turn begins at the first descriptor.
            size = sum(buffer.slots for buffer in self.driver.outstanding.values())
            self.driver = kind(memory, size, features=FEATURES, arena=Arena(0x1000, 1 << 19))
            add(self.driver)
        self.queue = Queue(SIZE)
        self.driver.configure(self.queue)
        self._heads = len(self.driver.outstanding)
        if isinstance(self.driver, SplitDriver):
            heads = list(self.driver.outstanding)
            ring = [heads[slot % len(heads)] for slot in range(size)]
            memory.write(GuestAddress(self.driver.driver_area + 4), struct.pack(f"<{size}H", *ring))
            self._idx = self._heads
        else:
            content = memory.read(GuestAddress(self.driver.descriptor_area), 16 * size)
            words = bytearray(content)
            for at in range(14, len(words), 16):
                (flags,) = struct.unpack_from("<H", words, at)
                if flags & 0x80:
                    struct.pack_into("<H", words, at, flags ^ 0x8080)
            self._rounds = [bytes(words), content]

    def again(self) -> None:
        """Make all buffers available anew, after all have been used."""
        if isinstance(self.driver, SplitDriver):
            self._idx = (self._idx + self._heads) & 0xFFFF
            self.driver.store16(self.driver.driver_area + 2, self._idx)
        else:
            self._rounds.reverse()
            self.driver.write(self.driver.descriptor_area, self._rounds[1])


def rows(bench: Bench) -> Iterator[Row]:
    """Each row in turn; see the module's text."""
    floor = _program(partial(bench.compile, HERE / "native" / "queue_floor.c"))
    peer = _program(partial(bench.cargo, HERE / "peers" / "virtio-queue", "virtio-queue-peer"))
    with GuestMemory.from_ranges([(GuestAddress(0), 1 << 20)]) as memory:
        for packed in (False, True):
            kind = PackedDriver if packed else SplitDriver
            form = "packed" if packed else "split"
            for workload, add in WORKLOADS.items():
                ring = Ring(memory, kind, add)
                yield bench.compare(
                    f"{form}: {workload}", "ns",
                    ours=walk(ring), floor=floor(workload),
                    peer=peer(workload), peer_name=PEER, goal=Goal.peer(1.0),
                )  # fmt: skip
            ring = Ring(memory, kind, many)
            yield bench.compare(
                f"{form}: add-used", "ns",
                ours=complete(ring), floor=floor("add-used"),
                peer=peer("add-used"), peer_name=PEER, goal=Goal.peer(1.0),
            )  # fmt: skip
            for batch in BATCHES:
                ring = Ring(memory, kind, requests(COUNT // 2 if packed else COUNT))
                yield bench.compare(
                    f"{form}: a request's cycle, in batches of {batch}", "ns",
                    ours=cycle(ring, batch), floor=floor(f"cycle-{batch}"),
                    peer=peer(f"cycle-{batch}"), peer_name=PEER, goal=_cycle_goal(batch),
                )  # fmt: skip
            ring = Ring(memory, kind, requests(COUNT // 2 if packed else COUNT))
            yield bench.compare(
                f"{form}: a request's cycle, through Python objects", "ns",
                ours=single(ring), floor=floor("cycle-1"),
                peer=peer("cycle-1"), peer_name=PEER, goal=Goal.at_most(2000),
            )  # fmt: skip


def one(driver: SplitDriver | PackedDriver) -> None:
    """One chain of 128 descriptors."""
    driver.add([bytes(64)] * COUNT)


def many(driver: SplitDriver | PackedDriver) -> None:
    """128 chains of one descriptor."""
    for _ in range(COUNT):
        driver.add([], [64])


def one_indirect(driver: SplitDriver | PackedDriver) -> None:
    """One chain whose indirect table has 128 descriptors."""
    driver.add([bytes(64)] * COUNT, indirect=True)


def many_indirect(driver: SplitDriver | PackedDriver) -> None:
    """128 chains whose indirect tables have one descriptor."""
    for _ in range(COUNT):
        driver.add([bytes(64)], indirect=True)


def requests(count: int) -> Callable[[SplitDriver | PackedDriver], None]:
    """Chains of a 16-byte header and a status byte."""

    def add(driver: SplitDriver | PackedDriver) -> None:
        for _ in range(count):
            driver.add([bytes(16)], [1])

    return add


WORKLOADS = {
    "single": one,
    "multiple": many,
    "indirect-single": one_indirect,
    "indirect-multiple": many_indirect,
}


def walk(ring: Ring) -> Measure:
    """Take all chains by one call."""

    def measure() -> float:
        times = []
        for _ in range(TURNS):
            start = perf_counter_ns()
            batch = ring.queue.pop_batch(ring.memory)
            times.append(perf_counter_ns() - start)
            assert len(batch), "the ring was not made ready"
            ring.queue.complete_batch(ring.memory, batch)
            ring.again()
        return statistics.median(times)

    return measure


def complete(ring: Ring) -> Measure:
    """Use all chains by one call."""

    def measure() -> float:
        times = []
        for _ in range(TURNS):
            batch = ring.queue.pop_batch(ring.memory)
            start = perf_counter_ns()
            ring.queue.complete_batch(ring.memory, batch)
            times.append(perf_counter_ns() - start)
            ring.again()
        return statistics.median(times)

    return measure


def cycle(ring: Ring, size: int) -> Measure:
    """Take, read headers, use, and decide, a batch at a time; of one request."""

    def measure() -> float:
        queue, memory = ring.queue, ring.memory
        times = []
        for _ in range(TURNS // 4):
            start = perf_counter_ns()
            done = 0
            while len(batch := queue.pop_batch(memory, size, header=16)):
                done += len(batch.headers)
                queue.complete_batch(memory, batch)
                queue.needs_notification(memory)
            times.append((perf_counter_ns() - start) / (done / 16))
            ring.again()
        return statistics.median(times)

    return measure


def single(ring: Ring) -> Measure:
    """Take, read the header, use, and decide, one chain object at a time; of one request."""

    def measure() -> float:
        queue, memory = ring.queue, ring.memory
        times = []
        for _ in range(TURNS // 4):
            start = perf_counter_ns()
            done = 0
            for chain in queue.chains(memory):
                chain.reader(memory).read(16)
                queue.add_used(memory, chain.head, 1)
                queue.needs_notification(memory)
                done += 1
            times.append((perf_counter_ns() - start) / done)
            ring.again()
        return statistics.median(times)

    return measure


def _cycle_goal(batch: int) -> Goal:
    if batch == 1:
        return Goal.at_most(2000)
    return Goal.peer(0.8 if batch >= 32 else 1.0)


def _program(build: Callable[[], Path]) -> Callable[[str], Measure | Skip]:
    """A program that prints the figure of a workload, or why there is none."""
    try:
        program = build()
    except Skip as skip:
        reason = skip
        return lambda workload: reason

    def column(workload: str) -> Measure:
        return lambda: float(
            subprocess.run([program, workload], check=True, capture_output=True, timeout=60).stdout
        )

    return column
