"""What `save` of the PCI room gives and `restore` takes."""

from __future__ import annotations

import attrs

from vmm_reference.devices import fields

__all__ = ["PciBusState", "PciConfigState", "PciFunctionState", "PciHotplugState"]


@attrs.frozen
class PciConfigState:
    """A `vmm_reference.pci.config.ConfigSpace`: all its registers."""

    registers: bytes = fields.octets(256, 256)
    version: int = fields.version()


@attrs.frozen
class PciFunctionState:
    """A `vmm_reference.pci.virtio.PciSlot`, without its virtio registers.

    Attributes:
        config: its configuration space.
        msix_table: 16 bytes a vector.
        msix_pending: vectors whose message waits for their mask to go.
    """

    config: PciConfigState
    msix_table: bytes
    msix_pending: tuple[int, ...] = ()
    version: int = fields.version()


@attrs.frozen
class PciBusState:
    """A `vmm_reference.pci.bus.PciBus`: what port 0xCF8 holds."""

    address: int = fields.whole(0, 0xFFFFFFFF)
    version: int = fields.version()


@attrs.frozen
class PciHotplugState:
    """A `vmm_reference.pci.hotplug.PciHotplug`.

    Attributes:
        up: slots that the guest has not looked at since something was plugged in.
        down: slots that the guest has not looked at since it was asked to give one up.
    """

    up: int = fields.whole(0, 0xFFFFFFFF)
    down: int = fields.whole(0, 0xFFFFFFFF)
    version: int = fields.version()
