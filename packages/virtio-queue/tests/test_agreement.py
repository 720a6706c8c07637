"""The C walker and the plain-Python model do the same, on valid and hostile rings."""

from __future__ import annotations

import ctypes
import os
import time
from contextlib import ExitStack
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from virtio_queue import ChainError, Queue, VirtioQueueError
from virtio_queue.constants import F_IN_ORDER
from virtio_queue.testing.images import MEMORY_RANGES, RingImage, random_image
from virtio_queue.testing.model import ModelQueue
from virtio_queue.testing.strategies import ring_images
from vm_memory import GuestAddress, GuestMemory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_TOP = GuestAddress(0xFFFF_FFFF_FFFF_F000)


class Twins:
    """One image in two memories, under the C queue and under the model."""

    def __init__(self, stack: ExitStack) -> None:
        ranges = [(GuestAddress(start), size) for start, size in MEMORY_RANGES]
        self.memories = [stack.enter_context(GuestMemory.from_ranges(ranges)) for _ in range(2)]

    def load(self, image: RingImage) -> None:
        """Start both from the same bytes."""
        for memory in self.memories:
            for start, size in MEMORY_RANGES:
                memory.fill(GuestAddress(start), size, 0xAA)
            image.write(memory)
        self.native = Queue(8)
        self.model = ModelQueue(8)
        self.queues: tuple[Queue | ModelQueue, ...] = (self.native, self.model)
        image.configure(self.native)
        image.configure(self.model)
        self.native.enable(self.memories[0])
        self.model.enable(self.memories[1])
        assert self.model.ring is not None
        self.native._ring.next_avail = self.native._ring.next_used = image.start
        self.model.ring.next_avail = self.model.ring.next_used = image.start

    def both(self, call: Callable[[Any, GuestMemory], Any]) -> Any:
        """Call both, require the same result or error, and return it."""
        results = []
        for queue, memory in zip(self.queues, self.memories, strict=True):
            try:
                results.append(call(queue, memory))
            except VirtioQueueError as error:
                results.append(error)
        native, model = results
        if isinstance(native, VirtioQueueError) or isinstance(model, VirtioQueueError):
            assert type(native) is type(model), (native, model)
            if isinstance(native, ChainError):
                assert native.__reduce__() == model.__reduce__()
        else:
            assert native == model
        return native

    def same_memory(self) -> None:
        """Require that both wrote the same bytes."""
        for start, size in MEMORY_RANGES:
            address = GuestAddress(start)
            assert self.memories[0].read(address, size) == self.memories[1].read(address, size)


@pytest.fixture(scope="module")
def twins() -> Iterator[Twins]:
    """Two memories that each example fills anew."""
    with ExitStack() as stack:
        yield Twins(stack)


def _tamper(twins: Twins, image: RingImage, random: Random) -> None:
    """Let the guest change a piece of what it once wrote."""
    address, data = random.choice([item for item in image.contents if item[1]])
    offset = random.randrange(len(data))
    junk = random.choice((b"\0", b"\xff", random.randbytes(1), data[offset : offset + 4]))
    for memory in twins.memories:
        memory.write(GuestAddress(address + offset), junk[: len(data) - offset])


def _exercise(twins: Twins, image: RingImage, random: Random) -> None:
    twins.load(image)
    flying: list[Any] = []
    for _ in range(random.randint(1, 24)):
        step = random.random()
        if step < 0.45:
            chain = twins.both(lambda queue, memory: queue.pop(memory))
            if chain is not None and not isinstance(chain, VirtioQueueError):
                flying.append(chain)
        elif step < 0.65 and flying:
            chain = flying.pop(random.randrange(len(flying)))
            length = random.choice((0, chain.writable_length, chain.writable_length + 1, -1))
            result = twins.both(partial(_add_used, entries=[(chain.head, length)], one=True))
            if result is not None:
                flying.append(chain)
        elif step < 0.72:
            entries = [(chain.head, 0) for chain in flying if random.random() < 0.5]
            entries += [(random.randrange(10), 0)] * (random.random() < 0.2)
            random.shuffle(entries)
            result = twins.both(partial(_add_used, entries=entries, one=False))
            if result is None:
                gone = {head for head, _ in entries}
                flying = [chain for chain in flying if chain.head not in gone]
        elif step < 0.80:
            twins.both(lambda queue, memory: queue.needs_notification(memory))
        elif step < 0.86:
            twins.both(lambda queue, memory: queue.enable_notifications(memory))
        elif step < 0.90:
            twins.both(lambda queue, memory: queue.disable_notifications(memory))
        elif step < 0.94 and flying:
            result = [_undo(queue, flying[-1].head) for queue in (twins.native, twins.model)]
            assert result[0] == result[1]
            if result[0]:
                flying.pop()
        else:
            _tamper(twins, image, random)
        assert twins.native.in_flight == twins.model.in_flight
    twins.same_memory()


def _add_used(
    queue: Queue | ModelQueue, memory: GuestMemory, *, entries: list[tuple[int, int]], one: bool
) -> None:
    if one:
        queue.add_used(memory, *entries[0])
    else:
        queue.add_used_batch(memory, entries)


def _undo(queue: Queue | ModelQueue, head: int) -> bool:
    for chain in queue.in_flight:
        if chain.head == head:
            try:
                queue.undo_pop(chain)
            except VirtioQueueError:
                return False
            return True
    return False


@settings(max_examples=400)
@given(image=ring_images(), random=st.randoms(use_true_random=False))
def test_any_sequence_of_calls(twins: Twins, image: RingImage, random: Random) -> None:
    """Results, errors with their fields, chains in flight and memory agree after every call."""
    _exercise(twins, image, random)


def _host_bytes(pieces: list[tuple[int, int]]) -> bytes:
    return b"".join(ctypes.string_at(host, length) for host, length in pieces)


def _batch_agrees(twins: Twins, image: RingImage, random: Random) -> None:
    twins.load(image)
    memory, other = twins.memories
    expected: list[Any] = []
    failure: ChainError | None = None
    try:
        expected.extend(twins.model.chains(other))
    except ChainError as error:
        failure = error
    got: list[Any] = []
    stopped: ChainError | None = None
    while True:
        try:
            batch = twins.native.pop_batch(memory, random.randint(1, 9))
        except ChainError as caught:
            stopped = caught
            break
        if not len(batch):
            # The model's round is bounded by the queue's size, not by an error.
            break
        for at, chain in enumerate(batch):
            readable, writable = batch.iovecs(at)
            for pieces, segments in ((readable, chain.readable), (writable, chain.writable)):
                wanted = b"".join(
                    memory.read(GuestAddress(address), length) for address, length in segments
                )
                assert _host_bytes(pieces) == wanted
        got.extend(batch)
    if failure is not None or stopped is not None:
        assert stopped is not None
        assert failure is None or stopped.__reduce__() == failure.__reduce__()
    assert got[: len(expected)] == expected
    assert twins.native.in_flight == tuple(got)
    entries = [(chain.head, chain.writable_length) for chain in expected]
    if got == expected:
        random.shuffle(entries)
        twins.native.add_used_batch(memory, entries)
        twins.model.add_used_batch(other, entries)
        assert twins.native.in_flight == ()
        assert twins.native.needs_notification(memory) == twins.model.needs_notification(other)
        twins.same_memory()


@settings(max_examples=300)
@given(image=ring_images(), random=st.randoms(use_true_random=False))
def test_batches(twins: Twins, image: RingImage, random: Random) -> None:
    """Chains taken in batches are those taken one by one; iovecs reach the same bytes."""
    _batch_agrees(twins, image, random)


def test_many_rings(twins: Twins) -> None:
    """As many generated rings as the time allows: 3 seconds, always the same ones, in CI.

    A profile that explores gets a minute of new ones. VIRTIO_QUEUE_FUZZ_SECONDS and
    VIRTIO_QUEUE_FUZZ_SEED say otherwise.
    """
    explores = not settings.default.derandomize  # type: ignore[union-attr]
    seconds = float(os.environ.get("VIRTIO_QUEUE_FUZZ_SECONDS", "60" if explores else "3"))
    end = time.monotonic() + seconds
    first = int.from_bytes(os.urandom(6), "little") if explores else 0
    seed = int(os.environ.get("VIRTIO_QUEUE_FUZZ_SEED", str(first)))
    while time.monotonic() < end:
        for packed in (False, True):
            random = Random(seed)
            image = random_image(random, packed=packed)
            try:
                _exercise(twins, image, random)
                _batch_agrees(twins, image, random)
            except AssertionError as error:
                raise AssertionError(f"seed {seed}, packed {packed}: {error}") from error
        seed += 1
    made = seed - int(os.environ.get("VIRTIO_QUEUE_FUZZ_SEED", str(first)))
    print(f"{2 * made} rings, half of them packed")
    assert made > 0


def test_images_are_good_and_bad(twins: Twins) -> None:
    """The generator makes every kind of fault, and mostly rings without one."""
    faults: set[str] = set()
    good = in_order = 0
    for seed in range(3000):
        image = random_image(Random(seed), packed=bool(seed % 2))
        twins.load(image)
        in_order += bool(image.features & F_IN_ORDER)
        try:
            good += bool(list(twins.native.chains(twins.memories[0])))
        except ChainError as error:
            faults.add(error.rule)
    assert good > 1000
    assert in_order > 1000
    assert len(faults) >= 16, faults
