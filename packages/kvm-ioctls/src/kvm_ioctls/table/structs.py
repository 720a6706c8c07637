"""Layouts of KVM's structures that all architectures share, and what a declaration means.

Each structure is written as C would write it, but shorter: groups separated by `;`, the type
first, then the names. A type is `u8` to `u64`, `s16` to `s64`, or another structure's name;
`name[4]` is an array and `name[]` a flexible one, which takes no room. Unions are given as the
array that pads them. Names with a leading underscore are ours: the header has none, or an unnamed
part.
"""

from __future__ import annotations

from typing import NamedTuple

from kvm_ioctls.table import arm64, riscv, x86

__all__ = ["ARCHITECTURES", "GENERIC", "GUARDS", "Field", "Layout", "layout", "structs"]

GENERIC: dict[str, str] = {
    # --- system
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
    # --- timers and clock
    "kvm_pit_config": "u32 flags pad[15]",
    "kvm_clock_data": "u64 clock; u32 flags pad0; u64 realtime host_tsc; u32 pad[4]",
    # --- vCPU state
    "kvm_mp_state": "u32 mp_state",
    "kvm_one_reg": "u64 id addr",
    "kvm_reg_list": "u64 n reg[]",
    "kvm_translation": "u64 linear_address physical_address; u8 valid writeable usermode pad[5]",
    "kvm_signal_mask": "u32 len; u8 sigset[]",
    # --- statistics
    "kvm_stats_header": "u32 flags name_size num_desc id_offset desc_offset data_offset",
    "kvm_stats_desc": "u32 flags; s16 exponent; u16 size; u32 offset bucket_size; u8 name[]",
    # --- the page shared with a vCPU; what an exit says lies in the union, see table.exits
    "kvm_run": (
        "u8 request_interrupt_window immediate_exit padding1[6]; u32 exit_reason;"
        " u8 ready_for_interrupt_injection if_flag; u16 flags; u64 cr8 apic_base _union[32]"
        " kvm_valid_regs kvm_dirty_regs _sync[256]"
    ),
    # --- plain values that an ioctl's number carries the size of
    "u64": "u64 value",
    "unsigned long": "u64 value",
    "int": "u32 value",
}

_OWN = {"x86": x86.STRUCTS, "arm64": arm64.STRUCTS, "riscv": riscv.STRUCTS}

ARCHITECTURES = tuple(_OWN)
"""The architectures whose layouts are declared; all of them have 64 bits, little-endian."""

# Structures that headers older than the given macro do not know, or lay out differently.
GUARDS: dict[str, str] = {
    "kvm_userspace_memory_region2": "KVM_SET_USER_MEMORY_REGION2",
    "kvm_memory_attributes": "KVM_SET_MEMORY_ATTRIBUTES",
    "kvm_create_guest_memfd": "KVM_CREATE_GUEST_MEMFD",
    "kvm_pre_fault_memory": "KVM_PRE_FAULT_MEMORY",
    "kvm_tdx_cmd": "KVM_TDX_MEASURE_MEMORY_REGION",
    "kvm_arm_counter_offset": "KVM_ARM_SET_COUNTER_OFFSET",
    "reg_mask_range": "KVM_ARM_GET_REG_WRITABLE_MASKS",
    "kvm_smccc_filter": "KVM_ARM_VM_SMCCC_FILTER",
    "kvm_riscv_config": "KVM_REG_RISCV_SBI_FWFT",
    "kvm_riscv_csr": "KVM_REG_RISCV_CSR_SMSTATEEN",
    "kvm_riscv_aia_csr": "KVM_REG_RISCV_CSR_AIA",
    "kvm_riscv_smstateen_csr": "KVM_REG_RISCV_CSR_SMSTATEEN",
    "kvm_riscv_sbi_sta": "KVM_REG_RISCV_SBI_STATE",
}


class Field(NamedTuple):
    """One member of a structure: where it lies and how large it is, in bytes."""

    name: str
    kind: str
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


_cache: dict[tuple[str, str], Layout] = {}


def structs(architecture: str = "x86") -> dict[str, str]:
    """The declarations of all structures that an architecture's headers have."""
    return GENERIC | _OWN[architecture]


def _measure(type_name: str, architecture: str) -> tuple[int, int]:
    if type_name[0] in "us" and type_name[1:].isdigit():
        size = int(type_name[1:]) // 8
        return size, size
    inner = layout(type_name, architecture)
    return inner.size, inner.alignment


def parse(name: str, text: str, architecture: str = "x86") -> Layout:
    """The layout of a declaration by C's rules on a 64-bit machine."""
    offset, widest, fields = 0, 1, []
    for group in text.split(";"):
        type_name, *members = group.split()
        size, alignment = _measure(type_name, architecture)
        widest = max(widest, alignment)
        for member in members:
            base, bracket, length = member.partition("[")
            count = 1 if not bracket else int(length.rstrip("]") or 0)
            offset = -(-offset // alignment) * alignment
            fields.append(Field(base, type_name, offset, size, count))
            offset += size * count
    return Layout(name, -(-offset // widest) * widest, widest, tuple(fields))


def layout(name: str, architecture: str = "x86") -> Layout:
    """The layout of a structure; KeyError if it is not declared.

    >>> layout("kvm_regs").size
    144
    >>> layout("kvm_userspace_memory_region").offset("userspace_addr")
    24
    >>> layout("kvm_guest_debug", "arm64").size
    520
    """
    found = _cache.get((name, architecture))
    if found is None:
        text = _OWN[architecture].get(name) or GENERIC[name]
        found = _cache[name, architecture] = parse(name, text, architecture)
    return found
