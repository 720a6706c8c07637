"""Queues as values: saved and restored in the middle, hostile states, other maps, dirty pages."""

from __future__ import annotations

import ctypes
import gc
from typing import TYPE_CHECKING, Any

import pytest
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from virtio_queue import ChainState, DescriptorChain, Queue, QueueStateError, StateError, UsageError
from virtio_queue.constants import F_EVENT_IDX, F_IN_ORDER, F_INDIRECT_DESC, F_RING_PACKED
from virtio_queue.testing import Arena, PackedDriver, SplitDriver
from vm_memory import GuestAddress, GuestMemory

if TYPE_CHECKING:
    from collections.abc import Iterator

AnyDriver = SplitDriver | PackedDriver
KINDS: list[type[AnyDriver]] = [SplitDriver, PackedDriver]
both = pytest.mark.parametrize("kind", KINDS)


def _pair(
    kind: type[AnyDriver], memory: GuestMemory, features: int = 0, arena: Arena | None = None
) -> tuple[AnyDriver, Queue]:
    driver = kind(memory, 8, features=features, arena=arena)
    queue = Queue(8)
    driver.configure(queue)
    return driver, queue


@given(
    kind=st.sampled_from(KINDS),
    features=st.sampled_from([0, F_EVENT_IDX, F_IN_ORDER, F_IN_ORDER | F_INDIRECT_DESC]),
    steps=st.lists(st.integers(0, 5), max_size=60),
)
def test_a_save_at_any_time_changes_nothing(
    kind: type[AnyDriver], features: int, steps: list[int]
) -> None:
    """Saved and restored after every step, nothing is lost, nothing is done twice."""
    with GuestMemory.from_ranges([(GuestAddress(0), 1 << 20)]) as memory:
        driver, queue = _pair(kind, memory, features)
        added: list[int] = []
        reaped: list[int] = []
        for step in steps:
            state = queue.save()
            restored = Queue(8)
            restored.restore(state, memory)
            assert restored.save() == state
            assert restored.in_flight == queue.in_flight
            queue = restored
            flying = queue.in_flight
            if step < 2 and driver.free > 1:
                added.append(driver.add([b"%d" % step], [2]))
            elif step == 2:
                queue.pop(memory)
            elif step == 3 and flying:
                queue.add_used(memory, flying[-1].head, 2)
            elif step == 4 and flying:
                queue.add_used(memory, flying[0].head, 1)
                queue.needs_notification(memory)
            else:
                reaped += [used.head for used in driver.reap()]
        for _ in queue.chains(memory):
            pass
        queue.add_used_batch(memory, [(chain.head, 0) for chain in queue.in_flight])
        reaped += [used.head for used in driver.reap()]
        assert sorted(reaped) == sorted(added)
        if features & F_IN_ORDER:
            assert reaped == added


def test_chains_of_batches_are_saved_too(memory: GuestMemory) -> None:
    """In flight are chains taken one by one and in batches, oldest first; used ones are not."""
    driver, queue = _pair(SplitDriver, memory)
    heads = [driver.add([], [at + 2]) for at in range(7)]
    first = queue.pop_batch(memory, 2)
    queue.pop(memory)
    second = queue.pop_batch(memory, 2)
    assert (first.heads, second.heads) == (heads[:2], heads[3:5])
    queue.add_used(memory, heads[1], 2)
    assert (first.outstanding, second.outstanding) == (1, 2)
    third = queue.pop_batch(memory)
    assert third.heads == heads[5:]
    assert [chain.head for chain in queue.in_flight] == [heads[0], *heads[2:]]
    new = Queue(8)
    new.restore(queue.save(), memory)
    assert new.in_flight == queue.in_flight
    new.add_used_batch(memory, [(chain.head, 0) for chain in new.in_flight])
    assert len(driver.reap()) == 7


def test_batches_are_reused_once_they_are_used(memory: GuestMemory) -> None:
    """A batch is filled again only when none of its chains is out."""
    driver, queue = _pair(SplitDriver, memory)
    driver.add([b"a"], [3])
    batch = queue.pop_batch(memory)
    assert batch.writable_lengths == [3]
    empty = queue.pop_batch(memory)
    assert empty is not batch
    assert len(empty) == 0
    assert queue.pop_batch(memory) is empty
    queue.complete_batch(memory, batch)
    assert driver.reap()[0].length == 3
    driver.add([b"b"], [3])
    assert queue.pop_batch(memory) is batch
    with pytest.raises(UsageError, match="for 1 chains"):
        queue.complete_batch(memory, batch, [1, 2])
    with pytest.raises(UsageError, match="length"):
        queue.complete_batch(memory, batch, [4])
    with pytest.raises(UsageError, match="2\\*\\*32"):
        queue.complete_batch(memory, batch, [-1])
    with pytest.raises(UsageError, match="2\\*\\*32"):
        queue.add_used_batch(memory, [(1 << 40, 0)])
    queue.complete_batch(memory, batch, [1])
    assert driver.reap()[0].length == 1
    for call in (batch.chain, batch.iovecs):
        with pytest.raises(IndexError):
            call(1)


@both
def test_headers_are_copied_with_the_chains(memory: GuestMemory, kind: type[AnyDriver]) -> None:
    """Each chain's first bytes are read once, however they are cut; missing ones are zeros."""
    driver, queue = _pair(kind, memory)
    driver.add([b"ab", b"", b"cdefgh"], [1])
    driver.add([b"xy"])
    batch = queue.pop_batch(memory, header=5)
    for buffer in driver.outstanding.values():
        driver.write(buffer.readable[0][0], b"!!")
    assert batch.headers == b"abcdexy\0\0\0"
    queue.complete_batch(memory, batch)
    assert queue.pop_batch(memory).headers == b""
    for wrong in (-1, 65):
        with pytest.raises(UsageError, match="header"):
            queue.pop_batch(memory, header=wrong)
    driver.reap()
    driver.add([b"1"])
    again = queue.pop_batch(memory)
    queue.complete_batch(memory, again)
    with pytest.raises(QueueStateError):
        queue.complete_batch(memory, again)


def test_a_batch_stops_before_a_malformed_chain(memory: GuestMemory) -> None:
    """Good chains are handed out first; the next call meets the bad one."""
    driver = SplitDriver(memory, 8)
    queue = Queue(8)
    driver.configure(queue)
    driver.add([b"good"])
    driver.make_available(0xFFFF)
    driver.publish()
    assert len(queue.pop_batch(memory)) == 1
    with pytest.raises(ValueError, match=r"2\.7\.5"):
        queue.pop_batch(memory)


@both
def test_a_long_round_in_order(memory: GuestMemory, kind: type[AnyDriver]) -> None:
    """More completions than one publication holds come back in order all the same."""
    driver = kind(memory, 256, features=F_IN_ORDER)
    queue = Queue(256)
    driver.configure(queue)
    heads = [driver.add([], [1]) for _ in range(200)]
    for chain in list(queue.chains(memory))[1:]:
        queue.add_used(memory, chain.head, 1)
    queue.add_used(memory, heads[0], 1)
    assert [used.head for used in driver.reap()] == heads


def test_a_chain_in_too_many_pieces_for_a_batch() -> None:
    """2.7.4.1: a chain that no batch can hold is refused by name; taken alone it is fine."""
    ranges = [(GuestAddress(at * 4096), 4096) for at in range(64)]
    with GuestMemory.from_ranges(ranges) as memory:
        driver = SplitDriver(memory, 4, features=F_INDIRECT_DESC, arena=Arena(0x1000, 0x2000))
        queue = Queue(4)
        driver.configure(queue)
        driver.add([b"small"])
        for index in range(1024):
            flags, following = (1, index + 1) if index < 1023 else (0, 0)
            driver.write_descriptor(index, 0x9000, 0x8000, flags, following, table=0x20000)
        driver.write_descriptor(1, 0x20000, 16 * 1024, 4)
        driver.make_available(1)
        driver.publish()
        assert len(queue.pop_batch(memory)) == 1
        with pytest.raises(ValueError, match=r"2\.7\.4\.1"):
            queue.pop_batch(memory)
        chain = queue.pop(memory)
        assert chain is not None
        assert chain.readable_length == 1024 * 0x8000


def test_chains_are_values(memory: GuestMemory) -> None:
    """Equal chains are equal and hash alike; they print what they are."""
    driver, queue = _pair(SplitDriver, memory)
    driver.add([b"x"], [3])
    chain = queue.pop(memory)
    assert chain is not None
    twin = DescriptorChain(chain.head, chain.readable, chain.writable, chain.slots)
    assert chain == twin
    assert len({chain, twin}) == 1
    assert chain != DescriptorChain(1, (), ())
    assert chain != 5
    assert "head=0" in repr(chain)
    assert (twin.readable_length, twin.writable_length) == (1, 3)


@both
def test_hostile_states_are_refused(memory: GuestMemory, kind: type[AnyDriver]) -> None:
    """Everything in a state is checked like guest input; a refusal leaves the queue as it was."""
    driver, queue = _pair(kind, memory, F_IN_ORDER)
    for _ in range(3):
        driver.add([b"abc"], [4])
    first, second, _ = queue.chains(memory)
    queue.add_used(memory, second.head, 4)
    good = queue.save()
    chain = good.in_flight[0]
    assert (chain.head, good.in_flight[1].completed) == (first.head, 4)

    def flying(**changes: Any) -> tuple[ChainState, ...]:
        return (evolve(chain, **changes), *good.in_flight[1:])

    bad = [
        evolve(good, version=0),
        evolve(good, max_size=16),
        evolve(good, size=0),
        evolve(good, size=16),
        evolve(good, features=good.features | 1),
        evolve(good, descriptor_area=good.descriptor_area + 1),
        evolve(good, descriptor_area=1 << 40),
        evolve(good, driver_area=-2),
        evolve(good, device_area=1 << 64),
        evolve(good, next_avail=1 << 16),
        evolve(good, next_avail=(good.next_avail + 1) & 0xFFFF),
        evolve(good, next_used=-1),
        evolve(good, pending=-1),
        evolve(good, pending=1 << 64),
        evolve(good, in_flight=good.in_flight[1:]),
        evolve(good, in_flight=good.in_flight * 2),
        evolve(good, in_flight=flying(head=-1)),
        evolve(good, in_flight=flying(head=1 << 16)),
        evolve(good, in_flight=flying(slots=0)),
        evolve(good, in_flight=flying(slots=9)),
        evolve(good, in_flight=flying(readable=((1 << 40, 1),))),
        evolve(good, in_flight=flying(readable=((-1, 1),))),
        evolve(good, in_flight=flying(writable=((0, -1),))),
        evolve(good, in_flight=flying(writable=(((1 << 64) - 1, 2),))),
        evolve(good, in_flight=flying(writable=((0, 1 << 20),) * 4097)),
        evolve(good, in_flight=flying(completed=5)),
        evolve(good, in_flight=flying(completed=-1)),
        evolve(good, features=good.features & ~F_IN_ORDER),
        evolve(good, ready=False),
    ]
    if kind is PackedDriver:
        bad.append(evolve(good, next_used=0x8008))
        bad.append(evolve(good, features=good.features & ~F_RING_PACKED))
    for state in bad:
        with pytest.raises(StateError):
            queue.restore(state, memory)
        assert queue.save() == good
    queue.restore(good, memory)
    queue.add_used(memory, first.head, 0)
    assert [used.length for used in driver.reap()] == [0, 4]


def test_a_queue_that_is_not_ready_is_saved_too(memory: GuestMemory) -> None:
    """Configuration in progress survives."""
    queue = Queue(16)
    queue.set_size(4)
    queue.set_driver_area(0x1002)
    new = Queue(16)
    new.restore(queue.save(), memory)
    assert new.save() == queue.save()
    assert (new.size, new.driver_area, new.ready) == (4, 0x1002, False)


def test_a_restored_queue_gives_nothing_back(memory: GuestMemory) -> None:
    """Which chain was taken last is not saved: undoing would repeat a chain used since."""
    driver, queue = _pair(SplitDriver, memory)
    driver.add([b"x"])
    queue.pop(memory)
    queue.restore(queue.save(), memory)
    (chain,) = queue.in_flight
    with pytest.raises(QueueStateError):
        queue.undo_pop(chain)


def test_another_map_is_taken_between_calls(memory: GuestMemory) -> None:
    """A map that shares the regions takes over; one without the rings is refused."""
    driver, queue = _pair(SplitDriver, memory)
    driver.add([b"x"])
    grown = GuestMemory(memory.regions)
    elsewhere = GuestMemory.from_ranges([(GuestAddress(1 << 40), 4096)])
    with pytest.raises(UsageError, match="memory"):
        queue.pop(elsewhere)
    elsewhere.close()
    assert queue.pop(grown) is not None
    grown.close()


def test_the_queue_keeps_a_closed_map_alive() -> None:
    """Closing memory under a queue cannot make it touch what was unmapped."""
    memory = GuestMemory.from_ranges([(GuestAddress(0), 1 << 20)])
    driver, queue = _pair(SplitDriver, memory)
    driver.add([b"x"])
    memory.close()
    gc.collect()
    assert queue.pop(memory) is not None
    assert queue.needs_notification(memory) is False


class _Region(ctypes.Structure):
    _fields_ = (
        ("guest_address", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("host", ctypes.c_uint64),
        ("bitmap", ctypes.c_uint64),
        ("mapping", ctypes.c_uint64),
    )


class _Table(ctypes.Structure):
    _fields_ = (
        ("version", ctypes.c_uint32),
        ("count", ctypes.c_uint32),
        ("references", ctypes.c_long),
        ("functions", ctypes.c_uint64 * 3),
        ("regions", _Region * 2),
    )


def test_the_table_of_memory_has_the_layout_we_repeat(memory: GuestMemory) -> None:
    """`native/vmm_table.h` restates vm-memory's declarations: version, regions, references."""
    table = _Table.from_address(memory.native_table)
    assert (table.version, table.count) == (1, 2)
    seen = [(region.guest_address, region.size, region.host) for region in table.regions]
    assert seen == [
        (region.guest_address, region.size, region.host_address) for region in memory.regions
    ]
    before = table.references
    _, queue = _pair(SplitDriver, memory)
    assert table.references == before + 1
    queue.reset()
    gc.collect()
    assert table.references == before


def test_a_table_of_an_unknown_layout_is_refused(memory: GuestMemory) -> None:
    """Another version of vm-memory's table is not walked."""
    driver, queue = _pair(SplitDriver, memory)
    driver.add([b"x"])
    table = _Table.from_address(memory.native_table)
    other = GuestMemory(memory.regions)
    _Table.from_address(other.native_table).version = 2
    with pytest.raises(UsageError, match="memory"):
        queue.pop(other)
    assert table.version == 1
    assert queue.pop(memory) is not None


@pytest.fixture
def tracked() -> Iterator[GuestMemory]:
    """Memory in two neighbouring regions whose writes are tracked by 16 bytes."""
    ranges = [(GuestAddress(0), 0x8000), (GuestAddress(0x8000), 0x8000)]
    with GuestMemory.from_ranges(ranges, dirty_page_size=16) as memory:
        yield memory


def _dirty(memory: GuestMemory) -> set[int]:
    return {
        page
        for address, length in memory.harvest_dirty()
        for page in range(address // 16, (address + length) // 16)
    }


@pytest.mark.parametrize("features", [0, F_EVENT_IDX])
@pytest.mark.parametrize("start", [0x1000, 0x8000 - 72, 0x8000 - 200])
@both
def test_every_byte_the_device_writes_is_dirty(
    tracked: GuestMemory, kind: type[AnyDriver], start: int, features: int
) -> None:
    """Rings, suppression fields and data, one by one and in batches, also across regions."""
    driver, queue = _pair(kind, tracked, features, Arena(start, 0x1000))
    for turn in range(12):
        heads = [driver.add([b"x"], [40]) for _ in range(2)]
        before = tracked.read(GuestAddress(0), 0x10000)
        _dirty(tracked)
        if turn % 2:
            for chain in queue.chains(tracked):
                writer = chain.writer(tracked)
                writer.write(b"y" * (turn + 1))
                queue.add_used(tracked, chain.head, writer.used_length)
        else:
            batch = queue.pop_batch(tracked)
            for at in range(len(batch)):
                assert sum(length for _, length in batch.iovecs(at)[1]) == 40
                views = batch.chain(at).writer(tracked).slices(turn + 1)
                _dirty(tracked)  # what `slices` marked; completion has to mark it again
                for view in views:
                    view[:] = b"z" * len(view)
            queue.complete_batch(tracked, batch, [turn + 1] * len(batch))
        queue.disable_notifications(tracked)
        queue.enable_notifications(tracked)
        after = tracked.read(GuestAddress(0), 0x10000)
        changed = {at // 16 for at in range(0x10000) if before[at] != after[at]}
        assert changed <= _dirty(tracked)
        assert [used.head for used in driver.reap()] == heads
