"""Saving and restoring queues, apart from `queue` because a boot does neither."""

from __future__ import annotations

from typing import TYPE_CHECKING

from virtio_queue._configuration import QueueConfiguration
from virtio_queue._native import lib
from virtio_queue.chain import DescriptorChain
from virtio_queue.constants import F_IN_ORDER, MAX_CHAIN_BYTES
from virtio_queue.errors import QueueConfigError, StateError
from virtio_queue.queue import Queue
from virtio_queue.state import ChainState, QueueState

if TYPE_CHECKING:
    from vm_memory import GuestMemory

_WRAP = 1 << 15


def save_queue(queue: Queue) -> QueueState:
    """Return the queue's state; see `Queue.save`."""
    ring = queue._ring
    ready = queue.ready
    return QueueState(
        max_size=queue.max_size,
        size=queue.size,
        ready=ready,
        features=queue.features,
        descriptor_area=queue.descriptor_area,
        driver_area=queue.driver_area,
        device_area=queue.device_area,
        next_avail=ring.next_avail if ready else 0,
        next_used=ring.next_used if ready else 0,
        pending=ring.pending if ready else 0,
        in_flight=tuple(
            ChainState(chain.head, chain.readable, chain.writable, chain.slots, completed)
            for chain, completed in queue._flying()
        ),
    )


def restore_queue(queue: Queue, state: QueueState, memory: GuestMemory) -> None:
    """Check a state in a queue of its own, then take it over; see `Queue.restore`."""
    queue._require_kept("restore")
    _expect(state.version == 1, "version", "only version 1 is known")
    _expect(state.max_size == queue.max_size, "max_size", f"must be {queue.max_size} here")
    fresh = Queue(queue.max_size)
    try:
        fresh.set_features(state.features)
        _expect(fresh.features == state.features, "features", "holds bits that no queue has")
        fresh.set_size(state.size)
        fresh.set_descriptor_area(state.descriptor_area)
        fresh.set_driver_area(state.driver_area)
        fresh.set_device_area(state.device_area)
        if state.ready:
            fresh.enable(memory)
    except QueueConfigError as error:
        raise StateError(error.field, str(error)) from error
    if not fresh.ready:
        idle = (state.next_avail, state.next_used, state.pending, state.in_flight)
        _expect(idle == (0, 0, 0, ()), "ready", "a queue that is not ready has no ring state")
    else:
        _restore_ring(fresh, state, memory)
    for name in (*QueueConfiguration.__slots__, *Queue.__slots__):
        setattr(queue, name, getattr(fresh, name))


def _restore_ring(fresh: Queue, state: QueueState, memory: GuestMemory) -> None:
    ring = fresh._ring
    for name, position in (("next_avail", state.next_avail), ("next_used", state.next_used)):
        _expect(0 <= position <= 0xFFFF, name, "must be 0 to 65535")
        if fresh.packed:
            _expect(position & ~_WRAP < state.size, name, "offset must be below the queue size")
    _expect(0 <= state.pending < 1 << 64, "pending", "must fit 64 bits")
    slots = 0
    for saved in state.in_flight:
        _check_chain(fresh, saved, memory)
        slots += saved.slots
        chain = DescriptorChain(saved.head, saved.readable, saved.writable, saved.slots)
        done = -1 if saved.completed is None else saved.completed
        _expect(
            lib.vq_adopt(ring, saved.head, saved.slots, chain.writable_length, done) == 0,
            "in_flight",
            "more chains than the queue holds",
        )
        fresh._in_flight[saved.head] = chain
    if fresh.packed:
        ahead = (state.next_avail & ~_WRAP) - (state.next_used & ~_WRAP)
        if (state.next_avail ^ state.next_used) & _WRAP:
            ahead += state.size
    else:
        ahead = (state.next_avail - state.next_used) & 0xFFFF
        slots = len(state.in_flight)
    _expect(ahead == slots <= state.size, "in_flight", "does not fit between the ring positions")
    ring.next_avail = state.next_avail
    ring.next_used = state.next_used
    ring.pending = state.pending
    # Whichever chain was taken last may have been used since: none can be given back.
    ring.sequence += 1


def _check_chain(fresh: Queue, saved: ChainState, memory: GuestMemory) -> None:
    limit = 1 << 16 if fresh.packed else fresh.size
    _expect(0 <= saved.head < limit, "in_flight.head", f"must be 0 to {limit - 1}")
    _expect(saved.head not in fresh._in_flight, "in_flight.head", "must be unique")
    _expect(1 <= saved.slots <= fresh.size, "in_flight.slots", "must be 1 to the queue size")
    total = 0
    for address, length in (*saved.readable, *saved.writable):
        total += length
        place = address >= 0 and length >= 0 and address + length <= 1 << 64
        _expect(place, "in_flight", "segment outside the address space")
        inside = not length or memory.check_range(address, length)  # type: ignore[arg-type]
        _expect(inside, "in_flight", "segment outside guest memory")
    _expect(total <= MAX_CHAIN_BYTES, "in_flight", "chain longer than 2**32 bytes")
    if saved.completed is not None:
        room = sum(length for _, length in saved.writable)
        _expect(bool(fresh.features & F_IN_ORDER), "in_flight.completed", "only with IN_ORDER")
        _expect(0 <= saved.completed <= room, "in_flight.completed", "longer than the chain")


def _expect(condition: bool, what: str, rule: str) -> None:
    if not condition:
        raise StateError(what, rule)


__all__ = ["restore_queue", "save_queue"]
