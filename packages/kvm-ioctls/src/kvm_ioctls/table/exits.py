"""Every exit reason: its number, the classes that stand for it, and its part of struct kvm_run."""

from __future__ import annotations

from typing import NamedTuple

from kvm_ioctls.table.structs import parse

__all__ = ["EXITS", "UNION", "ExitRow", "exit_layout"]

UNION = 32
"""Offset in struct kvm_run of the union that describes the exit (48 on s390, after its PSW)."""


class ExitRow(NamedTuple):
    """One exit reason.

    Attributes:
        name: without `KVM_EXIT_`.
        reason: its number.
        classes: names in kvm_ioctls.exits.
        member: of struct kvm_run's union, or an empty string if it has no data.
        members: that member's layout, written as in kvm_ioctls.table.structs.
        architecture: as for ioctls.
        shown: how the tests show it: `guest`, by a guest that makes it, `lab`, by one on stock
            `kvm_amd`, or `page`, by a run page.
    """

    name: str
    reason: int
    classes: tuple[str, ...]
    member: str = ""
    members: str = ""
    architecture: str = "all"
    shown: str = "page"


EXITS: tuple[ExitRow, ...] = (
    ExitRow("UNKNOWN", 0, ("Unknown",), "hw", "u64 hardware_exit_reason"),
    ExitRow("EXCEPTION", 1, ("ExceptionExit",), "ex", "u32 exception error_code", "x86"),
    ExitRow("IO", 2, ("IoIn", "IoOut"), "io", "u8 direction size; u16 port; u32 count;"
            " u64 data_offset", "x86", "guest"),
    ExitRow("HYPERCALL", 3, ("Hypercall",), "hypercall", "u64 nr args[6] ret; u32 longmode _pad",
            "all", "lab"),
    ExitRow("DEBUG", 4, ("Debug", "ArmDebug"), "debug.arch", "u32 exception pad; u64 pc dr6 dr7",
            "x86", "guest"),
    ExitRow("HLT", 5, ("Hlt",), shown="guest"),
    ExitRow("MMIO", 6, ("MmioRead", "MmioWrite"), "mmio", "u64 phys_addr; u8 data[8]; u32 len;"
            " u8 is_write", "all", "guest"),
    ExitRow("IRQ_WINDOW_OPEN", 7, ("IrqWindowOpen",), architecture="x86", shown="guest"),
    ExitRow("SHUTDOWN", 8, ("Shutdown",), shown="guest"),
    ExitRow("FAIL_ENTRY", 9, ("FailEntry",), "fail_entry", "u64 hardware_entry_failure_reason;"
            " u32 cpu"),
    ExitRow("INTR", 10, ("Interrupted",), shown="guest"),
    ExitRow("SET_TPR", 11, ("SetTpr",), architecture="x86"),
    ExitRow("TPR_ACCESS", 12, ("TprAccess",), "tpr_access", "u64 rip; u32 is_write pad", "x86"),
    ExitRow("S390_SIEIC", 13, ("S390Sieic",), "s390_sieic", "u8 icptcode; u16 ipa;"
            " u32 ipb", "s390"),
    ExitRow("S390_RESET", 14, ("S390Reset",), "", "u64 s390_reset_flags", "s390"),
    ExitRow("DCR", 15, ("Dcr",), "dcr", "u32 dcrn data; u8 is_write", "powerpc"),
    ExitRow("NMI", 16, ("Nmi",), architecture="x86"),
    ExitRow("INTERNAL_ERROR", 17, ("InternalError", "EmulationFailure"), "internal",
            "u32 suberror ndata; u64 data[16]", "all", "guest"),
    ExitRow("OSI", 18, ("Osi",), "osi", "u64 gprs[32]", "powerpc"),
    ExitRow("PAPR_HCALL", 19, ("PaprHcall",), "papr_hcall", "u64 nr ret args[9]", "powerpc"),
    ExitRow("S390_UCONTROL", 20, ("S390Ucontrol",), "s390_ucontrol", "u64 trans_exc_code;"
            " u32 pgm_code", "s390"),
    ExitRow("WATCHDOG", 21, ("Watchdog",), architecture="powerpc"),
    ExitRow("S390_TSCH", 22, ("S390Tsch",), "s390_tsch", "u16 subchannel_id subchannel_nr;"
            " u32 io_int_parm io_int_word ipb; u8 dequeued", "s390"),
    ExitRow("EPR", 23, ("Epr",), "epr", "u32 epr", "powerpc"),
    ExitRow("SYSTEM_EVENT", 24, ("SystemEvent",), "system_event", "u32 type ndata; u64 data[16]"),
    ExitRow("S390_STSI", 25, ("S390Stsi",), "s390_stsi", "u64 addr; u8 ar reserved fc sel1;"
            " u16 sel2", "s390"),
    ExitRow("IOAPIC_EOI", 26, ("IoapicEoi",), "eoi", "u8 vector", "x86", "guest"),
    ExitRow("HYPERV", 27, ("HypervSynic", "HypervHcall", "HypervSyndbg"), "hyperv",
            "u32 type pad1; u64 u[6]", "x86"),
    ExitRow("ARM_NISV", 28, ("ArmNisv",), "arm_nisv", "u64 esr_iss fault_ipa", "arm64"),
    ExitRow("X86_RDMSR", 29, ("Rdmsr",), "msr", "u8 error pad[7]; u32 reason index; u64 data",
            "x86", "guest"),
    ExitRow("X86_WRMSR", 30, ("Wrmsr",), "msr", "u8 error pad[7]; u32 reason index; u64 data",
            "x86", "guest"),
    ExitRow("DIRTY_RING_FULL", 31, ("DirtyRingFull",), shown="guest"),
    ExitRow("AP_RESET_HOLD", 32, ("ApResetHold",), architecture="x86"),
    ExitRow("X86_BUS_LOCK", 33, ("X86BusLock",), architecture="x86"),
    ExitRow("XEN", 34, ("XenHcall",), "xen", "u32 type; u64 u[9]", "x86"),
    ExitRow("RISCV_SBI", 35, ("RiscvSbi",), "riscv_sbi", "u64 extension_id function_id args[6]"
            " ret[2]", "riscv"),
    ExitRow("RISCV_CSR", 36, ("RiscvCsr",), "riscv_csr", "u64 csr_num new_value write_mask"
            " ret_value", "riscv"),
    ExitRow("NOTIFY", 37, ("Notify",), "notify", "u32 flags", "x86"),
    ExitRow("LOONGARCH_IOCSR", 38, ("LoongarchIocsrRead", "LoongarchIocsrWrite"), "iocsr_io",
            "u64 phys_addr; u8 data[8]; u32 len; u8 is_write", "loongarch"),
    ExitRow("MEMORY_FAULT", 39, ("MemoryFault",), "memory_fault", "u64 flags gpa size",
            shown="guest"),
    ExitRow("TDX", 40, ("Tdx",), "tdx", "u64 flags nr unknown[6]", "x86"),
    ExitRow("ARM_SEA", 41, ("ArmSea",), "arm_sea", "u64 flags esr gva gpa", "arm64"),
    ExitRow("ARM_LDST64B", 42, ("ArmLdst64b",), "arm_nisv", "u64 esr_iss fault_ipa", "arm64"),
    ExitRow("SNP_REQ_CERTS", 43, ("SnpReqCerts",), "snp_req_certs", "u64 gpa npages ret", "x86"),
)  # fmt: skip


def exit_layout(row: ExitRow) -> dict[str, tuple[int, int, int]]:
    """Offset in struct kvm_run, bytes and count of each member of an exit's data.

    >>> exit_layout(EXITS[6])["len"]
    (48, 4, 1)
    """
    if not row.members:
        return {}
    return {
        field.name: (UNION + field.offset, field.size, field.length)
        for field in parse(row.name, row.members).fields
    }
