"""Which processor an x86 vCPU is: CPUID, MSRs and its time-stamp counter."""

from __future__ import annotations

from struct import pack

from kvm_ioctls._fd import Descriptor
from kvm_ioctls._native import lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from kvm_ioctls.state.cpuid import CpuidEntry
    from kvm_ioctls.state.msrs import MsrReport

__all__ = ["VcpuCpu"]


class VcpuCpu(Descriptor):
    """The part of a vCPU that decides which processor the guest sees."""

    def set_cpuid2(self, entries: Iterable[CpuidEntry]) -> None:
        """KVM_SET_CPUID2 (KVM_CAP_EXT_CPUID): the leaves the guest sees, before it first runs."""
        from kvm_ioctls.state.cpuid import pack_entries

        data = pack_entries(entries)
        self._write(lib.KVM_SET_CPUID2, data, nent=(len(data) - 8) // 40)

    def get_cpuid2(self) -> tuple[CpuidEntry, ...]:
        """KVM_GET_CPUID2 (KVM_CAP_EXT_CPUID): the leaves as they were set."""
        from kvm_ioctls.state.cpuid import unpack_entries

        data = bytearray(8 + 40 * 256)
        data[:4] = pack("<I", 256)
        self._write(lib.KVM_GET_CPUID2, data, nent=256)
        return unpack_entries(data)

    def get_msrs(self, indices: Iterable[int]) -> MsrReport:
        """KVM_GET_MSRS: values of MSRs.

        The kernel stops at the first MSR it refuses; the rest is asked for again, so the report has
        every value there is and names every MSR that was refused.
        """
        from kvm_ioctls.state.msrs import read_msrs

        return read_msrs(self, indices)

    def set_msrs(self, values: Mapping[int, int]) -> MsrReport:
        """KVM_SET_MSRS: write MSRs in the mapping's order.

        Returns:
            What was written and which were refused; the ones behind a refused one are written too.
        """
        from kvm_ioctls.state.msrs import write_msrs

        return write_msrs(self, values)

    def get_tsc_khz(self) -> int:
        """KVM_GET_TSC_KHZ (KVM_CAP_GET_TSC_KHZ): the rate of the guest's TSC in kHz."""
        return self._value(lib.KVM_GET_TSC_KHZ)

    def set_tsc_khz(self, khz: int) -> None:
        """KVM_SET_TSC_KHZ (KVM_CAP_TSC_CONTROL): choose that rate; 0 is the host's."""
        self._value(lib.KVM_SET_TSC_KHZ, khz, khz=khz)

    def kvmclock_ctrl(self) -> None:
        """KVM_KVMCLOCK_CTRL (KVM_CAP_KVMCLOCK_CTRL): tell the guest that it had been paused.

        Raises:
            KvmError: EINVAL if the guest uses no kvmclock.
        """
        self._value(lib.KVM_KVMCLOCK_CTRL)

    def enable_cap(self, cap: int, args: tuple[int, ...] = (), flags: int = 0) -> None:
        """KVM_ENABLE_CAP on this vCPU: switch on a capability that is off by default."""
        a, b, c, d = (*args, 0, 0, 0, 0)[:4]
        self._write(
            lib.KVM_ENABLE_CAP, pack("<II4Q64x", cap, flags, a, b, c, d), cap=cap, args=args
        )
