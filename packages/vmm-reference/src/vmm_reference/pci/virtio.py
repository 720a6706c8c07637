"""A virtio device as a PCI function: section 4.1 of the virtio specification, version 1.3.

One 64-bit BAR holds the virtio structures, the MSI-X table and its pending bits. Kicks are eventfds
that KVM signals, and move with the BAR. The registers of virtio are `virtio_queue.pci`'s; here is
what PCI adds.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from virtio_queue.device import CONFIG_SOURCE, VirtioDevice
from virtio_queue.pci import NO_VECTOR, NOTIFY_MULTIPLIER, NOTIFY_OFFSET, WINDOW_SIZE, PciTransport
from vmm_reference.bus import OverlapError
from vmm_reference.loop import READ
from vmm_reference.slots import VirtioSlot

from .config import (
    COMMAND,
    COMMAND_INTX_DISABLE,
    COMMAND_MEMORY,
    STATUS_INTERRUPT,
    ConfigSpace,
)
from .msix import ENTRY_SIZE, Msix

if TYPE_CHECKING:
    from collections.abc import Callable

    from virtio_queue import DeviceModel
    from vmm_reference.wiring import Wiring

    from .bus import PciBus
    from .msix import MsiRoutes
    from .states import PciFunctionState

__all__ = ["PciSlot"]

_BAR_SIZE = 0x8000
_TABLE, _PENDING = WINDOW_SIZE, 0x6000  # offsets in the BAR
_MAX_VECTORS = (_PENDING - _TABLE) // ENTRY_SIZE

_VENDOR, _DEVICE_BASE = 0x1AF4, 0x1040  # 4.1.2
_SUBSYSTEM = (0x1AF4, 0x1100)  # an identifier from 0x40 on keeps transitional drivers away

# Class codes by device type; others are unassigned. A driver goes by the identifiers.
_CLASSES = {1: 0x020000, 2: 0x018000, 3: 0x078000, 16: 0x038000, 18: 0x098000, 19: 0x028000}
_UNASSIGNED = 0xFF0000

_MSIX_ENABLE, _MSIX_FUNCTION_MASK = 0x8000, 0x4000
_PCI_CFG = 5  # VIRTIO_PCI_CAP_PCI_CFG, 4.1.4.9


class PciSlot(VirtioSlot):
    """A virtio device in a slot of the bus.

    Args:
        wiring: the machine's side.
        model: of the device.
        bus: where it is plugged in, as `number`.
        routes: where its messages go.
        placed: whether its BAR has an address from the start, as firmware would leave it.
        vectors: of MSI-X; by default one for each queue and one for the configuration.
    """

    transport: PciTransport

    def __init__(
        self,
        wiring: Wiring,
        model: DeviceModel,
        bus: PciBus,
        number: int,
        routes: MsiRoutes,
        *,
        placed: bool,
        vectors: int | None = None,
    ) -> None:
        self._bus = bus
        self.number = number
        self._mapped: int | None = None  # where the BAR is now
        self.unmapped_bars = 0  # how often the guest put it where something else is
        self._calls: dict[int, int] = {}
        self._intx_pending = False
        self._intx_lock = threading.Lock()
        device = VirtioDevice(model, wiring.memory, _never)
        super().__init__(wiring, device)
        vectors = vectors or min(len(device.queues) + 1, _MAX_VECTORS)
        self.msix = Msix(vectors, routes, wiring.vm.irqfd, wiring.vm.irqfd_deassign, self.eventfd)
        wiring.on_close(self.msix.close)
        self.transport = PciTransport(
            device,
            self.kick,
            vectors=vectors,
            msix_enabled=lambda: self.msix.enabled,
            signal=self.msix.signal,
            intx=self._set_intx,
            bind=self._bind,
        )
        self.config = self._make_config(vectors, bus.place(_BAR_SIZE) if placed else 0)
        wiring.on_close(self._leave)
        with bus.lock:
            bus.functions[number] = self

    def call(self, queue: int) -> int:
        """An eventfd that follows the queue's vector; without MSI-X the loop relays it."""
        fd = self._calls.get(queue)
        if fd is None:
            fd = self._calls[queue] = self.eventfd()
            self._wiring.on_close(lambda: self._forget(fd))
            self._bind(queue, self.transport.vector(queue))
            self._relay()
        return fd

    def read_config(self, offset: int, length: int) -> bytes:
        """Configuration space; under the bus's lock."""
        if offset < self._window + 4 and self._window < offset + length:
            self.config.set_bytes(self._window, self._through_window(b""))
        return self.config.read(offset, length)

    def write_config(self, offset: int, data: bytes) -> None:
        """Configuration space; under the bus's lock."""
        self.config.write(offset, data)
        if offset < self._window + 4 and self._window < offset + len(data):
            self._through_window(self.config.read(self._window, 4))
        self._settle()

    def read(self, offset: int, length: int) -> bytes:
        """The BAR."""
        if offset < _TABLE:
            return self.transport.read(offset, length)
        if offset < _PENDING:
            return self.msix.read_table(offset - _TABLE, length)
        return self.msix.read_pending(offset - _PENDING, length)

    def write(self, offset: int, data: bytes) -> None:
        """The BAR."""
        if offset < _TABLE:
            self.transport.write(offset, data)
        elif offset < _PENDING:
            self.msix.write_table(offset - _TABLE, data)

    def metrics(self) -> dict[str, int]:
        """How often the guest put a BAR where it can't be."""
        return {"unmapped_bars": self.unmapped_bars}

    def save(self) -> PciFunctionState:
        """Configuration space and vectors."""
        from .states import PciFunctionState

        return PciFunctionState(self.config.save(), self.msix.save_table(), self.msix.pending())

    def restore(self, state: PciFunctionState) -> None:
        """Become the function that was saved; the BAR goes where it was.

        Raises:
            StateError: it was another function.
        """
        from vmm_reference.devices.states import StateError

        size = len(self.msix) * ENTRY_SIZE
        if len(state.msix_table) != size:
            rule = f"must be {size}"
            raise StateError("PciFunctionState.msix_table", f"{len(state.msix_table)} bytes", rule)
        if any(type(v) is not int or not 0 <= v < len(self.msix) for v in state.msix_pending):
            rule = f"must be from 0 to {len(self.msix) - 1}"
            raise StateError("PciFunctionState.msix_pending", state.msix_pending, rule)
        self.config.restore(state.config)
        self.config.set_status(STATUS_INTERRUPT, on=False)  # raised again by the device
        self.msix.restore(state.msix_table, state.msix_pending)
        self._settle()

    def _make_config(self, vectors: int, address: int) -> ConfigSpace:
        device_id = self.device.model.device_id
        config = ConfigSpace(
            vendor=_VENDOR,
            device=_DEVICE_BASE + device_id,
            class_code=_CLASSES.get(device_id, _UNASSIGNED),
            revision=1,
            subsystem=_SUBSYSTEM,
            pin=1,
        )
        config.add_bar(0, _BAR_SIZE, address)
        for capability in self.transport.capabilities(0):
            config.add_capability(capability)
        window = bytes((0x09, 0, 20, _PCI_CFG)) + bytes(16)
        # BAR, offset, length and data can be written.
        self._window_capability = config.add_capability(
            window, bytes(4) + b"\xff" + bytes(3) + b"\xff" * 12
        )
        self._window = self._window_capability + 16
        control = (vectors - 1).to_bytes(2, "little")
        msix = b"\x11\0" + control + _TABLE.to_bytes(4, "little") + _PENDING.to_bytes(4, "little")
        writable = bytes(2) + (_MSIX_ENABLE | _MSIX_FUNCTION_MASK).to_bytes(2, "little")
        self._msix_control = config.add_capability(msix, writable) + 2
        return config

    def _settle(self) -> None:
        """What follows from configuration space: where the BAR is, and which interrupts there are.

        A BAR that is switched off, or in the way of another device, is nowhere.
        """
        command = self.config.word(COMMAND)
        wanted = self.config.bar(0) if command & COMMAND_MEMORY else None
        if wanted != self._mapped:
            self._unmap()
            if wanted:
                self._map(wanted)
        control = self.config.word(self._msix_control)
        enabled = bool(control & _MSIX_ENABLE)
        changed = enabled != self.msix.enabled
        self.msix.set_control(enabled=enabled, function_mask=bool(control & _MSIX_FUNCTION_MASK))
        if changed and self._calls:
            self._wiring.loop.call_soon(self._relay)
        self._drive_pin()

    def _map(self, address: int) -> None:
        if address + _BAR_SIZE > 1 << 64:
            self.unmapped_bars += 1
            return
        try:
            self._wiring.mmio.add(address, _BAR_SIZE, self)
        except OverlapError:
            self.unmapped_bars += 1
            return
        self._mapped = address
        for queue, kick in enumerate(self.kicks):
            at = address + NOTIFY_OFFSET + queue * NOTIFY_MULTIPLIER
            self._wiring.vm.ioeventfd(kick, at, 0)

    def _unmap(self) -> None:
        if self._mapped is None:
            return
        for queue, kick in enumerate(self.kicks):
            at = self._mapped + NOTIFY_OFFSET + queue * NOTIFY_MULTIPLIER
            self._wiring.vm.ioeventfd_deassign(kick, at, 0)
        self._wiring.mmio.remove(self._mapped)
        self._mapped = None

    def _leave(self) -> None:
        with self._bus.lock:
            self._bus.functions.pop(self.number, None)
            self._unmap()
        self._bus.set_intx(self.number, level=False)

    def _through_window(self, data: bytes) -> bytes:
        """An access to the BAR by way of configuration space (4.1.4.9): 1, 2 or 4 bytes."""
        at = self._window_capability
        bar, offset = self.config.word(at + 4, 1), self.config.word(at + 8, 4)
        length = self.config.word(at + 12, 4)
        if bar or length not in (1, 2, 4) or offset % length or offset + length > _BAR_SIZE:
            return bytes(4)
        if data:
            self.write(offset, data[:length])
            return data
        return self.read(offset, length).ljust(4, b"\0")

    # Interrupts ---------------------------------------------------------------------------

    def _set_intx(self, level: bool) -> None:
        with self._intx_lock:
            self._intx_pending = level
        self._drive_pin()

    def _drive_pin(self) -> None:
        with self._intx_lock:
            level = self._intx_pending and not self.msix.enabled
            self.config.set_status(STATUS_INTERRUPT, on=level)
            disabled = self.config.word(COMMAND) & COMMAND_INTX_DISABLE
            self._bus.set_intx(self.number, level=level and not disabled)

    def _bind(self, source: int, vector: int) -> None:
        """A queue has another vector: the eventfd that others signal for it follows."""
        fd = self._calls.get(source)
        if fd is not None:
            self.msix.move(fd, None if vector == NO_VECTOR else vector)

    def _forget(self, fd: int) -> None:
        """Nobody listens to an eventfd any more; it came later than the vectors, and goes first."""
        self._wiring.loop.remove(fd)
        self.msix.move(fd, None)

    def _relay(self) -> None:
        """Without MSI-X, turn the signals that others send into bits of the ISR. On the loop."""
        loop = self._wiring.loop
        for queue, fd in self._calls.items():
            loop.remove(fd)
            if not self.msix.enabled:
                loop.add(fd, READ, _relayed(self.device, fd, queue))


def _relayed(device: VirtioDevice, fd: int, queue: int) -> Callable[[int], None]:
    import os

    def relay(_events: int) -> None:
        os.eventfd_read(fd)
        device.used_buffer_notification(queue)

    return relay


def _never() -> None:
    """The transport takes every interrupt over."""
    raise AssertionError(CONFIG_SOURCE)
