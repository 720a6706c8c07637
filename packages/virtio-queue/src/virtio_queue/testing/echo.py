"""The smallest device that uses everything: an example, and a subject for tests of transports."""

from __future__ import annotations

from typing import TYPE_CHECKING

from virtio_queue.constants import (
    DEFAULT_QUEUE_FEATURES,
    F_IN_ORDER,
    F_NOTIF_CONFIG_DATA,
    F_NOTIFICATION_DATA,
    F_RING_PACKED,
    F_RING_RESET,
)
from virtio_queue.errors import ActivationError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from virtio_queue.queue import Queue
    from vm_memory import GuestMemory

__all__ = ["ALL_QUEUE_FEATURES", "Echo"]

ALL_QUEUE_FEATURES = (
    DEFAULT_QUEUE_FEATURES
    | F_RING_PACKED
    | F_IN_ORDER
    | F_NOTIFICATION_DATA
    | F_NOTIF_CONFIG_DATA
    | F_RING_RESET
)
"""Every feature of queues that this package knows."""


class Echo:
    """Answers each buffer with its own bytes in upper case; 16 bytes of configuration.

    Args:
        memory: the guest's memory.
        features: feature bits to offer.

    Attributes:
        config: the configuration space.
        log: what `VirtioDevice` called, in order.
        fail: "activate" or "reset" makes that call fail.

    Example:
        >>> from vm_memory import GuestAddress, GuestMemory
        >>> from virtio_queue import MmioTransport, VirtioDevice
        >>> from virtio_queue.testing import Echo, MmioDriver
        >>> memory = GuestMemory.from_ranges([(GuestAddress(0), 1 << 20)])
        >>> device = VirtioDevice(Echo(memory), memory, lambda: None)
        >>> driver = MmioDriver(MmioTransport(device, device.process))
        >>> driver.start()
        >>> _ = driver.queues[0].add([b"hello"], [16])
        >>> driver.kick(0)
        >>> driver.queues[0].reap()[0].data
        b'HELLO'
        >>> memory.close()
    """

    device_id = 42
    queue_sizes: Sequence[int] = (8, 4)

    def __init__(self, memory: GuestMemory, features: int = ALL_QUEUE_FEATURES) -> None:
        self.memory = memory
        self.device_features = features
        self.config = bytearray(b"0123456789abcdef")
        self.queues: Sequence[Queue] = ()
        self.log: list[str] = []
        self.fail = ""

    def read_config(self, offset: int, length: int) -> bytes:
        """Return configuration bytes; none past the end."""
        return bytes(self.config[offset : offset + length])

    def write_config(self, offset: int, data: bytes) -> None:
        """Store configuration bytes; a write past the end is ignored."""
        if offset + len(data) <= len(self.config):
            self.config[offset : offset + len(data)] = data

    def activate(self, memory: GuestMemory, driver_features: int, queues: Sequence[Queue]) -> None:
        """Start; chains in flight of a restored queue are answered at once."""
        if self.fail == "activate":
            raise ActivationError("out of tea")
        self.log.append("activate")
        self.memory = memory
        self.queues = queues

    def process(self, queue_index: int) -> None:
        """Answer what is available until there is nothing more."""
        queue = self.queues[queue_index]
        while True:
            queue.disable_notifications(self.memory)
            for chain in (*queue.in_flight, *queue.chains(self.memory)):
                writer = chain.writer(self.memory)
                writer.write(chain.reader(self.memory).read(100).upper())
                queue.add_used(self.memory, chain.head, writer.used_length)
            if not queue.enable_notifications(self.memory):
                return

    def reset(self) -> None:
        """Forget the driver."""
        if self.fail == "reset":
            raise ActivationError("stuck")
        self.log.append("reset")

    def reset_queue(self, queue_index: int) -> None:
        """Forget one queue."""
        self.log.append(f"reset {queue_index}")

    def enable_queue(self, queue_index: int) -> None:
        """Use one queue again."""
        self.log.append(f"enable {queue_index}")
