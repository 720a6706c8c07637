"""The pump of network devices (5.1): frames between a pair of queues and a tap.

Example:
    >>> import os, socket
    >>> from vm_memory import GuestAddress, GuestMemory
    >>> from virtio_queue import NetPump, Queue
    >>> from virtio_queue.testing import Arena, SplitDriver
    >>> memory = GuestMemory.from_ranges([(GuestAddress(0), 1 << 20)])
    >>> queues = Queue(16), Queue(16)
    >>> arena = Arena(0x1000, 0xF_0000)
    >>> receiver, sender = (SplitDriver(memory, 16, arena=arena) for _ in queues)
    >>> receiver.configure(queues[0]); sender.configure(queues[1])
    >>> ours, wire = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    >>> ours.setblocking(False)
    >>> kicks = [os.eventfd(0) for _ in queues]
    >>> interrupt = os.eventfd(0)
    >>> pump = NetPump(ours.fileno())
    >>> pump.wire(kicks, [interrupt] * 2)
    >>> pump.start(memory, queues, 0)
    >>> _ = sender.add([bytes(12) + b"a frame of 20 bytes."], [])
    >>> os.eventfd_write(kicks[1], 1)
    >>> wire.recv(100)[12:]
    b'a frame of 20 bytes.'
    >>> pump.stop()
    >>> ours.close(); wire.close(); memory.close()
    >>> for fd in (*kicks, interrupt):
    ...     os.close(fd)
"""

from __future__ import annotations

import os

from virtio_queue._native import lib
from virtio_queue.errors import UsageError
from virtio_queue.pump import Pump

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from virtio_queue.queue import Queue
    from vm_memory import GuestMemory

__all__ = ["NetPump"]

# What is counted of pumps of all kinds.
_SHARED = frozenset((
    "kicks", "notifications", "notifications_suppressed", "chains", "publications", "last_errno",
))  # fmt: skip


class NetPump(Pump):
    """Serves a receive queue and a transmit queue of one network device.

    Each frame of the descriptor has a `struct virtio_net_hdr` of 12 bytes in front, both ways, and
    one `read` or `writev` moves one frame, as with a tap. A frame that breaks a rule, that no
    buffers can hold, or that the host refuses is dropped and counted by name. A frame that finds
    too few buffers waits, also over a stop; those behind it wait in the descriptor.

    Args:
        fd: non-blocking. The caller keeps it open while the pump runs.

    Raises:
        PumpError: the host has no more descriptors.
        UsageError: `fd` blocks.
        OSError: `fd` is not open.
    """

    def __init__(self, fd: int) -> None:
        if os.get_blocking(fd):
            raise UsageError("fd", f"{fd} blocks: make it non-blocking")
        super().__init__("network", uring=False)
        self._fd = fd

    def start(self, memory: GuestMemory, queues: Sequence[Queue], driver_features: int) -> None:
        """Lend the queues, chains in flight included, and serve them.

        Args:
            memory: the guest's memory.
            queues: the receive queue and the transmit queue, ready.
            driver_features: what was negotiated: MRG_RXBUF, CSUM and `HOST_*` count.

        Raises:
            QueueStateError: the pump runs, a queue is not ready, or another pump has it.
            UsageError: there are not two queues, `wire` did not tell of as many, or chains in
                flight are not in `memory`.
            PumpError: the host can't start a thread.
        """
        if len(queues) != 2:
            raise UsageError("queues", f"{len(queues)} queues; one to receive and one to send")
        self._features = driver_features
        self._start(memory, queues)

    def _open(self) -> None:
        if lib.vp_net_open(self.handle, self._fd, self._features):
            raise MemoryError("frames of a network pump")

    def forget(self) -> None:
        """Drop a frame that waits for buffers, as for a reset. The pump must not run."""
        if not self.running:
            self.handle.net.length = 0

    def _counts(self, name: str) -> bool:
        return name in _SHARED or not super()._counts(name)
