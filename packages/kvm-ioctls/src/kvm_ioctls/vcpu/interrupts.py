"""The local APIC, and everything that is about to interrupt an x86 vCPU."""

from __future__ import annotations

from kvm_ioctls._fd import Descriptor
from kvm_ioctls._native import lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvm_ioctls.state.events import VcpuEvents
    from kvm_ioctls.state.lapic import LapicState
    from kvm_ioctls.state.mp import MpState

__all__ = ["VcpuInterrupts"]


class VcpuInterrupts(Descriptor):
    """The part of a vCPU that deals with interrupts."""

    def get_lapic(self) -> LapicState:
        """KVM_GET_LAPIC: the local APIC's registers; needs create_irqchip() before the vCPU."""
        from kvm_ioctls.state.lapic import LapicState

        return LapicState.from_bytes(self._read(lib.KVM_GET_LAPIC, 1024))

    def set_lapic(self, lapic: LapicState) -> None:
        """KVM_SET_LAPIC."""
        self._write(lib.KVM_SET_LAPIC, lapic.to_bytes())

    def get_mp_state(self) -> MpState:
        """KVM_GET_MP_STATE (KVM_CAP_MP_STATE): whether it runs, waits or was not yet started."""
        from kvm_ioctls.state.mp import MpState

        return MpState(int.from_bytes(self._read(lib.KVM_GET_MP_STATE, 4), "little"))

    def set_mp_state(self, state: MpState | int) -> None:
        """KVM_SET_MP_STATE (KVM_CAP_MP_STATE)."""
        self._write(lib.KVM_SET_MP_STATE, int(state).to_bytes(4, "little"), mp_state=int(state))

    def get_vcpu_events(self) -> VcpuEvents:
        """KVM_GET_VCPU_EVENTS (KVM_CAP_VCPU_EVENTS): what is pending or half delivered."""
        from kvm_ioctls.state.events import VcpuEvents

        return VcpuEvents.from_bytes(self._read(lib.KVM_GET_VCPU_EVENTS, 64))

    def set_vcpu_events(self, events: VcpuEvents) -> None:
        """KVM_SET_VCPU_EVENTS (KVM_CAP_VCPU_EVENTS)."""
        self._write(lib.KVM_SET_VCPU_EVENTS, events.to_bytes())

    def interrupt(self, vector: int) -> None:
        """KVM_INTERRUPT: queue an external interrupt, where no controller is in the kernel.

        Args:
            vector: 0 to 255. The vCPU must be able to take it: see `IrqWindowOpen`.
        """
        self._write(lib.KVM_INTERRUPT, vector.to_bytes(4, "little"), vector=vector)

    def nmi(self) -> None:
        """KVM_NMI (KVM_CAP_USER_NMI): queue a non-maskable interrupt."""
        self._value(lib.KVM_NMI)

    def smi(self) -> None:
        """KVM_SMI (KVM_CAP_X86_SMM): queue a system-management interrupt."""
        self._value(lib.KVM_SMI)
