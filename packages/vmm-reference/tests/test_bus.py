from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm_reference.bus import Bus, OverlapError


class Recorder:
    """A device that answers with its number and keeps what it was asked."""

    def __init__(self, number: int = 0) -> None:
        self.number = number
        self.seen: list[tuple[int, bytes | int]] = []

    def read(self, offset: int, length: int) -> bytes:
        self.seen.append((offset, length))
        return bytes([self.number]) * length

    def write(self, offset: int, data: bytes) -> None:
        self.seen.append((offset, data))


def test_device_sees_the_offset_within_its_range() -> None:
    """An access reaches the device that holds the address, as an offset from its start."""
    bus, device = Bus(0x10000), Recorder(7)
    bus.add(0x3F8, 8, device)
    assert bus.read(0x3FD, 1) == b"\x07"
    bus.write(0x3F8, b"a")
    assert device.seen == [(5, 1), (0, b"a")]
    assert (bus.unclaimed_reads, bus.unclaimed_writes) == (0, 0)


def test_two_ranges_of_one_device_share_offsets_and_lock() -> None:
    """A device with its registers in two places sees both, and is entered under one lock."""
    bus, device = Bus(0x10000), Recorder()
    bus.add(0x60, 1, device)
    bus.add(0x64, 1, device, offset=4)
    bus.write(0x64, b"\xfe")
    assert device.seen == [(4, b"\xfe")]
    bus.remove(0x60)
    assert bus.lock(device) is not None


@pytest.mark.parametrize("start", [0x0FF8, 0x1000, 0x1004, 0x1007])
def test_overlap_is_refused(start: int) -> None:
    """A range that meets another is refused, names both, and changes nothing."""
    bus, device = Bus(), Recorder()
    bus.add(0x1000, 8, device)
    with pytest.raises(OverlapError, match=r"meets 0x1000\.\.0x1007 of Recorder") as caught:
        bus.add(start, 9, Recorder())
    assert (caught.value.start, caught.value.size) == (start, 9)
    assert list(bus) == [(0x1000, 8, device)]


@pytest.mark.parametrize(("start", "size"), [(-1, 2), (0xFFFF, 2), (0x10000, 1), (5, 0), (5, -1)])
def test_range_outside_the_bus_is_refused(start: int, size: int) -> None:
    """A range that is empty or leaves the address space can't be claimed."""
    with pytest.raises(OverlapError):
        Bus(0x10000).add(start, size, Recorder())


@pytest.mark.parametrize("length", [1, 2, 3, 4, 8, 4096])
def test_nobody_answers_with_all_ones(length: int) -> None:
    """An unclaimed read gives all ones in its width, an unclaimed write vanishes; both count."""
    bus = Bus()
    assert bus.read(0xFEED0000, length) == b"\xff" * length
    bus.write(0xFEED0000, bytes(length))
    assert (bus.unclaimed_reads, bus.unclaimed_writes) == (1, 1)


def test_access_across_the_end_of_a_range_reaches_nobody() -> None:
    """An access that begins in one range and ends in its neighbour is given to neither."""
    bus, low, high = Bus(), Recorder(), Recorder()
    bus.add(0, 4, low)
    bus.add(4, 4, high)
    assert bus.read(2, 4) == b"\xff" * 4
    bus.write(3, b"xy")
    assert low.seen == high.seen == []
    assert (bus.unclaimed_reads, bus.unclaimed_writes) == (1, 1)


def test_access_at_the_top_of_the_space_does_not_wrap() -> None:
    """Address plus length beyond the last address does not come round to address 0."""
    bus, device = Bus(), Recorder()
    bus.add(0, 16, device)
    assert bus.read((1 << 64) - 2, 8) == b"\xff" * 8
    assert device.seen == []


def test_removed_range_is_silent_and_free_again() -> None:
    """After `remove` nobody answers there, and another device may take the place."""
    bus = Bus()
    bus.add(8, 8, Recorder(1))
    bus.remove(8)
    assert bus.read(8, 1) == b"\xff"
    bus.add(4, 8, Recorder(2))
    assert bus.read(8, 1) == b"\x02"
    with pytest.raises(KeyError, match="0x8"):
        bus.remove(8)
    with pytest.raises(KeyError, match="Recorder"):
        bus.lock(Recorder())


def test_device_is_entered_by_one_thread_at_a_time() -> None:
    """While somebody holds a device's lock, an access of a vCPU waits."""
    bus, device = Bus(), Recorder()
    bus.add(0, 1, device)
    thread = threading.Thread(target=bus.read, args=(0, 1))
    with bus.lock(device):
        thread.start()
        thread.join(0.05)
        assert thread.is_alive()
        assert device.seen == []
    thread.join(10)
    assert device.seen == [(0, 1)]


ranges = st.lists(st.tuples(st.integers(0, 250), st.integers(1, 40)), max_size=12)
accesses = st.lists(st.tuples(st.integers(0, 300), st.sampled_from([1, 2, 4, 8])), max_size=30)


@given(ranges, accesses)
def test_bus_agrees_with_a_table_of_addresses(
    wanted: list[tuple[int, int]], asked: list[tuple[int, int]]
) -> None:
    """A bus gives the same answers as a table that holds the owner of every single address."""
    bus, owner = Bus(256), dict[int, tuple[int, Recorder]]()
    for number, (start, size) in enumerate(wanted):
        device = Recorder(number)
        fits = start + size <= 256 and not owner.keys() & set(range(start, start + size))
        try:
            bus.add(start, size, device)
        except OverlapError:
            assert not fits
        else:
            assert fits
            owner.update({start + n: (n, device) for n in range(size)})
    unclaimed = 0
    for address, length in asked:
        owners = [owner.get(address + n, (0, None))[1] for n in range(length)]
        found = owners[0] if all(other is owners[0] for other in owners) else None
        if found is None:
            assert bus.read(address, length) == b"\xff" * length
            unclaimed += 1
        else:
            assert bus.read(address, length) == bytes([found.number]) * length
            assert found.seen[-1] == (owner[address][0], length)
    assert bus.unclaimed_reads == unclaimed
