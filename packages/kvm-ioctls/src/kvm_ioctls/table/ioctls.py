"""Every ioctl of KVM's user API: name, number, structure, architecture, descriptor, capability."""

from __future__ import annotations

import os
from functools import cache
from typing import NamedTuple

from kvm_ioctls.table.structs import layout

__all__ = ["HOST", "IOCTLS", "KINDS", "MACHINES", "Ioctl", "find"]

MACHINES = {"x86_64": "x86", "aarch64": "arm64", "riscv64": "riscv"}
HOST = MACHINES.get(os.uname().machine, "x86")
"""The architecture of this machine, as the rows name it."""

KINDS = ("kvm", "vm", "vcpu", "device")
_DIRECTIONS = {"": 0, "W": 1, "R": 2, "WR": 3}


class Ioctl(NamedTuple):
    """One ioctl.

    Attributes:
        name: as in `linux/kvm.h`.
        direction: `""`, `"W"` (the caller writes), `"R"` or `"WR"`, as in the `_IO` macros.
        nr: its number within KVM's type 0xAE.
        struct: the structure its size is taken from, or its bytes where that is all we know of it
            (KVM of other architectures), or None if it takes no structure.
        fd: kinds of descriptor it works on: `kvm`, `vm`, `vcpu`, `device`.
        capability: the KVM_CAP that announces it, without the prefix, or None.
        architecture: `all`, `x86`, `arm64`, `riscv`, or several with a slash; and, for rows that
            this library does not carry out, `s390`, `powerpc`, or `none` if no kernel does now.
    """

    name: str
    direction: str
    nr: int
    struct: str | int | None
    fd: str
    capability: str | None = None
    architecture: str = "all"

    def on(self, architecture: str) -> bool:
        """Whether KVM of an architecture has it."""
        return self.architecture == "all" or architecture in self.architecture.split("/")

    @property
    def wrapped(self) -> bool:
        """Whether this library has a method for it."""
        return any(self.on(architecture) for architecture in MACHINES.values())

    def size(self, architecture: str) -> int:
        """Bytes of the fixed part of its structure; 0 if it takes a plain value."""
        if isinstance(self.struct, str):
            return layout(self.struct, architecture).size
        return self.struct or 0

    def number(self, architecture: str) -> int:
        """The number that the system call takes on an architecture."""
        size = self.size(architecture)
        return _DIRECTIONS[self.direction] << 30 | size << 16 | 0xAE << 8 | self.nr

    @property
    def request(self) -> int:
        """The number on this machine; of a row that it does not have, the number where it is."""
        if self.on(HOST) or not self.wrapped:
            return self.number(HOST)
        return self.number(self.architecture.split("/")[0])

    @property
    def method(self) -> str:
        """The method that carries it out: the name in lower case without `KVM_`.

        Where a structure differs from x86's, the method begins with the architecture: `arm_` and
        the name.
        """
        return self.name.removeprefix("KVM_").lower()


_X86 = "x86"

IOCTLS: tuple[Ioctl, ...] = (
    # --- /dev/kvm
    Ioctl("KVM_GET_API_VERSION", "", 0x00, None, "kvm"),
    Ioctl("KVM_CREATE_VM", "", 0x01, None, "kvm"),
    Ioctl("KVM_GET_MSR_INDEX_LIST", "WR", 0x02, "kvm_msr_list", "kvm", None, _X86),
    Ioctl("KVM_CHECK_EXTENSION", "", 0x03, None, "kvm vm", "CHECK_EXTENSION_VM"),
    Ioctl("KVM_GET_VCPU_MMAP_SIZE", "", 0x04, None, "kvm"),
    Ioctl("KVM_GET_SUPPORTED_CPUID", "WR", 0x05, "kvm_cpuid2", "kvm", "EXT_CPUID", _X86),
    Ioctl("KVM_GET_EMULATED_CPUID", "WR", 0x09, "kvm_cpuid2", "kvm", "EXT_EMUL_CPUID", _X86),
    Ioctl("KVM_GET_MSR_FEATURE_INDEX_LIST", "WR", 0x0A, "kvm_msr_list", "kvm",
          "GET_MSR_FEATURES", _X86),
    # --- virtual machine: memory
    Ioctl("KVM_CREATE_VCPU", "", 0x41, None, "vm"),
    Ioctl("KVM_GET_DIRTY_LOG", "W", 0x42, "kvm_dirty_log", "vm"),
    Ioctl("KVM_SET_NR_MMU_PAGES", "", 0x44, None, "vm", "MMU_SHADOW_CACHE_CONTROL", _X86),
    Ioctl("KVM_GET_NR_MMU_PAGES", "", 0x45, None, "vm", "MMU_SHADOW_CACHE_CONTROL", _X86),
    Ioctl("KVM_SET_USER_MEMORY_REGION", "W", 0x46, "kvm_userspace_memory_region", "vm",
          "USER_MEMORY"),
    Ioctl("KVM_SET_TSS_ADDR", "", 0x47, None, "vm", "SET_TSS_ADDR", _X86),
    Ioctl("KVM_SET_IDENTITY_MAP_ADDR", "W", 0x48, "u64", "vm", "SET_IDENTITY_MAP_ADDR", _X86),
    Ioctl("KVM_SET_USER_MEMORY_REGION2", "W", 0x49, "kvm_userspace_memory_region2", "vm",
          "USER_MEMORY2"),
    # --- virtual machine: interrupts, events, timers
    Ioctl("KVM_CREATE_IRQCHIP", "", 0x60, None, "vm", "IRQCHIP", "x86/arm64"),
    Ioctl("KVM_IRQ_LINE", "W", 0x61, "kvm_irq_level", "vm", "IRQCHIP"),
    Ioctl("KVM_GET_IRQCHIP", "WR", 0x62, "kvm_irqchip", "vm", "IRQCHIP", _X86),
    Ioctl("KVM_SET_IRQCHIP", "R", 0x63, "kvm_irqchip", "vm", "IRQCHIP", _X86),
    Ioctl("KVM_CREATE_PIT", "", 0x64, None, "vm", "PIT", _X86),
    Ioctl("KVM_GET_PIT", "WR", 0x65, "kvm_pit_state", "vm", "PIT", _X86),
    Ioctl("KVM_SET_PIT", "R", 0x66, "kvm_pit_state", "vm", "PIT", _X86),
    Ioctl("KVM_IRQ_LINE_STATUS", "WR", 0x67, "kvm_irq_level", "vm", "IRQ_INJECT_STATUS"),
    Ioctl("KVM_REGISTER_COALESCED_MMIO", "W", 0x67, "kvm_coalesced_mmio_zone", "vm",
          "COALESCED_MMIO"),
    Ioctl("KVM_UNREGISTER_COALESCED_MMIO", "W", 0x68, "kvm_coalesced_mmio_zone", "vm",
          "COALESCED_MMIO"),
    Ioctl("KVM_SET_GSI_ROUTING", "W", 0x6A, "kvm_irq_routing", "vm", "IRQ_ROUTING"),
    Ioctl("KVM_REINJECT_CONTROL", "", 0x71, None, "vm", "REINJECT_CONTROL", _X86),
    Ioctl("KVM_IRQFD", "W", 0x76, "kvm_irqfd", "vm", "IRQFD"),
    Ioctl("KVM_CREATE_PIT2", "W", 0x77, "kvm_pit_config", "vm", "PIT2", _X86),
    Ioctl("KVM_SET_BOOT_CPU_ID", "", 0x78, None, "vm", "SET_BOOT_CPU_ID", _X86),
    Ioctl("KVM_IOEVENTFD", "W", 0x79, "kvm_ioeventfd", "vm", "IOEVENTFD"),
    Ioctl("KVM_XEN_HVM_CONFIG", "W", 0x7A, "kvm_xen_hvm_config", "vm", "XEN_HVM", _X86),
    Ioctl("KVM_SET_CLOCK", "W", 0x7B, "kvm_clock_data", "vm", "ADJUST_CLOCK", _X86),
    Ioctl("KVM_GET_CLOCK", "R", 0x7C, "kvm_clock_data", "vm", "ADJUST_CLOCK", _X86),
    Ioctl("KVM_GET_PIT2", "R", 0x9F, "kvm_pit_state2", "vm", "PIT_STATE2", _X86),
    Ioctl("KVM_SET_PIT2", "W", 0xA0, "kvm_pit_state2", "vm", "PIT_STATE2", _X86),
    Ioctl("KVM_SET_TSC_KHZ", "", 0xA2, None, "vcpu vm", "TSC_CONTROL", _X86),
    Ioctl("KVM_GET_TSC_KHZ", "", 0xA3, None, "vcpu vm", "GET_TSC_KHZ", _X86),
    Ioctl("KVM_SIGNAL_MSI", "W", 0xA5, "kvm_msi", "vm", "SIGNAL_MSI"),
    Ioctl("KVM_SET_PMU_EVENT_FILTER", "W", 0xB2, "kvm_pmu_event_filter", "vm",
          "PMU_EVENT_FILTER", _X86),
    # --- vCPU
    Ioctl("KVM_RUN", "", 0x80, None, "vcpu"),
    Ioctl("KVM_GET_REGS", "R", 0x81, "kvm_regs", "vcpu", None, _X86),
    Ioctl("KVM_SET_REGS", "W", 0x82, "kvm_regs", "vcpu", None, _X86),
    Ioctl("KVM_GET_SREGS", "R", 0x83, "kvm_sregs", "vcpu", None, _X86),
    Ioctl("KVM_SET_SREGS", "W", 0x84, "kvm_sregs", "vcpu", None, _X86),
    Ioctl("KVM_TRANSLATE", "WR", 0x85, "kvm_translation", "vcpu", None, _X86),
    Ioctl("KVM_INTERRUPT", "W", 0x86, "kvm_interrupt", "vcpu", None, "x86/riscv"),
    Ioctl("KVM_GET_MSRS", "WR", 0x88, "kvm_msrs", "kvm vcpu", "GET_MSR_FEATURES", _X86),
    Ioctl("KVM_SET_MSRS", "W", 0x89, "kvm_msrs", "vcpu", None, _X86),
    Ioctl("KVM_SET_CPUID", "W", 0x8A, "kvm_cpuid", "vcpu", None, _X86),
    Ioctl("KVM_SET_SIGNAL_MASK", "W", 0x8B, "kvm_signal_mask", "vcpu"),
    Ioctl("KVM_GET_FPU", "R", 0x8C, "kvm_fpu", "vcpu", None, _X86),
    Ioctl("KVM_SET_FPU", "W", 0x8D, "kvm_fpu", "vcpu", None, _X86),
    Ioctl("KVM_GET_LAPIC", "R", 0x8E, "kvm_lapic_state", "vcpu", "IRQCHIP", _X86),
    Ioctl("KVM_SET_LAPIC", "W", 0x8F, "kvm_lapic_state", "vcpu", "IRQCHIP", _X86),
    Ioctl("KVM_SET_CPUID2", "W", 0x90, "kvm_cpuid2", "vcpu", "EXT_CPUID", _X86),
    Ioctl("KVM_GET_CPUID2", "WR", 0x91, "kvm_cpuid2", "vcpu", "EXT_CPUID", _X86),
    Ioctl("KVM_TPR_ACCESS_REPORTING", "WR", 0x92, "kvm_tpr_access_ctl", "vcpu", "VAPIC", _X86),
    Ioctl("KVM_SET_VAPIC_ADDR", "W", 0x93, "kvm_vapic_addr", "vcpu", "VAPIC", _X86),
    Ioctl("KVM_GET_MP_STATE", "R", 0x98, "kvm_mp_state", "vcpu", "MP_STATE"),
    Ioctl("KVM_SET_MP_STATE", "W", 0x99, "kvm_mp_state", "vcpu", "MP_STATE"),
    Ioctl("KVM_NMI", "", 0x9A, None, "vcpu", "USER_NMI", _X86),
    Ioctl("KVM_SET_GUEST_DEBUG", "W", 0x9B, "kvm_guest_debug", "vcpu", "SET_GUEST_DEBUG"),
    Ioctl("KVM_X86_SETUP_MCE", "W", 0x9C, "u64", "vcpu", "MCE", _X86),
    Ioctl("KVM_X86_GET_MCE_CAP_SUPPORTED", "R", 0x9D, "u64", "kvm", "MCE", _X86),
    Ioctl("KVM_X86_SET_MCE", "W", 0x9E, "kvm_x86_mce", "vcpu", "MCE", _X86),
    Ioctl("KVM_GET_VCPU_EVENTS", "R", 0x9F, "kvm_vcpu_events", "vcpu", "VCPU_EVENTS",
          "x86/arm64"),
    Ioctl("KVM_SET_VCPU_EVENTS", "W", 0xA0, "kvm_vcpu_events", "vcpu", "VCPU_EVENTS",
          "x86/arm64"),
    Ioctl("KVM_GET_DEBUGREGS", "R", 0xA1, "kvm_debugregs", "vcpu", "DEBUGREGS", _X86),
    Ioctl("KVM_SET_DEBUGREGS", "W", 0xA2, "kvm_debugregs", "vcpu", "DEBUGREGS", _X86),
    Ioctl("KVM_ENABLE_CAP", "W", 0xA3, "kvm_enable_cap", "vm vcpu", "ENABLE_CAP"),
    Ioctl("KVM_GET_XSAVE", "R", 0xA4, "kvm_xsave", "vcpu", "XSAVE", _X86),
    Ioctl("KVM_SET_XSAVE", "W", 0xA5, "kvm_xsave", "vcpu", "XSAVE", _X86),
    Ioctl("KVM_GET_XCRS", "R", 0xA6, "kvm_xcrs", "vcpu", "XCRS", _X86),
    Ioctl("KVM_SET_XCRS", "W", 0xA7, "kvm_xcrs", "vcpu", "XCRS", _X86),
    Ioctl("KVM_GET_ONE_REG", "W", 0xAB, "kvm_one_reg", "vcpu", "ONE_REG"),
    Ioctl("KVM_SET_ONE_REG", "W", 0xAC, "kvm_one_reg", "vcpu", "ONE_REG"),
    Ioctl("KVM_KVMCLOCK_CTRL", "", 0xAD, None, "vcpu", "KVMCLOCK_CTRL", _X86),
    Ioctl("KVM_GET_REG_LIST", "WR", 0xB0, "kvm_reg_list", "vcpu", "ONE_REG"),
    Ioctl("KVM_SMI", "", 0xB7, None, "vcpu", "X86_SMM", _X86),
    Ioctl("KVM_MEMORY_ENCRYPT_OP", "WR", 0xBA, "unsigned long", "vm vcpu", None, _X86),
    Ioctl("KVM_MEMORY_ENCRYPT_REG_REGION", "R", 0xBB, "kvm_enc_region", "vm", None, _X86),
    Ioctl("KVM_MEMORY_ENCRYPT_UNREG_REGION", "R", 0xBC, "kvm_enc_region", "vm", None, _X86),
    Ioctl("KVM_HYPERV_EVENTFD", "W", 0xBD, "kvm_hyperv_eventfd", "vm", "HYPERV_EVENTFD", _X86),
    Ioctl("KVM_GET_NESTED_STATE", "WR", 0xBE, "kvm_nested_state", "vcpu", "NESTED_STATE", _X86),
    Ioctl("KVM_SET_NESTED_STATE", "W", 0xBF, "kvm_nested_state", "vcpu", "NESTED_STATE", _X86),
    Ioctl("KVM_CLEAR_DIRTY_LOG", "WR", 0xC0, "kvm_clear_dirty_log", "vm",
          "MANUAL_DIRTY_LOG_PROTECT2"),
    Ioctl("KVM_GET_SUPPORTED_HV_CPUID", "WR", 0xC1, "kvm_cpuid2", "kvm vcpu", "HYPERV_CPUID",
          _X86),
    Ioctl("KVM_X86_SET_MSR_FILTER", "W", 0xC6, "kvm_msr_filter", "vm", "X86_MSR_FILTER", _X86),
    Ioctl("KVM_RESET_DIRTY_RINGS", "", 0xC7, None, "vm", "DIRTY_LOG_RING"),
    Ioctl("KVM_XEN_HVM_GET_ATTR", "WR", 0xC8, "kvm_xen_hvm_attr", "vm", "XEN_HVM", _X86),
    Ioctl("KVM_XEN_HVM_SET_ATTR", "W", 0xC9, "kvm_xen_hvm_attr", "vm", "XEN_HVM", _X86),
    Ioctl("KVM_XEN_VCPU_GET_ATTR", "WR", 0xCA, "kvm_xen_vcpu_attr", "vcpu", "XEN_HVM", _X86),
    Ioctl("KVM_XEN_VCPU_SET_ATTR", "W", 0xCB, "kvm_xen_vcpu_attr", "vcpu", "XEN_HVM", _X86),
    Ioctl("KVM_GET_SREGS2", "R", 0xCC, "kvm_sregs2", "vcpu", "SREGS2", _X86),
    Ioctl("KVM_SET_SREGS2", "W", 0xCD, "kvm_sregs2", "vcpu", "SREGS2", _X86),
    Ioctl("KVM_GET_STATS_FD", "", 0xCE, None, "vm vcpu", "BINARY_STATS_FD"),
    Ioctl("KVM_GET_XSAVE2", "R", 0xCF, "kvm_xsave", "vcpu", "XSAVE2", _X86),
    Ioctl("KVM_XEN_HVM_EVTCHN_SEND", "W", 0xD0, "kvm_irq_routing_xen_evtchn", "vm", "XEN_HVM",
          _X86),
    Ioctl("KVM_SET_MEMORY_ATTRIBUTES", "W", 0xD2, "kvm_memory_attributes", "vm",
          "MEMORY_ATTRIBUTES"),
    Ioctl("KVM_CREATE_GUEST_MEMFD", "WR", 0xD4, "kvm_create_guest_memfd", "vm", "GUEST_MEMFD"),
    Ioctl("KVM_PRE_FAULT_MEMORY", "WR", 0xD5, "kvm_pre_fault_memory", "vcpu", "PRE_FAULT_MEMORY"),
    # --- arm64
    Ioctl("KVM_ARM_SET_DEVICE_ADDR", "W", 0xAB, "kvm_arm_device_addr", "vm",
          "ARM_SET_DEVICE_ADDR", "arm64"),
    Ioctl("KVM_ARM_VCPU_INIT", "W", 0xAE, "kvm_vcpu_init", "vcpu", None, "arm64"),
    Ioctl("KVM_ARM_PREFERRED_TARGET", "R", 0xAF, "kvm_vcpu_init", "vm", None, "arm64"),
    Ioctl("KVM_ARM_MTE_COPY_TAGS", "R", 0xB4, "kvm_arm_copy_mte_tags", "vm", "ARM_MTE", "arm64"),
    Ioctl("KVM_ARM_SET_COUNTER_OFFSET", "W", 0xB5, "kvm_arm_counter_offset", "vm",
          "COUNTER_OFFSET", "arm64"),
    Ioctl("KVM_ARM_GET_REG_WRITABLE_MASKS", "R", 0xB6, "reg_mask_range", "vm",
          "ARM_SUPPORTED_REG_MASK_RANGES", "arm64"),
    Ioctl("KVM_ARM_VCPU_FINALIZE", "W", 0xC2, "int", "vcpu", "ARM_SVE", "arm64"),
    # --- devices
    Ioctl("KVM_CREATE_DEVICE", "WR", 0xE0, "kvm_create_device", "vm", "DEVICE_CTRL"),
    Ioctl("KVM_SET_DEVICE_ATTR", "W", 0xE1, "kvm_device_attr", "kvm vm vcpu device",
          "DEVICE_CTRL"),
    Ioctl("KVM_GET_DEVICE_ATTR", "W", 0xE2, "kvm_device_attr", "kvm vm vcpu device",
          "DEVICE_CTRL"),
    Ioctl("KVM_HAS_DEVICE_ATTR", "W", 0xE3, "kvm_device_attr", "kvm vm vcpu device",
          "DEVICE_CTRL"),
)  # fmt: skip


def find(request: int) -> Ioctl | None:
    """The row of a request number as the system call takes it, or None for a foreign one.

    >>> find(0xAE80).name
    'KVM_RUN'
    """
    return _by_number().get(request)


@cache
def _by_number() -> dict[int, Ioctl]:
    """All rows by each machine's number; where two share one, that of this machine speaks."""
    rows = sorted(IOCTLS, key=lambda row: not row.on(HOST))
    found: dict[int, Ioctl] = {}
    for row in rows:
        for machine in MACHINES.values():
            if row.wrapped and row.on(machine):
                found.setdefault(row.number(machine), row)
    return found
