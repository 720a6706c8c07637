"""Layouts of KVM's structures, declared once.

Each is written as C would write it, but shorter: groups separated by `;`, the type first, then the
names. A type is `u8` to `u64`, `s16` to `s64`, or another structure's name; `name[4]` is an array
and `name[]` a flexible one, which takes no room. Unions are given as the array that pads them.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["STRUCTS", "Field", "Layout", "layout"]

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
    "kvm_enable_cap": "u32 cap flags; u64 args[4]; u8 pad[64]",
    "kvm_device_attr": "u32 flags group; u64 attr addr",
    "kvm_create_device": "u32 type fd flags",
    # --- memory
    "kvm_userspace_memory_region": "u32 slot flags; u64 guest_phys_addr memory_size userspace_addr",
    "kvm_userspace_memory_region2": (
        "u32 slot flags; u64 guest_phys_addr memory_size userspace_addr guest_memfd_offset;"
        "u32 guest_memfd pad1; u64 pad2[14]"
    ),
    "kvm_memory_attributes": "u64 address size attributes flags",
    "kvm_create_guest_memfd": "u64 size flags reserved[6]",
    "kvm_pre_fault_memory": "u64 gpa size flags padding[5]",
    "kvm_dirty_log": "u32 slot padding1; u64 dirty_bitmap",
    "kvm_clear_dirty_log": "u32 slot num_pages; u64 first_page dirty_bitmap",
    "kvm_dirty_gfn": "u32 flags slot; u64 offset",
    "kvm_coalesced_mmio_zone": "u64 addr; u32 size pio",
    "kvm_coalesced_mmio": "u64 phys_addr; u32 len pio; u8 data[8]",
    "kvm_coalesced_mmio_ring": "u32 first last; kvm_coalesced_mmio coalesced_mmio[]",
    "kvm_enc_region": "u64 addr size",
    # --- interrupts and events
    "kvm_irq_level": "u32 irq level",
    "kvm_pic_state": (
        "u8 last_irr irr imr isr priority_add irq_base read_reg_select poll special_mask init_state"
        " auto_eoi rotate_on_auto_eoi special_fully_nested_mode init4 elcr elcr_mask"
    ),
    "kvm_ioapic_state": "u64 base_address; u32 ioregsel id irr pad; u64 redirtbl[24]",
    "kvm_irqchip": "u32 chip_id pad; u64 chip[64]",
    "kvm_irq_routing_irqchip": "u32 irqchip pin",
    "kvm_irq_routing_msi": "u32 address_lo address_hi data devid",
    "kvm_irq_routing_hv_sint": "u32 vcpu sint",
    "kvm_irq_routing_xen_evtchn": "u32 port vcpu priority",
    "kvm_irq_routing_entry": "u32 gsi type flags pad; u64 u[4]",
    "kvm_irq_routing": "u32 nr flags; kvm_irq_routing_entry entries[]",
    "kvm_irqfd": "u32 fd gsi flags resamplefd; u8 pad[16]",
    "kvm_ioeventfd": "u64 datamatch addr; u32 len; s32 fd; u32 flags; u8 pad[36]",
    "kvm_msi": "u32 address_lo address_hi data flags devid; u8 pad[12]",
    "kvm_interrupt": "u32 irq",
    "kvm_tpr_access_ctl": "u32 enabled flags reserved[8]",
    "kvm_vapic_addr": "u64 vapic_addr",
    "kvm_hyperv_eventfd": "u32 conn_id; s32 fd; u32 flags padding[3]",
    # --- timers and clock
    "kvm_pit_config": "u32 flags pad[15]",
    "kvm_pit_channel_state": (
        "u32 count; u16 latched_count; u8 count_latched status_latched status read_state"
        " write_state write_latch rw_mode mode bcd gate; s64 count_load_time"
    ),
    "kvm_pit_state": "kvm_pit_channel_state channels[3]",
    "kvm_pit_state2": "kvm_pit_channel_state channels[3]; u32 flags reserved[9]",
    "kvm_reinject_control": "u8 pit_reinject reserved[31]",
    "kvm_clock_data": "u64 clock; u32 flags pad0; u64 realtime host_tsc; u32 pad[4]",
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
    "kvm_mp_state": "u32 mp_state",
    "kvm_vcpu_events": (
        "u32 exception[2]; u8 interrupt[4] nmi[4]; u32 sipi_vector flags; u8 smi[4]"
        " triple_fault reserved[26] exception_has_payload; u64 exception_payload"
    ),
    "kvm_nested_state": "u16 flags format; u32 size; u64 hdr[15]; u8 data[]",
    "kvm_one_reg": "u64 id addr",
    "kvm_reg_list": "u64 n reg[]",
    "kvm_translation": "u64 linear_address physical_address; u8 valid writeable usermode pad[5]",
    "kvm_guest_debug": "u32 control pad; u64 arch[8]",
    "kvm_debug_exit_arch": "u32 exception pad; u64 pc dr6 dr7",
    "kvm_signal_mask": "u32 len; u8 sigset[]",
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
    # --- statistics
    "kvm_stats_header": "u32 flags name_size num_desc id_offset desc_offset data_offset",
    "kvm_stats_desc": "u32 flags; s16 exponent; u16 size; u32 offset bucket_size; u8 name[]",
    # --- plain values that an ioctl's number carries the size of
    "u64": "u64 value",
    "unsigned long": "u64 value",
}

# Structures that headers older than the given macro do not know, or lay out differently.
GUARDS: dict[str, str] = {
    "kvm_userspace_memory_region2": "KVM_SET_USER_MEMORY_REGION2",
    "kvm_memory_attributes": "KVM_SET_MEMORY_ATTRIBUTES",
    "kvm_create_guest_memfd": "KVM_CREATE_GUEST_MEMFD",
    "kvm_pre_fault_memory": "KVM_PRE_FAULT_MEMORY",
    "kvm_tdx_cmd": "KVM_TDX_MEASURE_MEMORY_REGION",
}


class Field(NamedTuple):
    """One member of a structure: where it lies and how large it is, in bytes."""

    name: str
    type: str
    offset: int
    size: int
    length: int


class Layout(NamedTuple):
    """A whole structure: its size and alignment in bytes, and its members in order."""

    name: str
    size: int
    alignment: int
    fields: tuple[Field, ...]

    def offset(self, field: str) -> int:
        """The offset of the member called `field`; KeyError if there is none."""
        for member in self.fields:
            if member.name == field:
                return member.offset
        raise KeyError(f"{self.name} has no member {field}")


_cache: dict[str, Layout] = {}


def _measure(type_name: str) -> tuple[int, int]:
    if type_name[0] in "us" and type_name[1:].isdigit():
        size = int(type_name[1:]) // 8
        return size, size
    inner = layout(type_name)
    return inner.size, inner.alignment


def layout(name: str) -> Layout:
    """The layout of a structure by its C rules on a 64-bit machine; KeyError if not declared.

    >>> layout("kvm_regs").size
    144
    >>> layout("kvm_userspace_memory_region").offset("userspace_addr")
    24
    """
    if name in _cache:
        return _cache[name]
    offset, widest, fields = 0, 1, []
    for group in STRUCTS[name].split(";"):
        type_name, *members = group.split()
        size, alignment = _measure(type_name)
        widest = max(widest, alignment)
        for member in members:
            base, bracket, length = member.partition("[")
            count = 1 if not bracket else int(length.rstrip("]") or 0)
            offset = -(-offset // alignment) * alignment
            fields.append(Field(base, type_name, offset, size, count))
            offset += size * count
    result = Layout(name, -(-offset // widest) * widest, widest, tuple(fields))
    _cache[name] = result
    return result
