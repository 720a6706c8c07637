"""The two PICs and the IOAPIC."""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING

import attrs

from kvm_ioctls.state._codec import pack_fields, refuse_field

if TYPE_CHECKING:
    from typing import Self

__all__ = ["IoapicState", "PicState", "Redirection", "unpack_chip"]

_PIC = Struct("<16B")
_IOAPIC = Struct("<QIIII24Q")


@attrs.frozen
class PicState:
    """struct kvm_pic_state: one i8259.

    Attributes:
        last_irr: line levels, for edge detection.
        irr: requests.
        imr: mask.
        isr: in service.
        priority_add: the line of highest priority.
        irq_base: vector of its first line.
        read_reg_select: 1 if a read gives isr.
        poll: 1 after a poll command.
        special_mask: 1 in special mask mode.
        init_state: how far an initialisation has come.
        auto_eoi: 1 if interrupts end by themselves.
        rotate_on_auto_eoi: 1 if priorities rotate then.
        special_fully_nested_mode: 1 if set.
        init4: 1 if the initialisation takes four words.
        elcr: lines that are level-triggered.
        elcr_mask: lines that may be.
        version: of this form; 1.
    """

    last_irr: int = 0
    irr: int = 0
    imr: int = 0
    isr: int = 0
    priority_add: int = 0
    irq_base: int = 0
    read_reg_select: int = 0
    poll: int = 0
    special_mask: int = 0
    init_state: int = 0
    auto_eoi: int = 0
    rotate_on_auto_eoi: int = 0
    special_fully_nested_mode: int = 0
    init4: int = 0
    elcr: int = 0
    elcr_mask: int = 0
    version: int = attrs.field(default=1, kw_only=True)

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview) -> Self:
        """From the kernel's 16 bytes."""
        return cls(*_PIC.unpack_from(data))

    def to_bytes(self) -> bytes:
        """The kernel's 16 bytes; ArgumentError if a field is no byte."""
        return pack_fields(
            self,
            _PIC,
            (
                self.last_irr, self.irr, self.imr, self.isr, self.priority_add, self.irq_base,
                self.read_reg_select, self.poll, self.special_mask, self.init_state, self.auto_eoi,
                self.rotate_on_auto_eoi, self.special_fully_nested_mode, self.init4, self.elcr,
                self.elcr_mask,
            ),
        )  # fmt: skip


@attrs.frozen
class Redirection:
    """One entry of the IOAPIC's redirection table (82093AA, 3.2.4).

    Attributes:
        vector: 0 to 255.
        delivery_mode: 0 fixed, 1 lowest priority, 2 SMI, 4 NMI, 5 INIT, 7 ExtINT.
        dest_mode: 0 physical, 1 logical.
        delivery_status: 1 while sending.
        polarity: 1 for active low.
        remote_irr: 1 from a level interrupt's delivery to its end.
        trig_mode: 1 for level.
        mask: 1 to hold it back.
        reserved: bits 17 to 55, as they were.
        dest_id: the destination.
        version: of this form; 1.
    """

    vector: int = 0
    delivery_mode: int = 0
    dest_mode: int = 0
    delivery_status: int = 0
    polarity: int = 0
    remote_irr: int = 0
    trig_mode: int = 0
    mask: int = 1
    reserved: int = 0
    dest_id: int = 0
    version: int = attrs.field(default=1, kw_only=True)

    @classmethod
    def from_bits(cls, bits: int) -> Self:
        """From the 64-bit register."""
        return cls(
            bits & 0xFF, bits >> 8 & 7, bits >> 11 & 1, bits >> 12 & 1, bits >> 13 & 1,
            bits >> 14 & 1, bits >> 15 & 1, bits >> 16 & 1, bits >> 17 & (1 << 39) - 1, bits >> 56,
        )  # fmt: skip

    def to_bits(self) -> int:
        """The 64-bit register; ArgumentError if a field does not fit its bits."""
        bits = 0
        for value, shift, width in (
            (self.vector, 0, 8), (self.delivery_mode, 8, 3), (self.dest_mode, 11, 1),
            (self.delivery_status, 12, 1), (self.polarity, 13, 1), (self.remote_irr, 14, 1),
            (self.trig_mode, 15, 1), (self.mask, 16, 1), (self.reserved, 17, 39),
            (self.dest_id, 56, 8),
        ):  # fmt: skip
            if not 0 <= value < 1 << width:
                refuse_field(self, f"{value} at bit {shift} needs more than {width} bits")
            bits |= value << shift
        return bits


@attrs.frozen
class IoapicState:
    """struct kvm_ioapic_state.

    Attributes:
        base_address: guest-physical address of its registers; 0xfec00000.
        ioregsel: the register selected for access.
        id: its APIC id register.
        irr: pins that request.
        redirtbl: 24 redirection entries.
        version: of this form; 1.
    """

    base_address: int = 0xFEC00000
    ioregsel: int = 0
    id: int = 0
    irr: int = 0
    redirtbl: tuple[Redirection, ...] = (Redirection(),) * 24
    version: int = attrs.field(default=1, kw_only=True)

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview) -> Self:
        """From the kernel's 216 bytes."""
        base, select, number, irr, _, *table = _IOAPIC.unpack_from(data)
        return cls(base, select, number, irr, tuple(Redirection.from_bits(x) for x in table))

    def to_bytes(self) -> bytes:
        """The kernel's 216 bytes; ArgumentError if a field does not fit."""
        if len(self.redirtbl) != 24:
            refuse_field(self, "24 redirection entries")
        return pack_fields(
            self,
            _IOAPIC,
            (
                self.base_address, self.ioregsel, self.id, self.irr, 0,
                *(entry.to_bits() for entry in self.redirtbl),
            ),
        )  # fmt: skip


def unpack_chip(chip_id: int, data: bytes | bytearray) -> PicState | IoapicState:
    """The chip in a struct kvm_irqchip."""
    return (IoapicState if chip_id == 2 else PicState).from_bytes(data[8:])
