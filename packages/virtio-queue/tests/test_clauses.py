"""Clauses of virtio 1.3 as properties: each test quotes the words that it proves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtio_queue import ChainError, Queue
from virtio_queue.constants import (
    DESC_F_AVAIL,
    DESC_F_NEXT,
    DESC_F_USED,
    F_EVENT_IDX,
    F_IN_ORDER,
    F_INDIRECT_DESC,
)
from virtio_queue.testing import Arena, PackedDriver, SplitDriver
from vm_memory import GuestAddress, GuestMemory

if TYPE_CHECKING:
    from collections.abc import Iterator

AnyDriver = SplitDriver | PackedDriver
KINDS: list[type[AnyDriver]] = [SplitDriver, PackedDriver]
kinds = st.sampled_from(KINDS)
indices = st.one_of(st.sampled_from([0, 1, 0x7FFF, 0x8000, 0xFFFE, 0xFFFF]), st.integers(0, 0xFFFF))
DATA = 0x2_0000


@pytest.fixture(scope="module")
def ram() -> Iterator[GuestMemory]:
    """Memory in which each example makes rings of its own."""
    with GuestMemory.from_ranges([(GuestAddress(0), 1 << 20)]) as memory:
        yield memory


def _pair(
    kind: type[AnyDriver], memory: GuestMemory, size: int = 8, features: int = 0, start: int = 0
) -> tuple[Any, Queue]:
    """A driver and a queue, which in a split ring begin at index `start`."""
    driver = kind(memory, size, features=features)
    queue = Queue(1 << (size - 1).bit_length())
    driver.configure(queue)
    if isinstance(driver, SplitDriver):
        driver.next_avail = driver.published = driver.last_used = start
        driver.set_avail_idx(start)
        driver.store16(driver.device_area + 2, start)
        queue._ring.next_avail = queue._ring.next_used = start
        driver.enable_interrupts()
    return driver, queue


@given(
    links=st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=8, max_size=8),
    head=st.integers(0, 9),
)
def test_2_7_5_2_loops_are_forbidden(
    ram: GuestMemory, links: list[tuple[int, bool]], head: int
) -> None:
    """Drivers MUST NOT add a descriptor chain longer than 2^32 bytes in total.

    "This implies that loops in the descriptor chain are forbidden!" Of all graphs of descriptors
    exactly those without a loop and without a step out of the table are chains.
    """
    driver, queue = _pair(SplitDriver, ram)
    for index, (following, more) in enumerate(links):
        driver.write_descriptor(index, DATA + index, 1, DESC_F_NEXT if more else 0, following)
    driver.make_available(head)
    driver.publish()
    way = [head]
    while way[-1] < 8 and len(way) <= 8 and links[way[-1]][1]:
        way.append(links[way[-1]][0])
    if way[-1] < 8 and len(set(way)) == len(way):
        chain = queue.pop(ram)
        assert chain is not None
        assert [address - DATA for address, _ in chain.readable] == way
    else:
        with pytest.raises(ChainError):
            queue.pop(ram)


@given(lengths=st.lists(st.integers(0, 1 << 32), min_size=1, max_size=8))
def test_2_7_5_2_total_length(ram: GuestMemory, lengths: list[int]) -> None:
    """Drivers MUST NOT add a descriptor chain longer than 2^32 bytes in total."""
    driver, queue = _pair(SplitDriver, ram)
    lengths = [min(length, 0xFFFF_FFFF) for length in lengths]
    for index, length in enumerate(lengths):
        last = index == len(lengths) - 1
        driver.write_descriptor(index, 0, length, 0 if last else DESC_F_NEXT, index + 1)
    driver.make_available(0)
    driver.publish()
    if sum(lengths) > 1 << 32 or max(lengths) > 1 << 20:
        with pytest.raises(ChainError) as caught:
            queue.pop(ram)
        # Memory holds no gigabytes: whichever comes first along the chain is named.
        assert caught.value.section in ("2.7.5", "2.7.5.2")
    else:
        chain = queue.pop(ram)
        assert chain is not None
        assert chain.readable_length == sum(lengths)


@given(kind=kinds, order=st.permutations(range(4)), indirect=st.booleans())
def test_2_7_5_1_the_device_writes_only_where_it_may(
    ram: GuestMemory, kind: type[AnyDriver], order: list[int], indirect: bool
) -> None:
    """A device MUST NOT write to a device-readable buffer.

    "A device MUST NOT write to any descriptor table entry" of a split ring; 2.8.15 says the first
    of packed rings too.
    """
    driver, queue = _pair(kind, ram, features=F_INDIRECT_DESC)
    for at in range(4):
        driver.add([b"readable %d" % at], [8], indirect=indirect)
    readable = [item for buffer in driver.outstanding.values() for item in buffer.readable]
    table = driver.read(driver.descriptor_area, 16 * 8)
    before = [driver.read(address, length) for address, length in readable]
    chains = list(queue.chains(ram))
    for at in order:
        writer = chains[at].writer(ram)
        writer.write(b"answers!")
        queue.add_used(ram, chains[at].head, writer.used_length)
    assert [driver.read(address, length) for address, length in readable] == before
    if kind is SplitDriver:
        assert driver.read(driver.descriptor_area, 16 * 8) == table


@given(start=indices, flags=st.integers(0, 0xFFFF), used_event=indices, count=st.integers(0, 8))
def test_2_7_7_2_without_event_idx(
    ram: GuestMemory, start: int, flags: int, used_event: int, count: int
) -> None:
    """The device MUST ignore the used_event value.

    "If flags is 1, the device SHOULD NOT send a notification. If flags is 0, the device MUST send
    a notification." Other values are not the driver's to write (2.7.7.1); their lowest bit counts.
    """
    driver, queue = _pair(SplitDriver, ram, start=start)
    driver.store16(driver.driver_area, flags)
    driver.store16(driver.driver_area + 4 + 2 * 8, used_event)
    _use(driver, queue, ram, count)
    assert queue.needs_notification(ram) is (count > 0 and not flags & 1)


def _use(driver: AnyDriver, queue: Queue, memory: GuestMemory, count: int) -> None:
    heads = [driver.add([b"x"]) for _ in range(count)]
    assert len(list(queue.chains(memory))) == count
    queue.add_used_batch(memory, [(head, 0) for head in heads])


@given(start=indices, flags=st.integers(0, 1), ahead=st.integers(-9, 9), count=st.integers(0, 8))
def test_2_7_7_2_with_event_idx(
    ram: GuestMemory, start: int, flags: int, ahead: int, count: int
) -> None:
    """The device MUST ignore the lower bit of flags.

    "If the idx field in the used ring (which determined where that descriptor index was placed)
    was equal to used_event, the device MUST send a notification. Otherwise the device SHOULD NOT
    send a notification."
    """
    driver, queue = _pair(SplitDriver, ram, features=F_EVENT_IDX, start=start)
    driver.store16(driver.driver_area, flags)
    used_event = (start + ahead) & 0xFFFF
    driver.store16(driver.driver_area + 4 + 2 * 8, used_event)
    _use(driver, queue, ram, count)
    placed = {(start + at) & 0xFFFF for at in range(count)}
    assert queue.needs_notification(ram) is (used_event in placed)
    assert queue.needs_notification(ram) is False


@given(
    start=indices, features=st.sampled_from([0, F_EVENT_IDX]), taken=st.integers(0, 8),
    late=st.integers(0, 8), kind=kinds,
)  # fmt: skip
def test_2_7_10_nobody_sleeps_on(
    ram: GuestMemory, kind: type[AnyDriver], start: int, features: int, taken: int, late: int
) -> None:
    """The driver MUST send a notification when idx passes avail_event, or when flags is 0.

    So whatever was taken before: of buffers that come while the device asks for kicks it either
    hears from the driver, or from `enable_notifications` itself.
    """
    late = min(late, 8 - taken)
    driver, queue = _pair(kind, ram, features=features, start=start)
    queue.disable_notifications(ram)
    for _ in range(taken):
        driver.add([b"x"])
    driver.kick_needed()
    assert len(list(queue.chains(ram))) == taken
    assert queue.enable_notifications(ram) is False
    for _ in range(late):
        driver.add([b"x"])
    assert driver.kick_needed() is (late > 0)
    assert queue.enable_notifications(ram) is (late > 0)


@given(features=st.sampled_from([0, F_EVENT_IDX]), wishes=st.lists(st.booleans(), max_size=6))
def test_2_7_10_2_flags_are_0_or_1(ram: GuestMemory, features: int, wishes: list[bool]) -> None:
    """The device MUST set flags to 0 or 1; with EVENT_IDX the device MUST set flags to 0."""
    driver, queue = _pair(SplitDriver, ram, features=features)
    for wanted in wishes:
        if wanted:
            queue.enable_notifications(ram)
        else:
            queue.disable_notifications(ram)
        flags = driver.load16(driver.device_area)
        assert flags == (0 if features or wanted else 1)


@given(
    kind=kinds, counts=st.lists(st.integers(1, 3), min_size=1, max_size=5), data=st.data(),
    start=indices, batched=st.booleans(),
)  # fmt: skip
def test_2_7_9_2_8_8_in_order(
    ram: GuestMemory,
    kind: type[AnyDriver],
    counts: list[int],
    data: st.DataObject,
    start: int,
    batched: bool,
) -> None:
    """Devices always use descriptors in the same order in which they have been made available.

    "If negotiated": whatever the order in which a device completes them.
    """
    driver, queue = _pair(kind, ram, 16, F_IN_ORDER, start)
    for _ in range(3):
        heads = [driver.add([b"x"] * count) for count in counts]
        assert [chain.head for chain in queue.chains(ram)] == heads
        order = data.draw(st.permutations(heads))
        if batched:
            cut = data.draw(st.integers(0, len(heads)))
            for part in (order[:cut], order[cut:]):
                queue.add_used_batch(ram, [(head, 0) for head in part])
        else:
            for head in order:
                queue.add_used(ram, head, 0)
        assert [used.head for used in driver.reap()] == heads


@given(
    size=st.integers(1, 13), counts=st.lists(st.integers(1, 4), min_size=1, max_size=30),
    data=st.data(),
)  # fmt: skip
def test_2_8_12_orders_and_wrap_counters(
    ram: GuestMemory, size: int, counts: list[int], data: st.DataObject
) -> None:
    """The device MUST start processing driver descriptors in the order in which they appear.

    "The device MUST start writing device descriptors into the ring in the order in which they
    complete." 2.8.1: both bits of a used descriptor match the device's ring wrap counter, which
    changes whenever the ring's end is passed.
    """
    driver, queue = _pair(PackedDriver, ram, size)
    position = 0
    for count in counts:
        heads = [driver.add([b"x"] * min(count, driver.free))]
        while driver.free and data.draw(st.booleans()):
            heads.append(driver.add([b"x"]))
        slots = {head: driver.outstanding[head].slots for head in heads}
        assert [chain.head for chain in queue.chains(ram)] == heads
        order = data.draw(st.permutations(heads))
        for head in order:
            queue.add_used(ram, head, 0)
            wrap = position // size % 2 == 0
            flags = driver.load16(driver.descriptor_area + 16 * (position % size) + 14)
            assert bool(flags & DESC_F_AVAIL) is bool(flags & DESC_F_USED) is wrap
            position += slots[head]
        assert [used.head for used in driver.reap()] == order


@given(order=st.permutations(range(6)), batched=st.booleans())
def test_2_8_15_used_descriptors_do_not_change_any_more(
    ram: GuestMemory, order: list[int], batched: bool
) -> None:
    """A device MUST NOT change a descriptor after changing it's the USED bit in its flags."""
    driver, queue = _pair(PackedDriver, ram)
    for _ in range(6):
        driver.add([b"x"], publish=False)
    driver.publish()
    chains = list(queue.chains(ram))
    seen = b""
    parts = [order[:3], order[3:]] if batched else [[at] for at in order]
    for part in parts:
        queue.add_used_batch(ram, [(chains[at].head, 0) for at in part])
        ring = driver.read(driver.descriptor_area, 16 * 8)
        assert ring.startswith(seen)
        seen = ring[: len(seen) + 16 * len(part)]
        queue.enable_notifications(ram)
    assert driver.read(driver.descriptor_area, len(seen)) == seen


@given(
    size=st.integers(1, 9), before=st.integers(0, 40), flags=st.integers(0, 3),
    offset=st.integers(0, 9), wrap=st.integers(0, 1), count=st.integers(0, 9),
    features=st.sampled_from([0, F_EVENT_IDX]),
)  # fmt: skip
def test_2_8_10_packed_suppression(
    ram: GuestMemory, size: int, before: int, flags: int, offset: int, wrap: int, count: int,
    features: int,
) -> None:  # fmt: skip
    """Enable events, disable events, enable events for a specific descriptor.

    "Event will only trigger when this descriptor is made available/used" and "when Ring Wrap
    Counter matches this value". What no driver may ask for gets a notification rather than none.
    """
    count = min(count, size)
    driver, queue = _pair(PackedDriver, ram, size, features)
    for _ in range(before):
        _use(driver, queue, ram, 1)
        driver.reap()
    queue.needs_notification(ram)
    driver.store16(driver.driver_area, offset | wrap << 15)
    driver.store16(driver.driver_area + 2, flags)
    _use(driver, queue, ram, count)
    expected = count > 0
    if flags == 1:
        expected = False
    elif flags == 2 and features and offset < size:
        # Positions on an axis that repeats after two rounds; the wrap counter starts at 1.
        places = {(before + at) % (2 * size) for at in range(count)}
        expected = offset + (0 if wrap else size) in places
    assert queue.needs_notification(ram) is expected


@pytest.mark.parametrize("size", [1 << bits for bits in range(16)])
@pytest.mark.parametrize("features", [0, F_EVENT_IDX])
def test_2_7_6_split_indices_wrap_at_every_size(size: int, features: int) -> None:
    """Note that avail idx and used idx always increment: they wrap at 2^16, slots at the size."""
    with GuestMemory.from_ranges([(GuestAddress(0), 4 << 20)]) as memory:
        driver = SplitDriver(memory, size, features=features, arena=Arena(0x1000, 3 << 20))
        queue = Queue(size)
        driver.configure(queue)
        start = (0x10000 - size - size // 2 - 1) & 0xFFFF
        driver.set_avail_idx(start)
        driver.store16(driver.device_area + 2, start)
        queue._ring.next_avail = queue._ring.next_used = start
        for index in range(size):
            driver.write_descriptor(index, DATA, 1)
        idx = start
        for turn in range(3):
            heads = [(slot * 7 + turn) % size for slot in range(size)]
            for at, head in enumerate(heads):
                slot = (idx + at) % size
                driver.store16(driver.driver_area + 4 + 2 * slot, head)
            event = (idx + size - 1) & 0xFFFF
            driver.store16(driver.driver_area + 4 + 2 * size, event)
            idx = (idx + size) & 0xFFFF
            driver.set_avail_idx(idx)
            batch = queue.pop_batch(memory)
            assert batch.heads == heads
            queue.complete_batch(memory, batch)
            assert queue.needs_notification(memory)
            assert driver.load16(driver.device_area + 2) == idx
            last = driver.device_area + 4 + 8 * ((idx - 1) % size)
            assert driver.load16(last) == heads[-1]


@pytest.mark.parametrize("size", [*range(1, 40), 255, 256, 257, 1000, 1024, 32767, 32768])
def test_2_8_10_1_packed_positions_wrap_at_every_size(size: int) -> None:
    """Queue Size corresponds to the maximum number of descriptors; it need not be a power of 2."""
    with GuestMemory.from_ranges([(GuestAddress(0), 2 << 20)]) as memory:
        driver = PackedDriver(memory, size, arena=Arena(0x1000, 1 << 20))
        queue = Queue(1 << (size - 1).bit_length())
        driver.configure(queue)
        step = max(1, min(size, 1000) * 2 // 3)
        position = 0
        while position < 5 * min(size, 1000) or position < 2 * size:
            chunk = min(step, size - position % size) if size > 1000 else step
            for at in range(chunk):
                offset, wrapped = (position + at) % size, (position + at) // size % 2
                flags = DESC_F_USED if wrapped else DESC_F_AVAIL
                driver.write_descriptor(offset, DATA, 1, at, flags)
            batch = queue.pop_batch(memory)
            assert batch.heads == list(range(chunk))
            queue.complete_batch(memory, batch)
            position += chunk
        expected = position % size | (0 if position // size % 2 else 0x8000)
        assert queue._ring.next_avail == queue._ring.next_used == expected
