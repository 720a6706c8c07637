"""Rows of the table that says where a global system interrupt goes."""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, Union

import attrs

from kvm_ioctls.state._codec import pack_fields

if TYPE_CHECKING:
    from typing import TypeAlias

__all__ = ["HvSintRoute", "IrqchipRoute", "MsiRoute", "RoutingEntry", "XenEvtchnRoute"]

_IRQCHIP = Struct("<IIIIII24x")
_MSI = Struct("<IIIIIIII16x")
_XEN = Struct("<IIIIIII20x")


@attrs.frozen
class IrqchipRoute:
    """KVM_IRQ_ROUTING_IRQCHIP: a GSI goes to a pin of a controller in the kernel.

    Attributes:
        gsi: the global system interrupt.
        irqchip: KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE or KVM_IRQCHIP_IOAPIC.
        pin: 0 to 7 on a PIC, 0 to 23 on the IOAPIC.
        version: of this form; 1.
    """

    gsi: int
    irqchip: int
    pin: int
    version: int = attrs.field(default=1, kw_only=True)

    def to_bytes(self) -> bytes:
        """The kernel's 48 bytes."""
        return pack_fields(self, _IRQCHIP, (self.gsi, 1, 0, 0, self.irqchip, self.pin))


@attrs.frozen
class MsiRoute:
    """KVM_IRQ_ROUTING_MSI: a GSI sends a message.

    Attributes:
        gsi: the global system interrupt.
        address: 64-bit message address.
        data: 32-bit message.
        devid: the device's id, or None where the interrupt controller wants none.
        version: of this form; 1.
    """

    gsi: int
    address: int
    data: int
    devid: int | None = None
    version: int = attrs.field(default=1, kw_only=True)

    def to_bytes(self) -> bytes:
        """The kernel's 48 bytes."""
        return pack_fields(
            self,
            _MSI,
            (
                self.gsi, 2, 0 if self.devid is None else 1, 0, self.address & 0xFFFFFFFF,
                self.address >> 32, self.data, self.devid or 0,
            ),
        )  # fmt: skip


@attrs.frozen
class HvSintRoute:
    """KVM_IRQ_ROUTING_HV_SINT: a GSI is a synthetic interrupt of Hyper-V's interface.

    Attributes:
        gsi: the global system interrupt.
        vcpu: the vCPU's index.
        sint: the synthetic interrupt source, 0 to 15.
        version: of this form; 1.
    """

    gsi: int
    vcpu: int
    sint: int
    version: int = attrs.field(default=1, kw_only=True)

    def to_bytes(self) -> bytes:
        """The kernel's 48 bytes."""
        return pack_fields(self, _IRQCHIP, (self.gsi, 4, 0, 0, self.vcpu, self.sint))


@attrs.frozen
class XenEvtchnRoute:
    """KVM_IRQ_ROUTING_XEN_EVTCHN: a GSI is a Xen event channel.

    Attributes:
        gsi: the global system interrupt.
        port: the event channel.
        vcpu: the vCPU's id.
        priority: 0xffffffff, the two-level ABI, is the only one.
        version: of this form; 1.
    """

    gsi: int
    port: int
    vcpu: int
    priority: int = 0xFFFFFFFF
    version: int = attrs.field(default=1, kw_only=True)

    def to_bytes(self) -> bytes:
        """The kernel's 48 bytes."""
        return pack_fields(self, _XEN, (self.gsi, 5, 0, 0, self.port, self.vcpu, self.priority))


RoutingEntry: TypeAlias = Union[IrqchipRoute, MsiRoute, HvSintRoute, XenEvtchnRoute]  # noqa: UP007
