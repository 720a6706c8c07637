"""The extended processor state (XSAVE area) and XCR0."""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING

import attrs

from kvm_ioctls.state._codec import pack_fields, refuse_field

if TYPE_CHECKING:
    from typing import Self

__all__ = ["Xcrs", "Xsave"]

_XCR = Struct("<I4xQ")


@attrs.frozen
class Xsave:
    """struct kvm_xsave: an XSAVE area in the standard format (Intel SDM volume 1, 13.4).

    Attributes:
        region: 4096 bytes, or as many as KVM_CAP_XSAVE2 says.
        version: of this form; 1.
    """

    region: bytes
    version: int = attrs.field(default=1, kw_only=True)

    @property
    def xstate_bv(self) -> int:
        """Which components the area holds; the others are in their initial state."""
        return int.from_bytes(self.region[512:520], "little")

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview) -> Self:
        """From the kernel's bytes."""
        return cls(bytes(data))

    def to_bytes(self) -> bytes:
        """The kernel's bytes; ArgumentError if there are fewer than 4096."""
        if len(self.region) < 4096 or len(self.region) % 4:
            refuse_field(self, "the area has 4096 bytes or more, a multiple of 4")
        return self.region


@attrs.frozen
class Xcrs:
    """struct kvm_xcrs: extended control registers.

    Attributes:
        xcrs: pairs of a register's number and value; XCR0 is the only one so far.
        flags: none is defined; 0.
        version: of this form; 1.
    """

    xcrs: tuple[tuple[int, int], ...] = ((0, 1),)
    flags: int = 0
    version: int = attrs.field(default=1, kw_only=True)

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview) -> Self:
        """From the kernel's 392 bytes."""
        count = min(int.from_bytes(data[:4], "little"), 16)
        return cls(
            tuple(_XCR.unpack_from(data, 8 + 16 * i) for i in range(count)),
            int.from_bytes(data[4:8], "little"),
        )

    def to_bytes(self) -> bytes:
        """The kernel's 392 bytes; ArgumentError if there are more than 16 registers."""
        if len(self.xcrs) > 16:
            refuse_field(self, "at most 16 registers")
        head = pack_fields(self, Struct("<II"), (len(self.xcrs), self.flags))
        body = b"".join(pack_fields(self, _XCR, pair) for pair in self.xcrs)
        return (head + body).ljust(392, b"\0")
