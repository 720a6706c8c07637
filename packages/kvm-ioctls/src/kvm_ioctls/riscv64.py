"""KVM on RISC-V: constants and register ids. It can be imported anywhere.

>>> hex(core_reg("pc"))
'0x8030000002000000'
"""

from __future__ import annotations

from kvm_ioctls.table.structs import layout

__all__ = ["config_reg", "core_reg", "csr_reg", "isa_ext_reg", "sbi_ext_reg", "timer_reg"]

KVM_RISCV_MODE_S = 1
KVM_RISCV_MODE_U = 0
KVM_INTERRUPT_SET = 0xFFFFFFFF
KVM_INTERRUPT_UNSET = 0xFFFFFFFE
KVM_RISCV_TIMER_STATE_OFF = 0
KVM_RISCV_TIMER_STATE_ON = 1
KVM_DEV_RISCV_AIA_GRP_CONFIG = 0
KVM_DEV_RISCV_AIA_CONFIG_MODE = 0
KVM_DEV_RISCV_AIA_CONFIG_IDS = 1
KVM_DEV_RISCV_AIA_CONFIG_SRCS = 2
KVM_DEV_RISCV_AIA_CONFIG_GROUP_BITS = 3
KVM_DEV_RISCV_AIA_CONFIG_GROUP_SHIFT = 4
KVM_DEV_RISCV_AIA_CONFIG_HART_BITS = 5
KVM_DEV_RISCV_AIA_CONFIG_GUEST_BITS = 6
KVM_DEV_RISCV_AIA_GRP_ADDR = 1
KVM_DEV_RISCV_AIA_ADDR_APLIC = 0
KVM_DEV_RISCV_AIA_GRP_CTRL = 2
KVM_DEV_RISCV_AIA_CTRL_INIT = 0
KVM_DEV_RISCV_AIA_GRP_APLIC = 3
KVM_DEV_RISCV_AIA_GRP_IMSIC = 4

_RISCV, _U64 = 8 << 60, 3 << 52
_CONFIG, _CORE, _CSR, _TIMER, _ISA, _SBI = (kind << 24 for kind in (1, 2, 3, 4, 7, 8))
_NAMES = (
    "pc", "ra", "sp", "gp", "tp", "t0", "t1", "t2", "s0", "s1",
    *(f"a{n}" for n in range(8)), *(f"s{n}" for n in range(2, 12)), "t3", "t4", "t5", "t6", "mode",
)  # fmt: skip
_CSRS = {"general": "kvm_riscv_csr", "aia": "kvm_riscv_aia_csr",
         "smstateen": "kvm_riscv_smstateen_csr"}  # fmt: skip


def _id(kind: int, struct: str, name: str) -> int:
    return _RISCV | _U64 | kind | layout(struct, "riscv").offset(name) // 8


def config_reg(name: str) -> int:
    """The id of a configuration register: `isa`, `mvendorid`, ...; KeyError if there is none."""
    return _id(_CONFIG, "kvm_riscv_config", name)


def core_reg(name: str) -> int:
    """The id of `pc`, a general register by its ABI name, or `mode`; KeyError if there is none."""
    if name not in _NAMES:
        raise KeyError(name)
    return _RISCV | _U64 | _CORE | _NAMES.index(name)


def csr_reg(name: str, group: str = "general") -> int:
    """The id of a control register.

    Args:
        name: `sstatus`, `sie`, `stvec` and so on.
        group: `general`, `aia` or `smstateen`.

    Raises:
        KeyError: there is no such register.
    """
    return _id(_CSR | list(_CSRS).index(group) << 16, _CSRS[group], name)


def timer_reg(name: str) -> int:
    """The id of `frequency`, `time`, `compare` or `state`."""
    return _id(_TIMER, "kvm_riscv_timer", name)


def isa_ext_reg(extension: int) -> int:
    """The id of the switch of an ISA extension, by KVM's number of it."""
    return _RISCV | _U64 | _ISA | extension


def sbi_ext_reg(extension: int) -> int:
    """The id of the switch of an SBI extension, by KVM's number of it."""
    return _RISCV | _U64 | _SBI | extension


_HEAD = "KVM_REG_RISCV | KVM_REG_SIZE_U64"
# What the headers must agree with, beyond the constants above: expressions of C and our values.
EXPRESSIONS: dict[str, int] = {
    f"({_HEAD} | KVM_REG_RISCV_CONFIG | KVM_REG_RISCV_CONFIG_REG(isa))": config_reg("isa"),
    f"({_HEAD} | KVM_REG_RISCV_CORE | KVM_REG_RISCV_CORE_REG(mode))": core_reg("mode"),
    f"({_HEAD} | KVM_REG_RISCV_CORE | KVM_REG_RISCV_CORE_REG(regs.t6))": core_reg("t6"),
    f"({_HEAD} | KVM_REG_RISCV_CORE | KVM_REG_RISCV_CORE_REG(regs.a0))": core_reg("a0"),
    f"({_HEAD} | KVM_REG_RISCV_CSR | KVM_REG_RISCV_CSR_REG(satp))": csr_reg("satp"),
    f"({_HEAD} | KVM_REG_RISCV_TIMER | KVM_REG_RISCV_TIMER_REG(state))": timer_reg("state"),
    f"({_HEAD} | KVM_REG_RISCV_ISA_EXT | 5)": isa_ext_reg(5),
}
