"""Pumps: one thread of C that serves the queues of a device and never takes the GIL.

A pump waits for kicks, takes and checks chains by the same walker as `Queue`, moves their bytes
between file descriptors and guest memory, publishes used buffers in batches, decides about the
interrupt and sends it. Python configures, starts and stops it, and answers what is unusual:

- `Pump.start` lends the queues (`Queue.lent`); nobody else can use them until `Pump.stop`, which
  finishes what the host is doing, gives back what was not started, and leaves the rest among
  `Queue.in_flight`. A queue that is stopped can be saved, restored, served by Python, and lent
  again: nothing is lost and nothing is done twice.
- `Pump.attention` becomes readable when there is something for Python: `Pump.take` returns requests
  that the pump does not know, to be answered by `Pump.complete`, and raises for a malformed chain
  what `Queue.pop` would.

`virtio_queue.pump_block` has the pump of block devices, `virtio_queue.pump_net` that of network
devices, `virtio_queue.pump_output` that of what is written as it comes, `virtio_queue.pump_vsock`
that of socket devices. All methods are for one thread at a time: hold `VirtioDevice.lock`. What is
written to a pump's attributes while it runs takes effect with the next request.

A device model uses one like this:

    def activate(self, memory, driver_features, queues):
        self.pump.start(memory, queues, driver_features)

    def process(self, queue_index):           # when `attention` is readable
        for index, chain in self.pump.take():
            self.pump.complete(index, chain.head, self.serve(chain))

    def reset(self):
        self.pump.stop()
"""

from __future__ import annotations

from virtio_queue import _rules
from virtio_queue._native import ffi, lib
from virtio_queue.batch import CHAIN_SIZE, make_chain
from virtio_queue.errors import PumpError, QueueStateError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from virtio_queue._native import CData
    from virtio_queue.chain import DescriptorChain
    from virtio_queue.queue import Queue
    from vm_memory import GuestMemory

__all__ = ["Pump"]

# What is counted of pumps of all kinds.
_SHARED = (
    "kicks", "notifications", "notifications_suppressed", "chains", "publications", "last_errno",
)  # fmt: skip


class Pump:
    """What the pumps of all kinds have in common; not made by itself.

    Attributes:
        attention: an eventfd, readable when there is something to `take`.
        running: whether the thread is there and has the queues.
    """

    _counted: tuple[str, ...] = ()  # of this kind of device

    def __init__(self, what: str, *, uring: bool) -> None:
        error = ffi.new("int *")
        handle = lib.vp_new(uring, error)
        if not handle:
            hint = "use the engine 'sync'" if uring else "raise the limit of open files"
            raise PumpError(what, error[0], hint)
        self.handle: CData = ffi.gc(handle, lib.vp_free)
        self.attention: int = handle.attention
        self.running = False
        self._queues: tuple[Queue, ...] = ()
        self._memory: GuestMemory | None = None
        self._kicks: tuple[int, ...] = ()
        self._interrupts: list[int] = []
        self._word: CData = ffi.NULL
        # Requests that Python has and has not answered: (queue, head) to writable length.
        self._taken: dict[tuple[int, int], int] = {}

    def __del__(self) -> None:
        # Before the queues go: the thread uses their rings.
        if getattr(self, "running", False):
            self.stop()

    def wire(
        self, kicks: Sequence[int], interrupts: Sequence[int], interrupt_word: CData | None = None
    ) -> None:
        """Say where kicks come from and where interrupts go, one of each for every queue.

        Args:
            kicks: eventfds that the pump waits for.
            interrupts: eventfds it writes to; -1 for a queue without an interrupt.
            interrupt_word: `VirtioDevice.interrupt_word`, where the transport has an interrupt
                status (virtio-mmio; virtio-pci without MSI-X).

        Raises:
            QueueStateError: the pump runs.
            UsageError: there are not as many kicks as interrupts.
        """
        if self.running:
            raise QueueStateError("wire", "the pump runs; stop it first")
        if len(kicks) != len(interrupts):
            raise UsageError("wire", f"{len(kicks)} kicks and {len(interrupts)} interrupts")
        self._kicks = tuple(kicks)
        self._interrupts = list(interrupts)
        self._word = ffi.NULL if interrupt_word is None else interrupt_word

    def set_interrupt(self, queue_index: int, fd: int) -> None:
        """Send a queue's interrupts to another eventfd, at any time; -1 for nowhere."""
        self._interrupts[queue_index] = fd
        if self.running:
            self.handle.queues[queue_index].interrupt = fd

    def _start(self, memory: GuestMemory, queues: Sequence[Queue]) -> None:
        """Lend the queues, chains in flight included, and start the thread.

        Raises:
            QueueStateError: the pump runs, a queue is not ready, or another pump has it.
            UsageError: `wire` did not tell of as many queues, or chains in flight are not in
                `memory`.
            PumpError: the host can't start a thread.
        """
        if self.running:
            raise QueueStateError("start", "the pump runs already")
        if len(queues) != len(self._kicks):
            raise UsageError("start", f"{len(queues)} queues, and wired for {len(self._kicks)}")
        self._memory = memory
        self._queues = ()
        self._taken.clear()
        try:
            for index, queue in enumerate(queues):
                self._lend(index, queue, memory)
            self._open()
            self.handle.status = self._word
            error = lib.vp_start(self.handle)
            if error:
                raise PumpError("start", error, "end other processes, or raise their limit")
        except BaseException:
            self._take_back()
            raise
        self.running = True

    def _start_pair(self, memory: GuestMemory, queues: Sequence[Queue]) -> None:
        """`_start` with a receive queue and a transmit queue.

        Raises:
            UsageError: there are not two.
        """
        if len(queues) != 2:
            raise UsageError("queues", f"{len(queues)} queues; one to receive and one to send")
        self._start(memory, queues)

    def _open(self) -> None:
        """What is to be done when the queues are lent, and before the thread runs."""

    def _lend(self, index: int, queue: Queue, memory: GuestMemory) -> None:
        ring, flying = queue.lend(memory)
        self._queues += (queue,)
        kick, interrupt = self._kicks[index], self._interrupts[index]
        failed = lib.vp_add_queue(self.handle, ring, kick, interrupt)
        if failed:
            queue.take_back(flying)
            self._queues = self._queues[:-1]
            if failed == -1:
                raise UsageError("queues", "at most 64 for one pump")
            raise MemoryError(f"queue {index} of a pump")
        for at, chain in enumerate(flying):
            words = [word for pair in (*chain.readable, *chain.writable) for word in pair]
            failed = lib.vp_adopt(
                self.handle,
                index,
                chain.head,
                len(chain.readable),
                len(chain.writable),
                ffi.new("uint64_t[]", words),
            )
            if failed:
                queue._in_flight |= {rest.head: rest for rest in flying[at:]}
                if failed == -1:
                    raise UsageError("memory", f"does not hold the chain {chain.head} in flight")
                raise MemoryError(f"chains in flight of queue {index} of a pump")

    def stop(self) -> None:
        """End the thread and have the queues again. Nothing happens when it does not run.

        Requests that the host is working on are finished, which takes as long as the host takes.
        Those that were taken from a ring and not started are available again where that can be, and
        else in flight, like those that Python has taken and not answered.
        """
        if self.running:
            lib.vp_stop(self.handle)
            self.running = False
            self._take_back()

    def _take_back(self) -> None:
        for index, queue in enumerate(self._queues):
            ring = queue._ring
            left = []
            number = 0
            while batch := lib.vp_batch(self.handle, index, number):
                number += 1
                if batch.outstanding:
                    left += _outstanding(ring, batch)
            queue.take_back(left)
        lib.vp_leave(self.handle)

    def take(self) -> list[tuple[int, DescriptorChain]]:
        """Return (queue index, chain) of each request that is for Python, and clear `attention`.

        Raises:
            ChainError: a chain or a ring is malformed, and its queue is not served any more. The
                pump has stopped: let the device ask for a reset.
        """
        where = ffi.new("uint32_t[2]")
        batch = ffi.new("struct vq_batch **")
        taken = []
        while lib.vp_take(self.handle, where, where + 1, batch):
            at = where[1]
            table = memoryview(ffi.buffer(batch[0].chains, CHAIN_SIZE * (at + 1)))
            segments = memoryview(ffi.buffer(batch[0].segments, 16 * batch[0].segment_count))
            chain = make_chain(table, CHAIN_SIZE * at, segments)
            self._taken[where[0], chain.head] = chain.writable_length
            taken.append((where[0], chain))
        for index, queue in enumerate(self._queues if self.running else ()):
            if self.handle.queues[index].faulted:
                fault = queue._ring.fault
                self.stop()
                descriptor = None if fault.descriptor < 0 else fault.descriptor
                raise _rules.broken(fault.rule, descriptor, fault.value, packed=queue.packed)
        return taken

    def complete(self, queue_index: int, head: int, length: int) -> None:
        """Give a chain that `take` returned back to the driver; the pump publishes and notifies.

        After a stop it is a chain in flight like any other, and goes back by `Queue.add_used`.

        Args:
            queue_index: as `take` said.
            head: `DescriptorChain.head`.
            length: `Writer.used_length`.

        Raises:
            QueueStateError: the pump does not run, or Python has no such chain of it.
            UsageError: `length` is more than the chain can hold.
        """
        if not self.running:
            raise QueueStateError("complete", "the pump does not run; use Queue.add_used")
        room = self._taken.get((queue_index, head))
        if room is None:
            raise QueueStateError("complete", f"no chain {head} of queue {queue_index} was taken")
        if not 0 <= length <= min(room, 0xFFFFFFFF):
            raise UsageError("length", f"{length} is more than the chain's writable part holds")
        del self._taken[queue_index, head]
        lib.vp_answer(self.handle, queue_index, head, length)

    def nudge(self) -> None:
        """Have the thread look again at what waits for a limit's tokens; at any time."""
        lib.vp_wake(self.handle.control)

    @property
    def counters(self) -> dict[str, int]:
        """What was done, refused and failed since the pump was made, by name."""
        counters = self.handle.counters
        return {name: getattr(counters, name) for name in (*_SHARED, *self._counted)}

    @property
    def thread_id(self) -> int:
        """The kernel's number of the thread (`gettid`), for its priority and its processors."""
        return self.handle.thread_id


def _outstanding(ring: CData, batch: CData) -> list[DescriptorChain]:
    """Chains of a batch that are in flight."""
    count = batch.count
    table = memoryview(ffi.buffer(batch.chains, CHAIN_SIZE * count))
    segments = memoryview(ffi.buffer(batch.segments, 16 * batch.segment_count))
    chains = []
    for at in range(count):
        chain = make_chain(table, CHAIN_SIZE * at, segments)
        flight = ring.flights[chain.head]
        if flight.slots and flight.batch == batch and flight.chain == at:
            chains.append(chain)
    return chains
