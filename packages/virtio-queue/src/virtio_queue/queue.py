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

from typing import TYPE_CHECKING

from virtio_queue._packed import PackedRing
from virtio_queue._split import SplitRing
from virtio_queue.constants import (
    F_EVENT_IDX,
    F_IN_ORDER,
    F_INDIRECT_DESC,
    F_NOTIFICATION_DATA,
    F_RING_PACKED,
    MAX_QUEUE_SIZE,
)
from virtio_queue.errors import QueueConfigError, QueueStateError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from virtio_queue.chain import DescriptorChain
    from virtio_queue.state import QueueState
    from vm_memory import GuestMemory

__all__ = ["Queue"]

_RING_FEATURES = F_INDIRECT_DESC | F_EVENT_IDX | F_RING_PACKED | F_IN_ORDER | F_NOTIFICATION_DATA


class Queue:
    """One virtqueue: its configuration, its place in the ring, and the chains in flight.

    Memory is passed to every call and never stored. A queue is not thread-safe: whoever uses it
    from several threads holds one lock, `VirtioDevice.lock` where there is a device.

    Configuration is possible only while the queue is not `ready`; `enable` checks everything
    once more, against memory, so that a ready queue is a usable one.

    Args:
        max_size: largest size offered to the driver, a power of two from 1 to 32768.

    Raises:
        UsageError: `max_size` is something else.
    """

    __slots__ = (
        "_completed",
        "_in_flight",
        "_ring",
        "descriptor_area",
        "device_area",
        "driver_area",
        "features",
        "max_size",
        "size",
    )

    def __init__(self, max_size: int) -> None:
        if not 1 <= max_size <= MAX_QUEUE_SIZE or max_size & (max_size - 1):
            raise UsageError("max_size", f"{max_size} is not a power of two from 1 to 32768")
        self.max_size = max_size
        self.reset()

    def reset(self) -> None:
        """Return to the state after construction (2.6.1): chains in flight are forgotten."""
        self.size = self.max_size
        self.features = 0
        self.descriptor_area = 0
        self.driver_area = 0
        self.device_area = 0
        self._ring: SplitRing | PackedRing | None = None
        self._in_flight: dict[int, DescriptorChain] = {}
        # IN_ORDER: completions that wait until every earlier chain is complete.
        self._completed: dict[int, int] = {}

    # Configuration ------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether the driver enabled the queue: chains may be taken."""
        return self._ring is not None

    @property
    def packed(self) -> bool:
        """Whether VIRTIO_F_RING_PACKED was negotiated."""
        return bool(self.features & F_RING_PACKED)

    def set_features(self, features: int) -> None:
        """Store the negotiated feature bits; those that do not concern queues are dropped.

        Raises:
            QueueStateError: the queue is ready.
        """
        self._require_stopped("set_features")
        self.features = features & _RING_FEATURES

    def set_size(self, size: int) -> None:
        """Set the size in descriptors: 1 to `max_size`, in split rings a power of two (2.7).

        Raises:
            QueueConfigError: the value is not allowed; the size keeps its value.
            QueueStateError: the queue is ready.
        """
        self._require_stopped("set_size")
        self._check_size(size)
        self.size = size

    def set_descriptor_area(self, address: int) -> None:
        """Set the guest address of the descriptor table or ring, a multiple of 16.

        Raises:
            QueueConfigError: misaligned or wider than 64 bits; the area keeps its value.
            QueueStateError: the queue is ready.
        """
        self._require_stopped("set_descriptor_area")
        _check_area("descriptor_area", address, 16)
        self.descriptor_area = address

    def set_driver_area(self, address: int) -> None:
        """Set the guest address of the available ring (even) or event suppression (times 4).

        Raises:
            QueueConfigError: misaligned or wider than 64 bits; the area keeps its value.
            QueueStateError: the queue is ready.
        """
        self._require_stopped("set_driver_area")
        _check_area("driver_area", address, 4 if self.packed else 2)
        self.driver_area = address

    def set_device_area(self, address: int) -> None:
        """Set the guest address of the used ring or device event suppression, a multiple of 4.

        Raises:
            QueueConfigError: misaligned or wider than 64 bits; the area keeps its value.
            QueueStateError: the queue is ready.
        """
        self._require_stopped("set_device_area")
        _check_area("device_area", address, 4)
        self.device_area = address

    def enable(self, memory: GuestMemory) -> None:
        """Check the whole configuration against `memory` and make the queue ready.

        Raises:
            QueueConfigError: size, alignment or place of a ring is not usable; the first fault
                is named and the queue stays as it was.
            QueueStateError: the queue is ready already.
        """
        self._require_stopped("enable")
        self._check(memory)
        self._ring = self._make_ring()

    def disable(self) -> None:
        """Stop using the rings; the configuration stays, chains in flight are forgotten."""
        self._ring = None
        self._in_flight.clear()
        self._completed.clear()

    def _check_size(self, size: int) -> None:
        if not 1 <= size <= self.max_size:
            raise QueueConfigError("size", size, f"must be 1 to {self.max_size}")
        if size & (size - 1) and not self.packed:
            raise QueueConfigError("size", size, "must be a power of two (2.7)")

    def _check(self, memory: GuestMemory) -> None:
        self._check_size(self.size)
        size = self.size
        event = 2 if self.features & F_EVENT_IDX else 0
        if self.packed:
            extents = (
                ("driver_area", self.driver_area, 4, 4),
                ("device_area", self.device_area, 4, 4),
            )
        else:
            extents = (
                ("driver_area", self.driver_area, 2, 4 + 2 * size + event),
                ("device_area", self.device_area, 4, 4 + 8 * size + event),
            )
        for name, address, alignment, length in (
            ("descriptor_area", self.descriptor_area, 16, 16 * size),
            *extents,
        ):
            _check_area(name, address, alignment)
            if address + length > 1 << 64 or not memory.check_range(address, length):  # type: ignore[arg-type]
                raise QueueConfigError(
                    name, address, f"its {length} bytes are not all guest memory"
                )

    def _make_ring(self) -> SplitRing | PackedRing:
        areas = (self.descriptor_area, self.driver_area, self.device_area)
        kind = PackedRing if self.packed else SplitRing
        return kind(
            self.size,
            areas,
            event_idx=bool(self.features & F_EVENT_IDX),
            indirect=bool(self.features & F_INDIRECT_DESC),
        )

    def _require_stopped(self, what: str) -> None:
        if self._ring is not None:
            raise QueueStateError(what, "the queue is ready; reset or disable it first")

    def _require_ready(self, what: str) -> SplitRing | PackedRing:
        if self._ring is None:
            raise QueueStateError(what, "the queue is not ready; wait until the driver enables it")
        return self._ring

    # Chains -------------------------------------------------------------------------------

    @property
    def in_flight(self) -> tuple[DescriptorChain, ...]:
        """Chains taken and not yet used, oldest first; a restored device works on them again."""
        return tuple(
            chain for head, chain in self._in_flight.items() if head not in self._completed
        )

    def pop(self, memory: GuestMemory) -> DescriptorChain | None:
        """Take the next chain, checked as a whole, or None when there is none.

        Raises:
            ChainError: the ring or the chain is malformed; nothing has been taken.
            QueueStateError: the queue is not ready.
        """
        ring = self._require_ready("pop")
        chain = ring.pop(memory, self._in_flight)
        if chain is not None:
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

    def undo_pop(self, chain: DescriptorChain) -> None:
        """Give back the chain that was taken last, to take it again later.

        Raises:
            QueueStateError: it is not the youngest chain in flight, or has been completed.
        """
        ring = self._require_ready("undo_pop")
        youngest = next(reversed(self._in_flight), None)
        if (
            youngest is None
            or self._in_flight[youngest] is not chain
            or youngest in self._completed
        ):
            raise QueueStateError("undo_pop", "only the youngest chain in flight can be given back")
        del self._in_flight[youngest]
        ring.undo(chain)

    def add_used(self, memory: GuestMemory, head: int, length: int) -> None:
        """Give one chain back to the driver.

        Args:
            memory: the guest's memory.
            head: `DescriptorChain.head` of a chain in flight.
            length: bytes written into its device-writable part, counted from the beginning
                (`Writer.used_length`).

        Raises:
            QueueStateError: the queue is not ready, or no such chain is in flight.
            UsageError: `length` is more than the chain can hold.
        """
        self.add_used_batch(memory, ((head, length),))

    def add_used_batch(self, memory: GuestMemory, entries: Iterable[tuple[int, int]]) -> None:
        """Give several chains back with one publication, in the order given.

        With VIRTIO_F_IN_ORDER a completion that overtakes an earlier chain is held until its
        turn (2.7.9).

        Raises:
            QueueStateError: as `add_used`; nothing of the batch has been published.
            UsageError: as `add_used`; nothing of the batch has been published.
        """
        ring = self._require_ready("add_used")
        checked: dict[int, tuple[DescriptorChain, int]] = {}
        for head, length in entries:
            chain = self._in_flight.get(head)
            if chain is None or head in self._completed or head in checked:
                raise QueueStateError("add_used", f"no chain with head {head} is in flight")
            if not 0 <= length <= min(chain.writable_length, 0xFFFFFFFF):
                raise UsageError(
                    "length", f"{length} is not from 0 to {chain.writable_length}, the chain's room"
                )
            checked[head] = (chain, length)
        if self.features & F_IN_ORDER:
            for head, (_, length) in checked.items():
                self._completed[head] = length
            checked = {}
            for head, chain in self._in_flight.items():
                if head not in self._completed:
                    break
                checked[head] = (chain, self._completed[head])
        if not checked:
            return
        ring.put_used(memory, tuple(checked.values()))
        for head in checked:
            del self._in_flight[head]
            self._completed.pop(head, None)

    # Notifications ------------------------------------------------------------------------

    def needs_notification(self, memory: GuestMemory) -> bool:
        """Whether the driver must be told about what was used since the last call.

        Decides once for all of it: a second call without new used buffers returns False.

        Raises:
            QueueStateError: the queue is not ready.
        """
        return self._require_ready("needs_notification").needs_notification(memory)

    def enable_notifications(self, memory: GuestMemory) -> bool:
        """Ask the driver for kicks again.

        Returns:
            True when buffers are available already, whose kick may have been suppressed: take
            them before waiting.

        Raises:
            ChainError: the ring is malformed.
            QueueStateError: the queue is not ready.
        """
        return self._require_ready("enable_notifications").enable_notifications(memory)

    def disable_notifications(self, memory: GuestMemory) -> None:
        """Tell the driver that kicks are not needed for now (a hint it may ignore).

        Raises:
            QueueStateError: the queue is not ready.
        """
        self._require_ready("disable_notifications").disable_notifications(memory)

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


def _check_area(name: str, address: int, alignment: int) -> None:
    if not 0 <= address < 1 << 64:
        raise QueueConfigError(name, address, "must be a 64-bit guest address")
    if address % alignment:
        raise QueueConfigError(name, address, f"must be a multiple of {alignment}")
