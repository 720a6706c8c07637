"""Configuration of queues, chains in flight, and both directions of a whole exchange."""

from __future__ import annotations

import pytest

from virtio_queue import DescriptorChain, Queue, QueueConfigError, QueueStateError, UsageError
from virtio_queue.constants import (
    F_EVENT_IDX,
    F_IN_ORDER,
    F_INDIRECT_DESC,
    F_RING_PACKED,
)
from virtio_queue.testing import Arena, Driver, PackedDriver, SplitDriver
from vm_memory import GuestAddress, GuestMemory

KINDS: list[type[SplitDriver | PackedDriver]] = [SplitDriver, PackedDriver]
both = pytest.mark.parametrize("kind", KINDS)


def _pair(
    kind: type[SplitDriver | PackedDriver], memory: GuestMemory, size: int = 8, features: int = 0
) -> tuple[SplitDriver | PackedDriver, Queue]:
    driver = kind(memory, size, features=features)
    queue = Queue(1 << (size - 1).bit_length())
    driver.configure(queue)
    return driver, queue


@pytest.mark.parametrize("size", [0, -1, 3, 32769, 65536])
def test_max_size_is_a_power_of_two_up_to_32768(size: int) -> None:
    """2.7: other sizes cannot be offered."""
    with pytest.raises(UsageError, match="power of two"):
        Queue(size)


@pytest.mark.parametrize("size", [0, -1, 3, 17, 32, 1 << 16])
def test_a_bad_size_keeps_the_former_one(size: int) -> None:
    """A split queue takes powers of two up to its maximum and is unchanged by anything else."""
    queue = Queue(16)
    queue.set_size(8)
    with pytest.raises(QueueConfigError):
        queue.set_size(size)
    assert queue.size == 8


def test_a_packed_queue_takes_any_size_up_to_its_maximum() -> None:
    """2.8.10.1: the size of a packed ring need not be a power of two."""
    queue = Queue(16)
    queue.set_features(F_RING_PACKED)
    queue.set_size(13)
    assert queue.size == 13


@pytest.mark.parametrize(
    ("field", "alignment"), [("descriptor_area", 16), ("driver_area", 2), ("device_area", 4)]
)
def test_alignment_of_split_rings(field: str, alignment: int) -> None:
    """2.7: descriptor table 16, available ring 2, used ring 4."""
    queue = Queue(16)
    setter = getattr(queue, f"set_{field}")
    setter(alignment * 3)
    for wrong in (alignment * 3 + alignment // 2, -alignment, 1 << 64):
        with pytest.raises(QueueConfigError) as caught:
            setter(wrong)
        assert caught.value.field == field
    assert getattr(queue, field) == alignment * 3


@pytest.mark.parametrize("field", ["descriptor_area", "driver_area", "device_area"])
@pytest.mark.parametrize("address", [0x0FFF_FFF0, (1 << 20) - 16, (1 << 64) - 16, 1 << 32])
@both
def test_rings_outside_memory_do_not_become_ready(
    memory: GuestMemory, kind: type[SplitDriver | PackedDriver], field: str, address: int
) -> None:
    """Rings in a hole, across the end of memory or of the address space are refused, by name."""
    driver = kind(memory, 8)
    setattr(driver, field, address if field == "descriptor_area" else address + 16)
    queue = Queue(8)
    with pytest.raises(QueueConfigError) as caught:
        driver.configure(queue)
    assert caught.value.field == field
    assert not queue.ready


@both
def test_a_ready_queue_is_frozen(
    memory: GuestMemory, kind: type[SplitDriver | PackedDriver]
) -> None:
    """CVE-2026-5747: nothing of the configuration changes while the rings are in use."""
    _, queue = _pair(kind, memory)
    before = queue.save()
    with pytest.raises(QueueStateError):
        queue.set_size(4)
    with pytest.raises(QueueStateError):
        queue.set_descriptor_area(0)
    with pytest.raises(QueueStateError):
        queue.set_driver_area(0)
    with pytest.raises(QueueStateError):
        queue.set_device_area(0)
    with pytest.raises(QueueStateError):
        queue.set_features(0)
    with pytest.raises(QueueStateError):
        queue.enable(memory)
    assert queue.save() == before


def test_a_queue_that_is_not_ready_is_not_used(memory: GuestMemory) -> None:
    """After a reset every call says so instead of touching stale rings."""
    driver, queue = _pair(SplitDriver, memory)
    driver.add([b"x"])
    queue.reset()
    with pytest.raises(QueueStateError):
        next(queue.chains(memory))
    with pytest.raises(QueueStateError):
        queue.add_used(memory, 0, 0)
    with pytest.raises(QueueStateError):
        queue.needs_notification(memory)


@pytest.mark.parametrize("indirect", [False, True])
@both
def test_data_goes_both_ways(
    memory: GuestMemory, kind: type[SplitDriver | PackedDriver], indirect: bool
) -> None:
    """What the driver put in is read, what the device wrote comes back, over many rounds."""
    driver, queue = _pair(kind, memory, 8, F_INDIRECT_DESC)
    for turn in range(100):
        text = b"request %d" % turn
        head = driver.add([text[:3], text[3:]], [2, 100], indirect=indirect)
        (chain,) = queue.chains(memory)
        assert chain.head == head
        assert chain.reader(memory).read_exact(len(text)) == text
        writer = chain.writer(memory)
        writer.write_exact(text[::-1])
        queue.add_used(memory, chain.head, writer.used_length)
        (used,) = driver.reap()
        assert used.data == text[::-1]
    assert queue.in_flight == ()


@both
def test_completion_out_of_order(
    memory: GuestMemory, kind: type[SplitDriver | PackedDriver]
) -> None:
    """Without IN_ORDER the driver sees completions as the device makes them."""
    driver, queue = _pair(kind, memory)
    heads = [driver.add([b"x"], [1]) for _ in range(4)]
    assert [chain.head for chain in queue.chains(memory)] == heads
    for head in reversed(heads):
        queue.add_used(memory, head, 0)
    assert [used.head for used in driver.reap()] == heads[::-1]


@both
def test_in_order_holds_completions_until_their_turn(
    memory: GuestMemory, kind: type[SplitDriver | PackedDriver]
) -> None:
    """2.7.9, 2.8.8: with IN_ORDER buffers come back in the order they were made available."""
    driver, queue = _pair(kind, memory, features=F_IN_ORDER)
    heads = [driver.add([], [4]) for _ in range(4)]
    chains = list(queue.chains(memory))
    for chain in chains[1:]:
        queue.add_used(memory, chain.head, 4)
        assert driver.reap() == []
    queue.add_used(memory, heads[0], 3)
    assert [(used.head, used.length) for used in driver.reap()] == [
        (heads[0], 3),
        (heads[1], 4),
        (heads[2], 4),
        (heads[3], 4),
    ]


@both
def test_used_lengths_and_heads_are_checked(
    memory: GuestMemory, kind: type[SplitDriver | PackedDriver]
) -> None:
    """A head that is not in flight, twice in a batch, or a length past the room is refused."""
    driver, queue = _pair(kind, memory)
    head = driver.add([b"x"], [10])
    queue.pop(memory)
    with pytest.raises(QueueStateError):
        queue.add_used(memory, head + 1, 0)
    with pytest.raises(UsageError):
        queue.add_used(memory, head, 11)
    with pytest.raises(QueueStateError):
        queue.add_used_batch(memory, [(head, 1), (head, 1)])
    assert driver.reap() == []
    queue.add_used(memory, head, 10)
    with pytest.raises(QueueStateError):
        queue.add_used(memory, head, 10)
    assert len(driver.reap()) == 1


@both
def test_undo_pop_takes_the_same_chain_again(
    memory: GuestMemory, kind: type[SplitDriver | PackedDriver]
) -> None:
    """The youngest chain can be given back, also across the ring's end; an older one cannot."""
    driver, queue = _pair(kind, memory, 4)
    for _ in range(10):
        driver.add([b"a"], [1, 1])
        chain = queue.pop(memory)
        assert chain is not None
        queue.undo_pop(chain)
        assert queue.in_flight == ()
        assert queue.pop(memory) == chain
        queue.add_used(memory, chain.head, 0)
        assert len(driver.reap()) == 1
    driver.add([b"a"])
    driver.add([b"b"])
    first, _ = queue.chains(memory)
    with pytest.raises(QueueStateError):
        queue.undo_pop(first)


@pytest.mark.parametrize("features", [0, F_EVENT_IDX])
@both
def test_notification_of_used_buffers_follows_the_driver(
    memory: GuestMemory, kind: type[SplitDriver | PackedDriver], features: int
) -> None:
    """2.7.7.2, 2.8.10: wanted means one notification, suppressed none, no news none."""
    driver, queue = _pair(kind, memory, features=features)

    def exchange() -> bool:
        head = driver.add([b"x"])
        queue.pop(memory)
        queue.add_used(memory, head, 0)
        return queue.needs_notification(memory)

    driver.enable_interrupts()
    assert exchange() is True
    assert queue.needs_notification(memory) is False
    driver.reap()
    driver.disable_interrupts()
    assert exchange() is False
    assert len(driver.reap()) == 1


@pytest.mark.parametrize("features", [0, F_EVENT_IDX])
@both
def test_kicks_follow_the_device(
    memory: GuestMemory, kind: type[SplitDriver | PackedDriver], features: int
) -> None:
    """2.7.10, 2.8.10: after enabling, the next buffer is kicked; enabling reports waiting ones."""
    driver, queue = _pair(kind, memory, features=features)
    assert queue.enable_notifications(memory) is False
    driver.add([b"x"])
    assert driver.kick_needed()
    assert not driver.kick_needed()
    assert queue.enable_notifications(memory) is True
    assert len(list(queue.chains(memory))) == 1
    queue.disable_notifications(memory)
    driver.add([b"x"])
    if not features or kind is PackedDriver:
        assert not driver.kick_needed()


@pytest.mark.parametrize("size", [1 << bits for bits in range(11)])
@pytest.mark.parametrize("features", [0, F_EVENT_IDX])
@both
def test_indices_wrap(
    memory: GuestMemory, kind: type[SplitDriver | PackedDriver], features: int, size: int
) -> None:
    """Positions wrap at the ring size and at 2**16 without losing or repeating a buffer."""
    driver, queue = _pair(kind, memory, size, features)
    if isinstance(driver, SplitDriver):
        start = 0xFFFF - 3 * size
        driver.next_avail = driver.published = driver.last_used = start
        driver.publish()
        driver.store16(driver.device_area + 2, start)
        driver.enable_interrupts()
        assert queue._ring is not None
        queue._ring.next_avail = queue._ring.next_used = start
    for _ in range(7):
        heads = [driver.add([b"x"]) for _ in range(size)]
        assert [chain.head for chain in queue.chains(memory)] == heads
        queue.add_used_batch(memory, [(head, 0) for head in heads])
        assert queue.needs_notification(memory)
        assert [used.head for used in driver.reap()] == heads


def test_the_largest_queue() -> None:
    """2.7: 32768 descriptors in one chain, again and again."""
    with GuestMemory.from_ranges([(GuestAddress(0), 4 << 20)]) as large:
        driver = SplitDriver(large, 1 << 15, arena=Arena(0x1000, 3 << 20))
        queue = Queue(1 << 15)
        driver.configure(queue)
        for index in range(1 << 15):
            last = index == (1 << 15) - 1
            driver.write_descriptor(index, 0, 1, 0 if last else 1, 0 if last else index + 1)
        for turn in range(1, 4):
            driver.make_available(0)
            driver.publish()
            (chain,) = queue.chains(large)
            assert chain.readable_length == 1 << 15
            queue.add_used(large, 0, 0)
            assert driver.load16(driver.device_area + 2) == turn
    assert queue.ready


@both
def test_publishing_a_batch_is_seen_at_once(
    memory: GuestMemory, kind: type[SplitDriver | PackedDriver]
) -> None:
    """Nothing of an unpublished batch is visible, all of a published one is."""
    driver, queue = _pair(kind, memory)
    for _ in range(3):
        driver.add([b"a", b"b"], publish=False)
    assert list(queue.chains(memory)) == []
    driver.publish()
    assert len(list(queue.chains(memory))) == 3


def test_drivers_have_one_interface() -> None:
    """Both ring drivers are drivers."""
    assert all(issubclass(kind, Driver) for kind in KINDS)


@both
def test_chains_are_served_as_they_come_those_in_flight_first(
    kind: type[SplitDriver | PackedDriver], memory: GuestMemory
) -> None:
    """At most a ring's worth in a call; more than that is told of, for nobody kicks for it."""
    driver, queue = _pair(kind, memory, size=8)
    for n in range(3):
        driver.add([bytes([n])], [1])
    assert queue.pop(memory) is not None
    served: list[bytes] = []

    def answer(chain: DescriptorChain) -> int:
        served.append(chain.reader(memory).read(1))
        if len(served) > 1:  # the driver is as fast
            driver.reap()
            driver.add([bytes([len(served) + 1])], [1])
        return 1

    assert queue.serve(memory, answer)
    assert served == [bytes([n]) for n in range(9)]
    assert queue.in_flight == ()
