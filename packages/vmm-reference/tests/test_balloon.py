from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtio_queue.testing.driver import Buffer
from virtio_queue.testing.stateful import DeviceMachine
from vm_memory import GuestAddress, GuestMemory
from vmm_reference.devices import balloon as module
from vmm_reference.devices.balloon import PAGE, Balloon, MemoryBalloon
from vmm_reference.devices.states import BalloonState, StateError
from vmm_reference.errors import ConfigError
from vmm_reference.testing import Bench, PumpBench

INFLATE, DEFLATE, STATS, HINTS, REPORTS = range(5)
RAM = 4 << 20
ALL = (1 << 64) - 1


class Guest(Bench):
    """A balloon on a bench; every page from the third mebibyte on is full of its number."""

    def __init__(self, *, start: bool = True, features: int = ALL, **options: Any) -> None:
        self.balloon = Balloon(
            kick=lambda index: self.kick_later(index),
            config_changed=lambda: self.device.config_changed(),
            **options,
        )
        super().__init__(self.balloon, start=start, features=features, memory=RAM)
        for page in range(512, RAM // PAGE):
            self.memory.write(GuestAddress(page * PAGE), bytes([page & 0xFF or 1]) * PAGE)

    def gone(self) -> set[int]:
        """Pages that the host has taken."""
        return {
            page
            for page in range(512, RAM // PAGE)
            if self.memory.read(GuestAddress(page * PAGE), PAGE) == bytes(PAGE)
        }

    def intact(self) -> bool:
        """Whether each page is either as it was, or empty."""
        pages = {page: self.memory.read(GuestAddress(page * PAGE), PAGE) for page in self.present()}
        return all(data == bytes([page & 0xFF or 1]) * PAGE for page, data in pages.items())

    def present(self) -> set[int]:
        return set(range(512, RAM // PAGE)) - self.gone()

    def pages(self, queue: int, *pages: int) -> None:
        self.send(queue, [struct.pack(f"<{len(pages)}I", *pages)])

    def report(self, queue: int, *ranges: tuple[int, int]) -> None:
        """A buffer whose writable elements are these ranges of memory."""
        ring = self.queue(queue)
        buffer = Buffer(head=0, readable=[], writable=list(ranges))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ring, "place", lambda _readable, _writable: buffer)
            ring.add([], [1])
        self.driver.kick(queue)


@pytest.fixture
def guest() -> Iterator[Guest]:
    guest = Guest()
    yield guest
    guest.close()


def test_inflated_pages_go_back_to_the_host(guest: Guest) -> None:
    guest.pages(INFLATE, 700, 600, 601)
    assert guest.gone() == {600, 601, 700}
    assert guest.intact()
    assert guest.balloon.inflated == 3
    guest.pages(DEFLATE, 600)
    assert guest.balloon.deflated == 1
    assert guest.config(0, 8) == bytes(8)
    guest.device.write_config(4, struct.pack("<I", 2))
    assert guest.balloon.actual == 2
    guest.device.write_config(0, b"\xff\xff\xff\xff")
    guest.device.write_config(5, b"\xff")
    guest.device.write_config(12, b"\xff\xff\xff\xff")
    assert (guest.balloon.target, guest.balloon.actual) == (0, 2)


def test_the_target_changes_while_running(guest: Guest) -> None:
    before = guest.interrupts
    with guest.device.config_change():
        guest.balloon.target = 512
    assert guest.config(0, 4) == struct.pack("<I", 512)
    assert guest.interrupts > before


@pytest.mark.parametrize(
    "page", [RAM // PAGE, RAM // PAGE + 5, 0x000FFFFF, 0x00100000, 0x7FFFFFFF, 0xFFFFFFFF]
)
def test_hostile_page_outside_memory(guest: Guest, page: int) -> None:
    """Item 13: no page number reaches anything but RAM; its neighbours are given back."""
    guest.pages(INFLATE, 600, page, 601)
    assert (guest.gone(), guest.balloon.refused) == ({600, 601}, 1)
    assert not guest.needs_reset


def test_hostile_run_across_the_end_of_memory(guest: Guest) -> None:
    """Item 13: pages that begin in RAM and go on outside are refused as a whole."""
    last = RAM // PAGE - 1
    guest.pages(INFLATE, last, last + 1)
    assert guest.balloon.refused == 1
    assert guest.gone() == set()


@pytest.mark.parametrize("length", [1, 3, 5, 4 * (1 << 14) + 4])
def test_hostile_list_of_pages(guest: Guest, length: int) -> None:
    """Item 13: half a page number, or more of them than anybody sends, are not looked at."""
    guest.send(INFLATE, [b"\0\3" * (length // 2) + b"\0" * (length % 2)])
    assert (guest.balloon.inflated, guest.balloon.refused) == (0, 1)


def test_hostile_repetition_costs_a_bounded_time(
    guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One call gives back a bounded number of pages, and says that there is more."""
    monkeypatch.setattr(module, "BUDGET", 10)
    for _ in range(9):
        guest.queue(INFLATE).add([struct.pack("<3I", 600, 602, 604)])
    guest.driver.kick(INFLATE)
    rounds = [len(guest.queue(INFLATE).reap())]
    while guest.balloon.unfinished:
        guest.device.process(INFLATE)
        rounds.append(len(guest.queue(INFLATE).reap()))
    assert sum(rounds) == 9
    assert max(rounds) <= 3


def test_reported_pages_go_back_as_far_as_they_are_whole(guest: Guest) -> None:
    guest.report(REPORTS, (600 * PAGE, 2 * PAGE), (700 * PAGE + 1, 3 * PAGE), (800 * PAGE + 8, 16))
    assert guest.gone() == {600, 601, 701, 702}
    assert guest.intact()
    assert (guest.balloon.reported, guest.balloon.refused) == (4, 1)


def test_hostile_report_outside_memory_needs_a_reset(guest: Guest) -> None:
    """Item 13: a range that leaves RAM is no buffer at all, and nothing of it is touched."""
    guest.report(REPORTS, (RAM - PAGE, 2 * PAGE))
    assert guest.needs_reset
    assert guest.gone() == set()


def stats(*pairs: tuple[int, int]) -> bytes:
    return b"".join(struct.pack("<HQ", *pair) for pair in pairs)


def test_statistics_when_they_are_asked_for(guest: Guest) -> None:
    """5.5.6.3: the device keeps the buffer until it wants new ones."""
    assert guest.send(STATS, [stats((4, 100), (5, 200), (99, 1))]) == []
    assert guest.balloon.statistics == {"free": 100, "total": 200}
    guest.balloon.ask_for_statistics()
    guest.settle()
    assert len(guest.queue(STATS).reap()) == 1
    assert guest.send(STATS, [stats((4, 50))]) == []
    assert guest.balloon.statistics == {"free": 50}


def test_statistics_asked_for_before_there_are_any(guest: Guest) -> None:
    guest.balloon.ask_for_statistics()
    guest.settle()
    guest.queue(STATS).add([stats((4, 50))])
    guest.driver.kick(STATS)
    assert guest.balloon.statistics == {"free": 50}


@pytest.mark.parametrize("data", [b"", b"123456789", bytes(2 << 20)])
def test_hostile_statistics(guest: Guest, data: bytes) -> None:
    """Item 13: a buffer of megabytes, or of nothing, is read as far as it can be statistics."""
    if data:
        guest.send(STATS, [data])
    else:
        guest.send(STATS, [], [16])
    assert len(guest.balloon.statistics) <= 1
    for _ in range(5):
        guest.queue(STATS).add([stats((4, 1))])
    guest.driver.kick(STATS)
    assert guest.queue(STATS).reap() == []  # one that is asked for at a time
    assert not guest.balloon.unfinished


def test_hinted_pages(guest: Guest) -> None:
    """5.5.6.4: only pages of the command that is asked for now count, and then it is done."""
    guest.report(HINTS, (600 * PAGE, PAGE))
    assert guest.gone() == set()
    with guest.device.config_change():
        guest.balloon.start_hinting()
    (command,) = struct.unpack("<I", guest.config(8, 4))
    assert command >= 2
    guest.pages(HINTS, command - 1)
    guest.report(HINTS, (600 * PAGE, PAGE))
    assert guest.gone() == set()
    guest.pages(HINTS, command)
    guest.report(HINTS, (600 * PAGE, 2 * PAGE))
    assert guest.gone() == {600, 601}
    before = guest.interrupts
    guest.pages(HINTS, 0)
    assert guest.config(8, 4) == b"\1\0\0\0"
    assert guest.interrupts > before
    assert guest.balloon.hints_done
    guest.report(HINTS, (610 * PAGE, PAGE))
    assert (guest.gone(), guest.balloon.hinted) == ({600, 601}, 2)
    with guest.device.config_change():
        guest.balloon.start_hinting()
    assert struct.unpack("<I", guest.config(8, 4))[0] not in (0, 1, command)
    with guest.device.config_change():
        guest.balloon.stop_hinting()
    assert guest.config(8, 4) == b"\1\0\0\0"


@pytest.mark.parametrize("data", [b"\2", bytes(8)])
def test_hostile_command(guest: Guest, data: bytes) -> None:
    guest.send(HINTS, [data])
    assert guest.balloon.refused == 1


@pytest.mark.parametrize(
    ("without", "setup", "roles"),
    [
        (0, [0, 1, 2, 3, 4], ["inflate", "deflate", "statistics", "hints", "reports"]),
        (module.F_STATS_VQ, [0, 1, 2, 3], ["inflate", "deflate", "hints", "reports"]),
        (module.F_STATS_VQ, [0, 1, 3, 4], ["inflate", "deflate", "hints", "reports"]),
        (module.F_FREE_PAGE_HINT, [0, 1, 2, 3], ["inflate", "deflate", "statistics", "reports"]),
        (module.F_REPORTING | module.F_STATS_VQ, [0, 1, 2], ["inflate", "deflate", "hints"]),
    ],
)
def test_queues_of_old_and_new_drivers(without: int, setup: list[int], roles: list[str]) -> None:
    """Linux before 6.11 leaves no gap for a queue that it does not use; the specification does."""
    guest = Guest(start=False)
    features = guest.driver.negotiate(ALL & ~without)
    assert not features & without
    for index in setup:
        guest.driver.queues += [None] * (index - len(guest.driver.queues))  # type: ignore[list-item]
        guest.driver.set_up_queue(index)
    guest.driver.add_status(4)
    assert [guest.balloon._roles[index] for index in setup] == roles
    guest.close()


def test_what_is_not_offered() -> None:
    guest = Guest(deflate_on_oom=False, hinting=False, reporting=False)
    wanted = module.F_DEFLATE_ON_OOM | module.F_FREE_PAGE_HINT | module.F_REPORTING
    assert guest.device.device_features & wanted == 0
    guest.report(HINTS, (600 * PAGE, PAGE))
    assert guest.gone() == set()
    guest.close()


def test_reset_forgets_the_driver(guest: Guest) -> None:
    guest.balloon.target = 77
    guest.device.write_config(4, struct.pack("<I", 2))
    guest.send(STATS, [stats((4, 1))])
    guest.balloon.start_hinting()
    guest.driver.write_status(0)
    assert guest.balloon.save() == Balloon(77).save()
    assert guest.balloon.statistics == {}
    guest.driver.start()
    guest.pages(INFLATE, 600)
    assert guest.gone() == {600}


def test_it_goes_on_elsewhere(guest: Guest) -> None:
    """The buffer of statistics that was kept is still there, and a command goes on."""
    guest.send(STATS, [stats((4, 1))])
    guest.balloon.start_hinting()
    guest.balloon.target = 5
    other = Guest(start=False)
    moved = guest.moved_to(other.balloon)
    assert other.balloon.save() == guest.balloon.save()
    other.balloon.ask_for_statistics()
    moved.pending, other.pending = other.pending, []
    moved.settle()
    assert len(moved.queue(STATS).reap()) == 1
    moved.close()
    other.close()
    with pytest.raises(StateError, match=r"BalloonState\.target"):
        BalloonState(target=-1, actual=0, last=1, wanted=0, answering=0)


@given(st.lists(st.lists(st.integers(500, RAM // PAGE + 20), max_size=40), max_size=6))
def test_the_balloon_holds_what_it_was_given(buffers: list[list[int]]) -> None:
    """Pages in any order, twice or outside: gone is what was named and is RAM, in whole runs."""
    guest = Guest()
    for pages in buffers:
        if pages:
            guest.pages(INFLATE, *pages)
    runs = [run for pages in buffers for run in module._runs(pages)]
    inside = [(first, count) for first, count in runs if first + count <= RAM // PAGE]
    wanted = {page for first, count in inside for page in range(first, first + count)}
    assert guest.gone() == {page for page in wanted if page >= 512}
    assert guest.intact()
    guest.close()


def test_its_owner_reaches_it_while_it_runs() -> None:
    """Each wish is in the configuration, with a new generation, or is done at once."""
    bench = PumpBench()
    controls = module.build(MemoryBalloon.parse("64K"), bench)  # type: ignore[arg-type]
    device = bench.device

    def config(offset: int) -> int:
        return int.from_bytes(device.read_config(offset, 4), "little")

    bench.driver.start(ALL)
    assert config(0) == 16
    changes: list[tuple[Callable[[], None], int, int]] = [
        (lambda: controls.set_size("128K"), 0, 32),
        (controls.start_hinting, 8, module._FIRST_CMD_ID),
        (controls.stop_hinting, 8, module.CMD_ID_DONE),
    ]
    for change, offset, expected in changes:
        before = device.read_config_generation()
        change()
        assert device.read_config_generation() != before
        assert config(offset) == expected
    with pytest.raises(ConfigError, match="whole pages"):
        controls.set_size(1)
    assert config(0) == 32
    ring = bench.driver.queues[STATS]
    ring.add([struct.pack("<HQ", 4, 100)], [])
    bench.kick(STATS)
    bench.wait(lambda: controls.balloon.statistics == {"free": 100})
    assert ring.outstanding
    controls.ask_for_statistics()
    bench.wait(lambda: not ring.outstanding)
    bench.close()


@pytest.mark.parametrize("text", ["1", "5k", "x", "size=-4096", "reporting=maybe", "20T"])
def test_configurations_that_can_not_be(text: str) -> None:
    with pytest.raises(ConfigError):
        MemoryBalloon.parse(text).check("balloon")


def test_configurations_that_can_be() -> None:
    MemoryBalloon.parse("64M,deflate_on_oom=false,hinting=false,reporting=false").check("balloon")
    MemoryBalloon().check("balloon")


numbers = st.lists(st.integers(0, 300), max_size=6).map(lambda n: struct.pack(f"<{len(n)}I", *n))


class BalloonMachine(DeviceMachine):
    """Any driver; what it gives away may be its own rings."""

    answers = False
    buffers = st.one_of(
        st.tuples(st.one_of(numbers, st.binary(max_size=40)).map(lambda data: [data]), st.just([])),
        st.tuples(
            st.just([]), st.lists(st.sampled_from([0, 1, 4096, 9000]), min_size=1, max_size=3)
        ),
    )

    def make_model(self, memory: GuestMemory) -> Balloon:
        return Balloon()

    def transplant(self, old: Any, new: Any) -> None:
        new.restore(old.save())


TestAnyDriver = BalloonMachine.TestCase
