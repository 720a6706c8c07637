"""The side that a machine moves to: waits, takes it in, and runs it once it is told to.

`handover.destination` decides; here it is carried out, on a thread of its own, with the machine
that is on its way (`arriving`). What comes over the
links is checked before it is believed, and nothing of the machine runs before the source has let
it go. The listening socket stays open until the source has said good-bye, so that the two can meet
again after a cut.
"""

from __future__ import annotations

import hmac
import os
import queue
import select
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from vmm_reference.errors import HostError

from . import handover
from .arriving import Arrival
from .connection import Address, Listener, Tls, greet, secure
from .handover import Action, Destination, Event, Message, Side, Step, Word
from .moving import MigrationError
from .postcopy import PostCopy
from .stream import receive_pages
from .warming import warm
from .wire import WORDS, Frame, Kind, Link, LinkLost, ProtocolError, Role

if TYPE_CHECKING:
    import socket
    from types import TracebackType
    from typing import Self

    from vm_memory import GuestMemory
    from vmm_reference.machine import Machine

__all__ = ["Incoming"]

_MOST_GREETINGS = 16
_SILENCE = 30.0
_LOST = "the machine is lost: some of its pages were at its source alone, which is dead"


class Incoming:
    """Waits for a machine; usable as a context manager that gives everything back.

    Args:
        address: `tcp:HOST:PORT` or `unix:PATH`.
        tls: certificates; without them whoever reaches the address may send a machine.
        console: as for `Machine`.
        overrides: fields of the machine's configuration that are others here, such as `drives`.

    Attributes:
        address: where it waits, with the port that the host chose.
        side: where it stands.

    Raises:
        HostError: the address can't be had.
        ConfigError: it is none, or the certificates are not there.
    """

    def __init__(
        self,
        address: str,
        *,
        tls: Tls | None = None,
        console: tuple[int, int] | None = None,
        **overrides: Any,
    ) -> None:
        warm()  # before anybody is told where to go: a migration's time is not spent on it
        self._console, self._overrides, self._tls = console, overrides, tls
        self._listener = Listener(Address.parse(address), tls)
        self.address = str(self._listener.address)
        self.side = Side(Destination.ABSENT)
        self.reports: list[str] = []  # what there is to say to who waits
        self._arrival: Arrival | None = None
        self._owned = threading.Event()
        self._changed = threading.Condition()
        self._controls: queue.Queue[tuple[Link, Frame, bytes]] = queue.Queue(1)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._greetings = threading.Semaphore(_MOST_GREETINGS)
        self._closing = False
        self._resolving = False
        self._link: Link | None = None
        self._parted = False
        self._threads = [
            threading.Thread(target=self._accept, name="incoming-accept", daemon=True),
            threading.Thread(target=self._serve, name="incoming", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def receive(self, timeout: float | None = None) -> Machine:
        """Wait for a machine; it runs here when this returns, and is the caller's to close.

        Args:
            timeout: seconds, or None without limit.

        Raises:
            TimeoutError: none has come, or it was not handed over, in that time.
            MigrationError: this was closed.
        """
        if not self._owned.wait(timeout):
            raise TimeoutError(f"no machine came to {self.address} in {timeout:g} s")
        if self._arrival is None:
            raise MigrationError(f"incoming at {self.address}", "it was closed")
        return self._arrival.machine

    def resolve(self) -> None:
        """Run a machine that is whole here: somebody states that its source never will again.

        One that is not whole is lost then: it ends in `HOST_FAILURE`.

        Raises:
            HostError: there is none, or it was lost.
        """
        phase = self.side.phase
        split = phase in (Destination.SPLIT, Destination.FILLING)
        if phase is not Destination.HOLDING and not split:
            where = f"the machine is {phase.value} here"
            raise HostError("resolve", where, "there is nothing to resolve")
        self._resolving = True
        os.eventfd_write(self._wake, 1)
        with self._changed:
            self._changed.wait_for(lambda: not self._resolving, 60)
        if split and self.side.phase is not Destination.OWNING:
            raise HostError("resolve", _LOST)
        if self.side.phase is Destination.HOLDING:
            raise HostError("resolve", self.reports[-1] if self.reports else "it did not start")

    def close(self) -> None:
        """Wait no longer; a machine that was received stays. Idempotent.

        Pages of it that are still to come are waited for, until they are there or the machine ends.
        """
        if self._closing:
            return
        with self._changed:
            self._changed.wait_for(lambda: self.side.phase is not Destination.FILLING)
        self._closing = True
        self._listener.close()
        os.eventfd_write(self._wake, 1)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
        os.close(self._wake)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # Connections.

    def _accept(self) -> None:
        while (sock := self._listener.accept()) is not None:
            if not self._greetings.acquire(blocking=False):
                sock.close()  # too many strangers at once
                continue
            threading.Thread(target=self._greet, args=(sock,), daemon=True).start()

    def _greet(self, sock: socket.socket) -> None:
        try:
            role = greet(sock)
        except (LinkLost, ProtocolError, OSError) as error:
            self._greetings.release()
            self._say(f"a connection was refused: {error}")
            sock.close()
            return
        self._greeted(sock, role)

    def _met(self, sock: socket.socket) -> None:
        """A control link that the process which supplies pages has accepted."""
        self._greetings.acquire()
        arguments = (sock, Role.CONTROL)
        threading.Thread(target=self._greeted, args=arguments, daemon=True).start()

    def _greeted(self, sock: socket.socket, role: Role) -> None:
        link: Link | None = None
        try:
            try:
                if role is Role.FAULTS:
                    arrival = self._arrival
                    if arrival is None or arrival.post_copy is None:
                        raise ProtocolError("role", role.name, "is not expected")
                    arrival.post_copy.give(sock)  # which proves it
                    return
                link = secure(sock, role, self._listener.context)
                frame = link.receive(1 << 20)
                payload = link.payload(frame)
            finally:
                self._greetings.release()
            if role is Role.CONTROL:
                self._control(link, frame, payload)
            else:
                self._join(link, frame)
        except (LinkLost, ProtocolError, queue.Full, OSError) as error:
            self._say(f"a connection was refused: {error}")
            (link or sock).close()

    def _control(self, link: Link, frame: Frame, payload: bytes) -> None:
        if frame.kind is Kind.MEET:
            known = hmac.compare_digest(
                frame.extra.to_bytes(8, "little"), self.side.attempt.to_bytes(8, "little")
            )
            if not known or self.side.phase is Destination.ABSENT:
                link.send(Kind.UNKNOWN, extra=frame.extra)
                link.close()
                return
            if self._link is not None:
                self._link.close()  # the source has given the old one up
        elif frame.kind is not Kind.OFFER or self.side.phase is not Destination.ABSENT:
            link.send(Kind.REFUSE, b"another machine is here or on its way")
            link.close()
            return
        self._controls.put((link, frame, payload), timeout=5)
        os.eventfd_write(self._wake, 1)

    def _join(self, link: Link, frame: Frame) -> None:
        fits = frame.kind is Kind.JOIN and frame.extra == self.side.attempt
        with self._changed:
            arrival = self._arrival if self.side.phase is Destination.RECEIVING else None
            if not fits or arrival is None or not arrival.expects_streams:
                raise ProtocolError("JOIN", frame.argument, "is for no migration here")
            arrival.streams.append(link)
        try:
            receive_pages(link, arrival.pages)
        except LinkLost:
            pass
        except ProtocolError as error:
            self._say(str(error))
            if self._link is not None:
                self._link.close()
        finally:
            link.close()

    # The thread that owns the machine until it runs.

    def _serve(self) -> None:
        try:
            while not self._closing and not self._parted:
                self._wait()
        finally:
            if self._link is not None:
                self._link.close()
            if self.side.phase in (Destination.RECEIVING, Destination.HOLDING, Destination.SPLIT):
                self._discard()
            if self.side.phase is not Destination.FILLING and self._post_copy is not None:
                self._post_copy.close()
            self._owned.set()
            if self._parted:
                self._listener.close()

    def _wait(self) -> None:
        """One thing that happens."""
        link = self._link
        waiting: list[Any] = [self._wake]
        pending = link is not None and link.pending
        if link is not None:
            waiting.append(link.socket)
        try:
            ready = select.select(waiting, [], [], 0 if pending else _SILENCE)[0]
        except (OSError, ValueError):  # another thread closed it
            self._lost(LinkLost("migration link", "it was closed"))
            return
        if self._wake in ready:
            os.eventfd_read(self._wake)
            self._told()
        elif link is not None and (pending or link.socket in ready):
            self._guarded(self._frame)
        elif self.side.phase is Destination.RECEIVING and not self._arriving.moves():
            self._lost(LinkLost("migration link", "nothing came for too long"))

    @property
    def _arriving(self) -> Arrival:
        """The machine in every phase but `ABSENT`."""
        assert self._arrival is not None
        return self._arrival

    @property
    def _post_copy(self) -> PostCopy | None:
        return None if self._arrival is None else self._arrival.post_copy

    def _told(self) -> None:
        """Another thread has something."""
        pages = self._post_copy
        if pages is not None:  # first: what it tells is of the links before
            for report in pages.reports():
                self._say(report)
                if self.side.phase is Destination.FILLING and not pages.filled:
                    self._lost(LinkLost("migration link", report))  # so that the source learns it
        with suppress(queue.Empty):
            link, frame, payload = self._controls.get_nowait()
            self._link = link
            if frame.kind is Kind.MEET:
                self._guarded(lambda: self._event(Event.MET))
            else:
                self._guarded(lambda: self._offered(frame, payload))
        pages = self._post_copy
        if pages is not None and pages.filled and self.side.phase is Destination.FILLING:
            self._guarded(lambda: self._event(Event.FILLED))
            pages.close()  # which takes a while, and the source waits for the word
        if self._resolving:
            self._guarded(lambda: self._event(Event.RESOLVE))
            if self.side.phase is Destination.ABSENT and not self._parted:
                self._forget()
            with self._changed:
                self._resolving = False
                self._changed.notify_all()

    def _guarded(self, work: Any) -> None:
        """Do something; a link that fails is lost, and a machine that can't be is refused."""
        try:
            work()
        except (LinkLost, ProtocolError) as error:
            self._lost(error)
        except (ValueError, OSError, MemoryError) as error:  # ours are among these
            self._say(f"refused: {error}")
            self._refuse(error)
        except BaseException as error:
            self._say(f"refused: {error!r}")
            self._refuse(error)
            raise

    def _refuse(self, error: BaseException) -> None:
        if self._link is not None:
            with suppress(LinkLost):
                self._link.send(Kind.REFUSE, str(error).encode()[:4096])
        if self.side.phase in (Destination.ABSENT, Destination.RECEIVING):
            self._lost(error)

    def _lost(self, error: BaseException) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None
            if self.side.phase is not Destination.OWNING:
                self._say(str(error))
        self._event(Event.LOST)
        if self.side.phase is Destination.ABSENT:
            self._forget()

    def _frame(self) -> None:
        link = self._link
        assert link is not None
        frame = link.receive()
        payload = link.payload(frame)
        if frame.kind in (Kind.STATES, Kind.MISSING):
            if self.side.phase is not Destination.RECEIVING:
                raise ProtocolError("frame", frame.kind.name, "has no place here")
            if frame.kind is Kind.STATES:
                self._arriving.receive_states(payload)
            else:
                self._arriving.receive_missing(payload)
            return
        if frame.kind is Kind.BYE:
            self._parted = self.side.phase is Destination.OWNING
            return
        word = next((word for word, kind in WORDS.items() if kind is frame.kind), None)
        if word is None or word is Word.OFFER:
            raise ProtocolError("frame", frame.kind.name, "has no place here")
        receiving = self.side == Side(Destination.RECEIVING, frame.extra)
        if receiving and word in (Word.STATE, Word.SPLIT):
            self._arriving.take(split=word is Word.SPLIT)
        self._step(handover.destination(self.side, Message(word, frame.extra)))
        if self.side.phase is Destination.ABSENT:
            self._forget()

    # What the phases consist of.

    def _offered(self, frame: Frame, payload: bytes) -> None:
        """Build the machine around memory that is still to come."""
        assert self._link is not None

        def supplier(memory: GuestMemory) -> PostCopy:
            return PostCopy(memory, frame.extra, self._listener, self._tls, self._wake, self._met)

        self._arrival = Arrival(
            self._link, payload, console=self._console, overrides=self._overrides,
            supplier=supplier,
        )  # fmt: skip
        self._step(handover.destination(self.side, Message(Word.OFFER, frame.extra)))
        self._arrival.rehearse()  # while memory comes

    def _event(self, event: Event) -> None:
        self._step(handover.destination(self.side, event))

    def _step(self, step: Step) -> None:
        if Action.ACQUIRE in step.actions:
            self._arriving.acquire()  # or nothing changes
        runs = self.side.phase.runs
        with self._changed:
            self.side = step.side
            self._changed.notify_all()
        for action in step.actions:
            if action is Action.DISCARD and runs:
                self._lose()
            elif action is Action.DISCARD:
                self._discard()
            elif action is Action.RESUME:
                self._arriving.go()
            elif action is Action.REPORT:
                self._say(self._state_of_affairs())
        try:
            for message in step.send:
                if self._link is not None:
                    self._link.send(WORDS[message.word], extra=message.attempt)
        finally:
            # The guest's processors, and whoever waits here, take time from the word that goes to
            # the source. Nothing between it and them can fail.
            if Action.RESUME in step.actions:
                self._arriving.run()
                self._owned.set()
        if self.side.phase is Destination.FILLING:
            os.eventfd_write(self._wake, 1)  # the last page may have come before the decision

    def _lose(self) -> None:
        """Pages of a machine that runs are nowhere: it ends here, and is its owner's to close."""
        self._arriving.lose(_LOST)
        self._parted = True

    def _state_of_affairs(self) -> str:
        if self.side.phase is Destination.ABSENT:
            return _LOST
        if self.side.phase is Destination.HOLDING:
            return (
                "the machine is here, whole and paused; its source may run it, or wait: "
                "recover there, or resolve here once you know that the source is dead"
            )
        return "pages of the machine are at its source alone: recover there (vmm migrate --recover)"

    def _discard(self) -> None:
        arrival, self._arrival = self._arrival, None
        if arrival is not None:
            arrival.discard()

    def _forget(self) -> None:
        """Ready for another machine."""
        self._arrival = None
        self._parted = False

    def _say(self, words: str) -> None:
        with self._changed:
            if not self.reports or self.reports[-1] != words:
                self.reports.append(words)
                del self.reports[:-100]
            self._changed.notify_all()
