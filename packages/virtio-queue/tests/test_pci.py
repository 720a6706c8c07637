"""The virtio-pci structures over a small device, driven as Linux does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from attrs import evolve

from virtio_queue import PciTransport, StateError, VirtioDevice
from virtio_queue.constants import (
    DEFAULT_QUEUE_FEATURES,
    F_NOTIFICATION_DATA,
    F_RING_PACKED,
    F_RING_RESET,
    F_VERSION_1,
)
from virtio_queue.pci import (
    DEVICE_OFFSET,
    ISR_OFFSET,
    NO_VECTOR,
    NOTIFY_OFFSET,
    WINDOW_SIZE,
)
from virtio_queue.testing import ALL_QUEUE_FEATURES, Echo, PciDriver

if TYPE_CHECKING:
    from vm_memory import GuestMemory

ALL = ALL_QUEUE_FEATURES


class Bench:
    """A device in a PCI window, a driver, and what they told each other."""

    def __init__(self, memory: GuestMemory, *, msix: bool = True) -> None:
        self.model = Echo(memory)
        self.msix = msix
        self.kicks: list[int] = []
        self.messages: list[int] = []
        self.levels: list[bool] = []
        self.device = VirtioDevice(self.model, memory, lambda: None)
        self.transport = PciTransport(
            self.device,
            self.kicks.append,
            vectors=3,
            msix_enabled=lambda: self.msix,
            signal=self.messages.append,
            intx=self.levels.append,
        )
        self.driver = PciDriver(self.transport, queue_vectors=(1, 2), config_vector=0)

    def talk(self, text: bytes, index: int = 0) -> bytes:
        """Send one request and return the answer."""
        self.driver.queues[index].add([text], [len(text)])
        self.driver.kick(index)
        assert self.kicks.pop() == index
        assert self.device.process(index)
        (used,) = self.driver.queues[index].reap()
        return used.data


@pytest.fixture
def bench(memory: GuestMemory) -> Bench:
    """A device that offers everything, MSI-X enabled."""
    return Bench(memory)


@pytest.mark.parametrize(
    "wanted",
    [
        F_VERSION_1,
        DEFAULT_QUEUE_FEATURES,
        DEFAULT_QUEUE_FEATURES | F_RING_PACKED | F_NOTIFICATION_DATA,
        ALL,
    ],
)
def test_a_correct_driver_brings_the_device_up(bench: Bench, wanted: int) -> None:
    """Every set of queue features works, with one vector a queue and one for the configuration."""
    for _ in range(2):
        bench.driver.start(wanted)
        assert bench.talk(b"hello") == b"HELLO"
        assert bench.talk(b"world", 1) == b"WORLD"
        bench.device.config_changed()
        assert bench.messages == [1, 2, 0]
        bench.messages.clear()
        bench.driver = PciDriver(bench.transport, queue_vectors=(1, 2), config_vector=0)
    assert bench.device.refused == 0


def test_4_1_4_5_1_intx_follows_the_isr(memory: GuestMemory) -> None:
    """Without MSI-X the line is raised with a bit and lowered by reading the ISR, which clears."""
    bench = Bench(memory, msix=False)
    bench.driver.start()
    bench.levels.clear()
    bench.talk(b"x")
    assert bench.levels == [True]
    assert bench.driver.read_isr() == 1
    assert bench.levels == [True, False]
    bench.device.config_changed()
    assert bench.driver.read_isr() == 2
    assert bench.driver.read_isr() == 0
    assert bench.messages == []


def test_intx_is_not_lost_to_a_race(memory: GuestMemory) -> None:
    """A bit set between reading the ISR and lowering the line raises it again."""
    bench = Bench(memory, msix=False)
    bench.driver.start()
    bench.device.used_buffer_notification()
    take = bench.device.take_interrupt_status

    def racing() -> int:
        status = take()
        bench.device.used_buffer_notification()
        return status

    bench.device.take_interrupt_status = racing  # type: ignore[method-assign]
    bench.levels.clear()
    assert bench.driver.read_isr() == 1
    assert bench.levels == [True, False, True]


def test_no_vector_means_no_interrupt(bench: Bench) -> None:
    """4.1.5.1.2: sources without a vector stay silent."""
    bench.driver = PciDriver(bench.transport)
    bench.driver.start()
    assert bench.talk(b"x") == b"X"
    bench.device.config_changed()
    assert bench.messages == []


@pytest.mark.parametrize("vector", [3, 4, 0x7FFF, 0xFFFE, 0xFFFF])
def test_vectors_out_of_the_table(bench: Bench, vector: int) -> None:
    """4.1.5.1.2: a vector that cannot be mapped reads back as NO_VECTOR and sends nothing."""
    bench.driver.start()
    bench.driver.set(0x16, 2, 0)
    bench.driver.set(0x1A, 2, vector)
    bench.driver.set(0x10, 2, vector)
    assert bench.driver.get(0x1A, 2) == NO_VECTOR
    assert bench.driver.get(0x10, 2) == NO_VECTOR
    bench.talk(b"x")
    bench.device.config_changed()
    assert bench.messages == []


@pytest.mark.parametrize("selector", [2, 0x7FFF, 0xFFFF])
def test_queue_select_out_of_range(bench: Bench, selector: int) -> None:
    """queue_select 0xffff: its fields read as an absent queue's and take nothing."""
    bench.driver.negotiate(ALL)
    bench.driver.set(0x16, 2, selector)
    before = bench.device.save()
    for field, width in ((0x18, 2), (0x1A, 2), (0x1C, 2), (0x20, 4), (0x24, 4), (0x3A, 2)):
        bench.driver.set(field, width, 1)
        assert bench.driver.get(field, width) == (NO_VECTOR if field == 0x1A else 0)
    assert bench.driver.get(0x1E, 2) == bench.driver.get(0x38, 2) == 0
    assert bench.device.save() == before


def test_cve_2026_5747_configuration_after_activation(bench: Bench) -> None:
    """Eight fields poisoned after DRIVER_OK: nothing changes and the queue still works."""
    bench.driver.start(ALL)
    bench.driver.set(0x16, 2, 0)
    before = bench.device.save()
    for field in (0x18, 0x20, 0x24, 0x28, 0x2C, 0x30, 0x34):
        width = 2 if field == 0x18 else 4
        for value in (0, 1, 3, 0xFFFF):
            bench.driver.set(field, width, value)
    bench.driver.set(0x1C, 2, 0)
    bench.driver.set(0x1C, 2, 1)
    assert bench.device.save() == before
    assert bench.talk(b"still here") == b"STILL HERE"


def test_odd_accesses_do_nothing(bench: Bench) -> None:
    """Widths 1, 2, 3, 8, misaligned and cross-field: zeros are read, nothing is written."""
    bench.driver.start()
    before = (bench.device.save(), bench.transport.save())
    widths = {0x14: 1, 0x15: 1}
    for offset in range(-4, 0x48):
        for length in (0, 1, 2, 3, 4, 5, 8, 16):
            natural = widths.get(offset) or (4 if offset < 0x10 or 0x20 <= offset < 0x38 else 2)
            if length == natural and offset % natural == 0 and offset >= 0 and offset < 0x40:
                continue
            assert bench.transport.read(offset, length) == bytes(length)
            bench.transport.write(offset, b"\xff" * length)
    assert (bench.device.save(), bench.transport.save()) == before


def test_gaps_of_the_window(bench: Bench) -> None:
    """Between the structures there is nothing."""
    bench.driver.start()
    for offset in (0x40, 0xFFC, ISR_OFFSET + 1, DEVICE_OFFSET - 4, WINDOW_SIZE, WINDOW_SIZE + 64):
        assert bench.transport.read(offset, 4) == bytes(4)
        bench.transport.write(offset, b"\xff" * 4)
    assert bench.transport.read(NOTIFY_OFFSET, 4) == bytes(4)
    assert bench.transport.read(ISR_OFFSET, 0) == b""
    assert bench.kicks == []


@pytest.mark.parametrize(
    ("offset", "data"),
    [
        (8, b"\x02\0"),
        (0xFFC, b"\xff\x03"),
        (1, b"\0\0"),
        (0, b"\1\0"),
        (4, b"\0\0"),
        (0, b"\0"),
        (0, b"\0\0\0"),
        (0, b"\0" * 8),
        (0, b""),
    ],
)
def test_kicks_that_name_no_queue(bench: Bench, offset: int, data: bytes) -> None:
    """A wrong place, a wrong number or a wrong width reaches nobody."""
    bench.driver.start(ALL & ~F_NOTIFICATION_DATA)
    bench.transport.write(NOTIFY_OFFSET + offset, data)
    assert bench.kicks == []


def test_read_only_fields(bench: Bench) -> None:
    """device_feature, num_queues, config_generation and queue_notify_off cannot be written."""
    bench.driver.start()
    for field, width in ((0x04, 4), (0x12, 2), (0x15, 1), (0x1E, 2), (0x38, 2), (0x3C, 2)):
        value = bench.driver.get(field, width)
        bench.driver.set(field, width, 0x55)
        assert bench.driver.get(field, width) == value
    assert bench.driver.get(0x12, 2) == 2


def test_driver_features_read_back(bench: Bench) -> None:
    """4.1.4.3.1: the device presents the bits the driver has written; other pages are 0."""
    bench.driver.negotiate(ALL)
    for page, word in ((0, ALL & 0xFFFFFFFF), (1, ALL >> 32), (2, 0), (0xFFFFFFFF, 0)):
        bench.driver.set(0x08, 4, page)
        assert bench.driver.get(0x0C, 4) == word
        bench.driver.set(0x00, 4, page)
        assert bench.driver.get(0x04, 4) == word
        assert bench.driver.get(0x00, 4) == bench.driver.get(0x08, 4) == page


def test_addresses_read_back_in_halves(bench: Bench) -> None:
    """queue_desc, queue_driver and queue_device are readable, as two 32-bit parts."""
    bench.driver.start(F_VERSION_1)
    bench.driver.set(0x16, 2, 1)
    assert bench.driver.get(0x16, 2) == 1
    ring = bench.driver.queues[1]
    for field, area in ((0x20, ring.descriptor_area), (0x28, ring.driver_area)):
        assert bench.driver.get(field, 4) | bench.driver.get(field + 4, 4) << 32 == area


def test_4_1_4_3_1_config_generation_never_comes_around(bench: Bench) -> None:
    """256 changes between two looks of the driver still show, although the field has 8 bits."""
    bench.driver.start()
    before = bench.driver.get(0x15, 1)
    for _ in range(256):
        bench.device.config_changed()
    assert bench.driver.get(0x15, 1) != before


def test_ring_reset(bench: Bench) -> None:
    """4.1.4.3.1: queue_reset resets one queue, which may come back with another size."""
    bench.driver.start(ALL & ~F_RING_PACKED)
    bench.driver.set(0x16, 2, 0)
    bench.driver.set(0x3A, 2, 1)
    assert bench.driver.get(0x3A, 2) == bench.driver.get(0x1C, 2) == 0
    assert bench.driver.set_up_queue(0, 2)
    assert bench.talk(b"again") == b"AGAIN"
    assert bench.talk(b"other", 1) == b"OTHER"
    bench.driver.start(ALL & ~F_RING_RESET)
    bench.driver.set(0x16, 2, 0)
    bench.driver.set(0x3A, 2, 1)
    assert bench.talk(b"x") == b"X"


def test_reset_clears_selectors_and_vectors(bench: Bench) -> None:
    """4.1.5.1.2: after a reset every vector reads NO_VECTOR."""
    bench.driver.start()
    bench.driver.write_status(0)
    assert bench.driver.get(0x10, 2) == NO_VECTOR
    assert bench.driver.get(0x16, 2) == 0
    assert bench.driver.get(0x1A, 2) == NO_VECTOR
    assert bench.levels[-1] is False


def test_device_configuration(bench: Bench) -> None:
    """The device-specific structure takes any width, zeros past its end."""
    bench.driver.start()
    assert bench.transport.read(DEVICE_OFFSET + 2, 3) == b"234"
    assert bench.transport.read(DEVICE_OFFSET + 14, 4) == b"ef\0\0"
    bench.transport.write(DEVICE_OFFSET, b"Z")
    assert bench.transport.read(DEVICE_OFFSET, 1) == b"Z"


def test_capabilities_point_into_the_window(bench: Bench) -> None:
    """4.1.4: common, notification, ISR and device capabilities, each complete in itself."""
    kinds = {}
    for capability in bench.transport.capabilities(4):
        assert (capability[0], capability[2], capability[4]) == (9, len(capability), 4)
        offset = int.from_bytes(capability[8:12], "little")
        length = int.from_bytes(capability[12:16], "little")
        assert offset + length <= WINDOW_SIZE
        kinds[capability[3]] = (offset, length)
    assert sorted(kinds) == [1, 2, 3, 4]
    assert kinds[2] == (NOTIFY_OFFSET, 8)


def test_4_1_4_7_shared_memory_capabilities(bench: Bench) -> None:
    """A region is named by its id; offset and length have 64 bits, the upper halves apart."""
    places = {3: (2, 0x1_0000_2000, 0x5_0000_1000), 0: (4, 0, 1 << 20)}
    former, regions = bench.transport.capabilities(0), []
    for data in bench.transport.capabilities(0, places)[len(former) :]:
        assert (data[0], data[2], data[3]) == (0x09, len(data), 8)
        words = [int.from_bytes(data[at : at + 4], "little") for at in (8, 12, 16, 20)]
        regions.append((data[5], (data[4], words[0] | words[2] << 32, words[1] | words[3] << 32)))
    assert dict(regions) == places
    assert len(regions) == 2


def test_saved_and_restored(bench: Bench, memory: GuestMemory) -> None:
    """A restored device goes on with its vectors; pending interrupts are sent again."""
    bench.driver.start()
    bench.device.used_buffer_notification(1)
    new = Bench(memory)
    new.transport.restore(bench.transport.save())
    new.device.restore(bench.device.save())
    assert sorted(new.messages) == [1, 2]
    assert new.transport.save() == bench.transport.save()
    new.driver.queues = bench.driver.queues
    new.driver.features = bench.driver.features
    assert new.talk(b"moved") == b"MOVED"


def test_hostile_states_are_refused(bench: Bench) -> None:
    """CVE class of hostile snapshots: vectors outside the table, fields too wide, other counts."""
    bench.driver.start()
    good = bench.transport.save()
    for bad in (
        evolve(good, version=2),
        evolve(good, device_feature_select=-1),
        evolve(good, driver_feature_select=1 << 32),
        evolve(good, queue_select=1 << 16),
        evolve(good, config_msix_vector=3),
        evolve(good, queue_msix_vectors=(1, 3)),
        evolve(good, queue_msix_vectors=(1,)),
    ):
        with pytest.raises(StateError):
            bench.transport.restore(bad)
    assert bench.transport.save() == good
