"""The state a vCPU starts in: CPUID, model-specific registers, entry registers.

Only the boot vCPU gets the entry state of the boot protocol; the others wait for INIT and SIPI,
which the in-kernel local APIC answers. That APIC comes out of KVM as firmware leaves it: LINT0
of the boot vCPU takes the PIC's interrupts; that LINT1 is the NMI stands in the MADT.
"""

from __future__ import annotations

from struct import Struct

from .cpuid import topology

TYPE_CHECKING = False
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


_KVM_CAP_TSC_DEADLINE_TIMER = 72

# struct kvm_segment and two struct kvm_dtable, as struct kvm_sregs begins with them: the values of
# kvm_ioctls.state would do, but every boot would wait for their classes.
_SEGMENT, _TABLES = Struct("<QIH9Bx"), Struct("<QH6xQH6x")


class CpuPolicy:
    """What all vCPUs of a machine have in common, read from KVM once."""

    def __init__(self, kvm: Kvm, cpus: int, *, threads: int = 1, sockets: int = 1) -> None:
        self._cpus, self._threads, self._sockets = cpus, threads, sockets
        self._supported: Iterable[CpuidEntry] = kvm.get_supported_cpuid()
        self._tsc_deadline = kvm.check_extension(_KVM_CAP_TSC_DEADLINE_TIMER) > 0

    @property
    def physical_address_bits(self) -> int:
        """Width of guest-physical addresses: leaf 0x80000008, 36 where there is none."""
        for entry in self._supported:
            if entry.function == 0x80000008:
                return entry.eax >> 16 & 0xFF or entry.eax & 0xFF
        return 36

    def apply(self, vcpu: Vcpu) -> None:
        """Give a new vCPU its CPUID table and boot MSRs."""
        vcpu.set_cpuid2(
            topology(
                self._supported,
                apic_id=vcpu.id,
                cpus=self._cpus,
                tsc_deadline=self._tsc_deadline,
                threads=self._threads,
                sockets=self._sockets,
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
    special = vcpu.raw_sregs().get()
    for number, name in enumerate(("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")):
        value: SegmentState = getattr(entry, name)
        _SEGMENT.pack_into(
            special.buffer, _SEGMENT.size * number,
            value.base, value.limit, value.selector, value.type, value.present, value.dpl,
            value.db, value.s, value.l, value.g, value.avl, value.unusable,
        )  # fmt: skip
    tables = (entry.gdt.base, entry.gdt.limit, entry.idt.base, entry.idt.limit)
    _TABLES.pack_into(special.buffer, _SEGMENT.size * 8, *tables)
    for name in ("cr0", "cr3", "cr4", "efer"):
        special[name] = getattr(entry, name)
    special.set()
    general = vcpu.raw_regs()
    for name in ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "rip", "rflags"):
        general[name] = getattr(entry, name)
    general.set()
