"""Names of model-specific registers.

>>> msr_name(0xC0000080), msr_index("TSC"), msr_name(0x205)
('EFER', 16, 'MTRR_PHYS_MASK2')
"""

from __future__ import annotations

__all__ = ["MSRS", "msr_index", "msr_name"]

MSRS: dict[int, str] = {
    0x0: "P5_MC_ADDR", 0x1: "P5_MC_TYPE", 0x10: "TSC", 0x17: "PLATFORM_ID", 0x1B: "APIC_BASE",
    0x2A: "EBL_CR_POWERON", 0x34: "SMI_COUNT", 0x3A: "FEATURE_CONTROL", 0x3B: "TSC_ADJUST",
    0x48: "SPEC_CTRL", 0x49: "PRED_CMD", 0x79: "UCODE_WRITE", 0x8B: "UCODE_REV",
    0x9E: "SMBASE", 0xCD: "FSB_FREQ", 0xCE: "PLATFORM_INFO", 0xCF: "CORE_CAPS",
    0xE1: "UMWAIT_CONTROL", 0xE7: "MPERF", 0xE8: "APERF", 0xFE: "MTRR_CAP",
    0x10A: "ARCH_CAPABILITIES", 0x10B: "FLUSH_CMD", 0x122: "TSX_CTRL", 0x140: "MISC_FEATURES",
    0x174: "SYSENTER_CS", 0x175: "SYSENTER_ESP", 0x176: "SYSENTER_EIP", 0x179: "MCG_CAP",
    0x17A: "MCG_STATUS", 0x17B: "MCG_CTL", 0x198: "PERF_STATUS", 0x199: "PERF_CTL",
    0x19A: "THERM_CONTROL", 0x19B: "THERM_INTERRUPT", 0x19C: "THERM_STATUS",
    0x1A0: "MISC_ENABLE", 0x1C4: "XFD", 0x1C5: "XFD_ERR", 0x1D9: "DEBUGCTL",
    0x1DB: "LAST_BRANCH_FROM_IP", 0x1DC: "LAST_BRANCH_TO_IP", 0x1DD: "LAST_INT_FROM_IP",
    0x1DE: "LAST_INT_TO_IP", 0x1FC: "POWER_CTL", 0x250: "MTRR_FIX64K_00000",
    0x258: "MTRR_FIX16K_80000", 0x259: "MTRR_FIX16K_A0000", 0x277: "PAT", 0x2FF: "MTRR_DEF_TYPE",
    0x309: "FIXED_CTR0", 0x30A: "FIXED_CTR1", 0x30B: "FIXED_CTR2", 0x345: "PERF_CAPABILITIES",
    0x38D: "FIXED_CTR_CTRL", 0x38E: "PERF_GLOBAL_STATUS", 0x38F: "PERF_GLOBAL_CTRL",
    0x390: "PERF_GLOBAL_OVF_CTRL", 0x3F1: "PEBS_ENABLE", 0x480: "VMX_BASIC",
    0x481: "VMX_PINBASED_CTLS", 0x482: "VMX_PROCBASED_CTLS", 0x483: "VMX_EXIT_CTLS",
    0x484: "VMX_ENTRY_CTLS", 0x485: "VMX_MISC", 0x486: "VMX_CR0_FIXED0",
    0x487: "VMX_CR0_FIXED1", 0x488: "VMX_CR4_FIXED0", 0x489: "VMX_CR4_FIXED1",
    0x48A: "VMX_VMCS_ENUM", 0x48B: "VMX_PROCBASED_CTLS2", 0x48C: "VMX_EPT_VPID_CAP",
    0x48D: "VMX_TRUE_PINBASED_CTLS", 0x48E: "VMX_TRUE_PROCBASED_CTLS",
    0x48F: "VMX_TRUE_EXIT_CTLS", 0x490: "VMX_TRUE_ENTRY_CTLS", 0x491: "VMX_VMFUNC",
    0x600: "DS_AREA", 0x6A0: "U_CET", 0x6A2: "S_CET", 0x6A4: "PL0_SSP", 0x6A5: "PL1_SSP",
    0x6A6: "PL2_SSP", 0x6A7: "PL3_SSP", 0x6A8: "INT_SSP_TAB", 0x6E0: "TSC_DEADLINE",
    0xDA0: "XSS", 0x40000000: "HV_GUEST_OS_ID", 0x40000001: "HV_HYPERCALL",
    0x40000002: "HV_VP_INDEX", 0x40000003: "HV_RESET", 0x40000010: "HV_VP_RUNTIME",
    0x40000020: "HV_TIME_REF_COUNT", 0x40000021: "HV_REFERENCE_TSC", 0x40000022: "HV_TSC_FREQUENCY",
    0x40000023: "HV_APIC_FREQUENCY", 0x40000070: "HV_EOI", 0x40000071: "HV_ICR",
    0x40000072: "HV_TPR", 0x40000073: "HV_VP_ASSIST_PAGE", 0x40000080: "HV_SCONTROL",
    0x40000081: "HV_SVERSION", 0x40000082: "HV_SIEFP", 0x40000083: "HV_SIMP", 0x40000084: "HV_EOM",
    0x4B564D00: "KVM_WALL_CLOCK_NEW", 0x4B564D01: "KVM_SYSTEM_TIME_NEW",
    0x4B564D02: "KVM_ASYNC_PF_EN",
    0x4B564D03: "KVM_STEAL_TIME", 0x4B564D04: "KVM_PV_EOI_EN", 0x4B564D05: "KVM_POLL_CONTROL",
    0x4B564D06: "KVM_ASYNC_PF_INT", 0x4B564D07: "KVM_ASYNC_PF_ACK",
    0x4B564D08: "KVM_MIGRATION_CONTROL", 0x11: "KVM_WALL_CLOCK", 0x12: "KVM_SYSTEM_TIME",
    0xC0000080: "EFER", 0xC0000081: "STAR", 0xC0000082: "LSTAR", 0xC0000083: "CSTAR",
    0xC0000084: "SYSCALL_MASK", 0xC0000100: "FS_BASE", 0xC0000101: "GS_BASE",
    0xC0000102: "KERNEL_GS_BASE", 0xC0000103: "TSC_AUX", 0xC0000104: "AMD64_TSC_RATIO",
    0xC0000300: "AMD64_PERF_CNTR_GLOBAL_STATUS", 0xC0000301: "AMD64_PERF_CNTR_GLOBAL_CTL",
    0xC0010010: "K8_SYSCFG", 0xC0010015: "K7_HWCR", 0xC0010058: "FAM10H_MMIO_CONF_BASE",
    0xC0010055: "K8_INT_PENDING_MSG", 0xC0010062: "AMD_PERF_CTL", 0xC0010114: "VM_CR",
    0xC0010117: "VM_HSAVE_PA", 0xC001011F: "VIRT_SPEC_CTRL", 0xC0010140: "AMD64_OSVW_ID_LENGTH",
    0xC0010141: "AMD64_OSVW_STATUS", 0xC001001F: "AMD64_NB_CFG", 0xC0011022: "AMD64_DC_CFG",
    0xC0011029: "AMD64_DE_CFG", 0xC0010131: "AMD64_SEV",
    **{0xC1 + n: f"PMC{n}" for n in range(8)},
    **{0x186 + n: f"PERFEVTSEL{n}" for n in range(8)},
    **{0x200 + 2 * n + mask: f"MTRR_PHYS_{('BASE', 'MASK')[mask]}{n}"
       for n in range(10) for mask in (0, 1)},
    **{0x268 + n: f"MTRR_FIX4K_{0xC0000 + 0x8000 * n:X}" for n in range(8)},
    **{0x280 + n: f"MC{n}_CTL2" for n in range(32)},
    **{0x400 + 4 * n + part: f"MC{n}_{('CTL', 'STATUS', 'ADDR', 'MISC')[part]}"
       for n in range(32) for part in range(4)},
    **{0x4C1 + n: f"PMC{n}_FULL" for n in range(8)},
    **{0x800 + n: f"X2APIC_{n:02X}" for n in range(0x40)},
    **{0x40000090 + n: f"HV_SINT{n}" for n in range(16)},
    **{0x400000B0 + 2 * n + part: f"HV_STIMER{n}_{('CONFIG', 'COUNT')[part]}"
       for n in range(4) for part in (0, 1)},
    **{0xC0010000 + n: f"K7_EVNTSEL{n}" for n in range(4)},
    **{0xC0010004 + n: f"K7_PERFCTR{n}" for n in range(4)},
    **{0xC0010200 + 2 * n + part: f"F15H_PERF_{('CTL', 'CTR')[part]}{n}"
       for n in range(6) for part in (0, 1)},
}  # fmt: skip
"""Names by index, as Linux calls them without `MSR_` and `IA32_`."""

_INDICES = {name: index for index, name in MSRS.items()}


def msr_name(index: int) -> str:
    """The name of an MSR, or its number in hexadecimal if it has none here."""
    return MSRS.get(index) or f"{index:#x}"


def msr_index(name: str) -> int:
    """The number of an MSR by its name here; KeyError if there is none."""
    return _INDICES[name]
