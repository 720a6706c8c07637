"""A network device whose frames somebody else moves: pumps, or the host's kernel (vhost-net).

The control queue stays here; what they do not do is not offered.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from virtio_queue.constants import (
    DEFAULT_QUEUE_FEATURES,
    F_EVENT_IDX,
    F_IN_ORDER,
    F_INDIRECT_DESC,
    F_NOTIFICATION_DATA,
    F_RING_PACKED,
    F_RING_RESET,
)
from vmm_reference.backends.pumps import Limits

from .features import F_CTRL_RX, F_CTRL_RX_EXTRA, F_CTRL_VLAN, F_MRG_RXBUF
from .model import Net

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from virtio_queue import Queue
    from vm_memory import GuestMemory
    from vmm_reference.backends.pumps import LinkPump
    from vmm_reference.devices.limiter import TokenBucket
    from vmm_reference.devices.offload import Offload

    from .model import Link, PlainLink

__all__ = ["ServedNet"]

_RINGS = (
    DEFAULT_QUEUE_FEATURES | F_INDIRECT_DESC | F_EVENT_IDX | F_RING_PACKED | F_IN_ORDER
    | F_NOTIFICATION_DATA | F_RING_RESET | F_MRG_RXBUF
)  # fmt: skip


class ServedNet(Net):
    """A network device of which others serve the pairs of queues.

    Args:
        link: what the frames come from and go to; here it is only set up.
        mac: six bytes, of a unicast address.
        offload: who serves each pair.
        pumps: those of them that know addresses and limits.
        options: as for `Net`.
    """

    def __init__(
        self,
        link: PlainLink,
        mac: bytes,
        offload: Offload,
        pumps: Sequence[LinkPump] = (),
        **options: Any,
    ) -> None:
        super().__init__(cast("Link", link), mac, **options)
        self.offload = offload
        self.device_features &= offload.features | ~_RINGS
        self._pumps = pumps
        self._limits = {"rx": Limits(), "tx": Limits()}
        for pump in pumps:
            pump.limit(*self._limits.values())
        if not pumps:  # nobody there looks at addresses
            self.device_features &= ~(F_CTRL_RX | F_CTRL_VLAN | F_CTRL_RX_EXTRA)

    def limit(self, buckets: Mapping[str, TokenBucket | None]) -> None:
        """Have other limits from now on; the device is locked."""
        for way, limits in self._limits.items():
            chosen = {
                what: bucket
                for name, bucket in buckets.items()
                if (what := name.removeprefix(f"{way}_")) != name
            }
            limits.set(chosen)
        for pump in self._pumps:
            pump.limit(*self._limits.values())

    def metrics(self) -> dict[str, int]:
        """Frames and bytes that passed, as far as they are counted, and what was lost."""
        return {**super().metrics(), **self.offload.metrics()}

    def activate(self, memory: GuestMemory, driver_features: int, queues: Sequence[Queue]) -> None:
        """The driver is ready, and so are they.

        Raises:
            ActivationError: as `Net.activate`, or somebody refuses.
        """
        super().activate(memory, driver_features, queues)
        self._filter()
        self.offload.activate(self._features, queues)

    def take_up(self, memory: GuestMemory, queues: Sequence[Queue]) -> None:
        """Chains in flight go with the queues to who serves them."""

    def reset(self) -> None:
        """Forget the driver; they have stopped before."""
        self.offload.reset()
        super().reset()

    def process(self, queue_index: int) -> None:
        """Serve the control queue; the others are theirs.

        Raises:
            ChainError: the driver broke a ring.
        """
        if queue_index == self._control_queue():
            super().process(queue_index)
            self._filter()
        else:
            self.offload.attend(queue_index)

    def _filter(self) -> None:
        for pump in self._pumps:
            pump.filter(self.control if self._features & F_CTRL_RX else None)
