"""From a failed ioctl to an error that says what was likely wrong. Loaded when something failed."""

from __future__ import annotations

import errno as e
from typing import TYPE_CHECKING, Any

from kvm_ioctls.errors import ArgumentError, ClosedError, KvmError
from kvm_ioctls.table import find

if TYPE_CHECKING:
    from kvm_ioctls._fd import Descriptor

# By ioctl (a trailing * stands for anything) and errno; the first match speaks.
HINTS: tuple[tuple[str, int, str], ...] = (
    ("open", e.ENOENT, "this kernel offers no KVM: load kvm_intel or kvm_amd (modprobe), switch on"
     " virtualization in the firmware, or in the outer machine if this one is virtual"),
    ("open", e.EACCES, "permission denied: add yourself to group kvm (usermod -aG kvm USER), then"
     " log in again"),
    ("open", e.EPERM, "the device is refused to this process: in a container pass it on"
     " (--device /dev/kvm)"),
    ("open", e.ENODEV, "the KVM module is gone or refuses this processor: see dmesg"),
    ("open", e.EISDIR, "this is a folder, not KVM's device"),
    ("KVM_GET_API_VERSION", e.ENOTTY, "this file is not KVM's device"),
    ("KVM_CREATE_VM", e.EINVAL, "this machine type is not known here: see KVM_CAP_VM_TYPES"),
    ("KVM_CREATE_VM", e.ENOMEM, "no memory for the VM's tables"),
    ("KVM_CREATE_VM", e.EBUSY, "another hypervisor on this machine holds the processor's"
     " virtualization"),
    ("KVM_CREATE_VCPU", e.EEXIST, "a vCPU with this id exists already, or the interrupt controller"
     " was made for others"),
    ("KVM_CREATE_VCPU", e.EINVAL, "the id lies above what KVM_CAP_MAX_VCPU_ID allows, or as many"
     " vCPUs exist as KVM_CAP_MAX_VCPUS allows"),
    ("KVM_CREATE_IRQCHIP", e.EEXIST, "this VM has an interrupt controller already, in the kernel or"
     " split"),
    ("KVM_CREATE_IRQCHIP", e.EINVAL, "wrong order: create the interrupt controller before the first"
     " vCPU"),
    ("KVM_CREATE_PIT*", e.ENOENT, "wrong order: the timer needs create_irqchip() first"),
    ("KVM_CREATE_PIT*", e.EEXIST, "this VM has a timer already"),
    ("KVM_GET_PIT*", e.ENXIO, "no timer yet: create_pit2() first"),
    ("KVM_SET_PIT*", e.ENXIO, "no timer yet: create_pit2() first"),
    ("KVM_REINJECT_CONTROL", e.ENXIO, "no timer yet: create_pit2() first"),
    ("KVM_*IRQCHIP", e.ENXIO, "no interrupt controller in the kernel: create_irqchip() first"),
    ("KVM_IRQ_LINE*", e.ENXIO, "no interrupt controller in the kernel: create_irqchip() first"),
    ("KVM_SIGNAL_MSI", e.EINVAL, "no interrupt controller in the kernel, or a flag it does not"
     " know"),
    ("KVM_IRQFD", e.EINVAL, "no interrupt controller in the kernel: create_irqchip() first; or the"
     " GSI is above the routing table"),
    ("KVM_IRQFD", e.EBUSY, "this eventfd raises an interrupt already: deassign it first"),
    ("KVM_IRQFD", e.EBADF, "the descriptor is not an open eventfd"),
    ("KVM_IOEVENTFD", e.EEXIST, "an ioeventfd with this address, length and match exists already"),
    ("KVM_IOEVENTFD", e.ENOENT, "no ioeventfd with this descriptor, address, length and match"),
    ("KVM_IOEVENTFD", e.EINVAL, "length is 0, 1, 2, 4 or 8, ports end at 0xffff, and length 0"
     " takes no match"),
    ("KVM_IOEVENTFD", e.EBADF, "the descriptor is not an open eventfd"),
    ("KVM_IOEVENTFD", e.ENOSPC, "KVM allows a VM 1000 such devices"),
    ("KVM_SET_USER_MEMORY_REGION*", e.EEXIST, "it overlaps another slot of this VM"),
    ("KVM_SET_USER_MEMORY_REGION*", e.EINVAL, "slot number, flags, alignment, or a change of size,"
     " address or read-only flag of a slot that lives: delete it first"),
    ("KVM_GET_DIRTY_LOG", e.ENOENT, "the slot does not exist, or is not logged: set"
     " KVM_MEM_LOG_DIRTY_PAGES"),
    ("KVM_CLEAR_DIRTY_LOG", e.ENOENT, "the slot does not exist, or is not logged: set"
     " KVM_MEM_LOG_DIRTY_PAGES"),
    ("KVM_*_DIRTY_LOG", e.ENXIO, "this VM tracks dirty pages in rings: read these"),
    ("KVM_CLEAR_DIRTY_LOG", e.EINVAL, "first_page and num_pages are multiples of 64 (the last"
     " may end at the slot's end), and KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 is to be enabled first"),
    ("KVM_RESET_DIRTY_RINGS", e.EINVAL, "no dirty rings: enable KVM_CAP_DIRTY_LOG_RING before the"
     " first vCPU"),
    ("KVM_SET_IDENTITY_MAP_ADDR", e.EINVAL, "wrong order: set it before the first vCPU"),
    ("KVM_SET_BOOT_CPU_ID", e.EBUSY, "wrong order: set it before the first vCPU"),
    ("KVM_SET_TSS_ADDR", e.EINVAL, "the three pages end beyond 4 GiB"),
    ("KVM_GET_LAPIC", e.EINVAL, "no local APIC in the kernel: create_irqchip() before the vCPU"),
    ("KVM_SET_LAPIC", e.EINVAL, "no local APIC in the kernel: create_irqchip() before the vCPU"),
    ("KVM_INTERRUPT", e.ENXIO, "the interrupt controller is in the kernel: use irq_line()"),
    ("KVM_INTERRUPT", e.EEXIST, "an interrupt is queued already: run first"),
    ("KVM_SET_CPUID2", e.EINVAL, "CPUID cannot change once the vCPU has run, or a leaf is refused"),
    ("KVM_SET_CPUID2", e.E2BIG, "KVM takes at most 256 entries"),
    ("KVM_SET_SREGS*", e.EINVAL, "the control registers contradict each other or CPUID: long mode"
     " wants cr4.PAE, cr0.PG and efer.LME with efer.LMA"),
    ("KVM_SET_REGS", e.EINVAL, "a bit is set that this processor does not have"),
    ("KVM_SET_XCRS", e.EINVAL, "XCR0 has a bit that the vCPU's CPUID does not offer: set_cpuid2()"
     " first"),
    ("KVM_SET_XSAVE", e.EINVAL, "XSTATE_BV has a bit that the vCPU's CPUID does not offer:"
     " set_cpuid2() first"),
    ("KVM_SET_MP_STATE", e.EINVAL, "this state needs an interrupt controller in the kernel"),
    ("KVM_SET_DEBUGREGS", e.EINVAL, "the upper halves of DR6 and DR7 are zero"),
    ("KVM_SET_GUEST_DEBUG", e.EBUSY, "an exception is pending: run first"),
    ("KVM_RUN", e.EIO, "this vCPU belongs to another process: a VM does not survive fork"),
    ("KVM_RUN", e.EFAULT, "the guest touched memory whose host pages are gone"),
    ("KVM_RUN", e.EBUSY, "the vCPU is running in another thread already"),
    ("KVM_RUN", e.EINVAL, "a state written through the run page was refused"),
    ("KVM_RUN", e.ENOEXEC, "the vCPU was not initialised"),
    ("KVM_ENABLE_CAP", e.EINVAL, "the kernel has no such capability to enable, or not with these"
     " arguments, or no longer now that vCPUs exist"),
    ("KVM_CREATE_GUEST_MEMFD", e.EINVAL, "the size is a positive multiple of the page size"),
    ("KVM_CREATE_DEVICE", e.ENODEV, "the kernel has no such device type"),
    ("KVM_CREATE_DEVICE", e.EEXIST, "this VM has such a device already"),
    ("KVM_*_DEVICE_ATTR", e.ENXIO, "the device has no such group or attribute"),
    ("KVM_*ONE_REG", e.EINVAL, "no such register, or not on this kernel"),
    ("KVM_SET_PMU_EVENT_FILTER", e.E2BIG, "at most 300 events"),
    ("KVM_XEN_*", e.ENOENT, "this attribute is not set"),
    ("*", e.EBADF, "the descriptor is not open"),
    ("*", e.EMFILE, "this process has as many descriptors as it may (ulimit -n)"),
    ("*", e.EAGAIN, "the queue of real-time signals is full (ulimit -i)"),
)  # fmt: skip


def _matches(pattern: str, name: str) -> bool:
    head, star, tail = pattern.partition("*")
    if not star:
        return pattern == name
    return name.startswith(head) and name.endswith(tail)


def hint(name: str, errno: int, capability: str | None = None) -> str:
    """The likely cause of `errno` from the ioctl `name`, or an empty string.

    >>> hint("KVM_CREATE_PIT2", e.ENOENT)
    'wrong order: the timer needs create_irqchip() first'
    """
    for pattern, number, text in HINTS:
        if number == errno and _matches(pattern, name):
            return text
    if errno in (e.ENOTTY, e.ENOSYS, e.EOPNOTSUPP):
        needs = f", which announces it as KVM_CAP_{capability}" if capability else ""
        return f"this kernel or this kind of descriptor does not know {name}{needs}"
    if errno == e.EINVAL and capability:
        return f"a value is refused, or the kernel lacks KVM_CAP_{capability}"
    return ""


def error(
    source: Descriptor | None, request: int | str, errno: int, arguments: dict[str, Any]
) -> KvmError:
    """The error for a failed request on `source`."""
    row = None if isinstance(request, str) else find(request)
    name = row.name if row else (request if isinstance(request, str) else f"ioctl {request:#x}")
    if source is not None and source.closed and errno == e.EBADF:
        return ClosedError(name, errno, arguments, f"this {type(source).__name__} has been closed")
    return KvmError(name, errno, arguments, hint(name, errno, row.capability if row else None))


def refuse(name: str, errno: int, arguments: dict[str, Any], why: str) -> ArgumentError:
    """The error for a request that is not worth the kernel's time."""
    return ArgumentError(name, errno, arguments, why)
