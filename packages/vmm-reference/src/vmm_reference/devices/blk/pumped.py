"""A disk whose requests are served by a thread of C, from kick to interrupt, without Python.

`Block` stays what it is: it has the features, the configuration and the state, and is the twin that
says in Python what the pump does. Here the pump is started with the driver, stopped for a reset, a
pause or another image, and told when the driver changes the cache mode.
"""

from __future__ import annotations

from virtio_queue.pump_block import BlockPump
from vmm_reference.loop import READ

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
    from collections.abc import Mapping, Sequence
    from typing import Literal

    from virtio_queue import Queue
    from vm_memory import GuestMemory
    from vmm_reference.backends.file import FileBackend
    from vmm_reference.devices.limiter import TokenBucket
    from vmm_reference.slots import VirtioSlot
    from vmm_reference.wiring import Wiring

__all__ = ["PumpedBlock"]


class PumpedBlock(Block):
    """A disk on a file or block device.

    Args:
        backend: the image.
        engine: `sync` for one system call after the other, `io_uring` for many at once.
        serial: as for `Block`.
        queues: as for `Block`.

    Raises:
        PumpError: the host lacks the engine.
    """

    def __init__(
        self,
        backend: FileBackend,
        engine: Literal["sync", "io_uring"],
        *,
        serial: str = "",
        queues: int = 1,
    ) -> None:
        super().__init__(backend, serial=serial, queues=queues)
        self.pump = BlockPump(
            backend.fileno(),
            sectors=backend.size // SECTOR,
            read_only=backend.read_only,
            identity=serial.encode(),
            engine=engine,
            max_data=MAX_DATA,
            max_discard=(MAX_DISCARD_SECTORS, MAX_DISCARD_SEGMENTS),
            max_write_zeroes=(MAX_ZEROES_SECTORS, MAX_ZEROES_SEGMENTS),
        )
        self._slot: VirtioSlot | None = None
        self._limits: dict[str, TokenBucket | None] = {"bandwidth": None, "ops": None}
        self._held = True  # until the machine starts, and while it is paused

    def plug_in(self, slot: VirtioSlot, wiring: Wiring) -> None:
        """Take kicks and interrupts from here; before a driver can come."""
        self._slot = slot
        device = slot.device

        def attend(_events: int) -> None:
            device.process(0)

        def halt() -> None:
            with device.lock:
                self._held = True
                self.pump.stop()

        def go() -> None:
            with device.lock:
                self._held = False
                if device.active:
                    self.go()

        def free() -> None:
            del self.pump  # and with it its descriptors, at once

        wiring.on_close(free)
        wiring.loop.add(self.pump.attention, READ, attend)
        wiring.on_close(lambda: wiring.loop.remove(self.pump.attention))
        wiring.on_close(halt)
        wiring.on_pause(halt, go)
        wiring.on_start(go)

    def activate(self, memory: GuestMemory, driver_features: int, queues: Sequence[Queue]) -> None:
        """The driver is ready, and so is the pump."""
        super().activate(memory, driver_features, queues)
        self.go()

    def reset(self) -> None:
        """Forget the driver, when the host has finished what it works on."""
        self.pump.stop()
        super().reset()

    def process(self, queue_index: int) -> None:
        """Answer what the pump leaves to Python: the types of requests that it does not know.

        Raises:
            ChainError: a chain that can't be answered; the pump has stopped.
        """
        if self._memory is None:
            return
        for index, chain in self.pump.take():
            self.pump.complete(index, chain.head, self._serve(chain, self._memory))

    def go(self) -> None:
        """Serve the queues of a driver that is ready. Under the device's lock."""
        ready = [number for number, queue in enumerate(self._queues) if queue.ready]
        slot = self._slot
        if self._memory is None or slot is None or not ready or self._held or self.pump.running:
            return
        self._settle_cache_mode()
        self.pump.wire(
            [slot.kicks[number] for number in ready],
            [slot.pump_call(number) for number in ready],
            slot.interrupt_word,
        )
        self.pump.start(self._memory, [self._queues[number] for number in ready], self._features)

    def exchange(self, backend: FileBackend) -> None:  # type: ignore[override]
        """Go on with another image."""
        was_running = self.pump.running
        self.pump.stop()
        try:
            super().exchange(backend)
            self.pump.set_file(backend.fileno())
            self.pump.sectors = self._sectors
        finally:
            if was_running:
                self.go()

    def limit(self, buckets: Mapping[str, TokenBucket | None]) -> None:
        """Have other limits from now on; the device is locked."""
        from virtio_queue import pump_limit

        self._limits |= buckets
        bandwidth, operations = (
            None
            if (bucket := self._limits[name]) is None
            else pump_limit.TokenBucket(bucket.size, bucket.refill_time, bucket.one_time_burst)
            for name in ("bandwidth", "ops")
        )
        if self.pump.limiter is None:
            self.pump.limiter = pump_limit.Limiter()
        self.pump.limiter.set(bandwidth, operations)
        self.pump.nudge()

    def metrics(self) -> dict[str, int]:
        """What the pump did, and what it left to Python."""
        return {**self.pump.counters, **super().metrics()}

    def _settle_cache_mode(self) -> None:
        super()._settle_cache_mode()
        self.pump.writeback = self._writeback
