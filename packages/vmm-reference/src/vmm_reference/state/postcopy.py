"""Post-copy on the side of the destination: the pager's process, as the VMM sees it."""

from __future__ import annotations

import array
import json
import os
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from vm_memory import Advice, GuestAddress
from vm_memory.userfault import Userfault
from vmm_reference.errors import HostError

from .ranges import Ranges
from .stream import PAGE, read_table
from .wire import ProtocolError

if TYPE_CHECKING:
    from collections.abc import Callable

    from vm_memory import GuestMemory

    from .connection import Listener, Tls

__all__ = ["PostCopy"]

_PER_LINE = 1000
_LONGEST = 1 << 16  # bytes of a line from the process
_MOST_DEATHS = 8


class PostCopy:
    """A process that supplies missing pages (`pager`), started early since that takes a while.

    Should it die it is started anew: what it had supplied stays, and is not replaced. While pages
    are missing it accepts connections too: a thread of this process may stand still at a missing
    page with the interpreter's lock in its hands, and the page come over a new link alone.

    Args:
        memory: of the machine.
        attempt: that links for faults must name.
        listener: where connections arrive.
        tls: that they must prove.
        wake: an eventfd that is signalled when there is something to look at.
        met: given a control link's connection that the process has accepted and greeted.

    Attributes:
        filled: whether all pages are there.
    """

    def __init__(
        self,
        memory: GuestMemory,
        attempt: int,
        listener: Listener,
        tls: Tls | None,
        wake: int,
        met: Callable[[socket.socket], None],
    ) -> None:
        self.filled = False
        self._memory, self._listener, self._met = memory, listener, met
        self._wake = os.dup(wake)  # its owner may be gone first
        self._arguments = [str(attempt), tls.folder if tls is not None else ""]
        self._userfault: Userfault | None = None
        self._missing: Ranges = []
        self._words: list[str] = []
        self._lock = threading.Lock()
        self._closed = False
        self._deaths = 0
        self._signals, self._hearing = -1, list[int]()
        self._spawn()

    def give(self, sock: socket.socket) -> None:
        """Pass a connection on."""
        with self._lock:
            self._tell({"link": True}, sock.fileno())
        sock.close()

    def begin(self, missing: bytes) -> None:
        """Let pages be missing from now on.

        Raises:
            ProtocolError, MemoryAccessError: they are none of this memory.
            MappingError: no userfaultfd.
        """
        ranges = read_table(missing)
        for address, length in ranges:
            if not length or (address | length) % PAGE:
                raise ProtocolError("missing", (address, length), "must be whole pages")
        for region in self._memory.regions:
            # No huge page may appear over pages that are missing.
            region.advise(Advice.NOHUGEPAGE)
        for address, length in ranges:
            self._memory.discard(GuestAddress(address), length)
        userfault = Userfault(self._memory)
        for region in self._memory.regions:
            userfault.register(region.guest_address, region.size)
        self._listener.lend()
        with self._lock:
            self._userfault, self._missing = userfault, ranges
            self._hand_over()

    def listen_for(self, signals: int, hearing: list[int]) -> None:
        """Give pages up once a signal has been unheard for long, since a thread waits for them.

        Args:
            signals: a pipe that is readable as long as one is.
            hearing: the threads for which pages are given up then, as the kernel numbers them.
        """
        with self._lock:
            if not self._closed and not self.filled:
                self._signals, self._hearing = os.dup(signals), hearing
                with suppress(ProtocolError):  # whoever dies is started anew, and told
                    self._tell({"threads": hearing}, self._signals)

    def reports(self) -> list[str]:
        """What the process has said since."""
        with self._lock:
            words, self._words = self._words, []
        return words

    def end(self) -> None:
        """The machine has ended: nobody needs any more what is still missing."""
        if self.close():
            self.filled = True
            self._signal()

    def close(self) -> bool:
        """End the process; whoever waits for a page gets zeros, and the memory is lost then.

        Idempotent, and from any thread: the memory is marked as lost when this returns, whoever
        of several was the first. Returns whether this call was.
        """
        with self._lock:
            if self._closed:
                return False
            self._closed = True
            if self._userfault is not None and not self.filled:
                for region in self._memory.regions:
                    region.mapping.lose()
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
        if self._userfault is not None:
            self._userfault.close()
        self._listener.take_back()
        if self.filled:
            for region in self._memory.regions:
                region.mapping.overlaid = False
                region.advise(Advice.HUGEPAGE)
        self._thread.join()
        self._socket.close()
        return True

    def __del__(self) -> None:
        os.close(self._wake)
        if self._signals >= 0:
            os.close(self._signals)

    def _spawn(self) -> None:
        self._socket, child = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        command = [sys.executable, "-m", "vmm_reference.state.pager", str(child.fileno())]
        try:
            process = subprocess.Popen(
                [*command, *self._arguments], pass_fds=[child.fileno()], stdin=subprocess.DEVNULL
            )
        except OSError as error:
            self._socket.close()
            raise HostError("the process that supplies pages", error.strerror) from error
        finally:
            child.close()
        self._thread = threading.Thread(
            target=self._hear, args=(process, self._socket), name="pager", daemon=True
        )
        self._thread.start()

    def _hand_over(self) -> None:
        assert self._userfault is not None
        rows = [[int(r.guest_address), r.host_address, r.size] for r in self._memory.regions]
        self._tell({"memory": rows}, self._userfault.fileno())
        for start in range(0, len(self._missing), _PER_LINE):
            self._tell({"missing": self._missing[start : start + _PER_LINE]})
        self._tell({"listen": True}, self._listener.lend())
        if self._signals >= 0:
            self._tell({"threads": self._hearing}, self._signals)
        self._tell({"ready": True})

    def _tell(self, words: dict[str, object], fd: int = -1) -> None:
        data = json.dumps(words).encode() + b"\n"
        beside = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))] if fd >= 0 else []
        try:
            sent = self._socket.sendmsg([data], beside)
            self._socket.sendall(data[sent:])
        except OSError as error:
            raise ProtocolError("pager", error, "is gone") from error

    def _hear(self, process: subprocess.Popen[bytes], sock: socket.socket) -> None:
        buffer = b""
        while True:
            data, fds = _read(sock)
            for fd in fds:
                self._met(socket.socket(fileno=fd))
            *lines, buffer = (buffer + data).split(b"\n")
            if not data or len(buffer) > _LONGEST or not all(map(self._understood, lines)):
                break
        process.kill()
        process.wait()
        with self._lock:
            if self._closed or self.filled:
                return
            self._deaths += 1
            sock.close()
            if self._deaths > _MOST_DEATHS:
                self._words.append("pages: the process that supplies them does not stay alive")
                self._signal()
                return
            self._words.append("the process that supplies pages died, and was started anew")
            try:
                self._spawn()
                if self._userfault is not None:
                    self._hand_over()
            except (HostError, ProtocolError) as error:
                self._words.append(f"it could not be: {error}")
        self._signal()

    def _understood(self, line: bytes) -> bool:
        """Take one line of the process; whether it was one that it should say."""
        try:
            words = json.loads(line)
            told = [str(why) for why in words.values() if why is not True]
        except (ValueError, AttributeError, RecursionError):
            return False
        with self._lock:
            self.filled = self.filled or words.get("filled") is True
            self._words += [f"pages: {why}" for why in told]
        self._signal()
        return True

    def _signal(self) -> None:
        with suppress(OSError):
            os.eventfd_write(self._wake, 1)


def _read(sock: socket.socket) -> tuple[bytes, list[int]]:
    try:
        return socket.recv_fds(sock, 1 << 16, 8)[:2]
    except OSError:
        return b"", []
