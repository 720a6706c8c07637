"""Segment, descriptor-table and control registers of an x86 vCPU."""

from __future__ import annotations

from struct import Struct

import attrs

from kvm_ioctls.state._codec import pack_fields

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self

__all__ = ["DescriptorTable", "Segment", "Sregs", "Sregs2"]

_SEGMENT = "QIH9Bx"
_TABLE = "QH6x"
_COMMON = "<" + 8 * _SEGMENT + 2 * _TABLE + "7Q"
_SREGS = Struct(_COMMON + "4Q")
_SREGS2 = Struct(_COMMON + "Q4Q")


@attrs.frozen
class Segment:
    """struct kvm_segment: a segment register with its hidden part.

    Attributes:
        base: linear address.
        limit: last valid offset in bytes, whatever `g` says.
        selector: 16-bit selector.
        type: the descriptor's type, 0 to 15.
        present: P.
        dpl: privilege level, 0 to 3.
        db: D/B: 32-bit default size.
        s: 1 for code and data, 0 for system segments.
        l: 64-bit code.
        g: granularity.
        avl: the bit left to software.
        unusable: 1 if the register holds no usable segment.
        version: of this form; 1.
    """

    base: int = 0
    limit: int = 0
    selector: int = 0
    type: int = 0
    present: int = 0
    dpl: int = 0
    db: int = 0
    s: int = 0
    l: int = 0  # noqa: E741 - the kernel's name
    g: int = 0
    avl: int = 0
    unusable: int = 0
    version: int = attrs.field(default=1, kw_only=True)

    def _values(self) -> tuple[int, ...]:
        return (
            self.base, self.limit, self.selector, self.type, self.present, self.dpl, self.db,
            self.s, self.l, self.g, self.avl, self.unusable,
        )  # fmt: skip


@attrs.frozen
class DescriptorTable:
    """struct kvm_dtable: where the GDT or IDT lies.

    Attributes:
        base: linear address.
        limit: its length in bytes, less one.
        version: of this form; 1.
    """

    base: int = 0
    limit: int = 0
    version: int = attrs.field(default=1, kw_only=True)


def _unpack_common(v: tuple[int, ...]) -> tuple[object, ...]:
    segments = [Segment(*v[i : i + 12]) for i in range(0, 96, 12)]
    return (
        *segments, DescriptorTable(v[96], v[97]), DescriptorTable(v[98], v[99]), *v[100:107],
    )  # fmt: skip


@attrs.frozen
class Sregs:
    """struct kvm_sregs: what decides the processor's mode.

    Attributes:
        cs: and ds, es, fs, gs, ss, tr, ldt: segment registers.
        gdt: and idt: descriptor tables.
        cr0: and cr2, cr3, cr4, cr8: control registers.
        efer: the EFER MSR.
        apic_base: the IA32_APIC_BASE MSR.
        interrupt_bitmap: four words; at most one bit: the external interrupt being delivered.
        version: of this form; 1.
    """

    cs: Segment = Segment()
    ds: Segment = Segment()
    es: Segment = Segment()
    fs: Segment = Segment()
    gs: Segment = Segment()
    ss: Segment = Segment()
    tr: Segment = Segment()
    ldt: Segment = Segment()
    gdt: DescriptorTable = DescriptorTable()
    idt: DescriptorTable = DescriptorTable()
    cr0: int = 0
    cr2: int = 0
    cr3: int = 0
    cr4: int = 0
    cr8: int = 0
    efer: int = 0
    apic_base: int = 0
    interrupt_bitmap: tuple[int, int, int, int] = (0, 0, 0, 0)
    version: int = attrs.field(default=1, kw_only=True)

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview) -> Self:
        """From the kernel's 312 bytes."""
        v = _SREGS.unpack_from(data)
        return cls(*_unpack_common(v), v[107:111])  # type: ignore[arg-type, call-arg]

    def to_bytes(self) -> bytes:
        """The kernel's 312 bytes; ArgumentError if a field does not fit its width."""
        return pack_fields(self, _SREGS, (*_common(self), *self.interrupt_bitmap))


@attrs.frozen
class Sregs2:
    """struct kvm_sregs2: as Sregs, with the page-directory pointers of 32-bit PAE paging.

    Attributes:
        flags: KVM_SREGS2_FLAGS_PDPTRS_VALID if `pdptrs` counts.
        pdptrs: four page-directory-pointer entries.
        version: of this form; 1.
    """

    cs: Segment = Segment()
    ds: Segment = Segment()
    es: Segment = Segment()
    fs: Segment = Segment()
    gs: Segment = Segment()
    ss: Segment = Segment()
    tr: Segment = Segment()
    ldt: Segment = Segment()
    gdt: DescriptorTable = DescriptorTable()
    idt: DescriptorTable = DescriptorTable()
    cr0: int = 0
    cr2: int = 0
    cr3: int = 0
    cr4: int = 0
    cr8: int = 0
    efer: int = 0
    apic_base: int = 0
    flags: int = 0
    pdptrs: tuple[int, int, int, int] = (0, 0, 0, 0)
    version: int = attrs.field(default=1, kw_only=True)

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview) -> Self:
        """From the kernel's 320 bytes."""
        v = _SREGS2.unpack_from(data)
        return cls(*_unpack_common(v), v[107], v[108:112])  # type: ignore[arg-type, call-arg]

    def to_bytes(self) -> bytes:
        """The kernel's 320 bytes; ArgumentError if a field does not fit its width."""
        return pack_fields(self, _SREGS2, (*_common(self), self.flags, *self.pdptrs))


def _common(s: Sregs | Sregs2) -> tuple[int, ...]:
    return (
        *s.cs._values(), *s.ds._values(), *s.es._values(), *s.fs._values(), *s.gs._values(),
        *s.ss._values(), *s.tr._values(), *s.ldt._values(), s.gdt.base, s.gdt.limit, s.idt.base,
        s.idt.limit, s.cr0, s.cr2, s.cr3, s.cr4, s.cr8, s.efer, s.apic_base,
    )  # fmt: skip
