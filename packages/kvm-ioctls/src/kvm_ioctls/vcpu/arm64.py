"""What a vCPU on arm64 has otherwise than x86; elsewhere the kernel refuses it."""

from __future__ import annotations

from struct import pack

from kvm_ioctls._fd import Descriptor
from kvm_ioctls._native import lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvm_ioctls.state.arm64 import ArmBreakpoints, ArmVcpuEvents, ArmVcpuInit

__all__ = ["VcpuArm64"]

# The same number for a structure of arm64's own size.
_SET_GUEST_DEBUG = 1 << 30 | 520 << 16 | 0xAE9B


class VcpuArm64(Descriptor):
    """The part of a vCPU that only arm64 has. Its registers are got and set by get_one_reg()."""

    def arm_vcpu_init(self, init: ArmVcpuInit) -> None:
        """KVM_ARM_VCPU_INIT: say which processor it is, and reset it; before anything else."""
        self._write(lib.KVM_ARM_VCPU_INIT, init.to_bytes(), target=init.target,
                    features=init.features)  # fmt: skip

    def arm_vcpu_finalize(self, feature: int) -> None:
        """KVM_ARM_VCPU_FINALIZE: fix a feature such as KVM_ARM_VCPU_SVE once it is set up."""
        self._write(lib.KVM_ARM_VCPU_FINALIZE, pack("<i", feature), feature=feature)

    def arm_get_vcpu_events(self) -> ArmVcpuEvents:
        """KVM_GET_VCPU_EVENTS (KVM_CAP_VCPU_EVENTS) on arm64: a pending SError."""
        from kvm_ioctls.state.arm64 import ArmVcpuEvents

        return ArmVcpuEvents.from_bytes(self._read(lib.KVM_GET_VCPU_EVENTS, 64))

    def arm_set_vcpu_events(self, events: ArmVcpuEvents) -> None:
        """KVM_SET_VCPU_EVENTS (KVM_CAP_VCPU_EVENTS) on arm64: raise an SError or an abort."""
        self._write(lib.KVM_SET_VCPU_EVENTS, events.to_bytes())

    def arm_set_guest_debug(self, control: int, breakpoints: ArmBreakpoints) -> None:
        """KVM_SET_GUEST_DEBUG (KVM_CAP_SET_GUEST_DEBUG) on arm64.

        Args:
            control: KVM_GUESTDBG_*.
            breakpoints: used with KVM_GUESTDBG_USE_HW.
        """
        self._write(_SET_GUEST_DEBUG, pack("<I4x", control) + breakpoints.to_bytes(),
                    control=control)  # fmt: skip
