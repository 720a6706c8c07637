"""Interrupt controllers and the ways to raise an interrupt."""

from __future__ import annotations

from struct import pack

from kvm_ioctls._fd import Descriptor
from kvm_ioctls._native import lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvm_ioctls.state.irqchip import IoapicState, PicState
    from kvm_ioctls.state.routing import RoutingEntry

__all__ = ["VmIrq"]


class VmIrq(Descriptor):
    """The part of a VM that deals with interrupts."""

    _routing: tuple[RoutingEntry, ...] | None = None

    @property
    def gsi_routing(self) -> tuple[RoutingEntry, ...] | None:
        """The table last set through this object, which the kernel does not give back.

        None is the table that create_irqchip() makes.
        """
        return self._routing

    def create_irqchip(self) -> None:
        """KVM_CREATE_IRQCHIP (KVM_CAP_IRQCHIP): PICs, IOAPIC and a local APIC for each vCPU.

        Raises:
            KvmError: EEXIST if there is one; EINVAL if vCPUs exist already.
        """
        self._value(lib.KVM_CREATE_IRQCHIP)

    def irq_line(self, gsi: int, level: int | bool) -> None:
        """KVM_IRQ_LINE: set the level of an interrupt line.

        Args:
            gsi: the global system interrupt, an index of the routing table.
            level: 1 raises the line, 0 lowers it.
        """
        self._write(lib.KVM_IRQ_LINE, pack("<II", gsi, int(level)), gsi=gsi, level=level)

    def irq_line_status(self, gsi: int, level: int | bool) -> int:
        """KVM_IRQ_LINE_STATUS (KVM_CAP_IRQ_INJECT_STATUS): the same, and what became of it.

        Returns:
            Above 0: to how many vCPUs it was delivered. 0: it merged with one that was pending.
            Below 0: it was masked or ignored.
        """
        data = bytearray(pack("<II", gsi, int(level)))
        self._write(lib.KVM_IRQ_LINE_STATUS, data, gsi=gsi, level=level)
        return int.from_bytes(data[:4], "little", signed=True)

    def signal_msi(self, address: int, data: int, *, devid: int | None = None) -> int:
        """KVM_SIGNAL_MSI (KVM_CAP_SIGNAL_MSI): deliver a message-signalled interrupt now.

        Args:
            address: the 64-bit message address.
            data: the 32-bit message.
            devid: the device's id, on machines whose interrupt controller wants one.

        Returns:
            To how many vCPUs it was delivered; 0 if the guest blocked it.
        """
        return self._write(
            lib.KVM_SIGNAL_MSI,
            pack(
                "<IIIII12x",
                address & 0xFFFFFFFF,
                address >> 32,
                data,
                0 if devid is None else 1,
                devid or 0,
            ),
            address=address,
            data=data,
        )

    def set_gsi_routing(self, entries: Iterable[RoutingEntry]) -> None:
        """KVM_SET_GSI_ROUTING (KVM_CAP_IRQ_ROUTING): replace the whole routing table.

        Args:
            entries: values of kvm_ioctls.state.routing, at most KVM_CAP_IRQ_ROUTING (4096) of them.
        """
        table = tuple(entries)
        rows = [entry.to_bytes() for entry in table]
        self._write(
            lib.KVM_SET_GSI_ROUTING,
            pack("<II", len(rows), 0) + b"".join(rows),
            nr=len(rows),
        )
        self._routing = table

    def get_irqchip(self, chip_id: int) -> PicState | IoapicState:
        """KVM_GET_IRQCHIP: the registers of one interrupt controller.

        Args:
            chip_id: KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE or KVM_IRQCHIP_IOAPIC.
        """
        from kvm_ioctls.state.irqchip import unpack_chip

        data = bytearray(520)
        data[:4] = chip_id.to_bytes(4, "little")
        self._write(lib.KVM_GET_IRQCHIP, data, chip_id=chip_id)
        return unpack_chip(chip_id, data)

    def set_irqchip(self, chip_id: int, state: PicState | IoapicState) -> None:
        """KVM_SET_IRQCHIP: put back what get_irqchip() gave for the same chip."""
        data = pack("<II", chip_id, 0) + state.to_bytes().ljust(512, b"\0")
        self._write(lib.KVM_SET_IRQCHIP, bytearray(data), chip_id=chip_id)
