"""What `save` of the PCI room gives and `restore` takes."""

from __future__ import annotations

from typing import Any

import attrs

from vmm_reference.devices.states import StateError

__all__ = ["PciBusState", "PciConfigState", "PciFunctionState", "PciHotplugState"]


def _bytes(size: int) -> Any:
    def check(state: object, field: attrs.Attribute[bytes], value: object) -> None:
        if not isinstance(value, bytes) or len(value) != size:
            name = f"{type(state).__name__}.{field.name}"
            raise StateError(name, value, f"must be {size} bytes")

    return attrs.field(validator=check)


def _register() -> Any:
    def check(state: object, field: attrs.Attribute[int], value: object) -> None:
        if type(value) is not int or not 0 <= value < 1 << 32:
            name = f"{type(state).__name__}.{field.name}"
            raise StateError(name, value, "must fit into 32 bits")

    return attrs.field(validator=check)


def _version() -> Any:
    def check(state: object, field: attrs.Attribute[int], value: object) -> None:
        if value != 1:
            raise StateError(f"{type(state).__name__}.version", value, "must be 1")

    return attrs.field(default=1, validator=check, kw_only=True)


@attrs.frozen
class PciConfigState:
    """A `vmm_reference.pci.config.ConfigSpace`: all its registers."""

    registers: bytes = _bytes(256)
    version: int = _version()


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
    version: int = _version()


@attrs.frozen
class PciBusState:
    """A `vmm_reference.pci.bus.PciBus`: what port 0xCF8 holds."""

    address: int = _register()
    version: int = _version()


@attrs.frozen
class PciHotplugState:
    """A `vmm_reference.pci.hotplug.PciHotplug`.

    Attributes:
        up: slots that the guest has not looked at since something was plugged in.
        down: slots that the guest has not looked at since it was asked to give one up.
    """

    up: int = _register()
    down: int = _register()
    version: int = _version()
