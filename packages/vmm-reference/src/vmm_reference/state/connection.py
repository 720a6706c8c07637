"""How two VMMs come to have a link: addresses, the preamble, TLS.

Whoever connects says first, in clear text, which protocol and version it speaks and what the link
is for; the other side answers with the version that counts. Then TLS, if both sides were told so,
and frames (`wire`).
"""

from __future__ import annotations

import os
import select
import socket
import ssl
import struct
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import attrs

from vmm_reference.errors import ConfigError, HostError

from .wire import Link, LinkLost, ProtocolError, Role, reason

__all__ = ["VERSION", "Address", "Listener", "Tls", "connect", "greet", "secure"]

VERSION = 2

_MAGIC = b"vmmove"
_PREAMBLE = struct.Struct("<6sBB")
_ACCEPTED, _OTHER_VERSION = 0, 1
_HANDSHAKE = 10.0  # seconds


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
        raise LinkLost(f"migration to {address}", reason(error), hint) from error
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
                f"--incoming {address}", reason(error), "name another address"
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
        raise LinkLost("migration link", reason(error)) from error
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
            raise LinkLost("migration link", reason(error)) from error
    return Link(sock, role)


def _exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = sock.recv(count - len(data))
        if not more:
            raise ConnectionResetError(104, "the other side closed it")
        data += more
    return data
