"""A virtqueue as the device sees it (section 2.6 to 2.8 of virtio 1.3), split or packed.

Example:
    >>> from vm_memory import GuestAddress, GuestMemory
    >>> from virtio_queue import Queue
    >>> from virtio_queue.testing import SplitDriver
    >>> memory = GuestMemory.from_ranges([(GuestAddress(0), 1 << 20)])
    >>> queue = Queue(16)
    >>> driver = SplitDriver(memory, 16)
    >>> driver.configure(queue)
    >>> _ = driver.add([b"ping"], [4])
    >>> for chain in queue.chains(memory):
    ...     writer = chain.writer(memory)
    ...     writer.write_exact(chain.reader(memory).read(4).upper())
    ...     queue.add_used(memory, chain.head, writer.used_length)
    >>> [used.data for used in driver.reap()]
    [b'PING']
    >>> memory.close()
"""

from __future__ import annotations

from array import array

from virtio_queue import _rules
from virtio_queue._configuration import QueueConfiguration
from virtio_queue._native import ffi, lib
from virtio_queue.batch import MAX_HEADER, ChainBatch, make_chain
from virtio_queue.constants import (
    F_EVENT_IDX,
    F_IN_ORDER,
    F_INDIRECT_DESC,
    MAX_INDIRECT_DESCRIPTORS,
)
from virtio_queue.errors import QueueStateError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from virtio_queue._native import CData
    from virtio_queue.chain import DescriptorChain
    from virtio_queue.errors import ChainError
    from virtio_queue.state import QueueState
    from vm_memory import GuestMemory

__all__ = ["Queue"]

# What stands for the memory of a queue that is not ready: no caller's memory is it.
_UNBOUND = object()
# What `vq_pop_batch` says besides a count and a fault.
_BUSY, _TOO_LONG = -2, -3

_NULL = ffi.NULL
_pop = lib.vq_pop
_pop_batch = lib.vq_pop_batch
_complete_batch = lib.vq_complete_batch
_complete_one = lib.vq_complete_one
_needs_notification = lib.vq_needs_notification


class Queue(QueueConfiguration):
    """One virtqueue: its configuration, its place in the ring, and the chains in flight.

    Memory is passed to every call; the queue keeps a reference to the map it used last. A queue
    is not thread-safe: whoever uses it from several threads holds one lock, `VirtioDevice.lock`
    where there is a device.

    Configuration is possible only while the queue is not `ready`; `enable` checks everything
    once more, against memory, so that a ready queue is a usable one.

    Ordering against the driver (2.7.13, 2.7.14, 2.8.21, 2.8.22): what makes buffers visible is
    loaded with acquire before they are read; what makes used buffers visible is stored with
    release after them; a full fence stands between publishing and reading the driver's wish for
    notifications, and between announcing a wish for kicks and looking for buffers once more.

    Args:
        max_size: largest size offered to the driver, a power of two from 1 to 32768.

    Raises:
        UsageError: `max_size` is something else.

    Attributes:
        max_size: largest size offered to the driver.
        size: size in use, in descriptors.
        features: negotiated feature bits that concern queues.
        descriptor_area: guest address of the descriptor table or ring.
        driver_area: guest address of the available ring or the driver event suppression.
        device_area: guest address of the used ring or the device event suppression.
        lent: whether a pump serves the queue; it can't be used otherwise until the pump stops.
    """

    __slots__ = ("_batches", "_in_flight", "_memory", "_one", "_ring", "lent")

    def __init__(self, max_size: int) -> None:
        super().__init__(max_size)
        self._ring: CData = ffi.NULL
        self._one: ChainBatch | None = None
        self._memory: object = _UNBOUND
        # Chains taken one by one; those of batches stay in the batch's arrays.
        self._in_flight: dict[int, DescriptorChain] = {}
        self._batches: list[ChainBatch] = []
        self.lent = False

    def reset(self) -> None:
        """Return to the state after construction (2.6.1): chains in flight are forgotten."""
        self._require_kept("reset")
        self._clear()
        self._drop_ring()

    def enable(self, memory: GuestMemory) -> None:
        """Check the whole configuration against `memory` and make the queue ready.

        Raises:
            QueueConfigError: size, alignment or place of a ring is not usable; the first fault
                is named and the queue stays as it was.
            QueueStateError: the queue is ready already.
        """
        self._require_stopped("enable")
        self._check(memory)
        one = ChainBatch(1, self._longest_chain(), 0)
        ring = lib.vq_new(
            self.size,
            self.descriptor_area,
            self.driver_area,
            self.device_area,
            self.packed,
            bool(self.features & F_EVENT_IDX),
            bool(self.features & F_INDIRECT_DESC),
            bool(self.features & F_IN_ORDER),
        )
        if not ring:
            raise MemoryError(f"a ring of {self.size} descriptors")
        self._ring = ffi.gc(ring, lib.vq_free)
        self._one = one
        self._bind(memory)
        self._ready = True

    def disable(self) -> None:
        """Stop using the rings; the configuration stays, chains in flight are forgotten."""
        self._require_kept("disable")
        self._ready = False
        self._drop_ring()

    def _drop_ring(self) -> None:
        self._ring = ffi.NULL
        self._one = None
        self._memory = _UNBOUND
        self._in_flight = {}
        self._batches = []

    def _longest_chain(self) -> int:
        return self.size + max(self.size, MAX_INDIRECT_DESCRIPTORS)

    def _bind(self, memory: GuestMemory) -> None:
        if lib.vq_bind(self._ring, memory.native_table):
            raise UsageError("memory", "does not hold the rings; pass the memory of `enable`")
        self._memory = memory

    def _running(self, what: str, memory: GuestMemory) -> CData:
        if memory is not self._memory:
            self._require_ready(what)
            self._bind(memory)
        return self._ring

    def _require_ready(self, what: str) -> None:
        super()._require_ready(what)
        self._require_kept(what)

    def _require_kept(self, what: str) -> None:
        if self.lent:
            raise QueueStateError(what, "a pump serves the queue; stop the pump first")

    def _fault(self) -> ChainError:
        fault = self._ring.fault
        descriptor = None if fault.descriptor < 0 else fault.descriptor
        return _rules.broken(fault.rule, descriptor, fault.value, packed=self.packed)

    # Chains -------------------------------------------------------------------------------

    @property
    def in_flight(self) -> tuple[DescriptorChain, ...]:
        """Chains taken and not yet used, oldest first; a restored device works on them again.

        Chains whose completion waits for its turn (IN_ORDER) are not among them.
        """
        return tuple(chain for chain, completed in self._flying() if completed is None)

    def _flying(self) -> list[tuple[DescriptorChain, int | None]]:
        """All chains in flight with the length of a completion that waits, oldest first."""
        self._require_kept("in_flight")
        chains = list(self._in_flight.values())
        for batch in self._batches:
            if batch.outstanding:
                chains += [
                    batch.chain(at)
                    for at, head in enumerate(batch.heads)
                    if self._flight(head).slots and self._flight(head).batch == batch.handle
                ]
        flights = [(self._flight(chain.head), chain) for chain in chains]
        flights.sort(key=lambda item: item[0].sequence)
        return [(chain, flight.length if flight.done else None) for flight, chain in flights]

    def _flight(self, head: int) -> CData:
        flight: CData = self._ring.flights[head]
        return flight

    def pop(self, memory: GuestMemory) -> DescriptorChain | None:
        """Take the next chain, checked as a whole, or None when there is none.

        Raises:
            ChainError: the ring or the chain is malformed; nothing has been taken.
            QueueStateError: the queue is not ready.
        """
        if memory is not self._memory:
            self._running("pop", memory)
        one: ChainBatch = self._one  # type: ignore[assignment]
        count = _pop(self._ring, one.handle, 1, 0)
        if count == 0:
            return None
        if count < 0:
            raise self._fault()
        chain = make_chain(one.table, 0, one.segments)
        self._in_flight[chain.head] = chain
        return chain

    def chains(self, memory: GuestMemory) -> Iterator[DescriptorChain]:
        """Take chains one after the other, at most `size` of them.

        The bound keeps a driver that adds as fast as the device takes from holding the caller
        forever; `enable_notifications` then says that there is more.

        Raises:
            ChainError: the ring or the next chain is malformed; the chains before it were good.
            QueueStateError: the queue is not ready.
        """
        for _ in range(self.size):
            chain = self.pop(memory)
            if chain is None:
                return
            yield chain

    def serve(self, memory: GuestMemory, answer: Callable[[DescriptorChain], int]) -> bool:
        """Use chains as they come, at most `size` of them, and ask for kicks again.

        Those in flight come first, as where a state with unfinished requests was restored.

        Args:
            memory: the guest's memory.
            answer: carries out what a chain asks for, and returns `Writer.used_length`.

        Returns:
            Whether there are more, for which no kick comes.

        Raises:
            ChainError: as `chains`; the chains before it are used.
            QueueStateError: the queue is not ready.
        """
        for chain in self.in_flight:
            self.add_used(memory, chain.head, answer(chain))
        for chain in self.chains(memory):
            self.add_used(memory, chain.head, answer(chain))
        return self.enable_notifications(memory)

    def pop_batch(
        self, memory: GuestMemory, limit: int | None = None, *, header: int = 0
    ) -> ChainBatch:
        """Take several chains into flat arrays at once.

        When a later chain is malformed, the batch ends before it and the next call raises. Use
        the chains with `add_used_batch` or `complete_batch`, in one or several calls.

        Args:
            memory: the guest's memory.
            limit: most chains to take; by default the queue's size.
            header: bytes to copy from the beginning of each chain into `ChainBatch.headers`,
                0 to 64.

        Raises:
            ChainError: the ring or the first chain is malformed; nothing has been taken.
            QueueStateError: the queue is not ready.
            UsageError: `header` is out of range.
        """
        if memory is not self._memory:
            self._running("pop_batch", memory)
        wanted = -1 if limit is None else limit if limit > 0 else 0
        try:
            for batch in self._batches:
                count = _pop_batch(self._ring, batch.handle, wanted, header)
                if count != _BUSY:
                    break
            else:
                batch = self._another_batch()
                count = _pop_batch(self._ring, batch.handle, wanted, header)
        except OverflowError:
            count = _TOO_LONG
        if count < 0:
            if count == _TOO_LONG:
                raise UsageError("header", f"{header} is not from 0 to {MAX_HEADER}")
            raise self._fault()
        batch._count = count
        batch._headers_size = count * header
        return batch

    def _another_batch(self) -> ChainBatch:
        segments = self._longest_chain() + 4 * self.size
        batch = ChainBatch(self.size, segments, 2 * segments)
        self._batches.append(batch)
        return batch

    def lend(self, memory: GuestMemory) -> tuple[CData, list[DescriptorChain]]:
        """Leave the ring and the chains in flight to a pump, until `take_back`.

        Raises:
            QueueStateError: the queue is not ready, or lent already.
        """
        self._require_ready("lend")
        self._bind(memory)
        flying = self._flying()
        # Completions that wait for their turn are the ring's own business.
        self._in_flight = {chain.head: chain for chain, done in flying if done is not None}
        self._memory = _UNBOUND
        self.lent = True
        return self._ring, [chain for chain, done in flying if done is None]

    def take_back(self, chains: Iterable[DescriptorChain]) -> None:
        """Have the ring again, with these chains in flight."""
        self.lent = False
        self._in_flight |= {chain.head: chain for chain in chains}
        self._forget_used()

    def undo_pop(self, chain: DescriptorChain) -> None:
        """Give back the chain that was taken last, to take it again later.

        Raises:
            QueueStateError: the queue is not ready, it is not the chain that was taken last, or
                it has been used.
        """
        self._require_ready("undo_pop")
        if self._in_flight.get(chain.head) is not chain or lib.vq_undo(self._ring, chain.head):
            raise QueueStateError("undo_pop", "only the chain taken last can be given back")
        del self._in_flight[chain.head]

    def add_used(self, memory: GuestMemory, head: int, length: int) -> None:
        """Give one chain back to the driver.

        With VIRTIO_F_IN_ORDER a completion that overtakes an earlier chain is held until its
        turn (2.7.9).

        Args:
            memory: the guest's memory.
            head: `DescriptorChain.head` of a chain in flight.
            length: bytes written into its device-writable part, counted from the beginning
                (`Writer.used_length`).

        Raises:
            QueueStateError: the queue is not ready, or no such chain is in flight.
            UsageError: `length` is more than the chain can hold.
        """
        if memory is not self._memory:
            self._running("add_used", memory)
        try:
            count = _complete_one(self._ring, head, length)
        except OverflowError:
            what = f"head {head} or length {length} is out of range"
            raise UsageError("add_used", what) from None
        if count == 1:
            self._in_flight.pop(head, None)
            return
        if count < 0:
            raise self._usage(head, length)
        self._forget_used()

    def add_used_batch(self, memory: GuestMemory, entries: Iterable[tuple[int, int]]) -> None:
        """Give several chains back with one publication, in the order given.

        Args:
            memory: the guest's memory.
            entries: (head, length) of each, as for `add_used`.

        Raises:
            QueueStateError: as `add_used`; nothing of the batch has been used.
            UsageError: as `add_used`; nothing of the batch has been used.
        """
        pairs = list(entries)
        try:
            heads = array("I", [head for head, _ in pairs])
            lengths = array("I", [length for _, length in pairs])
        except OverflowError:
            raise UsageError("add_used", "a head or a length is not from 0 to 2**32 - 1") from None
        self._complete(memory, heads, lengths)

    def complete_batch(
        self, memory: GuestMemory, batch: ChainBatch, lengths: Iterable[int] | None = None
    ) -> None:
        """Give a whole batch back with one publication.

        Args:
            memory: the guest's memory.
            batch: of which no chain has been used yet.
            lengths: bytes written into each chain; by default each was written in full.

        Raises:
            QueueStateError: as `add_used`; nothing of the batch has been used.
            UsageError: as `add_used`, or another number of lengths than of chains.
        """
        if memory is not self._memory:
            self._running("complete_batch", memory)
        written: array[int] | None = None
        raw = _NULL
        if lengths is not None:
            try:
                written = array("I", lengths)
            except OverflowError:
                raise UsageError("lengths", "each must be from 0 to 2**32 - 1") from None
            if len(written) != len(batch):
                raise UsageError("lengths", f"{len(written)} of them for {len(batch)} chains")
            raw = ffi.from_buffer("uint32_t[]", written)
        if _complete_batch(self._ring, batch.handle, raw) < 0:
            at = self._ring.fault.value
            raise self._usage(batch.heads[at], written[at] if written else 0)
        if self._in_flight:
            self._forget_used()

    def _complete(self, memory: GuestMemory, heads: array[int], lengths: array[int]) -> None:
        ring = self._running("add_used", memory)
        if not heads:
            return
        count = lib.vq_complete(
            ring,
            len(heads),
            ffi.from_buffer("uint32_t[]", heads),
            ffi.from_buffer("uint32_t[]", lengths),
        )
        if count < 0:
            at = ring.fault.value
            raise self._usage(heads[at], lengths[at])
        if self._in_flight:
            self._forget_used()

    def _forget_used(self) -> None:
        flights = self._ring.flights
        for head in [head for head in self._in_flight if not flights[head].slots]:
            del self._in_flight[head]

    def _usage(self, head: int, length: int) -> UsageError:
        if self._ring.fault.rule == _rules.LENGTH:
            return UsageError("length", f"{length} is more than the chain's writable part holds")
        return QueueStateError("add_used", f"no chain with head {head} is in flight")

    # Notifications ------------------------------------------------------------------------

    def needs_notification(self, memory: GuestMemory) -> bool:
        """Whether the driver must be told about what was used since the last call.

        Decides once for all of it: a second call without new used buffers returns False.

        Raises:
            QueueStateError: the queue is not ready.
        """
        if memory is not self._memory:
            self._running("needs_notification", memory)
        return _needs_notification(self._ring) != 0

    def enable_notifications(self, memory: GuestMemory) -> bool:
        """Ask the driver for kicks again.

        Returns:
            True when buffers are available already, whose kick may have been suppressed: take
            them before waiting.

        Raises:
            ChainError: the ring is malformed.
            QueueStateError: the queue is not ready.
        """
        available = lib.vq_enable_notifications(self._running("enable_notifications", memory))
        if available < 0:
            raise self._fault()
        return bool(available)

    def disable_notifications(self, memory: GuestMemory) -> None:
        """Tell the driver that kicks are not needed for now (a hint it may ignore).

        Raises:
            QueueStateError: the queue is not ready.
        """
        lib.vq_disable_notifications(self._running("disable_notifications", memory))

    # State --------------------------------------------------------------------------------

    def save(self) -> QueueState:
        """Return the queue's state as a value, chains in flight included."""
        from virtio_queue import _saving

        return _saving.save_queue(self)

    def restore(self, state: QueueState, memory: GuestMemory) -> None:
        """Take over a saved state after checking all of it against `memory`.

        Raises:
            StateError: the state is not one that `save` can return for this queue, or its rings
                and chains are not in `memory`; the queue keeps its former state.
        """
        from virtio_queue import _saving

        _saving.restore_queue(self, state, memory)
