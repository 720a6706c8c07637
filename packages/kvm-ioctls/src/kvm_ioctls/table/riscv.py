"""Layouts of the structures that only RISC-V has, written as in kvm_ioctls.table.structs."""

from __future__ import annotations

__all__ = ["STRUCTS"]

STRUCTS: dict[str, str] = {
    "kvm_guest_debug": "u32 control pad",
    # Registers are moved one by one (KVM_GET_ONE_REG); offsets in these structures are their ids.
    "kvm_riscv_config": (
        "u64 isa zicbom_block_size mvendorid marchid mimpid zicboz_block_size satp_mode"
        " zicbop_block_size"
    ),
    "kvm_riscv_core": "u64 regs[32] mode",
    "kvm_riscv_csr": (
        "u64 sstatus sie stvec sscratch sepc scause stval sip satp scounteren senvcfg"
    ),
    "kvm_riscv_aia_csr": "u64 siselect iprio1 iprio2 sieh siph iprio1h iprio2h",
    "kvm_riscv_smstateen_csr": "u64 sstateen0",
    "kvm_riscv_timer": "u64 frequency time compare state",
    "kvm_riscv_sbi_sta": "u64 shmem_lo shmem_hi",
}
