"""A virtual machine: its memory, interrupts, events and clocks, one file each."""

from __future__ import annotations

import os
from struct import pack

from kvm_ioctls._attributes import Attributes
from kvm_ioctls._fd import Descriptor
from kvm_ioctls._native import lib
from kvm_ioctls.vm.arm64 import VmArm64
from kvm_ioctls.vm.events import VmEvents
from kvm_ioctls.vm.guests import VmGuests
from kvm_ioctls.vm.irq import VmIrq
from kvm_ioctls.vm.pages import VmPages
from kvm_ioctls.vm.platform import VmPlatform

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Self

    from kvm_ioctls.device import Device
    from kvm_ioctls.state.snapshot import VcpuState, VmState
    from kvm_ioctls.stats import Stats
    from kvm_ioctls.vcpu import Vcpu

__all__ = ["Vm"]


class Vm(VmPages, VmIrq, VmEvents, VmPlatform, VmGuests, VmArm64, Attributes):
    """A virtual machine, made by Kvm.create_vm().

    It owns its vCPUs: close() closes these first, waiting for the ones that run. Buffers given as
    memory are held until then, so guest memory cannot vanish under a running guest.
    """

    _kind = "vm"

    def __init__(self, fd: int, vcpu_mmap_size: int) -> None:
        Descriptor.__init__(self, fd)
        self._mmap_size = vcpu_mmap_size
        self._init_memory()
        self._vcpus: list[Vcpu] = []

    @classmethod
    def adopt(cls, fd: int, vcpu_mmap_size: int) -> Self:
        """Take over an open descriptor of a VM, such as one that another process has passed.

        Slots and vCPUs made before are unknown to the object; their memory is their maker's care.
        """
        os.set_inheritable(fd, False)
        return cls(fd, vcpu_mmap_size)

    def create_vcpu(self, vcpu_id: int) -> Vcpu:
        """KVM_CREATE_VCPU: a vCPU; its id is its local APIC's id on x86.

        Raises:
            KvmError: EEXIST if the id is taken, EINVAL if it is too large.
        """
        from kvm_ioctls.vcpu import Vcpu

        fd = self._value(lib.KVM_CREATE_VCPU, vcpu_id, vcpu_id=vcpu_id)
        try:
            vcpu = Vcpu(self, fd, vcpu_id, self._mmap_size)
        except BaseException:
            os.close(fd)
            raise
        self._vcpus.append(vcpu)
        return vcpu

    @property
    def vcpus(self) -> tuple[Vcpu, ...]:
        """The vCPUs made by this object that are not closed, oldest first."""
        return tuple(vcpu for vcpu in self._vcpus if not vcpu.closed)

    def create_device(self, type: int) -> Device:  # noqa: A002 - the kernel's name
        """KVM_CREATE_DEVICE (KVM_CAP_DEVICE_CTRL): a device in the kernel.

        Args:
            type: KVM_DEV_TYPE_*.
        """
        from kvm_ioctls.device import Device

        data = bytearray(pack("<III", type, 0, 0))
        self._write(lib.KVM_CREATE_DEVICE, data, type=type)
        return Device(int.from_bytes(data[4:8], "little"), type)

    def test_device(self, type: int) -> bool:  # noqa: A002 - the kernel's name
        """KVM_CREATE_DEVICE with KVM_CREATE_DEVICE_TEST: whether such a device could be made.

        Nothing is made, and the descriptor number that the kernel leaves behind is not touched.
        """
        return self._try(lib.KVM_CREATE_DEVICE, bytearray(pack("<III", type, 0, 1))) == 0

    def get_stats_fd(self) -> Stats:
        """KVM_GET_STATS_FD (KVM_CAP_BINARY_STATS_FD): KVM's statistics of this VM."""
        from kvm_ioctls.stats import Stats

        return Stats(self._value(lib.KVM_GET_STATS_FD))

    def save(self) -> VmState:
        """What KVM knows of the VM as a whole, while no vCPU runs: without memory and vCPUs."""
        from kvm_ioctls.state.snapshot import save_vm

        return save_vm(self)

    def restore(self, state: VmState) -> None:
        """Put back what save() gave, into a VM made with the same controllers, before it runs."""
        from kvm_ioctls.state.snapshot import restore_vm

        restore_vm(self, state)

    def save_vcpus(
        self, msr_indices: Iterable[int] | None = None, *, cpuid: bool = True
    ) -> tuple[VcpuState, ...]:
        """What Vcpu.save() gives of each vCPU; none runs.

        Saving takes time: the counters (TSC) are those of the moment in which the first was saved,
        where KVM tells how far they are apart (KVM_VCPU_TSC_OFFSET).

        Args:
            msr_indices: as for Vcpu.save().
            cpuid: as for Vcpu.save().
        """
        from kvm_ioctls.state.counters import at_one_moment
        from kvm_ioctls.state.snapshot import chosen_msrs

        indices = chosen_msrs(msr_indices)
        states = [vcpu.save(indices, cpuid=cpuid) for vcpu in self.vcpus]
        return at_one_moment(self.vcpus, states)

    def restore_vcpus(self, states: Sequence[VcpuState]) -> None:
        """Put back what save_vcpus() gave, into as many new vCPUs, before any of them runs.

        However long it takes, their counters are as far apart as they were.

        Raises:
            ArgumentError: there are more or fewer states than vCPUs.
            KvmError: this host cannot continue one of them.
        """
        from kvm_ioctls.errors import ArgumentError
        from kvm_ioctls.state.counters import synchronize

        vcpus = self.vcpus
        if len(states) != len(vcpus):
            counts = {"states": len(states), "vcpus": len(vcpus)}
            raise ArgumentError("restore_vcpus", 22, counts, "each vCPU needs a state of its own")
        for vcpu, state in zip(vcpus, states, strict=True):
            vcpu.restore(state)
        synchronize(vcpus, states)

    def close(self) -> None:
        """Close the vCPUs, then the VM, then let go of the memory."""
        for vcpu in self._vcpus:
            vcpu.close()
        super().close()
        self._vcpus = []
        self._forget_memory()
