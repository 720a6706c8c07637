"""Layouts of the structures that only arm64 has, written as in kvm_ioctls.table.structs."""

from __future__ import annotations

__all__ = ["STRUCTS"]

STRUCTS: dict[str, str] = {
    # user_pt_regs, two registers, SPSRs and, aligned to 16 bytes, user_fpsimd_state; KVM moves them
    # one by one (KVM_GET_ONE_REG), and their offsets are their ids.
    "kvm_regs": "u64 regs[34] sp_el1 elr_el1 spsr[5] _fill fp_regs[66]",
    "kvm_vcpu_init": "u32 target features[7]",
    "kvm_guest_debug_arch": "u64 dbg_bcr[16] dbg_bvr[16] dbg_wcr[16] dbg_wvr[16]",
    "kvm_guest_debug": "u32 control pad; kvm_guest_debug_arch arch",
    "kvm_debug_exit_arch": "u32 hsr hsr_high; u64 far",
    "kvm_sync_regs": "u64 device_irq_level",
    "kvm_vcpu_events": "u64 exception[2]; u32 reserved[12]",
    "kvm_pmu_event_filter": "u16 base_event nevents; u8 action pad[3]",
    "kvm_arm_device_addr": "u64 id addr",
    "kvm_arm_copy_mte_tags": "u64 guest_ipa length addr flags reserved[2]",
    "kvm_arm_counter_offset": "u64 counter_offset reserved",
    "kvm_smccc_filter": "u32 base nr_functions; u8 action pad[15]",
    "reg_mask_range": "u64 addr; u32 range reserved[13]",
}
