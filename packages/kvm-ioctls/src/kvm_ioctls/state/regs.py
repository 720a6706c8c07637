"""General registers of an x86 vCPU."""

from __future__ import annotations

from struct import Struct

import attrs

from kvm_ioctls.state._codec import pack_fields

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self

__all__ = ["Regs"]

_CODEC = Struct("<18Q")


@attrs.frozen
class Regs:
    """struct kvm_regs: the sixteen general registers, the instruction pointer and the flags.

    Attributes:
        rax: and so on to r15: 64-bit values.
        rip: the next instruction's offset in the code segment.
        rflags: bit 1 is always set; 0x2 is what a fresh processor has.
        version: of this form; 1.
    """

    rax: int = 0
    rbx: int = 0
    rcx: int = 0
    rdx: int = 0
    rsi: int = 0
    rdi: int = 0
    rsp: int = 0
    rbp: int = 0
    r8: int = 0
    r9: int = 0
    r10: int = 0
    r11: int = 0
    r12: int = 0
    r13: int = 0
    r14: int = 0
    r15: int = 0
    rip: int = 0
    rflags: int = 2
    version: int = attrs.field(default=1, kw_only=True)

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview) -> Self:
        """From the kernel's 144 bytes."""
        return cls(*_CODEC.unpack_from(data))

    def to_bytes(self) -> bytes:
        """The kernel's 144 bytes; ArgumentError if a field is no 64-bit value."""
        return pack_fields(
            self,
            _CODEC,
            (
                self.rax, self.rbx, self.rcx, self.rdx, self.rsi, self.rdi, self.rsp, self.rbp,
                self.r8, self.r9, self.r10, self.r11, self.r12, self.r13, self.r14, self.r15,
                self.rip, self.rflags,
            ),
        )  # fmt: skip
