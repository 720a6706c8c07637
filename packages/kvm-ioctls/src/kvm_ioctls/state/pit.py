"""The i8254 timer."""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING

import attrs

from kvm_ioctls.state._codec import pack_fields, refuse_field

if TYPE_CHECKING:
    from typing import Self

__all__ = ["PitChannelState", "PitState2"]

_CHANNEL = Struct("<IH10Bq")
_FLAGS = Struct("<I36x")


@attrs.frozen
class PitChannelState:
    """struct kvm_pit_channel_state: one of the timer's three counters.

    Attributes:
        count: reload value, 0 to 65536.
        latched_count: what a latch command held, while count_latched.
        count_latched: how many bytes of it are to be read.
        status_latched: 1 if `status` waits to be read.
        status: the latched status.
        read_state: which byte comes next, as write_state for writing.
        write_state: which byte comes next.
        write_latch: the byte that waits for its other half.
        rw_mode: access mode.
        mode: counting mode, 0 to 5.
        bcd: 1 to count in decimal.
        gate: the gate input.
        count_load_time: host monotonic nanoseconds when counting began.
        version: of this form; 1.
    """

    count: int = 0
    latched_count: int = 0
    count_latched: int = 0
    status_latched: int = 0
    status: int = 0
    read_state: int = 0
    write_state: int = 0
    write_latch: int = 0
    rw_mode: int = 0
    mode: int = 0
    bcd: int = 0
    gate: int = 0
    count_load_time: int = 0
    version: int = attrs.field(default=1, kw_only=True)

    def to_bytes(self) -> bytes:
        """The kernel's 24 bytes; ArgumentError if a field does not fit its width."""
        return pack_fields(
            self,
            _CHANNEL,
            (
                self.count, self.latched_count, self.count_latched, self.status_latched,
                self.status, self.read_state, self.write_state, self.write_latch, self.rw_mode,
                self.mode, self.bcd, self.gate, self.count_load_time,
            ),
        )  # fmt: skip


@attrs.frozen
class PitState2:
    """struct kvm_pit_state2.

    Attributes:
        channels: the three counters.
        flags: KVM_PIT_FLAGS_*.
        version: of this form; 1.
    """

    channels: tuple[PitChannelState, ...] = (PitChannelState(),) * 3
    flags: int = 0
    version: int = attrs.field(default=1, kw_only=True)

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview) -> Self:
        """From the kernel's 112 bytes."""
        return cls(
            tuple(PitChannelState(*_CHANNEL.unpack_from(data, 24 * i)) for i in range(3)),
            _FLAGS.unpack_from(data, 72)[0],
        )

    def to_bytes(self) -> bytes:
        """The kernel's 112 bytes; ArgumentError if there are not three channels."""
        if len(self.channels) != 3:
            refuse_field(self, "three channels")
        return b"".join(c.to_bytes() for c in self.channels) + pack_fields(
            self, _FLAGS, (self.flags,)
        )
