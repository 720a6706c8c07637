"""Who connects while pages are missing: heard by the process that supplies them, not by the VMM."""

from __future__ import annotations

import os
import queue
import select
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from .connection import greet, secure
from .wire import Kind, Link, LinkLost, ProtocolError, Role

if TYPE_CHECKING:
    import socket
    import ssl
    from collections.abc import Callable

__all__ = ["Door"]


class Door:
    """Greets who connects, and lets in who proves to be this migration's source.

    Strangers may be slow: each is heard on a thread of its own, and a few at a time.

    Args:
        context: for TLS, or None.
        attempt: that links for faults must name.
        refused: told why somebody is not let in.
        met: given connections that are for control; it closes them.
    """

    def __init__(
        self,
        context: ssl.SSLContext | None,
        attempt: int,
        refused: Callable[[str], object],
        met: Callable[[socket.socket], object],
    ) -> None:
        self._context, self._attempt, self._refused, self._met = context, attempt, refused, met
        self._places = threading.Semaphore(16)
        self._links: queue.Queue[Link] = queue.Queue()
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._shut = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._accepting: threading.Thread | None = None
        self._hearing: list[threading.Thread] = []

    def fileno(self) -> int:
        """Readable when `link` has one."""
        return self._bell

    def link(self) -> Link | None:
        """A link for faults that was let in, if there is one."""
        with suppress(BlockingIOError):
            os.eventfd_read(self._bell)
        found = None
        while not self._links.empty():
            if found is not None:
                found.close()
            found = self._links.get()
        return found

    def listen(self, listener: socket.socket) -> None:
        """Accept connections from here on, on a thread."""
        listener.setblocking(False)
        self._accepting = threading.Thread(target=self._accept, args=(listener,), daemon=True)
        self._accepting.start()

    def hear(self, sock: socket.socket, role: Role | None = None) -> None:
        """Take a connection, greeted already if its role is known, on a thread."""
        thread = threading.Thread(target=self._hear, args=(sock, role), daemon=True)
        thread.start()
        self._hearing = [other for other in self._hearing if other.is_alive()] + [thread]

    def close(self) -> None:
        """Accept no more; who was accepted has been heard when this returns."""
        os.eventfd_write(self._shut, 1)
        if self._accepting is not None:
            self._accepting.join()
        for thread in self._hearing:
            thread.join()

    def _accept(self, listener: socket.socket) -> None:
        waiting: list[Any] = [listener, self._shut]
        while self._shut not in select.select(waiting, [], [])[0]:
            try:
                sock = listener.accept()[0]
            except BlockingIOError:
                continue
            except OSError:  # the VMM waits no longer
                return
            if self._places.acquire(blocking=False):
                self.hear(sock)
            else:
                sock.close()

    def _hear(self, sock: socket.socket, role: Role | None) -> None:
        counted = role is None
        try:
            if role is None:
                role = greet(sock)
            if role is Role.CONTROL:
                self._met(sock)
                return
            if role is not Role.FAULTS:
                raise ProtocolError("role", role.name, "is not expected")
            sock.settimeout(10)
            link = secure(sock, Role.FAULTS, self._context)
            frame = link.receive(0)
            if frame.kind is not Kind.JOIN or frame.extra != self._attempt:
                raise ProtocolError("JOIN", frame.extra, "is not for this migration")
            self._links.put(link)
            os.eventfd_write(self._bell, 1)
        except (LinkLost, ProtocolError, OSError) as error:
            sock.close()
            self._refused(str(error))
        finally:
            if counted:
                self._places.release()
