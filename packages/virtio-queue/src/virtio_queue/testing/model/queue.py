"""A whole queue in plain Python: what `virtio_queue.Queue` has to do, without its speed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from virtio_queue._configuration import QueueConfiguration
from virtio_queue.constants import F_EVENT_IDX, F_IN_ORDER, F_INDIRECT_DESC
from virtio_queue.errors import QueueStateError, UsageError
from virtio_queue.testing.model.packed import PackedRing
from virtio_queue.testing.model.split import SplitRing

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from virtio_queue.chain import DescriptorChain
    from vm_memory import GuestMemory

__all__ = ["ModelQueue"]


class ModelQueue(QueueConfiguration):
    """The oracle for `virtio_queue.Queue`; methods of the same names do the same.

    Attributes:
        ring: positions in the ring, or None while the queue is not ready.
    """

    __slots__ = ("_completed", "_in_flight", "_taken", "ring")

    def __init__(self, max_size: int) -> None:
        super().__init__(max_size)
        self._drop_ring()

    def reset(self) -> None:
        """Return to the state after construction."""
        self._clear()
        self._drop_ring()

    def disable(self) -> None:
        """Stop using the rings."""
        self._ready = False
        self._drop_ring()

    def _drop_ring(self) -> None:
        self.ring: SplitRing | PackedRing | None = None
        self._in_flight: dict[int, DescriptorChain] = {}
        # IN_ORDER: completions that wait until every earlier chain is complete.
        self._completed: dict[int, int] = {}
        self._taken: list[DescriptorChain] = []

    def enable(self, memory: GuestMemory) -> None:
        """Check the whole configuration and make the queue ready."""
        self._require_stopped("enable")
        self._check(memory)
        kind = PackedRing if self.packed else SplitRing
        self.ring = kind(
            self.size,
            (self.descriptor_area, self.driver_area, self.device_area),
            event_idx=bool(self.features & F_EVENT_IDX),
            indirect=bool(self.features & F_INDIRECT_DESC),
        )
        self._ready = True

    def _require_ring(self, what: str) -> SplitRing | PackedRing:
        if self.ring is None:
            raise QueueStateError(what, "the queue is not ready")
        return self.ring

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
        ring = self._require_ring("pop")
        chain = ring.pop(memory, self._in_flight)
        if chain is not None:
            self._in_flight[chain.head] = chain
            self._taken.append(chain)
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
        """Give back the chain that was taken last."""
        ring = self._require_ring("undo_pop")
        last = self._taken[-1] if self._taken else None
        if last is not chain or self._in_flight.get(chain.head) is not chain:
            raise QueueStateError("undo_pop", "only the chain taken last can be given back")
        if chain.head in self._completed:
            raise QueueStateError("undo_pop", "it has been used")
        del self._in_flight[chain.head]
        self._taken.pop()
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
        ring = self._require_ring("add_used")
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
        return self._require_ring("needs_notification").needs_notification(memory)

    def enable_notifications(self, memory: GuestMemory) -> bool:
        """Ask the driver for kicks again.

        Returns:
            True when buffers are available already, whose kick may have been suppressed: take
            them before waiting.

        Raises:
            ChainError: the ring is malformed.
            QueueStateError: the queue is not ready.
        """
        return self._require_ring("enable_notifications").enable_notifications(memory)

    def disable_notifications(self, memory: GuestMemory) -> None:
        """Tell the driver that kicks are not needed for now (a hint it may ignore).

        Raises:
            QueueStateError: the queue is not ready.
        """
        self._require_ring("disable_notifications").disable_notifications(memory)
