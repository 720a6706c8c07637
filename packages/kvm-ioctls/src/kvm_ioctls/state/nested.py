"""The state of a hypervisor that runs in the guest."""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING

import attrs

from kvm_ioctls.state._codec import pack_fields, refuse_field

if TYPE_CHECKING:
    from typing import Self

__all__ = ["NestedState"]

_HEAD = Struct("<HHI120s")


@attrs.frozen
class NestedState:
    """struct kvm_nested_state.

    Attributes:
        flags: KVM_STATE_NESTED_*.
        format: KVM_STATE_NESTED_FORMAT_VMX or _SVM.
        header: 120 bytes: where the VMCS or VMCB lies, and what is pending.
        data: the VMCS or VMCB in the kernel's own form, if a nested guest was running.
        version: of this form; 1.
    """

    flags: int = 0
    format: int = 0
    header: bytes = bytes(120)
    data: bytes = b""
    version: int = attrs.field(default=1, kw_only=True)

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview) -> Self:
        """From the kernel's bytes, as many as it said there are."""
        flags, kind, _, header = _HEAD.unpack_from(data)
        return cls(flags, kind, header, bytes(data[128:]))

    def to_bytes(self) -> bytes:
        """The kernel's bytes; ArgumentError if the header has another length."""
        if len(self.header) != 120:
            refuse_field(self, "the header has 120 bytes")
        size = 128 + len(self.data)
        return pack_fields(self, _HEAD, (self.flags, self.format, size, self.header)) + self.data
