"""The state a vCPU starts in: CPUID, model-specific registers, entry registers.

Only the boot vCPU gets the entry state of the boot protocol; the others wait for INIT and SIPI,
which the in-kernel local APIC answers. That APIC comes out of KVM as firmware leaves it: LINT0
of the boot vCPU takes the PIC's interrupts; that LINT1 is the NMI stands in the MADT.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import evolve

from kvm_ioctls import DescriptorTable, Regs, Segment, constants

from .cpuid import topology

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvm_ioctls import CpuidEntry, Kvm, Vcpu
    from linux_loader import EntryState
    from linux_loader.entry import SegmentState

__all__ = ["CpuPolicy", "set_entry_state"]

# What firmware leaves behind (Intel SDM volume 4): fast string operations on, and memory that is
# cached unless a page table says otherwise.
_MSR_IA32_MISC_ENABLE, _FAST_STRING = 0x1A0, 1
_MSR_MTRR_DEF_TYPE, _MTRR_ENABLED_WRITE_BACK = 0x2FF, 0x806


class CpuPolicy:
    """What all vCPUs of a machine have in common, read from KVM once."""

    def __init__(self, kvm: Kvm, cpus: int) -> None:
        self._cpus = cpus
        self._supported: Iterable[CpuidEntry] = kvm.get_supported_cpuid()
        self._tsc_deadline = kvm.check_extension(constants.KVM_CAP_TSC_DEADLINE_TIMER) > 0

    def apply(self, vcpu: Vcpu) -> None:
        """Give a new vCPU its CPUID table and boot MSRs."""
        vcpu.set_cpuid2(
            topology(
                self._supported,
                apic_id=vcpu.id,
                cpus=self._cpus,
                tsc_deadline=self._tsc_deadline,
            )
        )
        vcpu.set_msrs(
            {
                _MSR_IA32_MISC_ENABLE: _FAST_STRING,
                _MSR_MTRR_DEF_TYPE: _MTRR_ENABLED_WRITE_BACK,
            }
        )


def set_entry_state(vcpu: Vcpu, entry: EntryState) -> None:
    """Put the boot vCPU where the boot protocol says, with what it says."""
    vcpu.set_sregs(
        evolve(
            vcpu.get_sregs(),
            cs=_segment(entry.cs),
            ds=_segment(entry.ds),
            es=_segment(entry.es),
            fs=_segment(entry.fs),
            gs=_segment(entry.gs),
            ss=_segment(entry.ss),
            tr=_segment(entry.tr),
            ldt=_segment(entry.ldt),
            gdt=DescriptorTable(base=entry.gdt.base, limit=entry.gdt.limit),
            idt=DescriptorTable(base=entry.idt.base, limit=entry.idt.limit),
            cr0=entry.cr0,
            cr3=entry.cr3,
            cr4=entry.cr4,
            efer=entry.efer,
        )
    )
    vcpu.set_regs(
        Regs(
            rax=entry.rax,
            rbx=entry.rbx,
            rcx=entry.rcx,
            rdx=entry.rdx,
            rsi=entry.rsi,
            rdi=entry.rdi,
            rsp=entry.rsp,
            rbp=entry.rbp,
            rip=entry.rip,
            rflags=entry.rflags,
        )
    )


def _segment(value: SegmentState) -> Segment:
    return Segment(
        base=value.base,
        limit=value.limit,
        selector=value.selector,
        type=value.type,
        present=value.present,
        dpl=value.dpl,
        db=value.db,
        s=value.s,
        l=value.l,
        g=value.g,
        avl=value.avl,
        unusable=value.unusable,
    )
