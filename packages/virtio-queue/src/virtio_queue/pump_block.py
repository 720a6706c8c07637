"""The pump of block devices (5.2): requests between the queues and a file or a block device.

Example:
    >>> import os, tempfile
    >>> from vm_memory import GuestAddress, GuestMemory
    >>> from virtio_queue import BlockPump, Queue
    >>> from virtio_queue.testing import SplitDriver
    >>> memory = GuestMemory.from_ranges([(GuestAddress(0), 1 << 20)])
    >>> queue = Queue(16)
    >>> driver = SplitDriver(memory, 16)
    >>> driver.configure(queue)
    >>> file = tempfile.TemporaryFile()
    >>> _ = file.write(b"sector".ljust(512, b"."))
    >>> file.flush()
    >>> kick, interrupt = os.eventfd(0), os.eventfd(0)
    >>> pump = BlockPump(file.fileno(), sectors=1)
    >>> pump.wire([kick], [interrupt])
    >>> pump.start(memory, [queue], 0)
    >>> _ = driver.add([bytes(16)], [512, 1])  # a read of sector 0
    >>> os.eventfd_write(kick, 1)
    >>> _ = os.eventfd_read(interrupt)  # waits
    >>> driver.reap()[0].data[:6]
    b'sector'
    >>> pump.counters["reads"], pump.counters["read_bytes"]
    (1, 512)
    >>> pump.stop()
    >>> memory.close(); file.close(); os.close(kick); os.close(interrupt)
"""

from __future__ import annotations

import os
import stat

from virtio_queue._native import ffi
from virtio_queue.errors import QueueStateError, UsageError
from virtio_queue.pump import Pump

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Literal

    from virtio_queue.pump_limit import Limiter
    from virtio_queue.queue import Queue
    from vm_memory import GuestMemory

__all__ = ["BlockPump"]

F_FLUSH, F_DISCARD, F_WRITE_ZEROES = 1 << 9, 1 << 13, 1 << 14
ID_LENGTH = 20
MOST_SEGMENTS = 256


class BlockPump(Pump):
    """Serves the request queues of one block device.

    Reads, writes, flushes, discards, write zeroes and identities are served in C, in any layout of
    their chains; `virtio_queue.testing.model.BlockModel` says how in plain Python. Other requests,
    and chains without room for a status byte, are for Python to `take`.

    Args:
        fd: a file or a block device, open for reading, and for writing unless `read_only`. The
            caller keeps it open while the pump runs.
        sectors: the disk's size in sectors of 512 bytes.
        read_only: refuse what would change the disk.
        identity: up to 20 bytes that the driver can ask for.
        engine: "sync" does one system call after the other; "io_uring" hands many requests to the
            kernel at once.
        max_data: most bytes of one read or write.
        max_discard: most sectors of a segment, and most segments of a request.
        max_write_zeroes: likewise.
        limiter: limits of bandwidth and operations, as the attribute.

    Raises:
        PumpError: the host lacks the engine.
        UsageError: an argument is out of range.
    """

    _counted = (
        "throttled", "reads", "writes", "flushes", "discards", "write_zeroes", "get_ids",
        "handed_over", "read_bytes", "written_bytes", "refused_read_only", "refused_range",
        "refused_header", "refused_segments", "refused_unsupported", "failed_reads",
        "failed_writes", "failed_flushes", "failed_discards", "failed_write_zeroes",
    )  # fmt: skip

    def __init__(
        self,
        fd: int,
        *,
        sectors: int,
        read_only: bool = False,
        identity: bytes = b"",
        engine: Literal["sync", "io_uring"] = "sync",
        max_data: int = 256 << 20,
        max_discard: tuple[int, int] = (1 << 22, 64),
        max_write_zeroes: tuple[int, int] = (1 << 17, 1),
        limiter: Limiter | None = None,
    ) -> None:
        if engine not in ("sync", "io_uring"):
            raise UsageError("engine", f"{engine!r} is neither 'sync' nor 'io_uring'")
        if len(identity) > ID_LENGTH:
            raise UsageError("identity", f"has {len(identity)} bytes; {ID_LENGTH} are the most")
        for name, (_, segments) in (("discard", max_discard), ("write_zeroes", max_write_zeroes)):
            if not 1 <= segments <= MOST_SEGMENTS:
                rule = f"segments must be 1 to {MOST_SEGMENTS}"
                raise UsageError(f"max_{name}", f"{segments} {rule}")
        super().__init__(f"engine {engine!r}", uring=engine == "io_uring")
        block = self._block = self.handle.block
        block.read_only = read_only
        block.id = identity.ljust(ID_LENGTH, b"\0")
        block.writeback = True
        block.max_data = max_data
        block.max_discard_sectors, block.max_discard_segments = max_discard
        block.max_write_zeroes_sectors, block.max_write_zeroes_segments = max_write_zeroes
        self.sectors = sectors
        self._limiters: list[Limiter | None] = []
        self.limiter = limiter
        self.set_file(fd)

    @property
    def limiter(self) -> Limiter | None:
        """Limits of bandwidth and operations; another may be given at any time."""
        return self._limiters[-1]

    @limiter.setter
    def limiter(self, limiter: Limiter | None) -> None:
        self._limiters.append(limiter)  # the former ones stay: the thread may be using one
        self.handle.limiter = ffi.NULL if limiter is None else limiter.handle

    @property
    def sectors(self) -> int:
        """The disk's size in sectors; may be changed at any time."""
        return self._block.sectors

    @sectors.setter
    def sectors(self, sectors: int) -> None:
        if not 0 <= sectors < 1 << 54:
            raise UsageError("sectors", f"{sectors} is not from 0 to 2**54 - 1")
        self._block.sectors = sectors

    @property
    def writeback(self) -> bool:
        """Whether writes may stay in the host's cache until a flush; may be changed at any time.

        Otherwise each write is on stable storage before it is used (5.2.6.2).
        """
        return bool(self._block.writeback)

    @writeback.setter
    def writeback(self, writeback: bool) -> None:
        self._block.writeback = writeback

    def set_file(self, fd: int) -> None:
        """Serve another file or block device from now on; the caller sets `sectors` to its size.

        Raises:
            QueueStateError: the pump runs.
            UsageError: `fd` is neither a file nor a block device.
            OSError: `fd` is not open.
        """
        if self.running:
            raise QueueStateError("set_file", "the pump runs; stop it first")
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            raise UsageError("fd", f"{fd} is neither a file nor a block device")
        self._block.is_device = stat.S_ISBLK(mode)
        self._block.fd = fd

    def start(self, memory: GuestMemory, queues: Sequence[Queue], driver_features: int) -> None:
        """Lend the queues, chains in flight included, and serve them.

        Args:
            memory: the guest's memory.
            queues: ready, and as many as `wire` was told of.
            driver_features: what was negotiated: FLUSH, DISCARD and WRITE_ZEROES count.

        Raises:
            QueueStateError: the pump runs, a queue is not ready, or another pump has it.
            UsageError: `wire` did not tell of as many queues, or chains in flight are not in
                `memory`.
            PumpError: the host can't start a thread.
        """
        block = self._block
        block.may_flush = bool(driver_features & F_FLUSH)
        block.may_discard = bool(driver_features & F_DISCARD)
        block.may_write_zeroes = bool(driver_features & F_WRITE_ZEROES)
        self._start(memory, queues)
