"""Moving a machine: every order of messages, cuts, crashes and recoveries there is, looked at."""

from collections import deque
from collections.abc import Iterator
from itertools import product

import attrs
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vmm_reference.state.handover import (
    Action,
    Destination,
    Event,
    Message,
    Side,
    Source,
    Step,
    Word,
    begin,
    destination,
    source,
)

# What an earlier link lost never arrives on a later one, and within a link nothing overtakes.
Queue = tuple[Message, ...]
AT_HOME, AWAY = Side(Source.RUNNING), Side(Destination.ABSENT)


@attrs.frozen
class World:
    """Both sides, what is between them, and what went wrong so far."""

    source_side: Side = AT_HOME
    target_side: Side = AWAY
    there: Queue = ()  # to the destination
    back: Queue = ()
    linked: bool = True
    source_dead: bool = False
    target_dead: bool = False
    source_told: bool = False  # somebody was told that it is paused
    target_told: bool = False
    target_ran: bool = False
    attempts: int = 0
    faults: int = 0

    @property
    def source(self) -> Source:
        assert isinstance(self.source_side.phase, Source)
        return self.source_side.phase

    @property
    def target(self) -> Destination:
        assert isinstance(self.target_side.phase, Destination)
        return self.target_side.phase

    @property
    def runners(self) -> int:
        return (self.source.runs and not self.source_dead) + (
            self.target.runs and not self.target_dead
        )


def at_source(world: World, event: Event | Message | int) -> World:
    """An event at the source; a number begins the attempt of that number."""
    if world.source_dead:
        return world
    side = world.source_side
    step = begin(side, event) if isinstance(event, int) else source(side, event)
    there = world.there + step.send if world.linked else world.there
    told = Action.REPORT in step.actions or (world.source_told and step.side == side)
    return attrs.evolve(world, source_side=step.side, there=there, source_told=told)


def at_target(world: World, event: Event | Message) -> World:
    if world.target_dead:
        return world
    step = destination(world.target_side, event)
    back = world.back + step.send if world.linked else world.back
    told = Action.REPORT in step.actions or (world.target_told and step.side == world.target_side)
    world = attrs.evolve(world, target_side=step.side, back=back, target_told=told)
    return attrs.evolve(world, target_ran=world.target_ran or world.target.runs)


def cut(world: World) -> World:
    """The link breaks: what is on the way is gone, and both sides notice."""
    world = attrs.evolve(world, linked=False, there=(), back=())
    return at_target(at_source(world, Event.LOST), Event.LOST)


def meet(world: World) -> World:
    world = attrs.evolve(world, linked=True, there=(), back=())
    return at_target(at_source(world, Event.MET), Event.MET)


def deliver(world: World) -> Iterator[World]:
    if world.there and not world.target_dead:
        yield at_target(attrs.evolve(world, there=world.there[1:]), world.there[0])
    if world.back and not world.source_dead:
        yield at_source(attrs.evolve(world, back=world.back[1:]), world.back[0])


def choices(world: World, faults: int, attempts: int = 2) -> Iterator[World]:
    """Every world that can come next."""
    yield from deliver(world)
    if world.linked:
        if world.source is Source.RUNNING and world.attempts < attempts and not world.source_dead:
            number = world.attempts + 1
            yield at_source(attrs.evolve(world, attempts=number), number)
        for event in (Event.CONVERGED, Event.SWITCH, Event.CANCEL):
            yield at_source(world, event)
        yield at_target(world, Event.CANCEL)
        if not world.source_dead:  # it has the pages
            yield at_target(world, Event.FILLED)
    elif not (world.source_dead or world.target_dead):
        yield meet(world)
    if world.faults < faults:
        worse = attrs.evolve(world, faults=world.faults + 1)
        if world.linked:
            yield cut(worse)
        if not world.source_dead:
            yield cut(attrs.evolve(worse, source_dead=True))
        if not world.target_dead:
            yield cut(attrs.evolve(worse, target_dead=True))
    # Who states that the other side is dead tells the truth.
    if world.target_dead:
        yield at_source(world, Event.RESOLVE)
    if world.source_dead:
        yield at_target(world, Event.RESOLVE)


def reachable(faults: int) -> set[World]:
    first = World()
    seen, waiting = {first}, deque([first])
    while waiting:
        for world in choices(waiting.popleft(), faults):
            if world not in seen:
                seen.add(world)
                waiting.append(world)
    return seen


@pytest.fixture(scope="module")
def worlds() -> set[World]:
    found = reachable(3)
    assert len(found) > 1000
    assert {world.source for world in found} == set(Source)
    assert {world.target for world in found} == set(Destination)
    return found


def test_never_do_both_run(worlds: set[World]) -> None:
    """In no order of events, with up to three faults and two attempts."""
    assert max(world.runners for world in worlds) == 1
    assert any(world.target.runs for world in worlds)


def test_a_copy_is_given_up_only_when_the_other_runs(worlds: set[World]) -> None:
    """The source lets go after the destination has started; the destination never alone."""
    for world in worlds:
        if world.source is Source.DONE:
            assert world.target_ran
            assert world.target.whole or (world.target_dead and world.source_told)
        if world.source is Source.SERVING:
            lost = world.target is Destination.ABSENT and world.source_dead
            assert lost or world.target in (Destination.FILLING, Destination.OWNING)


def test_after_a_single_fault_one_runs_or_it_is_paused_whole_and_says_so() -> None:
    """Whatever breaks, and wherever: when all that is on the way has arrived."""
    broken = 0
    for world in reachable(1):
        if world.there or world.back or not world.faults or world.linked:
            continue
        broken += 1
        told = (
            (world.source_told and world.source.whole and not world.source_dead)
            or (world.target_told and world.target.whole and not world.target_dead)
        )  # fmt: skip
        dead = world.source_dead and not world.target.whole
        # With the source dead before the destination had it all, the machine is lost, not moved.
        lost = world.target_dead and world.source is Source.DONE
        # Nor does a machine survive whose newest pages were on one side alone.
        if world.target_dead and world.source is Source.SERVING:
            assert world.source_told
            lost = True
        assert world.runners == 1 or told or dead or lost, world
        if dead and world.target is not Destination.FILLING:
            assert not world.target_ran or world.target_told
        if world.target is Destination.FILLING and not world.target_dead:
            assert world.target_told
    assert broken > 10


def test_sides_that_meet_again_settle_it(worlds: set[World]) -> None:
    """From every state without a death: after a link and its messages exactly one runs."""
    settled = 0
    for world in worlds:
        if world.source_dead or world.target_dead:
            continue
        met = meet(cut(world))
        while True:
            following = list(deliver(met))
            if not following and met.target is Destination.FILLING:
                following = [at_target(met, Event.FILLED)]
            if not following:
                break
            met = following[0]
        assert met.runners == 1, (world, met)
        assert met.target in (Destination.ABSENT, Destination.OWNING)
        assert met.source in (Source.RUNNING, Source.SENDING, Source.DONE)
        settled += 1
    assert settled > 100


def test_a_death_is_resolved_by_who_knows_of_it(worlds: set[World]) -> None:
    """The survivor runs it if it has it whole; nobody is asked where that is not so."""
    for world in worlds:
        if world.target_dead and not world.source_dead and world.source.whole:
            assert at_source(world, Event.RESOLVE).source.runs or world.source is Source.SAVING
        if world.source_dead and not world.target_dead and world.target.whole:
            assert at_target(world, Event.RESOLVE).target.runs


def test_a_source_whose_partner_died_is_never_left_saving(worlds: set[World]) -> None:
    """Before the decision it runs on by itself."""
    for world in worlds:
        if world.target_dead and not world.source_dead:
            assert world.source is not Source.SAVING


@pytest.mark.parametrize("phase", [*Source, *Destination])
@pytest.mark.parametrize("word", Word)
@pytest.mark.parametrize("attempt", [1, 2])
def test_only_one_message_lets_a_side_run(
    phase: Source | Destination, word: Word, attempt: int
) -> None:
    """A hostile peer can say what it likes: it starts no machine that was not handed over."""
    side, message = Side(phase, 1), Message(word, attempt)
    step: Step = source(side, message) if isinstance(phase, Source) else destination(side, message)
    assert isinstance(step.side.phase, type(phase))
    # It may give the machine back, to a source that has not decided to let it go.
    given_back = phase is Source.SAVING and attempt == 1
    holding = phase in (Destination.HOLDING, Destination.SPLIT)
    handed_over = holding and (word, attempt) == (Word.COMMIT, 1)
    assert not step.side.phase.runs or phase.runs or given_back or handed_over


def test_every_pair_of_side_and_event_is_answered() -> None:
    """With a side of the same kind, and without an exception."""
    for phase, event in product(Source, Event):
        assert isinstance(source(Side(phase), event).side.phase, Source)
    for target, event in product(Destination, Event):
        assert isinstance(destination(Side(target), event).side.phase, Destination)


class Moving(RuleBasedStateMachine):
    """Long ways through the same worlds, with any number of attempts and faults."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()

    @rule(data=st.data())
    def go_on(self, data: st.DataObject) -> None:
        # As many attempts as there are rules, each with a number of its own.
        latest = max(self.world.source_side.attempt, self.world.target_side.attempt)
        world = attrs.evolve(self.world, attempts=latest, faults=0)
        following = list(choices(world, faults=1, attempts=1 << 30))
        if following:
            self.world = data.draw(st.sampled_from(following))

    @precondition(lambda self: not (self.world.there or self.world.back) and self.world.linked)
    @rule()
    def break_the_connection(self) -> None:
        self.world = cut(self.world)

    @invariant()
    def one_at_most_runs(self) -> None:
        assert self.world.runners <= 1

    @invariant()
    def it_is_somewhere(self) -> None:
        if not (self.world.source_dead or self.world.target_dead):
            split = (Source.SERVING, Destination.FILLING)
            whole = self.world.source.whole or self.world.target.whole
            assert whole or (self.world.source, self.world.target) == split


TestMoving = Moving.TestCase
TestMoving.settings = settings(max_examples=100, stateful_step_count=40)
