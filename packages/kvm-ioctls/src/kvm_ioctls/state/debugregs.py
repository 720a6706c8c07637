"""Debug registers of the guest."""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING

import attrs

from kvm_ioctls.state._codec import pack_fields

if TYPE_CHECKING:
    from typing import Self

__all__ = ["DebugRegs"]

_CODEC = Struct("<7Q72x")


@attrs.frozen
class DebugRegs:
    """struct kvm_debugregs.

    Attributes:
        db: the four breakpoint addresses, DR0 to DR3.
        dr6: debug status; 0xffff0ff0 after reset.
        dr7: debug control; 0x400 after reset.
        flags: none is defined; 0.
        version: of this form; 1.
    """

    db: tuple[int, int, int, int] = (0, 0, 0, 0)
    dr6: int = 0xFFFF0FF0
    dr7: int = 0x400
    flags: int = 0
    version: int = attrs.field(default=1, kw_only=True)

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview) -> Self:
        """From the kernel's 128 bytes."""
        v = _CODEC.unpack_from(data)
        return cls(v[:4], *v[4:])

    def to_bytes(self) -> bytes:
        """The kernel's 128 bytes; ArgumentError if a field does not fit its width."""
        return pack_fields(self, _CODEC, (*self.db, self.dr6, self.dr7, self.flags))
