"""A virtio entropy device: section 5.4 of the virtio specification, version 1.3."""

from __future__ import annotations

import os

from virtio_queue.constants import DEFAULT_QUEUE_FEATURES
from vm_memory._values import frozen
from vmm_reference.deviceconfig import DeviceConfig

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import ClassVar

    from virtio_queue import DescriptorChain, Queue
    from vm_memory import GuestMemory
    from vmm_reference.wiring import Wiring

__all__ = ["MAX_REQUEST", "Entropy", "Rng", "build"]

MAX_REQUEST = 64 << 10
"""The most a single request gets, in bytes: a guest that asks for gigabytes gets this much."""


class Rng:
    """A source of random bytes for the guest.

    Args:
        entropy: returns that many random bytes, 1 to `MAX_REQUEST`, or at least one of them.

    Attributes:
        served: bytes given to the guest.
        unfinished: whether `process` left something for another call.
    """

    device_id = 4
    device_features = DEFAULT_QUEUE_FEATURES
    queue_sizes = (64,)

    def __init__(self, entropy: Callable[[int], bytes]) -> None:
        self.served = 0
        self.unfinished = False
        self._entropy = entropy
        self._memory: GuestMemory | None = None
        self._queue: Queue | None = None

    def metrics(self) -> dict[str, int]:
        """Bytes given to the guest."""
        return {"served_bytes": self.served}

    def read_config(self, offset: int, length: int) -> bytes:
        """There is no configuration."""
        return b""

    def write_config(self, offset: int, data: bytes) -> None:
        """There is no configuration."""

    def activate(self, memory: GuestMemory, driver_features: int, queues: Sequence[Queue]) -> None:
        """The driver is ready."""
        self._memory, self._queue = memory, queues[0]

    def reset(self) -> None:
        """Forget the driver."""
        self._memory = self._queue = None

    def process(self, queue_index: int) -> None:
        """Fill the buffers that the driver made available, at most a ring's worth.

        Raises:
            ChainError: the driver broke the ring.
        """
        memory, queue = self._memory, self._queue
        if memory is not None and queue is not None and queue_index == 0:
            self.unfinished = queue.serve(memory, lambda chain: self._serve(chain, memory))

    def _serve(self, chain: DescriptorChain, memory: GuestMemory) -> int:
        writer = chain.writer(memory)
        length = min(writer.available, MAX_REQUEST)
        if length:
            self.served += writer.write(self._entropy(length)[:length])
        return writer.used_length


@frozen
class Entropy(DeviceConfig):
    """A source of the host's random bytes."""

    kind: ClassVar[str] = "rng"


def build(config: Entropy, wiring: Wiring) -> None:
    """An entropy device that asks the host's kernel."""
    wiring.virtio(Rng(os.getrandom))
