"""A console device of which threads of C write what some of the ports send."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .model import Console, PortSpec, transmit_queue

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from virtio_queue import Queue
    from vm_memory import GuestMemory
    from vmm_reference.backends.pumps import PortPump
    from vmm_reference.devices.offload import Offload

__all__ = ["ServedConsole"]


class ServedConsole(Console):
    """A console device; its other queues are served here.

    Args:
        ports: as for `Console`.
        send: as for `Console`; of ports with a pump it gets characters of an emergency alone.
        offload: has the pumps.
        pumps: by the number of the port.
        options: as for `Console`.
    """

    def __init__(
        self,
        ports: Sequence[PortSpec],
        send: Callable[[int, bytes], None],
        offload: Offload,
        pumps: Mapping[int, PortPump],
        **options: Any,
    ) -> None:
        super().__init__(ports, send, **options)
        self.offload = offload
        self._pumps = pumps
        self._pumped = frozenset(map(transmit_queue, pumps))

    def metrics(self) -> dict[str, int]:
        """Bytes both ways, and what was lost or refused."""
        here, there = super().metrics(), self.offload.metrics()
        return {name: here.get(name, 0) + there.get(name, 0) for name in {**here, **there}}

    def activate(self, memory: GuestMemory, driver_features: int, queues: Sequence[Queue]) -> None:
        """The driver is ready, and so are the pumps.

        Raises:
            ActivationError: the host can't start a thread.
        """
        super().activate(memory, driver_features, queues)
        for index, server in self._pumps.items():
            server.pump.offset = self._ports[index].offset
        self.offload.activate(driver_features, queues)

    def take_up(self, number: int, queue: Queue, memory: GuestMemory) -> None:
        """Chains in flight go with the queues to who serves them."""
        if number not in self._pumped:
            super().take_up(number, queue, memory)

    def reset(self) -> None:
        """Forget the driver; the pumps have stopped before."""
        self.offload.reset()
        super().reset()

    def process(self, queue_index: int) -> None:
        """Serve a queue that is served here.

        Raises:
            ChainError: the driver broke a ring.
        """
        if queue_index in self._pumped:
            self.offload.attend(queue_index)
        else:
            super().process(queue_index)

    def transmitted(self, index: int, count: int) -> None:
        """So many bytes are gone; among them may be what a pump has left to the port."""
        super().transmitted(index, min(count, self._ports[index].outstanding))

    def offset_of(self, index: int) -> int:
        """How many bytes of a port's buffer under way are taken."""
        server = self._pumps.get(index)
        return super().offset_of(index) if server is None else server.pump.offset
