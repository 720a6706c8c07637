"""Who owns a machine while it moves to another host: two pure state machines, one for each side.

Nothing here does I/O. A side is a value; `source` and `destination` take it and an event, and give
the side that it becomes and what is to be done now. Whoever drives them carries the actions out in
order, and makes the new side durable before it sends anything.

The rule behind it is that the machine is never run by both. The source runs it until the
destination has all of it (`READY`), then decides, once and for good (`COMMITTED`), and from that
moment only the destination may run it, once it has heard so:

    source                              destination
    RUNNING    -- OFFER -->             ABSENT
    SENDING    <-- ACCEPT --            RECEIVING
    SENDING    -- PAGES ... -->         RECEIVING
    SAVING     -- STATE -->             RECEIVING     the machine is paused
    SAVING     <-- READY --             HOLDING       both have it whole, neither runs it
    COMMITTED  -- COMMIT -->            HOLDING
    COMMITTED  <-- STARTED --           OWNING        the destination runs it
    DONE                                OWNING        the source lets its copy go

Post-copy hands over a machine some of whose pages are still at the source. Then neither side has it
whole until the last of them has gone over:

    SAVING     -- SPLIT -->             RECEIVING     all but pages, and which these are
    SAVING     <-- READY --             SPLIT
    COMMITTED  -- COMMIT -->            SPLIT
    COMMITTED  <-- FILLING --           FILLING       the destination runs it
    SERVING    -- PAGES ... -->         FILLING
    SERVING    <-- STARTED --           OWNING

The windows, where a fault leaves it paused, whole and reported, until the two sides talk again or
somebody who knows that the other side is dead resolves it:

- The source is `COMMITTED` and has not heard `STARTED`: the destination may run it, or may not.
- The destination is `HOLDING` and has not heard `COMMIT`: the source may have gone on running it.
- In post-copy, the link is gone in `SPLIT`, `FILLING` or `SERVING`: the destination runs until it
  needs a page that is not there, and goes on when the two have met again. The death of either side
  is then the loss of the only copy of some page: `RESOLVE` ends the survivor, and says so.

Before the decision any fault gives it back to the source, which runs on. When the two sides meet
again, each says where it stands: `READY` is answered by `COMMIT` or `ABORT`, whatever was decided,
and `STARTED` ends it. A destination that forgot the machine says `UNKNOWN`: it may have run it and
died, so a source that has committed does not run it on its own account.
"""

from __future__ import annotations

import enum

import attrs

__all__ = [
    "Action", "Destination", "Event", "Message", "Side", "Source", "Step", "Word", "begin",
    "destination", "source",
]  # fmt: skip


class Word(enum.Enum):
    """What the sides say to each other about the hand-over; pages are the stream's business."""

    OFFER = "offer"
    ACCEPT = "accept"
    STATE = "state"
    SPLIT = "split"
    READY = "ready"
    COMMIT = "commit"
    FILLING = "filling"
    STARTED = "started"
    ABORT = "abort"
    UNKNOWN = "unknown"


class Event(enum.Enum):
    """What happens to a side besides messages."""

    CONVERGED = "converged"  # the source has so little left that it pauses and sends the rest
    SWITCH = "switch"  # the source pauses, and lets pages follow behind the machine
    FILLED = "filled"  # the last page has come
    CANCEL = "cancel"  # somebody, or a limit, ends it
    LOST = "lost"  # the link is gone, or the other side is silent for too long
    MET = "met"  # a link is there again
    RESOLVE = "resolve"  # somebody states that the other side will never run it


class Action(enum.Enum):
    """What a side has to do, in the order given."""

    PAUSE = "pause"
    RESUME = "resume"
    RELEASE = "release"  # what only one may hold: disk locks, addresses
    ACQUIRE = "acquire"
    DISCARD = "discard"  # the copy
    REPORT = "report"  # paused, whole, and waiting for the other side or for `RESOLVE`


class Source(enum.Enum):
    """Where the side stands that has the machine."""

    RUNNING = "running"
    SENDING = "sending"
    SAVING = "saving"
    COMMITTED = "committed"
    SERVING = "serving"
    DONE = "done"

    @property
    def runs(self) -> bool:
        """Whether its vCPUs run."""
        return self in (Source.RUNNING, Source.SENDING)

    @property
    def whole(self) -> bool:
        """Whether it has all of the machine, as it was when it ran here."""
        return self not in (Source.SERVING, Source.DONE)


class Destination(enum.Enum):
    """Where the side stands that is to have it."""

    ABSENT = "absent"
    RECEIVING = "receiving"
    HOLDING = "holding"
    SPLIT = "split"
    FILLING = "filling"
    OWNING = "owning"

    @property
    def runs(self) -> bool:
        """Whether its vCPUs run."""
        return self in (Destination.FILLING, Destination.OWNING)

    @property
    def whole(self) -> bool:
        """Whether it has all of the machine."""
        return self in (Destination.HOLDING, Destination.OWNING)


@attrs.frozen
class Message:
    """A word about one attempt. Without its number a late `READY` would pass for that of the next.

    Attributes:
        word: what is said.
        attempt: of the source to move the machine; never used twice, and hard to guess.
    """

    word: Word
    attempt: int


@attrs.frozen
class Side:
    """A side, as it is made durable.

    Attributes:
        phase: where it stands.
        attempt: the one that it takes part in, or took part in last.
    """

    phase: Source | Destination
    attempt: int = 0


@attrs.frozen
class Step:
    """What a side becomes.

    Attributes:
        side: from now on; durable before anything is sent.
        actions: to be carried out before that, in order.
        send: what to say then.
    """

    side: Side
    actions: tuple[Action, ...] = ()
    send: tuple[Message, ...] = ()


def begin(side: Side, attempt: int) -> Step:
    """Let a source that runs its machine begin to move it; another one stays as it is."""
    if side.phase is not Source.RUNNING:
        return Step(side)
    return Step(Side(Source.SENDING, attempt), send=(Message(Word.OFFER, attempt),))


def source(side: Side, event: Event | Message) -> Step:
    """What the source does. What does not fit, a hostile peer's message say, changes nothing."""
    what: Event | Word
    if isinstance(event, Message):
        if event.attempt != side.attempt:
            # All attempts but the latest were given up.
            late = event.word is Word.READY
            return Step(side, send=(Message(Word.ABORT, event.attempt),) if late else ())
        what = event.word
    else:
        what = event
    phase, actions, words = _source(side.phase, what)
    return _step(side.attempt, phase, actions, words)


def destination(side: Side, event: Event | Message) -> Step:
    """What the destination does. What does not fit changes nothing."""
    what: Event | Word
    if isinstance(event, Message):
        what, attempt = event.word, event.attempt
        if what is Word.OFFER and side.phase in (Destination.ABSENT, Destination.RECEIVING):
            dropped = (Action.DISCARD,) if side.phase is Destination.RECEIVING else ()
            return _step(attempt, Destination.RECEIVING, dropped, (Word.ACCEPT,))
        if attempt != side.attempt or side.phase is Destination.ABSENT:
            asked = what in (Word.OFFER, Word.STATE, Word.SPLIT, Word.COMMIT)
            return Step(side, send=(Message(Word.UNKNOWN, attempt),) if asked else ())
    else:
        what = event
    phase, actions, words = _destination(side.phase, what)
    return _step(side.attempt, phase, actions, words)


_Answer = tuple[Source | Destination, tuple[Action, ...], tuple[Word, ...]]


def _step(
    attempt: int,
    phase: Source | Destination,
    actions: tuple[Action, ...],
    words: tuple[Word, ...],
) -> Step:
    return Step(Side(phase, attempt), actions, tuple(Message(word, attempt) for word in words))


def _source(phase: Source | Destination, event: Event | Word) -> _Answer:
    match phase, event:
        case Source.SENDING, Event.CONVERGED:
            return Source.SAVING, (Action.PAUSE,), (Word.STATE,)
        case Source.SENDING, Event.SWITCH:
            return Source.SAVING, (Action.PAUSE,), (Word.SPLIT,)
        case Source.SENDING, Event.CANCEL:
            return Source.RUNNING, (), (Word.ABORT,)
        case Source.SENDING, Event.LOST | Word.UNKNOWN | Word.ABORT:
            return Source.RUNNING, (), ()
        case Source.SAVING, Event.CANCEL:
            return Source.RUNNING, (Action.RESUME,), (Word.ABORT,)
        case Source.SAVING, Event.LOST | Word.UNKNOWN | Word.ABORT:
            return Source.RUNNING, (Action.RESUME,), ()
        case Source.SAVING, Word.READY:
            return Source.COMMITTED, (Action.RELEASE,), (Word.COMMIT,)
        case Source.COMMITTED, Word.READY | Event.MET:  # it may not have heard
            return Source.COMMITTED, (), (Word.COMMIT,)
        case Source.COMMITTED, Word.FILLING:
            return Source.SERVING, (), ()
        case Source.COMMITTED | Source.SERVING, Word.STARTED:
            return Source.DONE, (Action.DISCARD,), ()
        case Source.COMMITTED | Source.SERVING, Event.LOST | Word.UNKNOWN:
            return phase, (Action.REPORT,), ()
        case Source.COMMITTED, Event.RESOLVE:
            return Source.RUNNING, (Action.ACQUIRE, Action.RESUME), ()
        case Source.SERVING, Event.RESOLVE:  # it ran there, and ended there
            return Source.DONE, (Action.DISCARD, Action.REPORT), ()
        case Source.RUNNING, Word.READY:  # of an attempt that ended here
            return Source.RUNNING, (), (Word.ABORT,)
    return phase, (), ()


def _destination(phase: Source | Destination, event: Event | Word) -> _Answer:
    match phase, event:
        case Destination.RECEIVING, Word.STATE:
            return Destination.HOLDING, (), (Word.READY,)
        case Destination.RECEIVING, Word.SPLIT:
            return Destination.SPLIT, (), (Word.READY,)
        case Destination.RECEIVING, Event.CANCEL:
            return Destination.ABSENT, (Action.DISCARD,), (Word.ABORT,)
        case Destination.RECEIVING, Event.LOST | Word.ABORT:
            return Destination.ABSENT, (Action.DISCARD,), ()
        case Destination.HOLDING, Word.COMMIT | Event.RESOLVE:
            return Destination.OWNING, (Action.ACQUIRE, Action.RESUME), (Word.STARTED,)
        case Destination.SPLIT, Word.COMMIT:
            return Destination.FILLING, (Action.ACQUIRE, Action.RESUME), (Word.FILLING,)
        case Destination.SPLIT | Destination.FILLING, Event.RESOLVE:  # pages are nowhere
            return Destination.ABSENT, (Action.DISCARD, Action.REPORT), ()
        case Destination.HOLDING | Destination.SPLIT, Word.ABORT:
            return Destination.ABSENT, (Action.DISCARD,), ()
        case Destination.HOLDING | Destination.SPLIT | Destination.FILLING, Event.LOST:
            return phase, (Action.REPORT,), ()
        case Destination.HOLDING | Destination.SPLIT, Event.MET:
            return phase, (), (Word.READY,)
        case Destination.FILLING, Event.FILLED:
            return Destination.OWNING, (), (Word.STARTED,)
        case Destination.FILLING, Event.MET | Word.COMMIT:
            return Destination.FILLING, (), (Word.FILLING,)
        case Destination.OWNING, Event.MET | Word.COMMIT:
            return Destination.OWNING, (), (Word.STARTED,)
    return phase, (), ()
