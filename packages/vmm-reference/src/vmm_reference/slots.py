"""Where a virtio device is plugged in: its eventfds, and how they meet KVM and the I/O loop.

A kick is an eventfd that KVM signals and the loop, or a pump in C or the kernel, listens to. An
interrupt is an eventfd that KVM listens to. Neither costs a vCPU an exit to this process.
"""

from __future__ import annotations

import os
from functools import partial

from virtio_queue.device import VirtioDevice
from virtio_queue.mmio import QUEUE_NOTIFY, MmioTransport

from . import layout
from .acpi.tables import virtio_mmio
from .loop import READ

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from virtio_queue import DeviceModel, PciTransport
    from virtio_queue._native import CData

    from .wiring import Wiring

__all__ = ["MmioSlot", "VirtioSlot"]


class VirtioSlot:
    """A virtio device in the machine, whatever its transport.

    Attributes:
        device: take its `lock` around what a backend does to its queues.
        transport: the register file.
        kicks: an eventfd for each queue, signalled when the driver kicks it.
    """

    transport: MmioTransport | PciTransport

    def __init__(self, wiring: Wiring, device: VirtioDevice) -> None:
        self.device = device
        self._wiring = wiring
        self.kicks = tuple(self.eventfd() for _ in device.queues)
        for queue in range(len(self.kicks)):
            wiring.on_close(partial(self.take_kick, queue))
            self.give_kick(queue)

    def eventfd(self) -> int:
        """A new eventfd that is closed with the device."""
        fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._wiring.on_close(lambda: os.close(fd))
        return fd

    @property
    def interrupt_word(self) -> CData | None:
        """Where who raises interrupts itself has to set the bit of used buffers, if anywhere."""
        return None

    def call(self, queue: int) -> int:
        """The eventfd by which a pump or the kernel raises a queue's interrupt itself."""
        raise NotImplementedError

    def pump_call(self, queue: int) -> int:
        """The same for who sets `interrupt_word` too, where there is one."""
        return self.call(queue)

    def take_kick(self, queue: int) -> int:
        """Let somebody else listen to a queue's kicks; returns the eventfd."""
        self._wiring.loop.remove(self.kicks[queue])
        return self.kicks[queue]

    def give_kick(self, queue: int) -> None:
        """Let the loop serve a queue's kicks by the model's `process`."""
        fd = self.kicks[queue]
        self._wiring.loop.add(fd, READ, _kicked(self.device, fd, queue))

    def kick(self, queue: int) -> None:
        """Kick a queue as the driver would; it is served later, on the loop's thread."""
        os.eventfd_write(self.kicks[queue], 1)


class MmioSlot(VirtioSlot):
    """A device on virtio-mmio: a window, an interrupt line, and its place in ACPI."""

    transport: MmioTransport

    def __init__(
        self,
        wiring: Wiring,
        model: DeviceModel,
        index: int,
        shared_memory: Mapping[int, tuple[int, int]],
    ) -> None:
        vm, window, self._gsi = (
            wiring.vm,
            layout.virtio_mmio_window(index),
            layout.virtio_gsi(index),
        )
        self._calls: dict[int, int] = {}
        device = VirtioDevice(model, wiring.memory, self._interrupt, shared_memory=shared_memory)
        super().__init__(wiring, device)
        self._line = self.eventfd()
        vm.irqfd(self._line, self._gsi)
        for queue, kick in enumerate(self.kicks):
            vm.ioeventfd(kick, window + QUEUE_NOTIFY, 4, datamatch=queue)
        self.transport = MmioTransport(device, self.kick)
        wiring.mmio.add(window, layout.VIRTIO_MMIO_SIZE, self.transport)
        size = layout.VIRTIO_MMIO_SIZE
        wiring.announce(lambda: virtio_mmio(index, window, size, self._gsi))

    @property
    def interrupt_word(self) -> CData:
        """The interrupt status register (4.2.2)."""
        return self.device.interrupt_word

    def call(self, queue: int) -> int:
        """An eventfd that the loop turns into an interrupt.

        KVM can't do it: the driver reads the reason from a register of the device, and who signals
        this can't set it.
        """
        fd = self._calls.get(queue)
        if fd is None:
            fd = self._calls[queue] = self.eventfd()

            def relay(_events: int) -> None:
                os.eventfd_read(fd)
                self.device.used_buffer_notification(queue)

            self._wiring.loop.add(fd, READ, relay)
            self._wiring.on_close(lambda: self._wiring.loop.remove(fd))
        return fd

    def pump_call(self, queue: int) -> int:
        """The interrupt line itself: the reason is in the register before."""
        return self._line

    def _interrupt(self) -> None:
        os.eventfd_write(self._line, 1)


def _kicked(device: VirtioDevice, fd: int, queue: int) -> Callable[[int], None]:
    """What the loop does when a driver has kicked a queue."""
    model = device.model

    def serve(_events: int) -> None:
        os.eventfd_read(fd)
        if device.process(queue) and getattr(model, "unfinished", False):
            os.eventfd_write(fd, 1)  # the other descriptors have their turn first

    return serve
