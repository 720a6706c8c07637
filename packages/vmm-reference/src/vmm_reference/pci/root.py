"""A machine's PCI bus with its place in ACPI, and the slots that devices come to and go from."""

from __future__ import annotations

from vmm_reference import layout
from vmm_reference.acpi import pci
from vmm_reference.devices import pm
from vmm_reference.errors import ConfigError
from vmm_reference.outcome import Outcome
from vmm_reference.ram import memory_end

from .bus import PciBus
from .hotplug import PORT, SIZE, PciHotplug
from .msix import MsiRoutes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from vmm_reference.board import Board
    from vmm_reference.config import MachineConfig
    from vmm_reference.deviceconfig import DeviceConfig
    from vmm_reference.wiring import Wiring

__all__ = ["PciRoot"]


class PciRoot:
    """The bus of a board.

    Args:
        board: that gets it; before its devices.
        config: of the machine.

    Attributes:
        bus: where functions are.
        routes: by which functions send messages.
    """

    def __init__(self, board: Board, config: MachineConfig) -> None:
        self._board = board
        devices = config.named_devices().values()
        self._fixed = {device.slot for device in devices if device.slot is not None}
        self.routes = MsiRoutes(board.vm)
        self.bus = PciBus(
            board.ports,
            board.mmio,
            board.vm.irq_line,
            reset=lambda: board.end(Outcome.RESET, ""),
        )
        self._hotplug = PciHotplug(lambda: board.tell(pm.EVENT_PCI), self._ejected)
        board.ports.add(PORT, SIZE, self._hotplug)
        memory64 = layout.pci_memory64(memory_end(config))
        if config.firmware is None:
            bridge = pci.host_bridge(memory64, range(1, 32))
        else:  # slot 1 has the chipset
            bridge = pci.host_bridge(
                memory64, range(2, 32), layout.firmware_pci_memory32(config.memory)
            )
        board.announced.devices.append(lambda: bridge)
        board.announced.events.append((pm.EVENT_PCI, pci.NOTIFY_METHOD))
        board.announced.tables.append((b"MCFG", pci.mcfg()))

    def parts(self) -> dict[str, Any]:
        """Those with state, by name."""
        return {"pci": self.bus, "pci-hotplug": self._hotplug}

    def metrics(self) -> dict[str, dict[str, int]]:
        """Counters by the parts' names."""
        return {"pci-hotplug": self._hotplug.metrics()}

    def take_slot(self, wanted: int | None) -> int:
        """The slot of the next device."""
        return self.bus.free_slot(self._fixed) if wanted is None else wanted

    def plugged(self, name: str, wiring: Wiring, device: DeviceConfig) -> None:
        """Tell the guest of a device that has just been put into a slot.

        Raises:
            ConfigError: it is in none.
        """
        number = slot_number(wiring)
        if number is None:
            raise ConfigError("device", device.kind, "is none that can be plugged in")
        self._board.devices[name] = wiring
        with self._board.ports.lock(self._hotplug):
            self._hotplug.plugged(number)

    def ask_for(self, name: str, wiring: Wiring) -> None:
        """Ask the guest to give a device up.

        Raises:
            ConfigError: it is in no slot.
        """
        number = slot_number(wiring)
        if number is None:
            raise ConfigError("device", name, "is in no PCI slot and can't be unplugged")
        with self._board.ports.lock(self._hotplug):
            self._hotplug.ask_for(number)

    def _ejected(self, slot: int) -> None:
        """The guest has given a slot's device up. On a vCPU's thread."""
        self._board.loop.call_soon(lambda: self._remove(slot))

    def _remove(self, slot: int) -> None:
        for name, wiring in list(self._board.devices.items()):
            if slot_number(wiring) == slot:
                self._board.remove(name)


def slot_number(wiring: Wiring) -> int | None:
    """The slot that a device is in, if it is in one."""
    return getattr(wiring.slot, "number", None)
