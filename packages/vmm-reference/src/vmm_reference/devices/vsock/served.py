"""A socket device whose packets others move: a thread of C, or the host's kernel (vhost-vsock)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .model import EVENTS, Vsock

if TYPE_CHECKING:
    from collections.abc import Sequence

    from virtio_queue import Queue
    from vm_memory import GuestMemory
    from vmm_reference.devices.offload import Offload

__all__ = ["ServedVsock"]


class ServedVsock(Vsock):
    """A socket device of which somebody else serves the queues of packets; events stay here.

    Args:
        cid: the guest's context identifier.
        offload: who serves the queues.
    """

    def __init__(self, cid: int, offload: Offload) -> None:
        super().__init__(cid, lambda _port: None)
        self.offload = offload
        self.device_features = self.device_features & offload.features

    def count_refused(self, reason: str) -> None:
        """A connection that was refused before it came to who serves."""
        self._count(self.refused, reason)

    def metrics(self) -> dict[str, int]:
        """Connections there are, and what was refused, broken off and ignored, by reason."""
        here, there = super().metrics(), self.offload.metrics()
        return {name: here.get(name, 0) + there.get(name, 0) for name in {**here, **there}}

    def activate(self, memory: GuestMemory, driver_features: int, queues: Sequence[Queue]) -> None:
        """The driver is ready, and so is who serves.

        Raises:
            ActivationError: it can't.
        """
        super().activate(memory, driver_features, queues)
        self.offload.activate(driver_features, queues)

    def reset(self) -> None:
        """Forget the driver; who serves has stopped before."""
        self.offload.reset()
        super().reset()

    def process(self, queue_index: int) -> None:
        """Serve the queue of events; the others are not served here.

        Raises:
            ChainError: the driver broke the ring.
        """
        if queue_index == EVENTS:
            super().process(queue_index)
        else:
            self.offload.attend(queue_index)
