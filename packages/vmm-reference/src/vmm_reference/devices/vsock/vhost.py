"""A socket device whose packets the host's kernel moves: vhost-vsock."""

from __future__ import annotations

from typing import TYPE_CHECKING

from virtio_queue.errors import ActivationError

from .model import EVENTS, Vsock

if TYPE_CHECKING:
    from collections.abc import Sequence

    from virtio_queue import Queue
    from vm_memory import GuestMemory
    from vmm_reference.devices.net.vhost import KernelQueues

__all__ = ["KernelVsock"]


class KernelVsock(Vsock):
    """A socket device of which the kernel serves the queues of packets; events stay here.

    Args:
        cid: the guest's context identifier.
        kernel: who serves the queues.
    """

    def __init__(self, cid: int, kernel: KernelQueues) -> None:
        super().__init__(cid, lambda _port: None)
        self._kernel = kernel
        self.device_features = self.device_features & kernel.features
        self._serving = False

    def activate(self, memory: GuestMemory, driver_features: int, queues: Sequence[Queue]) -> None:
        """The driver is ready, and so is the kernel.

        Raises:
            ActivationError: the kernel refuses.
        """
        super().activate(memory, driver_features, queues)
        self._driver_features = driver_features
        try:
            self.go_on()
        except OSError as error:
            self.stop()
            raise ActivationError(f"vhost-vsock refuses: {error.strerror}") from error

    def reset(self) -> None:
        """Forget the driver; the kernel has stopped before."""
        self.stop()
        super().reset()

    def go_on(self) -> None:
        """Have the kernel serve the queues; does nothing for a device that is not active.

        Raises:
            OSError: the kernel refuses.
        """
        if self._memory is not None and not self._serving:
            self._serving = True
            self._kernel.start(self._driver_features, self._queues[:EVENTS])

    def stop(self) -> None:
        """Have the kernel stop; the queues are where it left them."""
        if self._serving:
            self._kernel.stop()
        self._serving = False

    def process(self, queue_index: int) -> None:
        """Serve the queue of events; the others are the kernel's.

        Raises:
            ChainError: the driver broke the ring.
        """
        if queue_index == EVENTS:
            super().process(queue_index)
