"""What goes over a link between two VMMs: preamble, TLS, frames; `docs/migration.md` has it whole.

Whoever connects says first, in clear text, which protocol and version it speaks and what the link
is for; the other side answers with the version that counts. Then TLS, if both sides were told so,
and frames of a header and a payload. Nothing that arrives is believed: sizes have limits, and what
does not fit ends the link.
"""

from __future__ import annotations

import enum
import os
import select
import socket
import ssl
import struct
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from vmm_reference.errors import ConfigError, HostError, VmmError

from .handover import Word

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

__all__ = [
    "VERSION", "Address", "Frame", "Kind", "Link", "LinkLost", "Listener", "ProtocolError",
    "Role", "Tls", "connect",
]  # fmt: skip

VERSION = 1
MAX_PAYLOAD = 64 << 20
"""Bytes of a frame on the control link."""
MAX_PAGES = 1 << 20
"""Bytes of memory in one frame."""

_MAGIC = b"vmmove"
_PREAMBLE = struct.Struct("<6sBB")
_HEADER = struct.Struct("<B3xIQQ")
_ACCEPTED, _OTHER_VERSION = 0, 1
# A peer that gets nothing through in this time is taken for gone.
SILENCE = 30.0
_HANDSHAKE = 10.0


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
    PART = 16  # payload: a name, a zero byte, a state
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


class ProtocolError(VmmError, ValueError):
    """The other side said what the protocol does not have there.

    Attributes:
        field: of which frame or field.
        value: what it was.
        rule: what is allowed.
    """

    def __init__(self, field: str, value: object, rule: str) -> None:
        super().__init__(field, value, rule)
        self.field = field
        self.value = value
        self.rule = rule

    def __str__(self) -> str:
        return f"migration link: {self.field}: {self.value!r:.80} {self.rule}"


@attrs.frozen
class Tls:
    """Certificates of one side; both sides show one, and each proves the other's.

    Attributes:
        folder: holds `cert.pem`, its key `key.pem`, and `ca.pem`, whose certificates the other
            side's must be signed by.
    """

    folder: str

    def context(self, *, server: bool) -> ssl.SSLContext:
        """The settings for TLS 1.3.

        Raises:
            ConfigError: a file is not there or is not what it must be.
        """
        folder = Path(self.folder)
        purpose = ssl.Purpose.CLIENT_AUTH if server else ssl.Purpose.SERVER_AUTH
        try:
            context = ssl.create_default_context(purpose, cafile=str(folder / "ca.pem"))
            context.load_cert_chain(str(folder / "cert.pem"), str(folder / "key.pem"))
        except (OSError, ssl.SSLError) as error:
            rule = f"must hold cert.pem, key.pem and ca.pem: {error}"
            raise ConfigError("tls", self.folder, rule) from None
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.verify_mode = ssl.CERT_REQUIRED
        return context


@attrs.frozen
class Address:
    """Where a VMM waits: `tcp:HOST:PORT` or `unix:PATH`.

    Attributes:
        host: name or address, empty for a Unix socket.
        port: 0 to 65535; 0 lets the host choose.
        path: of the Unix socket, empty for TCP.
    """

    host: str = ""
    port: int = 0
    path: str = ""

    @classmethod
    def parse(cls, text: str) -> Address:
        """An address from text.

        Example:
            >>> Address.parse("tcp:[::1]:4444")
            Address(host='::1', port=4444, path='')
            >>> str(Address.parse("unix:/run/vmm.sock"))
            'unix:/run/vmm.sock'

        Raises:
            ConfigError: it is none.
        """
        kind, _, rest = text.partition(":")
        if kind == "unix" and rest:
            return cls(path=rest)
        host, _, port = rest.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if kind == "tcp" and host and port.isascii() and port.isdigit() and int(port) < 1 << 16:
            return cls(host, int(port))
        raise ConfigError("address", text, "must be tcp:HOST:PORT or unix:PATH")

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"unix:{self.path}" if self.path else f"tcp:{host}:{self.port}"


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
            raise LinkLost("migration link", _reason(error)) from error
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
                raise LinkLost("migration link", _reason(error)) from error
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


def connect(address: Address, role: Role, tls: Tls | None) -> Link:
    """A link to the VMM that waits at an address.

    Raises:
        LinkLost: nobody is there, or does not prove who it is.
        ProtocolError: it speaks something else.
    """
    sock = None
    try:
        if address.path:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.settimeout(_HANDSHAKE)
            sock.connect(address.path)
        else:
            sock = socket.create_connection((address.host, address.port), _HANDSHAKE)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.sendall(_PREAMBLE.pack(_MAGIC, VERSION, role))
        answer = _exactly(sock, _PREAMBLE.size)
        magic, version, status = _PREAMBLE.unpack(answer)
        if magic != _MAGIC:
            raise ProtocolError("preamble", answer, f"must begin with {_MAGIC!r}")
        if status != _ACCEPTED or version != VERSION:
            raise ProtocolError(
                "version", version, f"is that of the other side; here it is {VERSION}"
            )
        if tls is not None:
            context = tls.context(server=False)
            context.check_hostname = bool(address.host)
            name = address.host if address.host else None
            sock = context.wrap_socket(sock, server_hostname=name)
    except OSError as error:
        if sock is not None:
            sock.close()
        hint = "is a VMM waiting there (vmm run --incoming)?"
        raise LinkLost(f"migration to {address}", _reason(error), hint) from error
    except BaseException:
        if sock is not None:
            sock.close()
        raise
    return Link(sock, role)


class Listener:
    """A socket that another VMM connects to.

    One thread accepts; another process can do so in its place for a while (`lend`).

    Args:
        address: where; a Unix socket must not be there yet.
        tls: None takes whoever comes.

    Attributes:
        address: where it is, with the port that the host chose.

    Raises:
        HostError: it can't be had.
    """

    def __init__(self, address: Address, tls: Tls | None) -> None:
        self.context = None if tls is None else tls.context(server=True)
        try:
            if address.path:
                self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                try:
                    self._socket.bind(address.path)
                    os.chmod(address.path, 0o600)  # noqa: PTH101
                    self._socket.listen()
                except BaseException:
                    self._socket.close()
                    raise
            else:
                family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
                self._socket = socket.create_server((address.host, address.port), family=family)
                address = attrs.evolve(address, port=self._socket.getsockname()[1])
        except OSError as error:
            raise HostError(
                f"--incoming {address}", _reason(error), "name another address"
            ) from error
        self._socket.setblocking(False)
        self.address = address
        self._changed = threading.Condition()
        self._lent = self._closed = False
        self._idle = True  # nobody accepts here
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def accept(self) -> socket.socket | None:
        """The next connection, not yet greeted; None once this is closed."""
        while True:
            with self._changed:
                self._idle = True
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._closed or not self._lent)
                if self._closed:
                    return None
                self._idle = False
            waiting: list[Any] = [self._socket, self._wake]
            ready = select.select(waiting, [], [])[0]
            if self._wake in ready:
                os.eventfd_read(self._wake)
                continue
            with suppress(OSError):  # it is gone already
                return self._socket.accept()[0]

    def lend(self) -> int:
        """The descriptor, for another process to accept; here nobody does when this returns."""
        with self._changed:
            self._lent = True
            os.eventfd_write(self._wake, 1)
            self._changed.wait_for(lambda: self._idle)
        return self._socket.fileno()

    def take_back(self) -> None:
        """Accept here again. Idempotent."""
        with self._changed:
            self._lent = False
            self._changed.notify_all()

    def close(self) -> None:
        """Take no more connections, and wake `accept`. Idempotent."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            os.eventfd_write(self._wake, 1)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._idle)
        os.close(self._wake)
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        if self.address.path:
            Path(self.address.path).unlink(missing_ok=True)


def greet(sock: socket.socket) -> Role:
    """Answer whoever connected; what it came for.

    Raises:
        LinkLost: it is silent.
        ProtocolError: it speaks something else.
    """
    sock.settimeout(_HANDSHAKE)
    try:
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        said = _exactly(sock, _PREAMBLE.size)
        magic, version, role = _PREAMBLE.unpack(said)
        if magic != _MAGIC:
            raise ProtocolError("preamble", said, f"must begin with {_MAGIC!r}")
        fits = version == VERSION
        sock.sendall(_PREAMBLE.pack(_MAGIC, VERSION, _ACCEPTED if fits else _OTHER_VERSION))
    except OSError as error:
        raise LinkLost("migration link", _reason(error)) from error
    if not fits:
        raise ProtocolError("version", version, f"is that of the other side; here it is {VERSION}")
    try:
        return Role(role)
    except ValueError:
        raise ProtocolError("role", role, "is none") from None


def secure(sock: socket.socket, role: Role, context: ssl.SSLContext | None) -> Link:
    """A link on a connection that was greeted.

    Raises:
        LinkLost: the other side does not prove who it is.
    """
    if context is not None:
        try:
            sock = context.wrap_socket(sock, server_side=True)
        except OSError as error:
            raise LinkLost("migration link", _reason(error)) from error
    return Link(sock, role)


def _exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = sock.recv(count - len(data))
        if not more:
            raise ConnectionResetError(104, "the other side closed it")
        data += more
    return data


def _reason(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "nothing came for too long"
    if isinstance(error, ssl.SSLError):
        return f"TLS: {error.reason or error}"
    return str(getattr(error, "strerror", None) or error)
