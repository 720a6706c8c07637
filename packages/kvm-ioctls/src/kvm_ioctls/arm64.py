"""KVM on arm64: constants, register ids and interrupt numbers.

It can be imported anywhere; what it names works where the machine is one.

>>> hex(core_reg("pc"))
'0x6030000000100040'
>>> hex(sys_reg(3, 0, 0, 0, 0))  # MIDR_EL1
'0x603000000013c000'
"""

from __future__ import annotations

from kvm_ioctls.table.structs import layout

__all__ = ["core_reg", "irq_number", "sys_reg"]

KVM_ARM_TARGET_GENERIC_V8 = 5
KVM_ARM_VCPU_POWER_OFF = 0
KVM_ARM_VCPU_EL1_32BIT = 1
KVM_ARM_VCPU_PSCI_0_2 = 2
KVM_ARM_VCPU_PMU_V3 = 3
KVM_ARM_VCPU_SVE = 4
KVM_ARM_VCPU_PTRAUTH_ADDRESS = 5
KVM_ARM_VCPU_PTRAUTH_GENERIC = 6
KVM_ARM_VCPU_HAS_EL2 = 7
KVM_ARM_VCPU_HAS_EL2_E2H0 = 8
KVM_ARM_DEVICE_VGIC_V2 = 0
KVM_VGIC_V2_ADDR_TYPE_DIST = 0
KVM_VGIC_V2_ADDR_TYPE_CPU = 1
KVM_VGIC_V3_ADDR_TYPE_DIST = 2
KVM_VGIC_V3_ADDR_TYPE_REDIST = 3
KVM_VGIC_ITS_ADDR_TYPE = 4
KVM_VGIC_V3_ADDR_TYPE_REDIST_REGION = 5
KVM_DEV_ARM_VGIC_GRP_ADDR = 0
KVM_DEV_ARM_VGIC_GRP_DIST_REGS = 1
KVM_DEV_ARM_VGIC_GRP_CPU_REGS = 2
KVM_DEV_ARM_VGIC_GRP_NR_IRQS = 3
KVM_DEV_ARM_VGIC_GRP_CTRL = 4
KVM_DEV_ARM_VGIC_GRP_REDIST_REGS = 5
KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS = 6
KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO = 7
KVM_DEV_ARM_VGIC_GRP_ITS_REGS = 8
KVM_DEV_ARM_VGIC_CTRL_INIT = 0
KVM_DEV_ARM_ITS_SAVE_TABLES = 1
KVM_DEV_ARM_ITS_RESTORE_TABLES = 2
KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES = 3
KVM_DEV_ARM_ITS_CTRL_RESET = 4
KVM_ARM_VCPU_PMU_V3_CTRL = 0
KVM_ARM_VCPU_PMU_V3_IRQ = 0
KVM_ARM_VCPU_PMU_V3_INIT = 1
KVM_ARM_VCPU_PMU_V3_FILTER = 2
KVM_ARM_VCPU_TIMER_CTRL = 1
KVM_ARM_VCPU_TIMER_IRQ_VTIMER = 0
KVM_ARM_VCPU_TIMER_IRQ_PTIMER = 1
KVM_ARM_VCPU_PVTIME_CTRL = 2
KVM_ARM_VCPU_PVTIME_IPA = 0
KVM_ARM_VM_SMCCC_CTRL = 0
KVM_ARM_VM_SMCCC_FILTER = 0
KVM_ARM_TAGS_TO_GUEST = 0
KVM_ARM_TAGS_FROM_GUEST = 1
KVM_ARM_IRQ_TYPE_CPU = 0
KVM_ARM_IRQ_TYPE_SPI = 1
KVM_ARM_IRQ_TYPE_PPI = 2
KVM_ARM_FEATURE_ID_RANGE = 0
KVM_SYSTEM_EVENT_RESET_FLAG_PSCI_RESET2 = 1
KVM_SYSTEM_EVENT_SHUTDOWN_FLAG_PSCI_OFF2 = 1
KVM_HYPERCALL_EXIT_SMC = 1
KVM_HYPERCALL_EXIT_16BIT = 2

_ARM64, _U32, _U64, _U128 = 6 << 60, 2 << 52, 3 << 52, 4 << 52
_CORE, _SYSREG = 0x10 << 16, 0x13 << 16


def core_reg(name: str) -> int:
    """The id of a core register, for get_one_reg() and set_one_reg().

    Args:
        name: `x0` to `x30`, `sp`, `pc`, `pstate`, `sp_el1`, `elr_el1`, `spsr0` to `spsr4`, `v0` to
            `v31`, `fpsr` or `fpcr`.

    Raises:
        KeyError: there is no such register.
    """
    regs = layout("kvm_regs", "arm64")
    places = {f"x{n}": 8 * n for n in range(31)} | {"sp": 248, "pc": 256, "pstate": 264}
    places |= {f"spsr{n}": regs.offset("spsr") + 8 * n for n in range(5)}
    places |= {each: regs.offset(each) for each in ("sp_el1", "elr_el1")}
    vectors = regs.offset("fp_regs")
    if name[0] == "v" and name[1:].isdigit() and int(name[1:]) < 32:
        return _ARM64 | _U128 | _CORE | (vectors + 16 * int(name[1:])) // 4
    if name in ("fpsr", "fpcr"):
        return _ARM64 | _U32 | _CORE | (vectors + 512 + 4 * (name == "fpcr")) // 4
    return _ARM64 | _U64 | _CORE | places[name] // 4


def sys_reg(op0: int, op1: int, crn: int, crm: int, op2: int) -> int:
    """The id of a system register by the fields of its MRS encoding (Arm ARM, C5.2)."""
    return _ARM64 | _U64 | _SYSREG | op0 << 14 | op1 << 11 | crn << 7 | crm << 3 | op2


def irq_number(kind: int, number: int, vcpu: int = 0) -> int:
    """What Vm.irq_line() takes as interrupt.

    Args:
        kind: KVM_ARM_IRQ_TYPE_*.
        number: the interrupt, 16 bits.
        vcpu: the vCPU's index, 12 bits, for what belongs to one.
    """
    return (vcpu >> 8 & 15) << 28 | kind << 24 | (vcpu & 255) << 16 | number


# What the headers must agree with, beyond the constants above: expressions of C and our values.
EXPRESSIONS: dict[str, int] = {
    "ARM64_SYS_REG(3, 3, 14, 3, 1)": sys_reg(3, 3, 14, 3, 1),
    "ARM64_SYS_REG(3, 0, 0, 4, 7)": sys_reg(3, 0, 0, 4, 7),
    **{
        f"(KVM_REG_ARM64 | KVM_REG_SIZE_{size} | KVM_REG_ARM_CORE | KVM_REG_ARM_CORE_REG({c}))":
        core_reg(name)
        for size, c, name in (
            ("U64", "regs.regs[7]", "x7"), ("U64", "regs.sp", "sp"), ("U64", "regs.pc", "pc"),
            ("U64", "regs.pstate", "pstate"), ("U64", "sp_el1", "sp_el1"),
            ("U64", "elr_el1", "elr_el1"), ("U64", "spsr[2]", "spsr2"),
            ("U128", "fp_regs.vregs[31]", "v31"), ("U32", "fp_regs.fpsr", "fpsr"),
            ("U32", "fp_regs.fpcr", "fpcr"),
        )
    },
}  # fmt: skip
