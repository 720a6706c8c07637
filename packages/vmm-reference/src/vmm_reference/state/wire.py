"""What goes over a link between two VMMs: frames; `docs/migration.md` has the protocol whole.

A frame is a header and a payload. Nothing that arrives is believed: sizes have limits, and what
does not fit ends the link. How a link comes to be is `connection`.
"""

from __future__ import annotations

import enum
import socket
import ssl
import struct
from contextlib import suppress
from typing import TYPE_CHECKING

import attrs

from vmm_reference.errors import HostError, RuleError

from .handover import Word

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

__all__ = ["MAX_PAGES", "WORDS", "Frame", "Kind", "Link", "LinkLost", "ProtocolError", "Role"]

MAX_PAYLOAD = 64 << 20
"""Bytes of a frame on the control link."""
MAX_PAGES = 1 << 20
"""Bytes of memory in one frame."""

_HEADER = struct.Struct("<B3xIQQ")
# A peer that gets nothing through in this time is taken for gone.
SILENCE = 30.0


class Role(enum.IntEnum):
    """What a link is for."""

    CONTROL = 0
    PAGES = 1
    FAULTS = 2


class Kind(enum.IntEnum):
    """What a frame says. The first eleven are the words of `handover`."""

    OFFER = 1
    ACCEPT = 2
    STATE = 3
    SPLIT = 4
    READY = 5
    COMMIT = 6
    FILLING = 7
    STARTED = 8
    ABORT = 9
    UNKNOWN = 10
    MEET = 15  # first on a control link that takes up an attempt again
    STATES = 16  # payload: all states by name
    SYNC = 17  # on a link for pages: all of round `argument` is sent; echoed on the control link
    REFUSE = 18  # payload: why, as text
    BYE = 19  # the source has heard STARTED, and lets go
    JOIN = 20  # first on any other link; `argument` is its number
    DATA = 32  # payload: memory from address `argument` on
    ZSTD = 33  # the same, compressed
    ZERO = 34  # the same, all zero, and no payload
    REQUEST = 35  # the destination waits for the page at `argument`
    MISSING = 36  # payload: pairs of address and length that the destination has not
    DONE = 37  # no page is missing


WORDS = {word: Kind[word.name] for word in Word}


class LinkLost(HostError):
    """The other side is gone, or silent for too long."""


class ProtocolError(RuleError):
    """The other side said what the protocol does not have there.

    Attributes:
        field: of which frame or field.
        value: what it was.
        rule: what is allowed.
    """

    def __str__(self) -> str:
        return f"migration link: {self.field}: {self.value!r:.80} {self.rule}"


@attrs.frozen
class Frame:
    """A frame without its payload.

    Attributes:
        kind: what it says.
        size: bytes of payload that follow.
        argument: an address or a number.
        extra: the attempt on a control link, a length in bytes on the others.
    """

    kind: Kind
    size: int
    argument: int = 0
    extra: int = 0


class Link:
    """A connected socket that carries frames. One thread sends, one receives.

    Attributes:
        socket: it; a Unix socket can pass descriptors.
        role: what the link is for.
        sent: bytes so far.
        received: bytes so far.
    """

    def __init__(self, sock: socket.socket, role: Role) -> None:
        self.socket = sock
        self.role = role
        self.sent = 0
        self.received = 0
        sock.settimeout(SILENCE)

    def send(
        self, kind: Kind, payload: bytes | memoryview = b"", argument: int = 0, extra: int = 0
    ) -> None:
        """Send one frame whole.

        Raises:
            LinkLost: it can't be.
        """
        self.send_parts(kind, [payload] if payload else [], argument, extra)

    def send_parts(
        self, kind: Kind, parts: list[bytes | memoryview], argument: int = 0, extra: int = 0
    ) -> None:
        """Send one frame whose payload lies in several pieces, at most 1000.

        Raises:
            LinkLost: it can't be.
        """
        size = sum(map(len, parts))
        header = _HEADER.pack(kind, size, argument, extra)
        buffers: list[bytes | memoryview] = [header, *parts]
        total = left = len(header) + size
        try:
            if isinstance(self.socket, ssl.SSLSocket):
                self.socket.sendall(b"".join(buffers))
                left = 0
            while left:
                done = self.socket.sendmsg(buffers)
                left -= done
                while done and done >= len(buffers[0]):
                    done -= len(buffers.pop(0))
                if done:
                    buffers[0] = memoryview(buffers[0])[done:]
        except (OSError, ValueError) as error:  # ValueError: it was closed
            raise LinkLost("migration link", reason(error)) from error
        self.sent += total

    def receive(self, limit: int = MAX_PAYLOAD) -> Frame:
        """Receive the next frame's header.

        Raises:
            LinkLost: nothing came, or the other side closed it.
            ProtocolError: it is no frame, or its payload is larger than `limit`.
        """
        header = bytearray(_HEADER.size)
        self.receive_into(memoryview(header))
        number, size, argument, extra = _HEADER.unpack(header)
        try:
            kind = Kind(number)
        except ValueError:
            raise ProtocolError("frame", number, "is no kind of frame") from None
        if size > limit:
            raise ProtocolError(kind.name, size, f"bytes are too many; at most {limit}")
        return Frame(kind, size, argument, extra)

    def payload(self, frame: Frame) -> bytes:
        """Receive a frame's payload.

        Raises:
            LinkLost: it does not come.
        """
        # A size alone, without what it promises, must not cost memory.
        data = bytearray()
        while len(data) < frame.size:
            at = len(data)
            data += bytes(min(MAX_PAGES, frame.size - at))
            self.receive_into(memoryview(data)[at:])
        return bytes(data)

    def receive_into(self, view: memoryview) -> None:
        """Fill a buffer.

        Raises:
            LinkLost: there does not come enough.
        """
        while view:
            try:
                count = self.socket.recv_into(view)
            except (OSError, ValueError) as error:
                raise LinkLost("migration link", reason(error)) from error
            if count == 0:
                raise LinkLost("migration link", "the other side closed it")
            self.received += count
            view = view[count:]

    @property
    def pending(self) -> bool:
        """Whether something has come that the socket does not show as readable any more."""
        return isinstance(self.socket, ssl.SSLSocket) and self.socket.pending() > 0

    def close(self) -> None:
        """Close it; whoever waits in it is told that it is lost. Idempotent, from any thread."""
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def reason(error: BaseException) -> str:
    """Why a socket failed, in words."""
    if isinstance(error, TimeoutError):
        return "nothing came for too long"
    if isinstance(error, ssl.SSLError):
        return f"TLS: {error.reason or error}"
    return str(getattr(error, "strerror", None) or error)
