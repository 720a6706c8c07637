"""A network device whose frames the host's kernel moves: vhost-net.

The control queue stays here; what the kernel does not do is not offered.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from virtio_queue.constants import (
    DEFAULT_QUEUE_FEATURES,
    F_EVENT_IDX,
    F_IN_ORDER,
    F_INDIRECT_DESC,
    F_NOTIFICATION_DATA,
    F_RING_PACKED,
    F_RING_RESET,
)
from virtio_queue.errors import ActivationError

from .model import F_CTRL_RX, F_CTRL_RX_EXTRA, F_CTRL_VLAN, F_MRG_RXBUF, Link, Net

if TYPE_CHECKING:
    from collections.abc import Sequence

    from virtio_queue import Queue
    from vm_memory import GuestMemory

__all__ = ["KernelNet", "KernelQueues"]

_RINGS = (
    DEFAULT_QUEUE_FEATURES | F_INDIRECT_DESC | F_EVENT_IDX | F_RING_PACKED | F_IN_ORDER
    | F_NOTIFICATION_DATA | F_RING_RESET | F_MRG_RXBUF
)  # fmt: skip


class KernelQueues(Protocol):
    """Who serves queues in a device's place; see `vmm_reference.backends.vhost`.

    Attributes:
        features: the feature bits of queues that it can work with.
    """

    features: int

    def start(self, features: int, queues: Sequence[Queue]) -> None:
        """Serve the queues from where they are.

        Raises:
            OSError: it can't.
        """

    def stop(self) -> None:
        """Touch the queues no more, and leave them where they are."""


class KernelNet(Net):
    """A network device of which somebody else serves the pairs of queues.

    Args:
        link: what the frames come from and go to; here it is only set up.
        mac: six bytes, of a unicast address.
        kernel: who serves each pair.
        options: as for `Net`.
    """

    def __init__(
        self, link: Link, mac: bytes, kernel: Sequence[KernelQueues], **options: Any
    ) -> None:
        super().__init__(link, mac, **options)
        self._kernel = kernel
        for each in kernel:
            self.device_features &= each.features | ~_RINGS
        # The kernel does not look at addresses.
        self.device_features &= ~(F_CTRL_RX | F_CTRL_VLAN | F_CTRL_RX_EXTRA)
        self._served: list[KernelQueues] = []

    def activate(self, memory: GuestMemory, driver_features: int, queues: Sequence[Queue]) -> None:
        """The driver is ready, and so is the kernel.

        Raises:
            ActivationError: as `Net.activate`, or the kernel refuses.
        """
        super().activate(memory, driver_features, queues)
        try:
            self.go_on()
        except OSError as error:
            self.stop()
            raise ActivationError(f"vhost-net refuses: {error.strerror}") from error

    def reset(self) -> None:
        """Forget the driver; the kernel has stopped before."""
        self.stop()
        super().reset()

    def go_on(self) -> None:
        """Have the kernel serve the queues; does nothing for a device that is not active.

        Raises:
            OSError: the kernel refuses.
        """
        if self._memory is None or self._served:
            return
        for pair, each in enumerate(self._kernel):
            pair_queues = self._queues[2 * pair : 2 * pair + 2]
            if all(queue.ready for queue in pair_queues):
                self._served.append(each)
                each.start(self._features, pair_queues)

    def stop(self) -> None:
        """Have the kernel stop; the queues are where it left them."""
        for each in self._served:
            each.stop()
        self._served = []

    def process(self, queue_index: int) -> None:
        """Serve the control queue; the others are the kernel's.

        Raises:
            ChainError: the driver broke the ring.
        """
        if queue_index == self._control_queue():
            super().process(queue_index)
