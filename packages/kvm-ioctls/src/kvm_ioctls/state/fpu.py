"""The x87 and SSE registers in the old, fixed form."""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING

import attrs

from kvm_ioctls.state._codec import pack_fields, refuse_field

if TYPE_CHECKING:
    from typing import Self

__all__ = ["Fpu"]

_CODEC = Struct("<" + 8 * "16s" + "HHBxHQQ" + 16 * "16s" + "I4x")
_ZERO = bytes(16)


@attrs.frozen
class Fpu:
    """struct kvm_fpu.

    Attributes:
        fpr: eight x87 or MMX registers of 16 bytes, the upper six unused.
        fcw: control word; 0x37f after FNINIT.
        fsw: status word.
        ftwx: tag word as FXSAVE shortens it: one bit a register.
        last_opcode: of the last x87 instruction, with last_ip and last_dp its addresses.
        xmm: sixteen SSE registers of 16 bytes.
        mxcsr: SSE control and status; 0x1f80 after reset.
        version: of this form; 1.
    """

    fpr: tuple[bytes, ...] = (_ZERO,) * 8
    fcw: int = 0x37F
    fsw: int = 0
    ftwx: int = 0
    last_opcode: int = 0
    last_ip: int = 0
    last_dp: int = 0
    xmm: tuple[bytes, ...] = (_ZERO,) * 16
    mxcsr: int = 0x1F80
    version: int = attrs.field(default=1, kw_only=True)

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview) -> Self:
        """From the kernel's 416 bytes."""
        v = _CODEC.unpack_from(data)
        fcw, fsw, ftwx, opcode, ip, dp = v[8:14]
        return cls(v[:8], fcw, fsw, ftwx, opcode, ip, dp, v[14:30], v[30])

    def to_bytes(self) -> bytes:
        """The kernel's 416 bytes; ArgumentError if a field does not fit its width."""
        if [len(x) for x in (*self.fpr, *self.xmm)] != [16] * 24:
            refuse_field(self, "8 values of fpr and 16 of xmm, 16 bytes each")
        return pack_fields(
            self,
            _CODEC,
            (
                *self.fpr, self.fcw, self.fsw, self.ftwx, self.last_opcode, self.last_ip,
                self.last_dp, *self.xmm, self.mxcsr,
            ),
        )  # fmt: skip
