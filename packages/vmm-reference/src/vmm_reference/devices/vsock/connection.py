"""One stream between the guest and the host: its credit, both ways, and how it ends.

All counters are those of virtio 1.3, section 5.10.6.3, and wrap at 32 bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from .packet import MASK32, SHUTDOWN_RCV, SHUTDOWN_SEND

if TYPE_CHECKING:
    from collections.abc import Callable

    from .packet import Packet

__all__ = ["BUFFER", "Connection", "Stream"]

BUFFER = 384 << 10
PACKET = 64 << 10  # the largest that Linux sends
"""What a connection keeps of the guest's data while the host does not take it, in bytes."""


class Stream(Protocol):
    """The host's end of a connection that goes through Python. Non-blocking.

    Attributes:
        readable: to be called when `receive` has something after it had nothing.
        writable: likewise for `send`.
    """

    readable: Callable[[], object]
    writable: Callable[[], object]

    def send(self, data: bytes) -> int:
        """Send data; returns how much was taken.

        Raises:
            OSError: nobody takes any more.
        """

    def receive(self, limit: int) -> bytes | None:
        """At most `limit` bytes; none at the end; None if there are none yet.

        Raises:
            OSError: the connection broke.
        """

    def established(self, host_port: int) -> None:
        """The guest has accepted the connection that the host asked for."""

    def shutdown(self) -> None:
        """Nothing more will be sent."""

    def hung_up(self) -> bool:
        """Whether the other end takes nothing any more either."""

    def close(self) -> None:
        """Forget it."""


class Connection:
    """A stream that both sides know, or that waits for the guest's answer.

    Attributes:
        guest_port: the guest's half of its name.
        host_port: the host's.
        stream: the host's end.
        open: whether the guest has agreed.
        guest_sends: whether the guest may send still.
        guest_receives: whether it may be sent something still.
        ended: whether the guest was told that the host sends no more.
    """

    def __init__(self, guest_port: int, host_port: int, stream: Stream, *, is_open: bool) -> None:
        self.guest_port, self.host_port = guest_port, host_port
        self.stream = stream
        self.open = is_open
        self.guest_sends = self.guest_receives = True
        self.ended = False
        self.closing = False  # the guest is done; what it sent is still on its way
        self._peer_buf_alloc = self._peer_fwd_cnt = self._tx_cnt = 0
        self._rx_cnt = self.fwd_cnt = self._told = 0
        self._asked = False
        self.pending = bytearray()

    # To the guest.

    def note(self, packet: Packet) -> bool:
        """Take what every packet says of the guest's buffer; whether that was waited for."""
        self._peer_buf_alloc, self._peer_fwd_cnt = packet.buf_alloc, packet.fwd_cnt
        asked, self._asked = self._asked, False
        return asked

    @property
    def credit(self) -> int:
        """Bytes that the guest has room for; none where its counters make no sense."""
        in_flight = (self._tx_cnt - self._peer_fwd_cnt) & MASK32
        return max(self._peer_buf_alloc - in_flight, 0)

    def sent(self, count: int) -> None:
        """So much went to the guest."""
        self._tx_cnt = (self._tx_cnt + count) & MASK32

    def ask_for_credit(self) -> bool:
        """Whether to ask the guest for credit, which is done once until it says something."""
        asked, self._asked = self._asked, True
        return not asked

    # From the guest.

    def accept(self, data: bytes) -> bool:
        """Take what the guest sent; False if it sent more than it was allowed.

        Raises:
            OSError: the host takes nothing any more.
        """
        if len(data) > BUFFER - len(self.pending):
            return False
        self._rx_cnt = (self._rx_cnt + len(data)) & MASK32
        if not self.pending:
            taken = self.stream.send(data)
            self.fwd_cnt = (self.fwd_cnt + taken) & MASK32
            data = data[taken:]
        self.pending += data
        return True

    def flush(self) -> None:
        """Give the host what waited for it.

        Raises:
            OSError: the host takes nothing any more.
        """
        while self.pending:
            taken = self.stream.send(bytes(self.pending))
            if taken == 0:
                return
            self.fwd_cnt = (self.fwd_cnt + taken) & MASK32
            del self.pending[:taken]
        if not self.guest_sends:
            self.stream.shutdown()

    def shut(self, flags: int) -> None:
        """The guest said that it is done with one or both directions; it can't take that back."""
        if flags & SHUTDOWN_SEND:
            self.guest_sends = False
        if flags & SHUTDOWN_RCV:
            self.guest_receives = False

    def tell(self) -> tuple[int, int]:
        """buf_alloc and fwd_cnt for a packet to the guest, which knows them then."""
        self._told = self.fwd_cnt
        return BUFFER, self.fwd_cnt

    @property
    def untold(self) -> bool:
        """Whether the guest should hear of room that it does not know of.

        It may have no more on its way than it takes itself, as Linux does, whatever its credit.
        """
        untold = (self.fwd_cnt - self._told) & MASK32
        window = min(self._peer_buf_alloc, BUFFER)
        return untold != 0 and untold >= max(window - PACKET, window // 2)
