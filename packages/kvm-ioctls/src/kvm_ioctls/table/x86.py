"""Layouts of the structures that only x86 has, written as in kvm_ioctls.table.structs."""

from __future__ import annotations

__all__ = ["STRUCTS"]

_SEGMENTS = "kvm_segment cs ds es fs gs ss tr ldt; kvm_dtable gdt idt"
_CONTROL = "u64 cr0 cr2 cr3 cr4 cr8 efer apic_base"

STRUCTS: dict[str, str] = {
    # --- system
    "kvm_msr_list": "u32 nmsrs indices[]",
    "kvm_cpuid_entry": "u32 function eax ebx ecx edx padding",
    "kvm_cpuid": "u32 nent padding; kvm_cpuid_entry entries[]",
    "kvm_cpuid_entry2": "u32 function index flags eax ebx ecx edx padding[3]",
    "kvm_cpuid2": "u32 nent padding; kvm_cpuid_entry2 entries[]",
    "kvm_msr_entry": "u32 index reserved; u64 data",
    "kvm_msrs": "u32 nmsrs pad; kvm_msr_entry entries[]",
    # --- interrupts and events
    "kvm_pic_state": (
        "u8 last_irr irr imr isr priority_add irq_base read_reg_select poll special_mask init_state"
        " auto_eoi rotate_on_auto_eoi special_fully_nested_mode init4 elcr elcr_mask"
    ),
    "kvm_ioapic_state": "u64 base_address; u32 ioregsel id irr pad; u64 redirtbl[24]",
    "kvm_hyperv_eventfd": "u32 conn_id; s32 fd; u32 flags padding[3]",
    # --- timers and clock
    "kvm_pit_channel_state": (
        "u32 count; u16 latched_count; u8 count_latched status_latched status read_state"
        " write_state write_latch rw_mode mode bcd gate; s64 count_load_time"
    ),
    "kvm_pit_state": "kvm_pit_channel_state channels[3]",
    "kvm_pit_state2": "kvm_pit_channel_state channels[3]; u32 flags reserved[9]",
    "kvm_reinject_control": "u8 pit_reinject reserved[31]",
    # --- vCPU state
    "kvm_regs": "u64 rax rbx rcx rdx rsi rdi rsp rbp r8 r9 r10 r11 r12 r13 r14 r15 rip rflags",
    "kvm_segment": (
        "u64 base; u32 limit; u16 selector; u8 type present dpl db s l g avl unusable padding"
    ),
    "kvm_dtable": "u64 base; u16 limit padding[3]",
    "kvm_sregs": f"{_SEGMENTS}; {_CONTROL} interrupt_bitmap[4]",
    "kvm_sregs2": f"{_SEGMENTS}; {_CONTROL} flags pdptrs[4]",
    "kvm_fpu": (
        "u8 fpr[128]; u16 fcw fsw; u8 ftwx pad1; u16 last_opcode; u64 last_ip last_dp;"
        " u8 xmm[256]; u32 mxcsr pad2"
    ),
    "kvm_lapic_state": "u8 regs[1024]",
    "kvm_xsave": "u32 region[1024] extra[]",
    "kvm_xcr": "u32 xcr reserved; u64 value",
    "kvm_xcrs": "u32 nr_xcrs flags; kvm_xcr xcrs[16]; u64 padding[16]",
    "kvm_debugregs": "u64 db[4] dr6 dr7 flags reserved[9]",
    "kvm_vcpu_events": (
        "u32 exception[2]; u8 interrupt[4] nmi[4]; u32 sipi_vector flags; u8 smi[4]"
        " triple_fault reserved[26] exception_has_payload; u64 exception_payload"
    ),
    "kvm_nested_state": "u16 flags format; u32 size; u64 hdr[15]; u8 data[]",
    "kvm_debug_exit_arch": "u32 exception pad; u64 pc dr6 dr7",
    "kvm_guest_debug_arch": "u64 debugreg[8]",
    "kvm_guest_debug": "u32 control pad; kvm_guest_debug_arch arch",
    "kvm_sync_regs": "kvm_regs regs; kvm_sregs sregs; kvm_vcpu_events events",
    "kvm_x86_mce": "u64 status addr misc mcg_status; u8 bank pad1[7]; u64 pad2[3]",
    # --- filters
    "kvm_msr_filter_range": "u32 flags nmsrs base; u64 bitmap",
    "kvm_msr_filter": "u32 flags; kvm_msr_filter_range ranges[16]",
    "kvm_pmu_event_filter": "u32 action nevents fixed_counter_bitmap flags pad[4]; u64 events[]",
    # --- Xen, SEV, TDX
    "kvm_xen_hvm_config": (
        "u32 flags msr; u64 blob_addr_32 blob_addr_64; u8 blob_size_32 blob_size_64 pad2[30]"
    ),
    "kvm_xen_hvm_attr": "u16 type pad[3]; u64 u[8]",
    "kvm_xen_vcpu_attr": "u16 type pad[3]; u64 u[8]",
    "kvm_sev_cmd": "u32 id; u64 data; u32 error sev_fd",
    "kvm_tdx_cmd": "u32 id flags; u64 data hw_error",
}
