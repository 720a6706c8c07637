"""The processor state that a boot protocol asks for, as a value that knows nothing of KVM."""

from __future__ import annotations

from vm_memory._values import frozen

__all__ = ["EntryState", "SegmentState", "TableState", "long_mode", "protected_mode", "real_mode"]

CODE_SELECTOR = 0x10
"""`__BOOT_CS` of the Linux boot protocol; PVH leaves the selectors free."""
DATA_SELECTOR = 0x18
"""`__BOOT_DS` of the Linux boot protocol."""
TASK_SELECTOR = 0x20


@frozen
class SegmentState:
    """A segment register with its hidden part (Intel SDM volume 3, section 3.4.3).

    Attributes:
        base: linear address of the segment.
        limit: last byte of it, already scaled: 0xFFFFFFFF for a flat segment.
        selector: the visible part.
        type: the descriptor's four type bits.
        present: 1 where the descriptor may be used.
        dpl: privilege level, 0 to 3.
        db: 1 for a 32-bit default operand size.
        s: 1 for code and data, 0 for system descriptors.
        l: 1 for 64-bit code.
        g: 1 where the limit counts pages.
        avl: the bit left to software.
        unusable: 1 where a null selector was loaded.
    """

    base: int
    limit: int
    selector: int
    type: int
    present: int
    dpl: int
    db: int
    s: int
    l: int  # noqa: E741  (the manual's name of the bit)
    g: int
    avl: int = 0
    unusable: int = 0


@frozen
class TableState:
    """GDTR or IDTR: linear address of the table and its size in bytes less one."""

    base: int
    limit: int


@frozen
class EntryState:
    """Everything the boot protocol says about the first processor at its first instruction.

    What is not named here (FPU, MSRs, local APIC) keeps its value of after reset. Field names are
    those of `struct kvm_regs` and `struct kvm_sregs`, so that a KVM user copies them one by one.
    """

    rip: int
    cs: SegmentState
    ds: SegmentState
    es: SegmentState
    fs: SegmentState
    gs: SegmentState
    ss: SegmentState
    tr: SegmentState
    ldt: SegmentState
    gdt: TableState
    idt: TableState
    cr0: int
    cr3: int
    cr4: int
    efer: int
    rsp: int = 0
    rbp: int = 0
    rax: int = 0
    rbx: int = 0
    rcx: int = 0
    rdx: int = 0
    rsi: int = 0
    rdi: int = 0
    rflags: int = 2


_NO_SEGMENT = SegmentState(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1)


def long_mode(*, rip: int, rsp: int, rsi: int, gdt: TableState, page_tables: int) -> EntryState:
    """Return the state of the Linux 64-bit boot protocol (Documentation/x86/boot, section 1.14).

    64-bit mode, paging on with `page_tables` as the root, interrupts off, flat segments.
    """
    data = SegmentState(0, 0xFFFFFFFF, DATA_SELECTOR, 3, 1, 0, 1, 1, 0, 1)
    return EntryState(
        rip=rip,
        rsp=rsp,
        rbp=rsp,
        rsi=rsi,
        cs=SegmentState(0, 0xFFFFFFFF, CODE_SELECTOR, 11, 1, 0, 0, 1, 1, 1),
        ds=data,
        es=data,
        fs=data,
        gs=data,
        ss=data,
        tr=SegmentState(0, 0x67, TASK_SELECTOR, 11, 1, 0, 0, 0, 0, 0),
        ldt=_NO_SEGMENT,
        gdt=gdt,
        idt=TableState(0, 0),
        cr0=0x80000011,  # PG, ET, PE
        cr3=page_tables,
        cr4=0x20,  # PAE
        efer=0x500,  # LMA, LME
    )


def protected_mode(
    *, rip: int, gdt: TableState, rsp: int = 0, rax: int = 0, rbx: int = 0, rsi: int = 0
) -> EntryState:
    """Return 32-bit protected mode without paging, flat segments, interrupts off.

    So start the PVH, Multiboot and Linux 32-bit protocols; they differ in which register points
    at the boot information.
    """
    data = SegmentState(0, 0xFFFFFFFF, DATA_SELECTOR, 3, 1, 0, 1, 1, 0, 1)
    return EntryState(
        rip=rip,
        rsp=rsp,
        rax=rax,
        rbx=rbx,
        rsi=rsi,
        cs=SegmentState(0, 0xFFFFFFFF, CODE_SELECTOR, 11, 1, 0, 1, 1, 0, 1),
        ds=data,
        es=data,
        fs=data,
        gs=data,
        ss=data,
        tr=SegmentState(0, 0x67, TASK_SELECTOR, 11, 1, 0, 0, 0, 0, 0),
        ldt=_NO_SEGMENT,
        gdt=gdt,
        idt=TableState(0, 0),
        cr0=0x11,  # ET, PE
        cr3=0,
        cr4=0,
        efer=0,
    )


def real_mode(*, address: int, rsp: int) -> EntryState:
    """Return real mode at a linear address: below 1 MiB, or 0xFFFFFFF0 for the reset vector.

    At the reset vector the code segment's base is 0xFFFF0000, which no selector gives (Intel SDM
    volume 3, section 10.1.4).
    """
    base = address & ~0xFFFF
    selector = base >> 4 & 0xFFFF
    data = SegmentState(0, 0xFFFF, 0, 3, 1, 0, 0, 1, 0, 0)
    return EntryState(
        rip=address & 0xFFFF,
        rsp=rsp,
        cs=SegmentState(base, 0xFFFF, selector, 11, 1, 0, 0, 1, 0, 0),
        ds=data,
        es=data,
        fs=data,
        gs=data,
        ss=data,
        tr=SegmentState(0, 0xFFFF, 0, 11, 1, 0, 0, 0, 0, 0),
        ldt=SegmentState(0, 0xFFFF, 0, 2, 1, 0, 0, 0, 0, 0),
        gdt=TableState(0, 0xFFFF),
        idt=TableState(0, 0xFFFF),
        cr0=0x60000010,  # CD, NW, ET
        cr3=0,
        cr4=0,
        efer=0,
    )
