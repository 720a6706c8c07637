"""The chipset that firmware knows how to set up: a host bridge, an ISA bridge, power management.

Register numbers are those of Intel's 82441FX (i440FX) and 82371AB (PIIX4) data sheets. Nothing
here has an effect: memory below 1 MiB is RAM from the start, power management is on and has its
place. The registers are what firmware looks for, so that it leaves alone what is done already.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmm_reference.devices import pm

from .config import ConfigSpace

if TYPE_CHECKING:
    from .bus import PciBus
    from .states import PciConfigState

__all__ = ["ISA_SLOT", "ChipsetFunction", "add_chipset"]

ISA_SLOT = 1
"""The ISA bridge's; its function 3 is power management."""

_INTEL = 0x8086
_HEADER_TYPE, _MULTIFUNCTION = 0x0E, 0x80
_IO_SPACE, _BRIDGE = 0x0001, 0x0007  # of the command register; a bridge decodes and is master

_PAM, _SMRAM = 0x59, 0x72  # host bridge: what is RAM below 1 MiB
_PIRQ = 0x60  # ISA bridge: where interrupt pins go; nowhere, as they have lines of their own
_PMBA, _DEVACTB, _PMREGMISC = 0x40, 0x58, 0x80  # power management
_APMC_ENABLED, _PM_IO_ENABLED = 1 << 25, 1


class ChipsetFunction:
    """A function that is nothing but its configuration space."""

    def __init__(self, device: int, class_code: int) -> None:
        self.config = ConfigSpace(vendor=_INTEL, device=device, class_code=class_code)

    def read_config(self, offset: int, length: int) -> bytes:
        """The registers."""
        return self.config.read(offset, length)

    def write_config(self, offset: int, data: bytes) -> None:
        """The registers, as far as they can be written."""
        self.config.write(offset, data)

    def save(self) -> PciConfigState:
        """All registers."""
        return self.config.save()

    def restore(self, state: PciConfigState) -> None:
        """Take over what was saved."""
        self.config.restore(state)


def add_chipset(bus: PciBus) -> dict[str, ChipsetFunction]:
    """Put the three functions on a bus; returns them by name."""
    host = ChipsetFunction(0x1237, 0x060000)
    host.config.let_write(_PAM, b"\xff" * 7)
    host.config.let_write(_SMRAM, b"\xff")
    isa = ChipsetFunction(0x7000, 0x060100)
    isa.config.set_bytes(4, _BRIDGE.to_bytes(2, "little"))  # or OVMF finds no serial port behind it
    isa.config.set_bytes(_HEADER_TYPE, bytes([_MULTIFUNCTION]))
    isa.config.let_write(_PIRQ, b"\xff" * 4)
    power = ChipsetFunction(0x7113, 0x068000)
    power.config.set_bytes(4, _IO_SPACE.to_bytes(2, "little"))
    power.config.set_bytes(_PMBA, (pm.PORT | 1).to_bytes(4, "little"))
    power.config.set_bytes(_DEVACTB, _APMC_ENABLED.to_bytes(4, "little"))
    power.config.set_bytes(_PMREGMISC, bytes([_PM_IO_ENABLED]))
    with bus.lock:
        bus.functions[0] = host
        bus.functions[ISA_SLOT] = isa
        bus.more[ISA_SLOT << 3 | 3] = power
    return {"host-bridge": host, "isa-bridge": isa, "power-management": power}
