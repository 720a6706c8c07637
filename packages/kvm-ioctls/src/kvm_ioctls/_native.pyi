"""Types of the extension: a test compares the names here with the library's."""

from typing import Any

class ffi:  # noqa: N801 - the name cffi gives it
    """What is used of cffi's FFI object."""

    NULL: Any
    @staticmethod
    def new(cdecl: str, init: Any = ...) -> Any: ...
    @staticmethod
    def cast(cdecl: str, source: Any) -> Any: ...
    @staticmethod
    def gc(cdata: Any, destructor: Any, size: int = ...) -> Any: ...
    @staticmethod
    def buffer(cdata: Any, size: int = ...) -> Any: ...
    @staticmethod
    def from_buffer(cdecl: Any, source: Any = ..., require_writable: bool = ...) -> Any: ...
    @staticmethod
    def sizeof(cdecl: Any) -> int: ...

class lib:  # noqa: N801 - the name cffi gives it
    """The C functions and constants."""

    @staticmethod
    def kvmi_ioctl(fd: int, request: int, argument: Any) -> int: ...
    @staticmethod
    def kvmi_ioctl_value(fd: int, request: int, value: int) -> int: ...
    @staticmethod
    def kvmi_map(fd: int, offset: int, size: int, address: Any) -> int: ...
    @staticmethod
    def kvmi_unmap(address: Any, size: int) -> None: ...
    @staticmethod
    def kvmi_kick_signal() -> int: ...
    @staticmethod
    def kvmi_vcpu_init(vcpu: Any, fd: int, page: Any, kick_signal: int) -> None: ...
    @staticmethod
    def kvmi_run(vcpu: Any) -> int: ...
    @staticmethod
    def kvmi_kick(vcpu: Any) -> int: ...
    @staticmethod
    def kvmi_retire(vcpu: Any) -> None: ...
    @staticmethod
    def kvmi_coalesced_take(page: Any, page_size: int, out: Any, room: int) -> int: ...
    @staticmethod
    def kvmi_dirty_take(pages: Any, entries: int, fetch: Any, out: Any, room: int) -> int: ...
    @staticmethod
    def kvmi_serve_hot(vcpu: Any, hot: Any, limit: int) -> int: ...
    @staticmethod
    def kvmi_take_held(vcpu: Any) -> int: ...
    @staticmethod
    def kvmi_hot_new(room: int, wake: int) -> Any: ...
    @staticmethod
    def kvmi_hot_free(hot: Any) -> None: ...
    @staticmethod
    def kvmi_hot_set(hot: Any, index: int, value: Any) -> None: ...
    @staticmethod
    def kvmi_hot_count(hot: Any, index: int) -> int: ...
    @staticmethod
    def kvmi_hot_full(hot: Any) -> int: ...
    @staticmethod
    def kvmi_hot_waiting(hot: Any) -> int: ...
    @staticmethod
    def kvmi_hot_take(hot: Any, out: Any, room: int) -> int: ...
    KVMI_COALESCED_PAGE: int
    KVMI_DECLARATIONS: int
    KVMI_KICKED: int
    KVMI_POSTED: int
    KVM_ARM_GET_REG_WRITABLE_MASKS: int
    KVM_ARM_MTE_COPY_TAGS: int
    KVM_ARM_PREFERRED_TARGET: int
    KVM_ARM_SET_COUNTER_OFFSET: int
    KVM_ARM_SET_DEVICE_ADDR: int
    KVM_ARM_VCPU_FINALIZE: int
    KVM_ARM_VCPU_INIT: int
    KVM_CHECK_EXTENSION: int
    KVM_CLEAR_DIRTY_LOG: int
    KVM_CREATE_DEVICE: int
    KVM_CREATE_GUEST_MEMFD: int
    KVM_CREATE_IRQCHIP: int
    KVM_CREATE_PIT: int
    KVM_CREATE_PIT2: int
    KVM_CREATE_VCPU: int
    KVM_CREATE_VM: int
    KVM_ENABLE_CAP: int
    KVM_GET_API_VERSION: int
    KVM_GET_CLOCK: int
    KVM_GET_CPUID2: int
    KVM_GET_DEBUGREGS: int
    KVM_GET_DEVICE_ATTR: int
    KVM_GET_DIRTY_LOG: int
    KVM_GET_EMULATED_CPUID: int
    KVM_GET_FPU: int
    KVM_GET_IRQCHIP: int
    KVM_GET_LAPIC: int
    KVM_GET_MP_STATE: int
    KVM_GET_MSRS: int
    KVM_GET_MSR_FEATURE_INDEX_LIST: int
    KVM_GET_MSR_INDEX_LIST: int
    KVM_GET_NESTED_STATE: int
    KVM_GET_NR_MMU_PAGES: int
    KVM_GET_ONE_REG: int
    KVM_GET_PIT: int
    KVM_GET_PIT2: int
    KVM_GET_REGS: int
    KVM_GET_REG_LIST: int
    KVM_GET_SREGS: int
    KVM_GET_SREGS2: int
    KVM_GET_STATS_FD: int
    KVM_GET_SUPPORTED_CPUID: int
    KVM_GET_SUPPORTED_HV_CPUID: int
    KVM_GET_TSC_KHZ: int
    KVM_GET_VCPU_EVENTS: int
    KVM_GET_VCPU_MMAP_SIZE: int
    KVM_GET_XCRS: int
    KVM_GET_XSAVE: int
    KVM_GET_XSAVE2: int
    KVM_HAS_DEVICE_ATTR: int
    KVM_HYPERV_EVENTFD: int
    KVM_INTERRUPT: int
    KVM_IOEVENTFD: int
    KVM_IRQFD: int
    KVM_IRQ_LINE: int
    KVM_IRQ_LINE_STATUS: int
    KVM_KVMCLOCK_CTRL: int
    KVM_MEMORY_ENCRYPT_OP: int
    KVM_MEMORY_ENCRYPT_REG_REGION: int
    KVM_MEMORY_ENCRYPT_UNREG_REGION: int
    KVM_NMI: int
    KVM_PRE_FAULT_MEMORY: int
    KVM_REGISTER_COALESCED_MMIO: int
    KVM_REINJECT_CONTROL: int
    KVM_RESET_DIRTY_RINGS: int
    KVM_RUN: int
    KVM_SET_BOOT_CPU_ID: int
    KVM_SET_CLOCK: int
    KVM_SET_CPUID: int
    KVM_SET_CPUID2: int
    KVM_SET_DEBUGREGS: int
    KVM_SET_DEVICE_ATTR: int
    KVM_SET_FPU: int
    KVM_SET_GSI_ROUTING: int
    KVM_SET_GUEST_DEBUG: int
    KVM_SET_IDENTITY_MAP_ADDR: int
    KVM_SET_IRQCHIP: int
    KVM_SET_LAPIC: int
    KVM_SET_MEMORY_ATTRIBUTES: int
    KVM_SET_MP_STATE: int
    KVM_SET_MSRS: int
    KVM_SET_NESTED_STATE: int
    KVM_SET_NR_MMU_PAGES: int
    KVM_SET_ONE_REG: int
    KVM_SET_PIT: int
    KVM_SET_PIT2: int
    KVM_SET_PMU_EVENT_FILTER: int
    KVM_SET_REGS: int
    KVM_SET_SIGNAL_MASK: int
    KVM_SET_SREGS: int
    KVM_SET_SREGS2: int
    KVM_SET_TSC_KHZ: int
    KVM_SET_TSS_ADDR: int
    KVM_SET_USER_MEMORY_REGION: int
    KVM_SET_USER_MEMORY_REGION2: int
    KVM_SET_VAPIC_ADDR: int
    KVM_SET_VCPU_EVENTS: int
    KVM_SET_XCRS: int
    KVM_SET_XSAVE: int
    KVM_SIGNAL_MSI: int
    KVM_SMI: int
    KVM_TPR_ACCESS_REPORTING: int
    KVM_TRANSLATE: int
    KVM_UNREGISTER_COALESCED_MMIO: int
    KVM_X86_GET_MCE_CAP_SUPPORTED: int
    KVM_X86_SETUP_MCE: int
    KVM_X86_SET_MCE: int
    KVM_X86_SET_MSR_FILTER: int
    KVM_XEN_HVM_CONFIG: int
    KVM_XEN_HVM_EVTCHN_SEND: int
    KVM_XEN_HVM_GET_ATTR: int
    KVM_XEN_HVM_SET_ATTR: int
    KVM_XEN_VCPU_GET_ATTR: int
    KVM_XEN_VCPU_SET_ATTR: int
