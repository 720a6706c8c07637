"""A vCPU: running it, and its state, one file for each chapter."""

from __future__ import annotations

from kvm_ioctls._attributes import Attributes
from kvm_ioctls._fd import Descriptor
from kvm_ioctls.vcpu.arm64 import VcpuArm64
from kvm_ioctls.vcpu.cpu import VcpuCpu
from kvm_ioctls.vcpu.debug import VcpuDebug
from kvm_ioctls.vcpu.extras import VcpuExtras
from kvm_ioctls.vcpu.interrupts import VcpuInterrupts
from kvm_ioctls.vcpu.registers import VcpuRegisters
from kvm_ioctls.vcpu.shared import VcpuShared

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvm_ioctls.state.snapshot import VcpuState
    from kvm_ioctls.vm import Vm

__all__ = ["Vcpu"]


class Vcpu(
    VcpuShared, VcpuRegisters, VcpuInterrupts, VcpuCpu, VcpuDebug, VcpuExtras, VcpuArm64, Attributes
):
    """A virtual processor, made by Vm.create_vcpu().

    run() and everything that reads or writes its state belongs to one thread at a time; kick() may
    be called from any. While one thread runs it, state calls of others wait for that run to end.

    Attributes:
        id: what it was created with; its local APIC's id on x86.
        vm: the VM it belongs to.
    """

    _kind = "vcpu"

    def __init__(self, vm: Vm, fd: int, vcpu_id: int, mmap_size: int) -> None:
        self._fd = -1  # until the run page is mapped the caller owns the descriptor
        self.id = vcpu_id
        self.vm = vm
        self._init_run(fd, mmap_size)
        Descriptor.__init__(self, fd)

    def save(self, msr_indices: Iterable[int] | None = None, *, cpuid: bool = True) -> VcpuState:
        """Everything that KVM knows of this vCPU, between two runs.

        After an exit for I/O, run once more with a kick pending, so that KVM completes it.

        Args:
            msr_indices: the MSRs to save, usually Kvm.get_msr_index_list(), which None asks for.
            cpuid: whether to ask for the leaves too, which no guest changes.
        """
        from kvm_ioctls.state.snapshot import chosen_msrs, save_vcpu

        return save_vcpu(self, chosen_msrs(msr_indices), cpuid=cpuid)

    def restore(self, state: VcpuState) -> None:
        """Put back what save() gave, into a new vCPU of a VM that was made alike.

        Without leaves in it, those that were set with set_cpuid2() before stay.

        Raises:
            KvmError: this host cannot continue it.
        """
        from kvm_ioctls.state.snapshot import restore_vcpu

        restore_vcpu(self, state)
