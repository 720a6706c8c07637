"""A disk whose requests are served by a thread of C, from kick to interrupt, without Python.

`Block` stays what it is: it has the features, the configuration and the state, and is the twin that
says in Python what the pump does. Here the pump is started with the driver, stopped for a reset, a
pause or another image, and told when the driver changes the cache mode.
"""

from __future__ import annotations

from virtio_queue.pump_block import BlockPump
from vmm_reference.devices.offload import Offload, PumpServer

from .model import (
    MAX_DATA,
    MAX_DISCARD_SECTORS,
    MAX_DISCARD_SEGMENTS,
    MAX_ZEROES_SECTORS,
    MAX_ZEROES_SEGMENTS,
    SECTOR,
    Block,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Literal

    from virtio_queue import DescriptorChain, Queue
    from vm_memory import GuestMemory
    from vmm_reference.backends.file import FileBackend
    from vmm_reference.backends.pumps import Limits
    from vmm_reference.devices.limiter import TokenBucket

__all__ = ["PumpedBlock"]


class DrivePump(PumpServer):
    """Serves the request queues of a disk, as many as are ready.

    Args:
        memory: the guest's.
        pump: the thread, with the image.
        answer: carries out a request that the pump does not know, and returns what it has written.
    """

    pump: BlockPump
    together = False

    def __init__(
        self, memory: GuestMemory, pump: BlockPump, answer: Callable[[DescriptorChain], int]
    ) -> None:
        super().__init__(memory, pump)
        self._answer = answer

    def _start(self, features: int, queues: Sequence[Queue]) -> None:
        self.pump.start(self._memory, queues, features)

    def attend(self) -> None:
        """Answer what is left to Python.

        Raises:
            ChainError: a chain that can't be answered; the pump has stopped.
        """
        for index, chain in self.pump.take():
            self.pump.complete(index, chain.head, self._answer(chain))


class PumpedBlock(Block):
    """A disk on a file or block device.

    Args:
        backend: the image.
        engine: `sync` for one system call after the other, `io_uring` for many at once.
        memory: the guest's.
        serial: as for `Block`.
        queues: as for `Block`.

    Attributes:
        offload: to be plugged in before a driver can come.

    Raises:
        PumpError: the host lacks the engine.
    """

    def __init__(
        self,
        backend: FileBackend,
        engine: Literal["sync", "io_uring"],
        memory: GuestMemory,
        *,
        serial: str = "",
        queues: int = 1,
    ) -> None:
        super().__init__(backend, serial=serial, queues=queues)
        pump = BlockPump(
            backend.fileno(),
            sectors=backend.size // SECTOR,
            read_only=backend.read_only,
            identity=serial.encode(),
            engine=engine,
            max_data=MAX_DATA,
            max_discard=(MAX_DISCARD_SECTORS, MAX_DISCARD_SEGMENTS),
            max_write_zeroes=(MAX_ZEROES_SECTORS, MAX_ZEROES_SEGMENTS),
        )
        self.server = DrivePump(memory, pump, self._answer)
        self.offload = Offload("the pump", [(self.server, range(queues))])
        self._limits: Limits | None = None  # unlimited

    def activate(self, memory: GuestMemory, driver_features: int, queues: Sequence[Queue]) -> None:
        """The driver is ready, and so is the pump.

        Raises:
            ActivationError: the host can't start a thread.
        """
        super().activate(memory, driver_features, queues)
        self.offload.activate(driver_features, queues)

    def reset(self) -> None:
        """Forget the driver, when the host has finished what it works on."""
        self.offload.reset()
        super().reset()

    def process(self, queue_index: int) -> None:
        """Answer what the pump leaves to Python: the types of requests that it does not know.

        Raises:
            ChainError: a chain that can't be answered; the pump has stopped.
        """
        if self._memory is not None:
            self.offload.attend(queue_index)

    def _answer(self, chain: DescriptorChain) -> int:
        assert self._memory is not None
        return self._serve(chain, self._memory)

    def exchange(self, backend: FileBackend) -> None:  # type: ignore[override]
        """Go on with another image."""
        pump = self.server.pump
        self.offload.stop()
        try:
            super().exchange(backend)
            pump.set_file(backend.fileno())
            pump.sectors = self._sectors
        finally:
            self.offload.go_on()

    def limit(self, buckets: Mapping[str, TokenBucket | None]) -> None:
        """Have other limits from now on; the device is locked."""
        pump = self.server.pump
        if self._limits is None:
            from vmm_reference.backends.pumps import Limits

            self._limits = Limits()
            pump.limiter = self._limits.limiter
        self._limits.set(buckets)
        pump.nudge()

    def metrics(self) -> dict[str, int]:
        """What the pump did, and what it left to Python."""
        return {**self.offload.metrics(), **super().metrics()}

    def _settle_cache_mode(self) -> None:
        super()._settle_cache_mode()
        self.server.pump.writeback = self._writeback
