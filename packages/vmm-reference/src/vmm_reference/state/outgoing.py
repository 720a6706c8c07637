"""The side that has the machine, and gives it away: rounds over memory, the hand-over, recovery.

`handover.source` decides; here it is carried out, on the thread that asked for the migration. The
side is durable as long as this process is: its death takes the machine's memory with it in any
case, and whoever knows of it tells the other side by `resolve`.
"""

from __future__ import annotations

import gc
import secrets
import time
from contextlib import ExitStack, suppress
from importlib.metadata import version
from typing import TYPE_CHECKING

from vm_memory import sharing
from vm_memory.looking import data_ranges
from vmm_reference.errors import HostError
from vmm_reference.outcome import Outcome

from . import handover
from . import memory as pages
from .connection import Address, connect
from .faults import FaultServer
from .format import encode, encode_fields, pack_parts
from .handover import Action, Event, Message, Side, Source, Step, Word
from .memory import MemoryState
from .moving import MigrationError, Offer, Options, Progress, Report, Round
from .ranges import Ranges, joined, total, without
from .stream import Pace, Pages, Sender, table
from .throttle import Throttle
from .warming import rehearse_saving, warm
from .wire import WORDS, Kind, Link, LinkLost, ProtocolError, Role, reason

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm_reference.board import Board
    from vmm_reference.machine import Machine

__all__ = ["Outgoing"]

_PAGE = 4096
# Rounds that bring nothing nearer end in the same way as a time limit does: when they have sent so
# many times what the first did, or there were so many.
_MOST_PASSES = 30
_MOST_ROUNDS = 1000
_LITTLE = 1 << 20  # bytes
_LAST_WORD = 0.5  # seconds
_LOST = "the machine is lost: its newest pages were on the other side alone, which is dead"


class _Cancelled(Exception):
    """Somebody, or a limit, ends it: the argument says who."""


class _Refused(Exception):
    """The other side says why it can't take the machine."""


class Outgoing:
    """A migration of a running machine to another VMM.

    Args:
        machine: runs, or is paused.
        address: where the other VMM waits.
        options: how.
        told: called now and then with the progress, on the same thread.

    Attributes:
        side: where it stands.
        address: as given.
    """

    def __init__(
        self,
        machine: Machine,
        address: Address,
        options: Options,
        told: Callable[[Progress], object] | None,
    ) -> None:
        self.side = Side(Source.RUNNING)
        self.address = address
        self._machine, self._options, self._told = machine, options, told
        board = machine._board
        if board is None or machine._ending is not None:
            raise HostError(f"migration to {address}", "the machine does not run", "start it first")
        self._board: Board = board
        self._was_paused = machine._paused
        self._cancelled = ""
        self._link: Link | None = None
        self._links = ExitStack()
        self._held = ExitStack()  # the loop stands still while the machine is nobody's
        self._then: Callable[[Callable[[], None]], None] | None = None
        self._rounds: list[Round] = []
        self._missing: Ranges = []
        self._server: FaultServer | None = None
        self._sender: Sender | None = None
        self._split = False
        self._started = time.monotonic()
        self._marks: dict[str, float] = {}
        self._sent_before = 0

    def run(self) -> Report:
        """Move it; the machine has ended here when this returns.

        Raises:
            MigrationError: it has not moved; `runs` says whether it runs on here.
        """
        try:
            self._begin()
            event = Event.CONVERGED
            if not self._options.local:
                event = self._copy()
            self._split = event is Event.SWITCH
            self._event(event)
            self._until(Source.COMMITTED)
            return self._finish()
        except (LinkLost, ProtocolError) as error:
            raise self._lost(error) from error
        except _Refused as refusal:
            self._event(Event.LOST)
            raise self._ended_early(f"the other side refuses: {refusal}") from None
        except _Cancelled as cancelled:
            self._event(Event.CANCEL)
            raise self._ended_early(str(cancelled)) from None
        except BaseException:
            # A defect, or no memory: before the decision the machine stays here.
            self._event(Event.CANCEL)
            self._event(Event.LOST)
            raise
        finally:
            self._close_links()

    def cancel(self, reason: str = "it was cancelled") -> None:
        """End it, unless it was decided that the machine goes; from any thread."""
        self._cancelled = reason
        if self._sender is not None:
            self._sender.stopped = True

    def let_go(self, callback: Callable[[], None]) -> None:
        """Let the I/O loop go on, if it stands still, with `callback` before anything else."""
        if self._then is not None:
            self._then(callback)
            self._held.close()

    def recover(self, address: Address | None) -> Report:
        """Meet the other side again, and bring it to its end.

        Raises:
            MigrationError: it can't be reached, or does not know of the machine.
            HostError: there is nothing to recover.
        """
        if self.side.phase not in (Source.COMMITTED, Source.SERVING):
            where = f"the machine is {self.side.phase.value}, not in between"
            raise HostError("recovery", where, "there is nothing to recover")
        self.address = address or self.address
        try:
            if self._split:  # first: the other VMM may stand still until a page comes
                with suppress(LinkLost):  # or may need none any more
                    self._serve_faults()
            self._link = self._links.enter_context(
                connect(self.address, Role.CONTROL, self._options.tls)
            )
            self._link.send(Kind.MEET, extra=self.side.attempt)
            self._event(Event.MET)
            return self._finish()
        except (LinkLost, ProtocolError) as error:
            raise self._lost(error) from error
        except _Refused as refusal:
            self._event(Event.LOST)
            raise self._ended_early(f"the other side says: {refusal}") from None
        finally:
            self._close_links()

    def resolve(self) -> None:
        """Let the machine run on here: somebody states that the other side never will run it.

        One that ran there already is lost then: it ends in `HOST_FAILURE`.

        Raises:
            HostError: it was lost, or it runs here, or a disk is taken.
        """
        if self.side.phase is Source.SERVING:
            self._event(Event.RESOLVE)
            self._machine._gone(Outcome.HOST_FAILURE, _LOST)
            raise HostError("resolve", _LOST)
        if self.side.phase is not Source.COMMITTED:
            where = f"the machine is {self.side.phase.value}"
            raise HostError("resolve", where, "there is nothing to resolve")
        self._event(Event.RESOLVE)

    # What the phases consist of.

    def _begin(self) -> None:
        options = self._options
        self._pages = Pages(self._board.memory)
        self._pace = Pace(options.bandwidth)
        self._link = self._links.enter_context(connect(self.address, Role.CONTROL, options.tls))
        self._step(handover.begin(self.side, secrets.randbits(63) | 1))
        warm(self._machine.config)  # while the other side builds the machine
        rehearse_saving()
        frame = self._receive()
        if frame is not Word.ACCEPT:
            raise ProtocolError("answer", frame.value, "must be accept")
        if options.local:
            return
        links = []
        for number in range(options.streams):
            link = self._links.enter_context(connect(self.address, Role.PAGES, options.tls))
            link.send(Kind.JOIN, argument=number, extra=self.side.attempt)
            links.append(link)
        self._sender = Sender(self._pages, links, compress=options.compress, pace=self._pace)
        if options.post_copy is not None:
            self._serve_faults()

    def _serve_faults(self) -> None:
        link = connect(self.address, Role.FAULTS, self._options.tls)
        self._links.callback(link.close)
        link.send(Kind.JOIN, extra=self.side.attempt)
        self._server = FaultServer(link, self._pages, self._pace, compress=self._options.compress)
        self._server.start()

    def _copy(self) -> Event:
        """Send memory while the guest runs, until it is time to pause it."""
        options, board = self._options, self._board
        board.ram.log_dirty_pages(on=True)
        board.tracking = None
        self._links.callback(self._stop_logging)
        board.ram.dirty()
        if options.post_copy == 0:
            self._missing = [(int(at), n) for at, n in data_ranges(board.memory)]
            return Event.SWITCH
        found = [(int(at), n) for at, n in data_ranges(board.memory)]
        with Throttle(board) as throttle:
            self._round(found, [], 0)
            bandwidth = 0.0
            while True:
                self._check()
                ranges = board.ram.dirty()
                left = total(ranges)
                last = self._rounds[-1]
                carried = total(found) / max(last.seconds, 1e-6)
                rate = left / max(last.seconds, 1e-6)
                # A short round takes longer than its bytes do.
                short = total(found) <= _LITTLE
                bandwidth = max(carried, bandwidth) if short else carried
                bandwidth = min(bandwidth, options.bandwidth or bandwidth)
                self._tell("memory", left, bandwidth)
                # Where the last round has left far less, another one makes the pause shorter still.
                worth = left > _LITTLE and 2 * left < total(found)
                if left <= bandwidth * options.downtime and not worth:
                    self._missing = ranges
                    return Event.CONVERGED
                late = self._late()
                if options.post_copy is not None and (
                    late or len(self._rounds) >= options.post_copy
                ):
                    self._missing = ranges
                    return Event.SWITCH
                if late:
                    raise _Cancelled(late)
                if options.auto_converge and len(self._rounds) > 1 and rate > carried / 2:
                    throttle.more()
                found, zeros = self._looked_at(ranges)
                self._round(found, zeros, throttle.percent, rate)

    def _looked_at(self, ranges: Ranges) -> tuple[Ranges, Ranges]:
        """What of it is to be sent, and what is zero; a little is not worth the look."""
        if total(ranges) <= _LITTLE:
            return ranges, []
        found = [(int(at), n) for at, n in data_ranges(self._board.memory, within=ranges)]
        return found, without(ranges, found)

    def _late(self) -> str:
        limit = self._options.timeout
        if limit is not None and time.monotonic() - self._started > limit:
            return f"the guest writes faster than memory is sent, and {limit:g} s are over"
        first, *others = (each.pages - each.zeros for each in self._rounds)
        most = _MOST_PASSES * max(first, _LITTLE // _PAGE)
        if len(others) >= _MOST_ROUNDS or sum(others) >= most:
            return f"the guest writes faster than memory is sent, in {len(others)} rounds"
        return ""

    def _round(self, found: Ranges, zeros: Ranges, throttle: int, dirty_rate: float = 0.0) -> None:
        assert self._sender is not None
        start, before = time.monotonic(), self._sender.sent
        self._sender.send(found, zeros)
        self._check()
        count = (total(found) + total(zeros)) // _PAGE
        seconds = time.monotonic() - start
        sent = self._sender.sent - before
        self._rounds.append(
            Round(count, total(zeros) // _PAGE, sent, seconds, dirty_rate, throttle)
        )

    def _check(self) -> None:
        if self._cancelled:
            raise _Cancelled(self._cancelled)
        if self._machine._board is not self._board or self._machine._ending is not None:
            raise _Cancelled("the guest has ended or reset itself meanwhile")

    def _stop_logging(self) -> None:
        if self.side.phase is Source.RUNNING and self._machine._board is self._board:
            with suppress(OSError):
                self._board.ram.log_dirty_pages(on=False)

    def _pause(self) -> None:
        """The guest and all devices stand still from here on."""
        self._tell("paused", total(self._missing), 0.0)  # who is told has time until then
        if gc.isenabled():
            gc.disable()
            self._held.callback(gc.enable)
        self._mark("pause")
        if not self._was_paused:
            self._board.pause()
        try:
            self._then = self._held.enter_context(self._machine._loop.hold())
        except RuntimeError:
            raise _Cancelled("the machine has ended meanwhile") from None
        self._mark("memory")

    def _send_states(self) -> None:
        """What is left of memory, or which of it is left, and all states."""
        assert self._link is not None
        if not self._options.local:
            last = self._board.ram.dirty()
            self._missing = joined(self._missing, last)
            if self._split:
                self._link.send(Kind.MISSING, table(self._missing))
            else:
                self._round(*self._looked_at(self._missing), 0)
        self._mark("states")
        self._link.send(Kind.STATES, pack_parts(self._board.save(cpuid=False)))
        self._mark("restore")

    def _finish(self) -> Report:
        """From the decision on: until the other side has it all, and this one lets go."""
        self._mark("start")
        self._until(Source.SERVING if self._split else Source.DONE)
        self._mark("runs")
        if self.side.phase is Source.SERVING:
            if self._server is None:
                raise LinkLost("migration link", "the one for pages can't be had")
            while not self._server.wait(0.5):
                self._tell("filling", self._server.left, 0.0)
            if self._server.cut and self._link is not None:
                # The machine may have ended there, and need no page more: the control link tells.
                self._link.socket.settimeout(_LAST_WORD)
            self._until(Source.DONE)
        self._mark("end")
        with suppress(LinkLost):
            if self._link is not None:
                self._link.send(Kind.BYE, extra=self.side.attempt)
        report = self._report()
        self._tell("done", 0, 0.0)
        self._machine._gone(Outcome.MIGRATED, f"to {self.address}")
        return report

    def _until(self, phase: Source) -> None:
        while self.side.phase not in (phase, Source.DONE):
            if self._cancelled and self.side.phase is Source.SAVING:
                raise _Cancelled(self._cancelled)
            self._receive()

    def _receive(self) -> Word:
        """One word of the other side, carried out."""
        if self._link is None:
            raise LinkLost("migration link", "it was lost")
        frame = self._link.receive()
        payload = self._link.payload(frame)
        if frame.kind is Kind.REFUSE:
            raise _Refused(payload.decode(errors="replace")[:500])
        word = next((word for word, kind in WORDS.items() if kind is frame.kind), None)
        if word is None:
            raise ProtocolError("frame", frame.kind.name, "has no place here")
        before = self.side.phase
        self._step(handover.source(self.side, Message(word, frame.extra)))
        if word in (Word.ABORT, Word.UNKNOWN):
            if before is Source.COMMITTED:
                raise LinkLost("migration link", "the other side does not know of the machine")
            raise _Refused("it gives up")
        return word

    # The state machine's wishes.

    def _event(self, event: Event) -> None:
        self._step(handover.source(self.side, event))

    def _step(self, step: Step) -> None:
        if Action.ACQUIRE in step.actions:
            self._board.acquire()  # or nothing changes
        self.side = step.side
        for action in step.actions:
            if action is Action.PAUSE:
                self._pause()
            elif action is Action.RESUME:
                self._held.close()
                if not self._was_paused:
                    self._board.resume()
            elif action is Action.RELEASE:
                self._board.release()
        for message in step.send:
            self._say(message)

    def _say(self, message: Message) -> None:
        if self._link is None:
            return
        if message.word in (Word.STATE, Word.SPLIT):
            self._send_states()
        if message.word is Word.OFFER:
            self._link.send(Kind.OFFER, encode(self._offer()), extra=message.attempt)
            if self._options.local:
                self._send_memory()
            return
        if message.word is Word.ABORT:
            with suppress(LinkLost):
                self._link.send(Kind.ABORT, extra=message.attempt)
            return
        self._link.send(WORDS[message.word], extra=message.attempt)

    def _offer(self) -> Offer:
        cpuid = []
        for number in range(len(self._board.vm.vcpus)):
            with self._board.between_runs(number) as vcpu:
                cpuid.append(tuple(vcpu.get_cpuid2()))
        return Offer(
            version("vmm-reference"),
            encode_fields(self._machine.config.to_mapping()).decode(),
            MemoryState(pages.describe(self._board.memory)),
            tuple(cpuid),
            self._options.streams,
            self._options.post_copy is not None,
            self._options.local,
        )

    def _send_memory(self) -> None:
        assert self._link is not None
        try:
            sharing.send(self._link.socket, self._board.memory)
        except ValueError as error:
            raise _Cancelled(f"memory can't be handed over: {error}; start the machine with "
                             "shared memory, and name a Unix socket") from error  # fmt: skip
        except OSError as error:
            raise LinkLost("migration link", reason(error)) from error

    # What it comes to.

    def _lost(self, error: BaseException) -> MigrationError:
        self._event(Event.LOST)
        return self._ended_early(str(error))

    def _ended_early(self, cause: str) -> MigrationError:
        what = f"migration to {self.address}"
        if self.side.phase is Source.RUNNING:
            return MigrationError(what, cause, "the machine runs on here")
        if self.side.phase is Source.SERVING:
            hint = "the machine runs there, and pages that it needs are here: vmm migrate --recover"
            return MigrationError(what, cause, hint, runs=False)
        hint = (
            "the machine is paused here, whole, and may run there: vmm migrate --recover asks; "
            "--resolve runs it here, once you know that it will never run there"
        )
        return MigrationError(what, cause, hint, runs=False)

    def _close_links(self) -> None:
        if self._server is not None:
            self._server.stop()
            self._server = None
        self._link = None
        with suppress(OSError):
            self._links.close()
        if self.side.phase is Source.RUNNING:
            self._pages.close()

    def _mark(self, name: str) -> None:
        self._marks[name] = time.monotonic()

    def _tell(self, phase: str, left: int, bandwidth: float) -> None:
        if self._told is not None:
            sent = self._sender.sent if self._sender is not None else 0
            self._told(Progress(phase, len(self._rounds), sent, left, bandwidth))

    def _report(self) -> Report:
        at, now = self._marks, time.monotonic()

        def took(start: str, end: str) -> float:
            return max(at.get(end, now) - at.get(start, now), 0.0)

        return Report(
            tuple(self._rounds),
            self._sender.sent if self._sender is not None else 0,
            now - self._started,
            took("pause", "runs"),
            took("pause", "memory"),
            took("memory", "states"),
            took("states", "restore"),
            took("restore", "start"),
            took("start", "runs"),
            took("runs", "end") if self._split else 0.0,
        )
