"""The paravirtual clock."""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING

import attrs

from kvm_ioctls.state._codec import pack_fields

if TYPE_CHECKING:
    from typing import Self

__all__ = ["ClockData"]

_CODEC = Struct("<QI4xQQ16x")


@attrs.frozen
class ClockData:
    """struct kvm_clock_data.

    Attributes:
        clock: the guest's kvmclock in nanoseconds.
        flags: KVM_CLOCK_*: which of the others count, and whether the TSC is stable.
        realtime: the host's wall clock in nanoseconds at the same moment.
        host_tsc: the host's TSC at the same moment.
        version: of this form; 1.
    """

    clock: int = 0
    flags: int = 0
    realtime: int = 0
    host_tsc: int = 0
    version: int = attrs.field(default=1, kw_only=True)

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview) -> Self:
        """From the kernel's 48 bytes."""
        return cls(*_CODEC.unpack_from(data))

    def to_bytes(self) -> bytes:
        """The kernel's 48 bytes; ArgumentError if a field does not fit its width."""
        return pack_fields(self, _CODEC, (self.clock, self.flags, self.realtime, self.host_tsc))
