"""Post-copy on the side of the destination: a process that supplies missing pages.

It is a process of its own because the VMM can't serve itself: a thread of Python that touches a
missing page stands still with the interpreter's lock in its hands. It has the VMM's userfaultfd and
the links for faults, and knows which pages are still at the source. What it puts in place goes
straight to the VMM's memory. Faults on other pages get zeros at once: what the source never sent
and does not list is zero.

The VMM tells it over a socket, one JSON object a line, with descriptors beside it:

    {"memory": [[guest, host, size], ...]}   and the userfaultfd
    {"missing": [[address, length], ...]}    in as many lines as it takes, then {"ready": true}
    {"link": true}                           and a connection that was greeted, not yet secured
    {"listen": true}                         and the socket where connections arrive from now on
    {"threads": [number, ...]}               and a pipe that is readable while a signal is unheard

and hears `{"lost": "why"}`, `{"refused": "why"}` of a link, `{"met": true}` with a connection that
is for control, and `{"filled": true}` in the end.

A thread that waits for a page which never comes, because the source is dead, keeps the VMM from
hearing even a signal that is to end it. Once that has been so for some seconds, the pages that its
named threads wait for are given up: they go on, the memory is marked as lost, and the VMM ends as
it was asked to. Named are those of Python but the vCPUs': what the guest or a pump of C waits for
stays missing, so that neither ever goes on with what is not the guest's memory.
"""

from __future__ import annotations

import errno
import json
import os
import select
import socket
import ssl
import sys
import threading
import time
from contextlib import suppress
from functools import partial
from typing import Any

import attrs

from vm_memory import GuestAddress
from vm_memory.errors import MappingError
from vm_memory.userfault import PageFault, Removal, Userfault

from .connection import Tls
from .door import Door
from .ranges import Ranges
from .stream import LIMIT, PAGE, batches, read_head, table, unpack
from .wire import Kind, Link, LinkLost, ProtocolError, Role

__all__ = ["Missing", "main"]

_UNHEARD = 2.0  # seconds that a signal may be


class Missing:
    """The set of pages that are still to come, over some regions.

    Example:
        >>> missing = Missing([(0, 1 << 20)])
        >>> missing.add(4096, 8192)
        >>> missing.has(8192), missing.remove(4096, 4096), list(missing.ranges())
        (True, 1, [(8192, 4096)])
    """

    def __init__(self, regions: Ranges) -> None:
        self._regions = [(start, size, bytearray(size // PAGE)) for start, size in regions]
        self.count = 0

    def add(self, address: int, length: int) -> None:
        """Mark pages as missing.

        Raises:
            ProtocolError: they are no pages of the memory.
        """
        flags, first, count = self._find(address, length)
        self.count += count - sum(flags[first : first + count])
        flags[first : first + count] = b"\1" * count

    def remove(self, address: int, length: int) -> int:
        """Mark pages as there; how many of them were missing.

        Raises:
            ProtocolError: they are no pages of the memory.
        """
        flags, first, count = self._find(address, length)
        gone = sum(flags[first : first + count])
        flags[first : first + count] = bytes(count)
        self.count -= gone
        return gone

    def has(self, address: int) -> bool:
        """Whether the page of an address is missing."""
        flags, first, _ = self._find(address // PAGE * PAGE, PAGE)
        return bool(flags[first])

    def runs(self, address: int, length: int) -> Ranges:
        """The missing parts of a range."""
        flags, first, count = self._find(address, length)
        found: Ranges = []
        at = flags.find(1, first, first + count)
        while at >= 0:
            end = flags.find(0, at, first + count)
            end = first + count if end < 0 else end
            found.append((address + (at - first) * PAGE, (end - at) * PAGE))
            at = flags.find(1, end, first + count)
        return found

    def ranges(self) -> Ranges:
        """All that is missing."""
        return [piece for start, size, _ in self._regions for piece in self.runs(start, size)]

    def _find(self, address: int, length: int) -> tuple[bytearray, int, int]:
        for start, size, flags in self._regions:
            if start <= address and address + length <= start + size:
                if (address | length) % PAGE or not length:
                    break
                return flags, (address - start) // PAGE, length // PAGE
        raise ProtocolError("pages", (address, length), "are no pages of the machine's memory")


@attrs.define
class _Pager:
    parent: socket.socket
    context: ssl.SSLContext | None
    attempt: int
    door: Door = attrs.field(init=False)
    lock: Any = attrs.field(factory=threading.Lock)
    userfault: Userfault | None = None
    missing: Missing | None = None
    regions: list[tuple[GuestAddress, int]] = attrs.field(factory=list)
    ready: bool = False
    link: Link | None = None
    asked: set[int] = attrs.field(factory=set)
    waiting: dict[int, set[int]] = attrs.field(factory=dict)  # pages: threads
    hearing: set[int] = attrs.field(factory=set)
    signals: int = -1
    unheard: float | None = None  # since when
    gave_up: bool = False
    buffer: bytes = b""
    fds: list[int] = attrs.field(factory=list)

    def __attrs_post_init__(self) -> None:
        self.door = Door(
            self.context, self.attempt, lambda why: self.say(refused=why), self.pass_on
        )

    def run(self) -> None:
        """Until all is there, or the VMM is gone."""
        while True:
            waiting: list[Any] = [self.parent, self.door]
            if self.userfault is not None:
                waiting.append(self.userfault)
            if self.link is not None:
                waiting.append(self.link.socket)
            if self.link is not None and self.link.pending:
                ready = [*select.select(waiting[:-1], [], [], 0)[0], self.link.socket]
            else:
                timeout = None if self.signals < 0 else _UNHEARD / 4
                ready = select.select(waiting, [], [], timeout)[0]
            if self.parent in ready and not self.hear():
                return
            if self.door in ready and (link := self.door.link()) is not None:
                self.join(link)
            if self.userfault is not None and self.userfault in ready:
                self.faults()
            if self.is_unheard():
                self.give_up()
            if self.link is not None and self.link.socket in ready:
                self.guarded(self.pages)
            if self.ready and self.missing is not None and not self.missing.count:
                self.finish()
                return

    def is_unheard(self) -> bool:
        """Whether a signal has waited for long, so that the VMM stands still."""
        if self.signals < 0 or not select.select([self.signals], [], [], 0)[0]:
            self.unheard = None
            return False
        now = time.monotonic()
        self.unheard = self.unheard or now
        return now - self.unheard >= _UNHEARD

    def give_up(self) -> None:
        """Let the threads go on that are to hear, unless somebody else waits for the same page."""
        assert self.userfault is not None
        for address, threads in list(self.waiting.items()):
            if threads <= self.hearing:
                del self.waiting[address]
                with suppress(MappingError):  # it has come meanwhile
                    self.userfault.poison(GuestAddress(address), PAGE)
                if not self.gave_up:  # the VMM may not hear more than that
                    self.say(lost=f"the page at {address:#x} was given up: a signal was not heard")
                self.gave_up = True

    def finish(self) -> None:
        if self.link is not None:
            self.guarded(partial(self.link.send, Kind.DONE))
        self.door.close()
        assert self.userfault is not None
        for region in self.regions:
            # What was never sent is zeros, from now on without anybody's help: a thread of the VMM
            # that waits for such a page may keep it from closing its own descriptor.
            self.userfault.unregister(*region)
        self.userfault.close()
        self.say(filled=True)

    def say(self, **words: object) -> None:
        with self.lock, suppress(OSError):  # `run` learns that the VMM is gone
            self.parent.sendall(json.dumps(words).encode() + b"\n")

    def pass_on(self, sock: socket.socket) -> None:
        """Give the VMM a connection for control."""
        with self.lock:
            socket.send_fds(self.parent, [b'{"met": true}\n'], [sock.fileno()])
        sock.close()

    def hear(self) -> bool:
        data, fds, _, _ = socket.recv_fds(self.parent, 1 << 16, 8)
        self.fds += fds
        if not data:
            return False
        *lines, self.buffer = (self.buffer + data).split(b"\n")
        for line in lines:
            self.told(json.loads(line))
        return True

    def told(self, words: dict[str, Any]) -> None:
        if "memory" in words:
            rows = [(int(guest), int(host), int(size)) for guest, host, size in words["memory"]]
            self.userfault = Userfault.inherited(self.fds.pop(0), rows)
            self.missing = Missing([(guest, size) for guest, _, size in rows])
            self.regions = [(GuestAddress(guest), size) for guest, _, size in rows]
            for region in self.regions:  # who waited for a pager that died says so again
                self.userfault.wake(*region)
        elif "missing" in words:
            assert self.missing is not None
            for address, length in words["missing"]:
                self.missing.add(address, length)
        elif "ready" in words:
            self.ready = True
            self.guarded(self.announce)
        elif "link" in words:
            self.door.hear(socket.socket(fileno=self.fds.pop(0)), Role.FAULTS)
        elif "listen" in words:
            self.door.listen(socket.socket(fileno=self.fds.pop(0)))
        elif "threads" in words:
            self.hearing, self.signals = set(words["threads"]), self.fds.pop(0)

    def join(self, link: Link) -> None:
        """Take up a link of the source's."""
        if self.link is not None:
            self.link.close()
        self.link = link
        link.socket.settimeout(30)
        if self.ready:
            self.guarded(self.announce)

    def announce(self) -> None:
        """Tell the source what is not here."""
        if self.link is None or self.missing is None:
            return
        self.asked.clear()
        for batch in batches(self.missing.ranges(), 1 << 62):
            self.link.send(Kind.MISSING, table(batch))
        self.link.send(Kind.SYNC)
        self.faults()

    def guarded(self, work: Any) -> None:
        """Do something with the link; where that fails the VMM is told, and may give another."""
        try:
            work()
        except (LinkLost, ProtocolError) as error:
            if self.link is not None:
                self.link.close()
                self.link = None
            self.say(lost=str(error))

    def faults(self) -> None:
        """Ask for what somebody waits for."""
        assert self.userfault is not None
        assert self.missing is not None
        for event in self.userfault.read(0):
            if isinstance(event, Removal):
                self.missing.remove(event.address, event.length)
            elif isinstance(event, PageFault):
                address = event.address // PAGE * PAGE
                if not self.missing.has(address):
                    self.zero(address)
                    continue
                self.waiting.setdefault(address, set()).add(event.thread)
                if address not in self.asked and self.link is not None and self.ready:
                    self.asked.add(address)
                    self.guarded(partial(self.link.send, Kind.REQUEST, argument=address))
                # Without a link it comes with the rest, which is sent unasked once there is one.

    def zero(self, address: int) -> None:
        assert self.userfault is not None
        try:
            self.userfault.zero(GuestAddress(address), PAGE)
        except MappingError as error:
            if error.errno != errno.EEXIST:
                raise
            self.userfault.wake(GuestAddress(address), PAGE)

    def pages(self) -> None:
        """Put what comes in place; what is there already stays."""
        assert self.link is not None
        assert self.missing is not None
        frame = self.link.receive(LIMIT)
        ranges, rest = read_head(self.link, frame)
        total = sum(length for _, length in ranges)
        if frame.kind is Kind.ZERO:
            raise ProtocolError("frame", "ZERO", "has no place in post-copy")
        if frame.kind is Kind.ZSTD:
            data = unpack(self.link, rest, total)
        else:
            plain = bytearray(total)
            self.link.receive_into(memoryview(plain))
            data = memoryview(plain)
        start = 0
        for address, length in ranges:
            self.place(address, data[start : start + length])
            self.asked.difference_update(range(address, address + length, PAGE))
            start += length

    def place(self, address: int, data: memoryview) -> None:
        assert self.userfault is not None
        assert self.missing is not None
        waiting = self.missing.runs(address, len(data))
        while waiting:
            run, count = waiting.pop(0)
            at = run - address
            try:
                self.userfault.copy(GuestAddress(run), data[at : at + count])
            except MappingError as error:
                if error.errno == errno.EAGAIN:  # something is being removed: that comes first
                    self.faults()
                    waiting = self.missing.runs(address, len(data))
                    continue
                if error.errno != errno.EEXIST:
                    raise
                if count > PAGE:
                    waiting[:0] = [(page, PAGE) for page in range(run, run + count, PAGE)]
                    continue
            self.missing.remove(run, count)
            for page in [page for page in self.waiting if run <= page < run + count]:
                del self.waiting[page]


def main(arguments: list[str]) -> None:
    """The process: number of the socket's descriptor, attempt, TLS folder or nothing."""
    parent = socket.socket(fileno=int(arguments[0]))
    folder = arguments[2] if len(arguments) > 2 else ""
    context = Tls(folder).context(server=True) if folder else None
    _Pager(parent, context, int(arguments[1])).run()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
