"""The pump of output: bytes of one queue to a descriptor, as those of a console port (5.3.6).

Example:
    >>> import os
    >>> from vm_memory import GuestAddress, GuestMemory
    >>> from virtio_queue import OutputPump, Queue
    >>> from virtio_queue.testing import Arena, SplitDriver
    >>> memory = GuestMemory.from_ranges([(GuestAddress(0), 1 << 20)])
    >>> queue = Queue(16)
    >>> driver = SplitDriver(memory, 16, arena=Arena(0x1000, 0xF_0000))
    >>> driver.configure(queue)
    >>> there, ours = os.pipe2(os.O_NONBLOCK)
    >>> os.set_blocking(there, True)
    >>> kick, interrupt = os.eventfd(0), os.eventfd(0)
    >>> pump = OutputPump(ours, lossy=True)
    >>> pump.wire([kick], [interrupt])
    >>> pump.start(memory, [queue])
    >>> _ = driver.add([b"login: "], [])
    >>> os.eventfd_write(kick, 1)
    >>> os.read(there, 100)
    b'login: '
    >>> pump.stop()
    >>> memory.close()
    >>> for fd in (there, ours, kick, interrupt):
    ...     os.close(fd)
"""

from __future__ import annotations

import os

from virtio_queue._native import ffi, lib
from virtio_queue.errors import QueueStateError, UsageError
from virtio_queue.pump import Pump

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from virtio_queue.queue import Queue
    from vm_memory import GuestMemory

__all__ = ["OutputPump"]

WINDOW = 256 << 10


class OutputPump(Pump):
    """Writes what a driver puts into a queue.

    What the descriptor does not take waits in a window of 256 KiB, and its chain is used all the
    same. Behind a full window chains wait, or with `lossy` their bytes are dropped and counted, so
    that a driver which waits for its buffer is never held up. When nobody reads any more, as with
    a broken pipe, all that follows is dropped and counted.

    Args:
        fd: non-blocking. The caller keeps it open while the pump runs.
        lossy: drop what finds no room.

    Raises:
        PumpError: the host has no more descriptors.
        UsageError: `fd` blocks.
        OSError: `fd` is not open.
    """

    _counted = ("sent_bytes", "dropped_bytes")

    def __init__(self, fd: int, *, lossy: bool) -> None:
        if os.get_blocking(fd):
            raise UsageError("fd", f"{fd} blocks: make it non-blocking")
        super().__init__("output", uring=False)
        if lib.vp_output_new(self.handle):
            raise MemoryError("window of an output pump")
        self._output = self.handle.output
        self._output.fd, self._output.lossy = fd, lossy

    def start(self, memory: GuestMemory, queues: Sequence[Queue]) -> None:
        """Lend the queue, chains in flight included, and serve it.

        Args:
            memory: the guest's memory.
            queues: one that is ready.

        Raises:
            QueueStateError: the pump runs, the queue is not ready, or another pump has it.
            UsageError: there is not one queue, `wire` did not tell of it, or chains in flight are
                not in `memory`.
            PumpError: the host can't start a thread.
        """
        if len(queues) != 1:
            raise UsageError("queues", f"{len(queues)} queues; one is written")
        self._start(memory, queues)

    @property
    def offset(self) -> int:
        """How many bytes of the first chain in flight are taken already; set it before a start."""
        return self._output.offset

    @offset.setter
    def offset(self, offset: int) -> None:
        self._output.offset = offset

    def take_window(self) -> bytes:
        """What was taken from the driver and not written; it is the caller's from now on.

        Raises:
            QueueStateError: the pump runs.
        """
        if self.running:
            raise QueueStateError("take_window", "the pump runs; stop it first")
        left = ffi.new("uint8_t[]", self._output.window.length)
        lib.vp_output_window(self.handle, left, self._output.window.length, 1)
        return bytes(ffi.buffer(left))

    def fill_window(self, data: bytes) -> None:
        """Have these bytes written first. Behind what is in the window already.

        Raises:
            QueueStateError: the pump runs.
            UsageError: there is no room for them.
        """
        if self.running:
            raise QueueStateError("fill_window", "the pump runs; stop it first")
        if len(data) > (room := WINDOW - self._output.window.length):
            raise UsageError("data", f"{len(data)} bytes; there is room for {room}")
        lib.vp_output_window(self.handle, ffi.from_buffer("uint8_t[]", data), len(data), 0)

    def _open(self) -> None:
        lib.vp_output_open(self.handle)
