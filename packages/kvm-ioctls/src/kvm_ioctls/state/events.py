"""Exceptions, interrupts, NMIs and SMIs that are pending or half delivered."""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING

import attrs

from kvm_ioctls.state._codec import pack_fields

if TYPE_CHECKING:
    from typing import Self

__all__ = ["VcpuEvents"]

_CODEC = Struct("<4BI4B3BxII5B26xBQ")


@attrs.frozen
class VcpuEvents:
    """struct kvm_vcpu_events, with the names of its nested structures joined by an underscore.

    Attributes:
        exception_injected: 1 if an exception's delivery has begun.
        exception_nr: its vector.
        exception_has_error_code: 1 if it pushes one.
        exception_pending: 1 if it is raised but not yet being delivered (see `flags`).
        exception_error_code: what it pushes.
        interrupt_injected: 1 if an interrupt's delivery has begun, with nr and soft (INT n).
        interrupt_shadow: KVM_X86_SHADOW_INT_*: interrupts are held back one instruction.
        nmi_injected: and nmi_pending, nmi_masked.
        sipi_vector: start-up vector of a waiting processor.
        flags: KVM_VCPUEVENT_VALID_*: which of the optional fields count.
        smi_smm: 1 in system-management mode, with smi_pending, smi_smm_inside_nmi,
            smi_latched_init.
        triple_fault_pending: 1 if a triple fault waits.
        exception_has_payload: 1 if exception_payload counts.
        exception_payload: DR6 or CR2 bits that go with a pending exception.
        version: of this form; 1.
    """

    exception_injected: int = 0
    exception_nr: int = 0
    exception_has_error_code: int = 0
    exception_pending: int = 0
    exception_error_code: int = 0
    interrupt_injected: int = 0
    interrupt_nr: int = 0
    interrupt_soft: int = 0
    interrupt_shadow: int = 0
    nmi_injected: int = 0
    nmi_pending: int = 0
    nmi_masked: int = 0
    sipi_vector: int = 0
    flags: int = 0
    smi_smm: int = 0
    smi_pending: int = 0
    smi_smm_inside_nmi: int = 0
    smi_latched_init: int = 0
    triple_fault_pending: int = 0
    exception_has_payload: int = 0
    exception_payload: int = 0
    version: int = attrs.field(default=1, kw_only=True)

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview) -> Self:
        """From the kernel's 64 bytes."""
        return cls(*_CODEC.unpack_from(data))

    def to_bytes(self) -> bytes:
        """The kernel's 64 bytes; ArgumentError if a field does not fit its width."""
        return pack_fields(
            self,
            _CODEC,
            (
                self.exception_injected, self.exception_nr, self.exception_has_error_code,
                self.exception_pending, self.exception_error_code, self.interrupt_injected,
                self.interrupt_nr, self.interrupt_soft, self.interrupt_shadow, self.nmi_injected,
                self.nmi_pending, self.nmi_masked, self.sipi_vector, self.flags, self.smi_smm,
                self.smi_pending, self.smi_smm_inside_nmi, self.smi_latched_init,
                self.triple_fault_pending, self.exception_has_payload, self.exception_payload,
            ),
        )  # fmt: skip
