"""Threads of C that serve the queues of a device, for `vmm_reference.devices.offload`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from virtio_queue.pump_net import NetPump

if TYPE_CHECKING:
    from collections.abc import Sequence

    from virtio_queue import Queue
    from vm_memory import GuestMemory
    from vmm_reference.slots import VirtioSlot

__all__ = ["TapPump"]


class TapPump:
    """Moves frames between a pair of queues and a queue of a tap.

    Args:
        memory: the guest's.
        fd: of the tap's queue.

    Attributes:
        features: all that there are.
        attention: readable when `attend` is to be called.
        pump: the thread.

    Raises:
        PumpError: the host has no more descriptors.
    """

    features = -1

    def __init__(self, memory: GuestMemory, fd: int) -> None:
        self._memory = memory
        self.pump = NetPump(fd)
        self.attention = self.pump.attention

    def connect(self, slot: VirtioSlot, numbers: Sequence[int]) -> None:
        """Have the kicks of these queues, and send their interrupts."""
        self.pump.wire(
            [slot.take_kick(number) for number in numbers],
            [slot.pump_call(number) for number in numbers],
            slot.interrupt_word,
        )

    def start(self, features: int, queues: Sequence[Queue]) -> None:
        """Serve the queues from where they are.

        Raises:
            PumpError: the host can't start a thread.
        """
        self.pump.start(self._memory, queues, features)

    def stop(self) -> None:
        """Touch the queues no more."""
        self.pump.stop()

    def forget(self) -> None:
        """Drop a frame that waits for the driver's buffers."""
        self.pump.forget()

    def attend(self) -> None:
        """Raise what went wrong.

        Raises:
            ChainError: the driver broke a ring; the pump has stopped.
        """
        self.pump.take()

    def metrics(self) -> dict[str, int]:
        """What the pump counts."""
        return self.pump.counters

    def close(self) -> None:
        """Give the thread's descriptors back."""
        self.pump.stop()
        del self.pump
