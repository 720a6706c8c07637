"""/dev/kvm itself: what the host can do, and the door to virtual machines."""

from __future__ import annotations

import os
from struct import pack, unpack_from

from kvm_ioctls._attributes import Attributes
from kvm_ioctls._fd import Descriptor
from kvm_ioctls._native import lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Self

    from kvm_ioctls.state.cpuid import CpuidEntry
    from kvm_ioctls.state.msrs import MsrReport
    from kvm_ioctls.vm import Vm

__all__ = ["API_VERSION", "Kvm"]

API_VERSION = 12
"""The only version of the API that a current kernel reports."""

_E2BIG, _EINTR = 7, 4


class Kvm(Attributes):
    """The KVM subsystem of the host.

    >>> with Kvm() as kvm:
    ...     kvm.get_api_version()
    12
    """

    _kind = "kvm"

    def __init__(self, path: str = "/dev/kvm") -> None:
        """Open the device, readable, writable and close-on-exec.

        Raises:
            KvmError: if it is not there, may not be opened, or is no KVM device.
        """
        self._fd = -1
        self._mmap_size = 0
        try:
            super().__init__(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        except OSError as error:
            self._fail_open(path, error)
        try:
            self.get_api_version()
        except BaseException:
            self.close()
            raise

    def _fail_open(self, path: str, error: OSError) -> None:
        from kvm_ioctls._hints import hint
        from kvm_ioctls.errors import KvmError

        number = error.errno or 0
        raise KvmError("open", number, {"path": path}, hint("open", number)) from None

    @classmethod
    def adopt(cls, fd: int) -> Self:
        """Take over an open descriptor of /dev/kvm, such as one inherited by a jailed process.

        The object owns it from now on and closes it.

        Raises:
            KvmError: if it is not a descriptor of KVM's device; it is then left open.
        """
        self = cls.__new__(cls)
        Descriptor.__init__(self, fd)
        self._mmap_size = 0
        try:
            self.get_api_version()
        except BaseException:
            self._fd = -1
            raise
        os.set_inheritable(fd, False)
        return self

    def get_api_version(self) -> int:
        """KVM_GET_API_VERSION: 12 on every kernel of the last fifteen years."""
        return self._value(lib.KVM_GET_API_VERSION)

    def check_extension(self, cap: int) -> int:
        """KVM_CHECK_EXTENSION: 0 if the kernel lacks the capability, else 1 or what it means."""
        return self._value(lib.KVM_CHECK_EXTENSION, cap, cap=cap)

    def get_vcpu_mmap_size(self) -> int:
        """KVM_GET_VCPU_MMAP_SIZE: bytes of a vCPU's shared page and the pages behind it."""
        if not self._mmap_size:
            self._mmap_size = self._value(lib.KVM_GET_VCPU_MMAP_SIZE)
        return self._mmap_size

    def get_supported_cpuid(self) -> tuple[CpuidEntry, ...]:
        """KVM_GET_SUPPORTED_CPUID (KVM_CAP_EXT_CPUID): the leaves KVM can offer a guest here."""
        return self._cpuid(lib.KVM_GET_SUPPORTED_CPUID)

    def get_emulated_cpuid(self) -> tuple[CpuidEntry, ...]:
        """KVM_GET_EMULATED_CPUID (KVM_CAP_EXT_EMUL_CPUID): emulated though the host lacks it."""
        return self._cpuid(lib.KVM_GET_EMULATED_CPUID)

    def get_supported_hv_cpuid(self) -> tuple[CpuidEntry, ...]:
        """KVM_GET_SUPPORTED_HV_CPUID (KVM_CAP_SYS_HYPERV_CPUID): leaves of Hyper-V's interface."""
        return self._cpuid(lib.KVM_GET_SUPPORTED_HV_CPUID)

    def _cpuid(self, request: int) -> tuple[CpuidEntry, ...]:
        from kvm_ioctls.state.cpuid import unpack_entries

        room = 256
        while True:
            data = bytearray(8 + 40 * room)
            data[:4] = room.to_bytes(4, "little")
            result = self._try(request, data)
            if result == -_E2BIG and room < 1 << 16:
                room *= 2
                continue
            if result < 0:
                self._fail(request, -result, {"nent": room})
            return unpack_entries(data)

    def get_msr_index_list(self) -> tuple[int, ...]:
        """KVM_GET_MSR_INDEX_LIST: the MSRs that KVM saves and restores for a guest."""
        return self._indices(lib.KVM_GET_MSR_INDEX_LIST)

    def get_msr_feature_index_list(self) -> tuple[int, ...]:
        """KVM_GET_MSR_FEATURE_INDEX_LIST (KVM_CAP_GET_MSR_FEATURES): MSRs that state features."""
        return self._indices(lib.KVM_GET_MSR_FEATURE_INDEX_LIST)

    def _indices(self, request: int) -> tuple[int, ...]:
        room = 256
        while True:
            data = bytearray(pack("<I", room) + bytes(4 * room))
            result = self._try(request, data)
            (count,) = unpack_from("<I", data)
            if result == -_E2BIG and count > room:
                room = count
                continue
            if result < 0:
                self._fail(request, -result, {"nmsrs": room})
            return unpack_from(f"<{count}I", data, 4)

    def get_msrs(self, indices: Iterable[int]) -> MsrReport:
        """KVM_GET_MSRS on the system (KVM_CAP_GET_MSR_FEATURES): values of feature MSRs.

        The kernel stops at the first MSR it refuses; the rest is asked for again, so the report
        names every MSR that was refused.
        """
        from kvm_ioctls.state.msrs import read_msrs

        return read_msrs(self, indices)

    def x86_get_mce_cap_supported(self) -> int:
        """KVM_X86_GET_MCE_CAP_SUPPORTED (KVM_CAP_MCE): the MCG_CAP bits a vCPU may be given."""
        return int.from_bytes(self._read(lib.KVM_X86_GET_MCE_CAP_SUPPORTED, 8), "little")

    def get_nr_vcpus(self) -> int:
        """KVM_CAP_NR_VCPUS: how many vCPUs a VM should have at most; 4 if the kernel is silent."""
        return self.check_extension(9) or 4

    def get_max_vcpus(self) -> int:
        """KVM_CAP_MAX_VCPUS: how many vCPUs a VM can have."""
        return self.check_extension(66) or self.get_nr_vcpus()

    def get_max_vcpu_id(self) -> int:
        """KVM_CAP_MAX_VCPU_ID: a vCPU's id lies below this."""
        return self.check_extension(128) or self.get_max_vcpus()

    def get_nr_memslots(self) -> int:
        """KVM_CAP_NR_MEMSLOTS: how many memory slots a VM can have; 32 if the kernel is silent."""
        return self.check_extension(10) or 32

    def capabilities(self) -> dict[str, int]:
        """Every KVM_CAP that this library knows, by name without the prefix, with its value.

        >>> with Kvm() as kvm:
        ...     kvm.capabilities()["USER_MEMORY"]
        1
        """
        from kvm_ioctls.constants import capability_names

        return {name: self.check_extension(cap) for name, cap in capability_names().items()}

    def create_vm(self, machine_type: int = 0) -> Vm:
        """KVM_CREATE_VM: a virtual machine without memory and vCPUs.

        It is tried again while signals interrupt it, which the kernel does not do by itself.

        Args:
            machine_type: 0 for an ordinary machine; others as KVM_CAP_VM_TYPES lists them.
        """
        from kvm_ioctls.vm import Vm

        request = lib.KVM_CREATE_VM
        result = -_EINTR
        while result == -_EINTR:  # a Python signal handler runs between two tries
            result = lib.kvmi_ioctl_value(self._fd, request, machine_type)
        if result < 0:
            self._fail(request, -result, {"machine_type": machine_type})
        return Vm(result, self.get_vcpu_mmap_size())
