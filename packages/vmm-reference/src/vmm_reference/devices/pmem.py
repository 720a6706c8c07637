"""A virtio persistent memory device: section 5.19 of the virtio specification, version 1.3.

The guest reads and writes a file as memory, without a request; what it asks for is that all it
wrote be durable. A flush is carried out elsewhere, since it may take long: requests that come
meanwhile wait for the next one, which serves them all.
"""

from __future__ import annotations

import os
import threading
from struct import Struct
from typing import TYPE_CHECKING, ClassVar

import attrs

from virtio_queue.constants import DEFAULT_QUEUE_FEATURES
from virtio_queue.errors import ChainError
from vm_memory import FilePrivate, FileShared
from vmm_reference.deviceconfig import DeviceConfig
from vmm_reference.errors import ConfigError, HostError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from virtio_queue import DescriptorChain, Queue, VirtioDevice
    from vm_memory import GuestMemory
    from vmm_reference.loop import Loop
    from vmm_reference.wiring import Wiring

__all__ = ["PersistentMemory", "Pmem", "build"]

CONFIG = Struct("<QQ")  # start, size (5.19.4)
WORD = Struct("<I")
FLUSH = 0  # struct virtio_pmem_req, 5.19.6
OK, FAILED = 0, 1  # struct virtio_pmem_resp; any other value than 0 is an error (5.19.7)

_BLOCK = 2 << 20  # what a guest maps at once


class Pmem:
    """The device.

    Args:
        address: guest-physical, of the memory.
        size: of it, in bytes.
        flush: begins to make the memory durable; `flushed` is called once it is.

    Attributes:
        flushes: how often `flush` was called.
        failures: how often it failed.
        refused: requests that are none of 5.19.6.
        unfinished: whether `process` left something for another call.
    """

    device_id = 27
    device_features = DEFAULT_QUEUE_FEATURES
    queue_sizes = (64,)

    def __init__(self, address: int, size: int, flush: Callable[[], object]) -> None:
        self.flushes = self.failures = self.refused = 0
        self.unfinished = False
        self._config = CONFIG.pack(address, size)
        self._flush = flush
        self._busy = False
        self._served: list[DescriptorChain] = []  # by the flush under way
        self._memory: GuestMemory | None = None
        self._queue: Queue | None = None

    def metrics(self) -> dict[str, int]:
        """Flushes, and what went wrong."""
        return {
            "flushes": self.flushes,
            "host_failures": self.failures,
            "refused_requests": self.refused,
        }

    def read_config(self, offset: int, length: int) -> bytes:
        """The configuration space, 5.19.4."""
        return self._config[offset : offset + length]

    def write_config(self, offset: int, data: bytes) -> None:
        """All of it is read-only."""

    def activate(self, memory: GuestMemory, driver_features: int, queues: Sequence[Queue]) -> None:
        """The driver is ready."""
        self._memory, self._queue = memory, queues[0]

    def reset(self) -> None:
        """Forget the driver. A flush under way serves nobody any more."""
        self._memory = self._queue = None
        self._served = []

    def process(self, queue_index: int) -> None:
        """Take requests; a flush begins unless one is under way.

        Raises:
            ChainError: one without room for an answer.
        """
        memory, queue = self._memory, self._queue
        if memory is None or queue is None or queue_index != 0:
            return
        for chain in queue.chains(memory):
            reader = chain.reader(memory)
            if chain.writable_length < WORD.size:
                raise ChainError("5.19.6", chain.head, 0, "a request has room for an answer")
            if reader.available < WORD.size or reader.read_struct(WORD) != (FLUSH,):
                self.refused += 1
                self._answer(chain, FAILED)
        self.unfinished = queue.enable_notifications(memory)
        self._begin()

    def flushed(self, ok: bool) -> None:
        """What `flush` began is done; the device is locked. The caller sends notifications."""
        self._busy = False
        self.failures += not ok
        served, self._served = self._served, []
        for chain in served:
            self._answer(chain, OK if ok else FAILED)
        self._begin()

    def forget(self) -> None:
        """A flush under way will not be told of; `process` begins another. The device is locked."""
        self._busy = False
        self._served = []

    def _begin(self) -> None:
        if self._busy or self._queue is None:
            return
        self._served = list(self._queue.in_flight)
        if self._served:
            self._busy = True
            self.flushes += 1
            self._flush()

    def _answer(self, chain: DescriptorChain, result: int) -> None:
        memory, queue = self._memory, self._queue
        if memory is not None and queue is not None:
            writer = chain.writer(memory)
            writer.write(WORD.pack(result))
            queue.add_used(memory, chain.head, writer.used_length)


@attrs.frozen
class PersistentMemory(DeviceConfig):
    """A file that the guest has as memory.

    Attributes:
        path: of a file whose size is a multiple of 2 MiB.
        private: keep what the guest writes to this machine, and the file as it is.
    """

    kind: ClassVar[str] = "pmem"
    positional: ClassVar[str] = "path"
    flags: ClassVar[dict[str, str]] = {"private": "private"}

    path: str
    private: bool = False

    def cloned(self, number: int) -> PersistentMemory:
        """What a clone writes stays its own; the snapshot has what the file had."""
        return attrs.evolve(self, private=True)

    @property
    def reserved_memory(self) -> int:
        """As much as the file has."""
        try:
            return os.stat(self.path).st_size  # noqa: PTH116
        except OSError:
            return 0  # `check` says so

    @property
    def memory_backing(self) -> FileShared | FilePrivate:
        """The file."""
        return FilePrivate(self.path) if self.private else FileShared(self.path)

    def check(self, field: str) -> None:
        """Raise `ConfigError` unless the file is there and may be used so."""
        super().check(field)
        private: object = self.private
        if not isinstance(private, bool):
            raise ConfigError(f"{field}.private", private, "must be true or false")
        path: object = self.path
        if not isinstance(path, str) or "\0" in path or not os.path.isfile(path):  # noqa: PTH113
            raise ConfigError(f"{field}.path", repr(path), "must be a regular file")
        if not os.access(path, os.R_OK if private else os.R_OK | os.W_OK):
            rule = "must be readable" if private else "must be readable and writable, or private"
            raise ConfigError(f"{field}.path", path, rule)
        size = self.reserved_memory
        if size == 0 or size % _BLOCK:
            rule = "must have a size that is a multiple of 2 MiB"
            raise ConfigError(f"{field}.path", f"{path} with {size} bytes", rule)


class _Flushes:
    """Makes the file durable on a thread of its own, and tells the device on the loop's.

    Args:
        loop: of the machine.
        sync: makes it durable, or raises `OSError`.
    """

    device: VirtioDevice

    def __init__(self, loop: Loop, sync: Callable[[], object]) -> None:
        self._loop, self._sync = loop, sync
        self._thread: threading.Thread | None = None
        self._run = 0  # counts pauses: what began before one is not told of after it

    def begin(self) -> None:
        """Begin a flush; the device is locked."""
        self._thread = threading.Thread(target=self._flush, args=(self._run,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Let the device stand still."""
        with self.device.lock:
            self._run += 1
            self._model.forget()

    def close(self) -> None:
        """Wait for a flush under way."""
        if self._thread is not None:
            self._thread.join()

    @property
    def _model(self) -> Pmem:
        model = self.device.model
        assert isinstance(model, Pmem)
        return model

    def _flush(self, run: int) -> None:
        try:
            self._sync()
        except OSError:
            self._loop.call_soon(lambda: self._done(run, ok=False))
        else:
            self._loop.call_soon(lambda: self._done(run, ok=True))

    def _done(self, run: int, *, ok: bool) -> None:
        with self.device.lock:
            if run == self._run:
                self._model.flushed(ok)
                self.device.notify_used()


def build(config: PersistentMemory, wiring: Wiring) -> Pmem:
    """The file as memory behind the machine's own; returned for its counters."""
    from vmm_reference.backends.file import FileBackend

    address, size = wiring.area()
    own = not config.private
    backend = FileBackend(config.path, read_only=not own, locked=own and not wiring.incoming)
    wiring.on_close(backend.close)
    if backend.size != size:
        raise HostError(f"pmem {config.path}", "its size has changed", "start the machine again")
    if own:
        wiring.on_hand_over(backend.unlock, backend.lock)
    # Nothing of private memory is in the file.
    flushes = _Flushes(wiring.loop, backend.flush if own else lambda: None)
    wiring.on_close(flushes.close)
    pmem = Pmem(address, size, flushes.begin)
    slot = wiring.virtio(pmem)
    flushes.device = slot.device
    wiring.show_memory(address, size)
    wiring.on_pause(flushes.stop, lambda: slot.kick(0))
    return pmem
