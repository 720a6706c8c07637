"""Each rule of sections 2.7 and 2.8 that a driver can break, by name, and what must hold then.

Every case runs on the C walker and on the plain-Python model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from virtio_queue import ChainError, Queue
from virtio_queue.constants import (
    DESC_F_AVAIL,
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_USED,
    DESC_F_WRITE,
    F_INDIRECT_DESC,
)
from virtio_queue.testing import PackedDriver, SplitDriver
from virtio_queue.testing.model import ModelQueue

if TYPE_CHECKING:
    from vm_memory import GuestMemory

AnyQueue = Queue | ModelQueue
SIZE = 8
DATA = 0x2_0000
TABLE = 0x3_0001  # unaligned: an indirect table is data
NEXT, WRITE, INDIRECT = DESC_F_NEXT, DESC_F_WRITE, DESC_F_INDIRECT

queues = pytest.mark.parametrize("kind", [Queue, ModelQueue])


def _split(
    memory: GuestMemory, kind: type[AnyQueue], features: int = F_INDIRECT_DESC
) -> tuple[SplitDriver, AnyQueue]:
    driver = SplitDriver(memory, SIZE, features=features)
    queue = kind(SIZE)
    queue.set_features(features)
    queue.set_descriptor_area(driver.descriptor_area)
    queue.set_driver_area(driver.driver_area)
    queue.set_device_area(driver.device_area)
    queue.enable(memory)
    return driver, queue


def _packed(
    memory: GuestMemory, kind: type[AnyQueue], features: int = F_INDIRECT_DESC
) -> tuple[PackedDriver, AnyQueue]:
    driver = PackedDriver(memory, SIZE, features=features)
    queue = kind(SIZE)
    queue.set_features(driver.features)
    queue.set_descriptor_area(driver.descriptor_area)
    queue.set_driver_area(driver.driver_area)
    queue.set_device_area(driver.device_area)
    queue.enable(memory)
    return driver, queue


def _refused(
    queue: AnyQueue, memory: GuestMemory, section: str, descriptor: int | None, value: int
) -> None:
    """The fault is named, nothing was taken, and asking again says the same."""
    for _ in range(2):
        with pytest.raises(ChainError) as caught:
            queue.pop(memory)
        error = caught.value
        assert (error.section, error.descriptor, error.value) == (section, descriptor, value)
    assert queue.in_flight == ()


def _offer(driver: SplitDriver, *descriptors: tuple[int, int, int, int], head: int = 0) -> None:
    for index, fields in enumerate(descriptors):
        driver.write_descriptor(index, *fields)
    driver.make_available(head)
    driver.publish()


@queues
@pytest.mark.parametrize("jump", [SIZE + 1, 0x8000, 0xFFFF])
def test_2_7_6_1_avail_idx_jumps_or_goes_back(
    memory: GuestMemory, kind: type[AnyQueue], jump: int
) -> None:
    """A driver MUST NOT decrement the available idx; it cannot add more than the ring holds."""
    driver, queue = _split(memory, kind)
    driver.set_avail_idx(jump)
    _refused(queue, memory, "2.7.6.1", None, jump)
    with pytest.raises(ChainError):
        queue.enable_notifications(memory)


@queues
@pytest.mark.parametrize("head", [SIZE, SIZE + 1, 0xFFFF])
def test_2_7_5_head_outside_the_table(memory: GuestMemory, kind: type[AnyQueue], head: int) -> None:
    """A head must be a descriptor of the table."""
    driver, queue = _split(memory, kind)
    _offer(driver, head=head)
    _refused(queue, memory, "2.7.5", head, head)


@queues
def test_2_7_5_next_outside_the_table(memory: GuestMemory, kind: type[AnyQueue]) -> None:
    """A truncated chain never looks like a complete one."""
    driver, queue = _split(memory, kind)
    _offer(driver, (DATA, 1, NEXT, SIZE))
    _refused(queue, memory, "2.7.5", SIZE, SIZE)


@queues
def test_2_7_5_2_loops_are_forbidden(memory: GuestMemory, kind: type[AnyQueue]) -> None:
    """A loop is found after as many steps as the table has entries."""
    driver, queue = _split(memory, kind)
    _offer(driver, (DATA, 1, NEXT, 1), (DATA, 1, NEXT, 0))
    _refused(queue, memory, "2.7.5.2", 0, SIZE + 1)


@queues
def test_a_chain_of_all_descriptors_is_no_loop(memory: GuestMemory, kind: type[AnyQueue]) -> None:
    """2.7.5: the queue size is the maximum possible chain length."""
    driver, queue = _split(memory, kind)
    driver.add([b"x"] * SIZE)
    chain = queue.pop(memory)
    assert chain is not None
    assert (len(chain.readable), chain.slots) == (SIZE, SIZE)


@queues
def test_2_7_5_2_chain_longer_than_2_32_bytes(memory: GuestMemory, kind: type[AnyQueue]) -> None:
    """Drivers MUST NOT add a descriptor chain longer than 2**32 bytes in total."""
    driver, queue = _split(memory, kind)
    _offer(driver, (0, 1 << 20, NEXT, 1), (0, 0xFFFF_FFFF, 0, 0))
    _refused(queue, memory, "2.7.5.2", 1, (1 << 20) + 0xFFFF_FFFF)


@queues
@pytest.mark.parametrize(
    "address", [1 << 20, (1 << 20) - 15, (1 << 30) - 1, (1 << 30) + (1 << 20) - 15, 1 << 63]
)
def test_2_7_5_buffer_outside_memory(
    memory: GuestMemory, kind: type[AnyQueue], address: int
) -> None:
    """CVE-2019-18960: a buffer that passes the end of a region is split or refused, never used."""
    driver, queue = _split(memory, kind)
    _offer(driver, (address, 16, 0, 0))
    _refused(queue, memory, "2.7.5", 0, address)


@queues
def test_2_7_5_address_and_length_overflow(memory: GuestMemory, kind: type[AnyQueue]) -> None:
    """Address + length past 2**64 does not wrap to the start of memory."""
    driver, queue = _split(memory, kind)
    _offer(driver, ((1 << 64) - 8, 16, 0, 0))
    _refused(queue, memory, "2.7.5", 0, (1 << 64) - 8)


@queues
def test_2_7_4_2_writable_elements_come_last(memory: GuestMemory, kind: type[AnyQueue]) -> None:
    """The driver MUST place any device-writable element after any device-readable one."""
    driver, queue = _split(memory, kind)
    _offer(driver, (DATA, 1, NEXT | WRITE, 1), (DATA, 1, 0, 0))
    _refused(queue, memory, "2.7.4.2", 1, DATA)


@queues
def test_2_7_13_1_head_in_flight_twice(memory: GuestMemory, kind: type[AnyQueue]) -> None:
    """CVE-2026-45782: a head is refused while the device still works on it."""
    driver, queue = _split(memory, kind)
    _offer(driver, (DATA, 1, 0, 0))
    chain = queue.pop(memory)
    assert chain is not None
    driver.make_available(0)
    driver.publish()
    for _ in range(2):
        with pytest.raises(ChainError) as caught:
            queue.pop(memory)
        assert caught.value.section == "2.7.13.1"
    assert queue.in_flight == (chain,)
    queue.add_used(memory, 0, 0)
    assert queue.pop(memory) == chain


@queues
def test_cve_2016_5403_in_flight_is_bounded(memory: GuestMemory, kind: type[AnyQueue]) -> None:
    """However often heads are offered, no more than the queue's size are in flight."""
    driver, queue = _split(memory, kind)
    for index in range(SIZE):
        driver.write_descriptor(index, DATA, 1)
    taken = 0
    for turn in range(4 * SIZE):
        driver.make_available(turn % SIZE)
        driver.publish()
        try:
            taken += queue.pop(memory) is not None
        except ChainError:
            break
    assert taken == len(queue.in_flight) == SIZE


@queues
def test_2_7_5_3_1_indirect_needs_its_feature(memory: GuestMemory, kind: type[AnyQueue]) -> None:
    """The driver MUST NOT set INDIRECT unless VIRTIO_F_INDIRECT_DESC was negotiated."""
    driver, queue = _split(memory, kind, features=0)
    _offer(driver, (TABLE, 16, INDIRECT, 0))
    _refused(queue, memory, "2.7.5.3.1", 0, INDIRECT)


@queues
def test_2_7_5_3_1_indirect_and_next(memory: GuestMemory, kind: type[AnyQueue]) -> None:
    """A driver MUST NOT set both INDIRECT and NEXT."""
    driver, queue = _split(memory, kind)
    _offer(driver, (TABLE, 16, INDIRECT | NEXT, 1))
    _refused(queue, memory, "2.7.5.3.1", 0, INDIRECT | NEXT)


@queues
def test_2_7_5_3_1_indirect_inside_indirect(memory: GuestMemory, kind: type[AnyQueue]) -> None:
    """Only one table per descriptor."""
    driver, queue = _split(memory, kind)
    driver.write_descriptor(0, TABLE, 16, INDIRECT, table=TABLE)
    _offer(driver, (TABLE, 16, INDIRECT, 0))
    _refused(queue, memory, "2.7.5.3.1", 0, INDIRECT)


@queues
@pytest.mark.parametrize("length", [0, 1, 15, 17, 24])
def test_2_7_5_3_odd_table_lengths(memory: GuestMemory, kind: type[AnyQueue], length: int) -> None:
    """A table is len / 16 descriptors: at least one, and nothing left over."""
    driver, queue = _split(memory, kind)
    _offer(driver, (TABLE, length, INDIRECT, 0))
    _refused(queue, memory, "2.7.5.3", 0, length)


@queues
def test_2_7_5_3_table_too_long(memory: GuestMemory, kind: type[AnyQueue]) -> None:
    """The device bounds its work: 1024 descriptors, or the queue's size where that is more."""
    driver, queue = _split(memory, kind)
    _offer(driver, (TABLE, 16 * 1025, INDIRECT, 0))
    _refused(queue, memory, "2.7.5.3", 0, 1025)


@queues
@pytest.mark.parametrize("address", [(1 << 20) - 8, 1 << 40, (1 << 64) - 8])
def test_2_7_5_3_table_outside_memory(
    memory: GuestMemory, kind: type[AnyQueue], address: int
) -> None:
    """A table that is not all memory is refused as a whole."""
    driver, queue = _split(memory, kind)
    _offer(driver, (address, 32, INDIRECT, 0))
    _refused(queue, memory, "2.7.5.3", 0, address)


@queues
@pytest.mark.parametrize("following", [2, 0xFFFF])
def test_2_7_5_3_next_outside_the_indirect_table(
    memory: GuestMemory, kind: type[AnyQueue], following: int
) -> None:
    """`next` of an indirect descriptor indexes its table."""
    driver, queue = _split(memory, kind)
    driver.write_descriptor(0, DATA, 1, NEXT, following, table=TABLE)
    _offer(driver, (TABLE, 32, INDIRECT, 0))
    _refused(queue, memory, "2.7.5.3", following, following)


@queues
def test_2_7_5_3_next_of_the_last_entry(memory: GuestMemory, kind: type[AnyQueue]) -> None:
    """Also the table's last step is checked."""
    driver, queue = _split(memory, kind)
    driver.write_descriptor(0, DATA, 1, NEXT, 1, table=TABLE)
    _offer(driver, (TABLE, 16, INDIRECT, 0))
    _refused(queue, memory, "2.7.5.3", 1, 1)


@queues
def test_2_7_5_2_loop_in_an_indirect_table(memory: GuestMemory, kind: type[AnyQueue]) -> None:
    """A loop in a table is found after as many steps as it has entries."""
    driver, queue = _split(memory, kind)
    driver.write_descriptor(0, DATA, 1, NEXT, 1, table=TABLE)
    driver.write_descriptor(1, DATA, 1, NEXT, 0, table=TABLE)
    _offer(driver, (TABLE, 32, INDIRECT, 0))
    _refused(queue, memory, "2.7.5.2", 0, 2)


@queues
def test_2_7_5_3_2_write_flag_of_an_indirect_descriptor_is_ignored(
    memory: GuestMemory, kind: type[AnyQueue]
) -> None:
    """The device MUST ignore the write-only flag of a descriptor that refers to a table."""
    driver, queue = _split(memory, kind)
    driver.write_descriptor(0, DATA, 5, table=TABLE)
    _offer(driver, (TABLE, 16, INDIRECT | WRITE, 0))
    chain = queue.pop(memory)
    assert chain is not None
    assert (chain.readable, chain.writable) == (((DATA, 5),), ())


@queues
def test_2_7_5_3_2_normal_descriptors_before_an_indirect_one(
    memory: GuestMemory, kind: type[AnyQueue]
) -> None:
    """The device MUST handle normal chained descriptors followed by a single indirect one."""
    driver, queue = _split(memory, kind)
    driver.write_descriptor(0, DATA, 1, NEXT, 1, table=TABLE)
    driver.write_descriptor(1, DATA, 2, WRITE, 0, table=TABLE)
    _offer(driver, (DATA, 3, NEXT, 1), (DATA, 4, NEXT, 2), (TABLE, 32, INDIRECT, 0))
    chain = queue.pop(memory)
    assert chain is not None
    assert chain.readable == ((DATA, 3), (DATA, 4), (DATA, 1))
    assert (chain.writable, chain.slots) == (((DATA, 2),), 3)


@queues
def test_indirect_table_longer_than_the_queue(memory: GuestMemory, kind: type[AnyQueue]) -> None:
    """2.7.4.1: Linux makes such tables on small queues; up to 1024 they are taken."""
    driver, queue = _split(memory, kind)
    for index in range(1024):
        more = NEXT if index < 1023 else 0
        driver.write_descriptor(index, DATA, 1, more, index + 1 if more else 0, table=TABLE)
    _offer(driver, (TABLE, 16 * 1024, INDIRECT, 0))
    chain = queue.pop(memory)
    assert chain is not None
    assert chain.readable_length == 1024


@queues
def test_zero_lengths_are_empty_elements(memory: GuestMemory, kind: type[AnyQueue]) -> None:
    """An element of no bytes reaches nothing, wherever it points."""
    driver, queue = _split(memory, kind)
    _offer(driver, (1 << 63, 0, NEXT, 1), (DATA, 0, NEXT | WRITE, 2), (DATA, 1, WRITE, 0))
    chain = queue.pop(memory)
    assert chain is not None
    assert (chain.readable_length, chain.writable_length) == (0, 1)
    assert chain.reader(memory).read(10) == b""
    assert chain.writer(memory).write(b"xy") == 1


@queues
def test_reserved_flags_are_ignored(memory: GuestMemory, kind: type[AnyQueue]) -> None:
    """Bits without a meaning in a split descriptor change nothing."""
    driver, queue = _split(memory, kind)
    _offer(driver, (DATA, 1, 0xFFF8, 0))
    assert queue.pop(memory) is not None


def _lay(driver: PackedDriver, *descriptors: tuple[int, int, int, int]) -> None:
    for offset in reversed(range(len(descriptors))):
        address, length, buffer_id, flags = descriptors[offset]
        driver.write_descriptor(offset, address, length, buffer_id, flags ^ DESC_F_AVAIL)


@queues
def test_2_8_1_only_a_changed_avail_bit_makes_available(
    memory: GuestMemory, kind: type[AnyQueue]
) -> None:
    """2.8.15: a descriptor with equal AVAIL and USED bits is not the device's."""
    driver, queue = _packed(memory, kind)
    for flags in (DESC_F_AVAIL, DESC_F_USED, DESC_F_AVAIL | DESC_F_USED ^ DESC_F_AVAIL):
        _lay(driver, (DATA, 1, 0, flags))
        assert queue.pop(memory) is None
    _lay(driver, (DATA, 1, 0, 0))
    assert queue.pop(memory) is not None


@queues
def test_2_8_17_list_published_before_it_is_whole(
    memory: GuestMemory, kind: type[AnyQueue]
) -> None:
    """A driver MUST NOT make the first descriptor available before all subsequent ones."""
    driver, queue = _packed(memory, kind)
    _lay(driver, (DATA, 1, 0, NEXT))
    _refused(queue, memory, "2.8.17", 1, 0)


@queues
def test_2_8_17_list_longer_than_the_queue(memory: GuestMemory, kind: type[AnyQueue]) -> None:
    """All of the ring linked by NEXT comes around to its own first descriptor."""
    driver, queue = _packed(memory, kind)
    _lay(driver, *[(DATA, 1, 0, NEXT)] * SIZE)
    _refused(queue, memory, "2.8.17", 0, SIZE + 1)


@queues
def test_2_8_17_more_in_flight_than_places(memory: GuestMemory, kind: type[AnyQueue]) -> None:
    """A driver cannot make descriptors available where unused ones still lie."""
    driver, queue = _packed(memory, kind)
    for _ in range(SIZE):
        driver.add([b"x"])
    assert len(list(queue.chains(memory))) == SIZE
    driver.write_descriptor(0, DATA, 1, 100, DESC_F_USED)
    with pytest.raises(ChainError) as caught:
        queue.pop(memory)
    assert (caught.value.section, caught.value.value) == ("2.8.17", SIZE + 1)


@queues
def test_2_8_21_buffer_id_in_flight_twice(memory: GuestMemory, kind: type[AnyQueue]) -> None:
    """A buffer ID names one buffer until it is used."""
    driver, queue = _packed(memory, kind)
    _lay(driver, (DATA, 1, 5, 0), (DATA, 1, 5, 0))
    assert queue.pop(memory) is not None
    with pytest.raises(ChainError) as caught:
        queue.pop(memory)
    assert (caught.value.section, caught.value.value) == ("2.8.21.1", 5)


@queues
@pytest.mark.parametrize(("flags", "features"), [(INDIRECT, 0), (INDIRECT | NEXT, F_INDIRECT_DESC)])
def test_2_8_19_indirect_needs_its_feature_and_stands_alone(
    memory: GuestMemory, kind: type[AnyQueue], flags: int, features: int
) -> None:
    """INDIRECT only when negotiated, and never in a list linked by NEXT."""
    driver, queue = _packed(memory, kind, features=features)
    _lay(driver, (TABLE, 16, 0, flags))
    _refused(queue, memory, "2.8.19", 0, flags | DESC_F_AVAIL)


@queues
def test_2_8_19_indirect_at_the_end_of_a_list(memory: GuestMemory, kind: type[AnyQueue]) -> None:
    """Each list only contains descriptors of a given type (2.8.5)."""
    driver, queue = _packed(memory, kind)
    _lay(driver, (DATA, 1, 0, NEXT), (TABLE, 16, 0, INDIRECT))
    _refused(queue, memory, "2.8.19", 1, INDIRECT | DESC_F_AVAIL)


@queues
def test_2_8_7_flags_in_an_indirect_table_are_ignored(
    memory: GuestMemory, kind: type[AnyQueue]
) -> None:
    """WRITE is the only valid flag in a table; others and the buffer ID are ignored."""
    driver, queue = _packed(memory, kind)
    driver.write(TABLE, DATA.to_bytes(8, "little") + b"\x03\0\0\0" + b"\xee\xee" + b"\xfd\xff")
    _lay(driver, (TABLE, 16, 9, INDIRECT | WRITE))
    chain = queue.pop(memory)
    assert chain is not None
    assert (chain.head, chain.readable, chain.writable) == (9, ((DATA, 3),), ())


@queues
def test_2_8_17_writable_elements_come_last(memory: GuestMemory, kind: type[AnyQueue]) -> None:
    """The packed format has the order rule of 2.7.4.2 too."""
    driver, queue = _packed(memory, kind)
    _lay(driver, (DATA, 1, 0, NEXT | WRITE), (DATA, 1, 0, 0))
    _refused(queue, memory, "2.8.17", 1, DATA)


@queues
def test_a_chain_is_read_once(memory: GuestMemory, kind: type[AnyQueue]) -> None:
    """Double fetch: what the guest rewrites after the chain was taken changes nothing."""
    driver, queue = _split(memory, kind)
    driver.write(DATA, b"checked!")
    _offer(driver, (DATA, 8, 0, 0))
    chain = queue.pop(memory)
    assert chain is not None
    reader = chain.reader(memory)
    header = reader.read_exact(8)
    driver.write_descriptor(0, 1 << 63, 0xFFFF_FFFF)
    driver.write(DATA, b"changed!")
    assert (chain.readable, header) == (((DATA, 8),), b"checked!")
    assert reader.read(8) == b""
