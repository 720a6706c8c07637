"""States of arm64 vCPUs that x86 has otherwise or not at all."""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING

import attrs

from kvm_ioctls.arm64 import KVM_ARM_TARGET_GENERIC_V8
from kvm_ioctls.state._codec import pack_fields, refuse_field

if TYPE_CHECKING:
    from typing import Self

__all__ = ["ArmBreakpoints", "ArmVcpuEvents", "ArmVcpuInit"]

_EVENTS = Struct("<3B5xQ48x")


@attrs.frozen
class ArmVcpuInit:
    """struct kvm_vcpu_init: which processor a vCPU is.

    Attributes:
        target: KVM_ARM_TARGET_*, as Vm.arm_preferred_target() says.
        features: numbers of features, KVM_ARM_VCPU_*.
        version: of this form; 1.
    """

    target: int = KVM_ARM_TARGET_GENERIC_V8
    features: tuple[int, ...] = ()
    version: int = attrs.field(default=1, kw_only=True)

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview) -> Self:
        """From the kernel's 32 bytes."""
        bits = int.from_bytes(data[4:32], "little")
        return cls(
            int.from_bytes(data[:4], "little"), tuple(n for n in range(224) if bits >> n & 1)
        )

    def to_bytes(self) -> bytes:
        """The kernel's 32 bytes; ArgumentError if a feature's number is above 223."""
        if not all(0 <= number < 224 for number in self.features):
            refuse_field(self, "a feature is a number from 0 to 223")
        bits = sum({1 << number for number in self.features})
        return pack_fields(self, Struct("<I"), (self.target,)) + bits.to_bytes(28, "little")


@attrs.frozen
class ArmVcpuEvents:
    """struct kvm_vcpu_events of arm64.

    Attributes:
        serror_pending: 1 if an SError waits.
        serror_has_esr: 1 if serror_esr counts.
        ext_dabt_pending: 1 to raise an external data abort (only set, never read).
        serror_esr: the syndrome.
        version: of this form; 1.
    """

    serror_pending: int = 0
    serror_has_esr: int = 0
    ext_dabt_pending: int = 0
    serror_esr: int = 0
    version: int = attrs.field(default=1, kw_only=True)

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview) -> Self:
        """From the kernel's 64 bytes."""
        return cls(*_EVENTS.unpack_from(data))

    def to_bytes(self) -> bytes:
        """The kernel's 64 bytes; ArgumentError if a field does not fit its width."""
        return pack_fields(
            self,
            _EVENTS,
            (self.serror_pending, self.serror_has_esr, self.ext_dabt_pending, self.serror_esr),
        )


@attrs.frozen
class ArmBreakpoints:
    """struct kvm_guest_debug_arch of arm64: pairs of control and value registers, at most 16 each.

    Attributes:
        breakpoints: pairs of DBGBCR and DBGBVR (Arm ARM, D2.9).
        watchpoints: pairs of DBGWCR and DBGWVR (Arm ARM, D2.10).
    """

    breakpoints: tuple[tuple[int, int], ...] = ()
    watchpoints: tuple[tuple[int, int], ...] = ()

    def to_bytes(self) -> bytes:
        """The kernel's 512 bytes; ArgumentError if there are more than 16 pairs."""
        parts = b""
        for pairs in (self.breakpoints, self.watchpoints):
            if len(pairs) > 16:
                refuse_field(self, "at most 16 pairs")
            for which in (0, 1):
                registers = [pair[which] for pair in pairs] + [0] * (16 - len(pairs))
                parts += pack_fields(self, Struct("<16Q"), tuple(registers))
        return parts
