"""The virtio-mmio register file over a small device."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest
from attrs import evolve

from virtio_queue import MmioTransport, StateError, VirtioDevice
from virtio_queue.constants import (
    DEFAULT_QUEUE_FEATURES,
    F_IN_ORDER,
    F_INDIRECT_DESC,
    F_NOTIFICATION_DATA,
    F_RING_PACKED,
    F_RING_RESET,
    F_VERSION_1,
)
from virtio_queue.testing import Echo, MmioDriver

if TYPE_CHECKING:
    from vm_memory import GuestMemory

ALL = DEFAULT_QUEUE_FEATURES | F_RING_PACKED | F_IN_ORDER | F_NOTIFICATION_DATA | F_RING_RESET


class Bench:
    """A device, its registers, a driver, and what they told each other."""

    def __init__(self, memory: GuestMemory, features: int = ALL) -> None:
        self.model = Echo(memory, features)
        self.interrupts = 0
        self.kicks: list[int] = []
        self.device = VirtioDevice(
            self.model, memory, self._interrupt, shared_memory={3: (0x5_0000_1000, 0x1_0000_2000)}
        )
        self.transport = MmioTransport(self.device, self.kicks.append)
        self.driver = MmioDriver(self.transport)

    def _interrupt(self) -> None:
        self.interrupts += 1

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
    """A device that offers everything."""
    return Bench(memory)


@pytest.mark.parametrize(
    "wanted",
    [
        F_VERSION_1,
        DEFAULT_QUEUE_FEATURES,
        DEFAULT_QUEUE_FEATURES | F_RING_PACKED,
        ALL,
        ALL & ~F_RING_PACKED,
    ],
)
def test_a_correct_driver_brings_the_device_up(bench: Bench, wanted: int) -> None:
    """Every set of queue features works from reset to data, twice over a reset."""
    for _ in range(2):
        bench.driver.start(wanted)
        assert bench.device.active
        assert bench.talk(b"hello") == b"HELLO"
        assert bench.talk(b"world", 1) == b"WORLD"
        assert bench.interrupts == 2
        assert bench.driver.acknowledge() == 1
        assert bench.driver.get(0x060) == 0
        bench.interrupts = 0
        bench.driver = MmioDriver(bench.transport)
    assert bench.device.refused == 0


def test_identification_registers(bench: Bench) -> None:
    """4.2.2: magic, version 2, device ID."""
    assert bench.transport.read(0, 4) == b"virt"
    assert bench.driver.get(4) == 2
    assert bench.driver.get(8) == 42


def test_reset_forgets_everything(bench: Bench) -> None:
    """2.4.1, 4.2.2.1: after a reset nothing of the former life is left but the configuration."""
    bench.driver.start()
    bench.talk(b"x")
    bench.driver.set(0x070, 0)
    device = bench.device
    assert (device.status, device.driver_features, device.interrupt_status) == (0, 0, 0)
    assert not device.active
    for queue in device.queues:
        assert (queue.ready, queue.size) == (False, queue.max_size)
        assert queue.descriptor_area == queue.driver_area == queue.device_area == 0
    assert bench.model.log == ["reset", "activate", "reset"]
    assert not device.process(0)


def test_configuration_after_activation_is_refused(bench: Bench) -> None:
    """CVE-2026-5747: size and addresses written after DRIVER_OK change nothing."""
    bench.driver.start()
    before = bench.device.save()
    for register in (0x038, 0x080, 0x084, 0x090, 0x094, 0x0A0, 0x0A4, 0x020):
        for value in (0, 1, 3, 0xFFFFFFFF):
            bench.driver.set(register, value)
    bench.driver.set(0x044, 1)
    assert bench.device.save() == before
    assert bench.device.refused == 8 * 4 + 1
    assert bench.talk(b"still here") == b"STILL HERE"


def test_queue_select_out_of_range(bench: Bench) -> None:
    """queue_sel 0xffff: the queue is absent, and its registers do nothing."""
    bench.driver.negotiate(ALL)
    for selector in (2, 0xFFFF, 0xFFFFFFFF):
        bench.driver.set(0x030, selector)
        assert bench.driver.get(0x034) == 0
        assert bench.driver.get(0x044) == 0
        for register in (0x038, 0x044, 0x080, 0x084, 0x0C0):
            bench.driver.set(register, 1)
        bench.driver.set(0x044, 0)
    assert not any(queue.ready for queue in bench.device.queues)


@pytest.mark.parametrize("value", [2, 3, 0xFFFF, 0xFFFFFFFF, 0x10000])
def test_kick_of_a_queue_that_does_not_exist(bench: Bench, value: int) -> None:
    """CVE-2011-2512: a queue number that is too large or negative reaches nobody."""
    bench.driver.start(ALL & ~F_NOTIFICATION_DATA)
    bench.driver.set(0x050, value)
    assert bench.kicks == []


def test_notification_data_names_the_queue_in_its_low_half(bench: Bench) -> None:
    """2.9: with NOTIFICATION_DATA the value also carries next_off and next_wrap."""
    bench.driver.start(ALL)
    bench.driver.set(0x050, 0x8005_0001)
    assert bench.kicks == [1]


@pytest.mark.parametrize("length", [0, 1, 2, 3, 5, 8, 16])
def test_odd_accesses_do_nothing(bench: Bench, length: int) -> None:
    """4.2.2.2: control registers take 32-bit accesses only; others read zeros and write nothing."""
    bench.driver.start()
    before = bench.device.save()
    for offset in range(0x100):
        assert bench.transport.read(offset, length) == bytes(length)
        bench.transport.write(offset, b"\xff" * length)
    for offset in (1, 2, 3, 0x0FE, -4):
        assert bench.transport.read(offset, 4) == bytes(4)
        bench.transport.write(offset, bytes(4))
    assert bench.device.save() == before


def test_registers_that_cannot_be_read_or_written(bench: Bench) -> None:
    """Undefined and write-only registers read 0, read-only ones do not change."""
    for offset in range(0, 0x100, 4):
        bench.driver.get(offset)
    for offset in (0x014, 0x018, 0x020, 0x050, 0x064, 0x0AC, 0x080):
        assert bench.driver.get(offset) == 0
    for offset in (0x000, 0x004, 0x008, 0x00C, 0x010, 0x034, 0x060, 0x0B0, 0x0FC):
        value = bench.driver.get(offset)
        bench.driver.set(offset, 0x12345678)
        assert bench.driver.get(offset) == value


def test_configuration_space_takes_any_width(bench: Bench) -> None:
    """CVE-2021-45464: reads past the structure give zeros, writes past it do nothing."""
    bench.driver.start()
    assert bench.transport.read(0x100, 8) == b"01234567"
    assert bench.transport.read(0x10E, 8) == b"ef" + bytes(6)
    assert bench.transport.read(0x1FFF, 4) == bytes(4)
    bench.transport.write(0x101, b"X")
    bench.transport.write(0x10F, b"YZ")
    assert bench.transport.read(0x100, 16) == b"0X23456789abcdef"


def test_configuration_is_not_writable_before_driver(bench: Bench) -> None:
    """3.1.1: nothing but identification happens before DRIVER."""
    bench.transport.write(0x100, b"X")
    assert bench.transport.read(0x100, 1) == b"0"


def test_shared_memory_registers(bench: Bench) -> None:
    """4.2.2: base and length of a region; an unknown one has both of -1."""
    bench.driver.set(0x0AC, 3)
    words = [bench.driver.get(register) for register in (0x0B0, 0x0B4, 0x0B8, 0x0BC)]
    assert words == [0x2000, 1, 0x1000, 5]
    bench.driver.set(0x0AC, 4)
    words = [bench.driver.get(register) for register in (0x0B0, 0x0B4, 0x0B8, 0x0BC)]
    assert words == [0xFFFFFFFF] * 4


def test_features_past_the_second_page(bench: Bench) -> None:
    """Feature words that do not exist read 0 and take nothing."""
    bench.driver.negotiate(0xFFFFFFFF_FFFFFFFF)
    bench.driver.set(0x014, 2)
    assert bench.driver.get(0x010) == 0
    bench.driver.set(0x014, 0xFFFFFFFF)
    assert bench.driver.get(0x010) == 0


def test_features_that_were_not_offered_are_refused(memory: GuestMemory) -> None:
    """2.2.2, 3.1.1: FEATURES_OK stays clear when the driver accepts too much, or no VERSION_1."""
    for wanted in (F_VERSION_1 | F_RING_PACKED, 0):
        bench = Bench(memory, F_INDIRECT_DESC)
        bench.driver.add_status(1)
        bench.driver.add_status(2)
        for page in (0, 1):
            bench.driver.set(0x024, page)
            bench.driver.set(0x020, wanted >> 32 * page & 0xFFFFFFFF)
        assert bench.driver.add_status(8) == 3


def test_driver_features_outside_their_time(bench: Bench) -> None:
    """Features written before DRIVER, after FEATURES_OK, or in page 2 have no effect."""
    bench.driver.set(0x020, 0xFFFFFFFF)
    assert bench.device.driver_features == 0
    bench.driver.negotiate(F_VERSION_1)
    bench.driver.set(0x024, 0)
    bench.driver.set(0x020, 0xFFFFFFFF)
    assert bench.device.driver_features == F_VERSION_1


def test_activation_failure_asks_for_a_reset(bench: Bench) -> None:
    """A model that cannot start leaves DEVICE_NEEDS_RESET; the next attempt may succeed."""
    bench.model.fail = "activate"
    bench.driver.negotiate(ALL)
    bench.driver.set_up_queue(0)
    assert bench.driver.add_status(4) & 0x40
    assert bench.interrupts == 1
    assert bench.driver.get(0x060) == 2
    assert not bench.device.active
    assert bench.device.reset_reason == "activation failed: out of tea"
    bench.model.fail = ""
    bench.driver.start()
    assert bench.talk(b"back") == b"BACK"


def test_a_failed_reset_is_visible_and_can_be_repeated(bench: Bench) -> None:
    """Status does not read 0 until a reset has really happened."""
    bench.driver.start()
    bench.model.fail = "reset"
    bench.driver.set(0x070, 0)
    assert bench.driver.status == 0x40
    bench.model.fail = ""
    bench.driver.start()
    assert bench.talk(b"back") == b"BACK"


def test_a_malformed_chain_asks_for_a_reset(bench: Bench) -> None:
    """2.1.2: the driver is told by a configuration interrupt, and nothing is served any more."""
    bench.driver.start(F_VERSION_1)
    ring = bench.driver.queues[0]
    ring.add([b"good"], [4])
    assert ring.driver_area
    ring.store16(ring.driver_area + 2, 100)
    assert not bench.device.process(0)
    assert bench.driver.status & 0x40
    assert bench.driver.get(0x060) & 2
    assert "2.7.6.1" in bench.device.reset_reason
    assert not bench.device.process(0)
    bench.driver.set(0x070, 15)
    assert bench.driver.status & 0x40
    bench.driver.start()
    assert bench.talk(b"back") == b"BACK"


@pytest.mark.parametrize("register", [0x038, 0x080, 0x090, 0x0A0])
def test_a_queue_enabled_with_a_refused_value_needs_a_reset(bench: Bench, register: int) -> None:
    """A driver that believes in a value the device refused is told so, unless it corrects it."""
    bench.driver.negotiate(F_VERSION_1)
    bench.driver.set_up_queue(1)
    bench.driver.set(0x030, 0)
    bench.driver.set(register, 0x11)
    bench.driver.set(0x044, 1)
    assert bench.driver.get(0x044) == 0
    assert bench.driver.status & 0x40
    bench.driver.negotiate(F_VERSION_1)
    bench.driver.set(0x030, 0)
    bench.driver.set(register, 0x11)
    assert bench.driver.set_up_queue(0)


def test_queue_ready_outside_memory_needs_a_reset(bench: Bench) -> None:
    """Rings in the hole or beyond memory do not become ready, and the driver learns of it."""
    bench.driver.negotiate(F_VERSION_1)
    bench.driver.set(0x030, 0)
    bench.driver.set(0x084, 1)
    bench.driver.set(0x044, 1)
    assert bench.driver.get(0x044) == 0
    assert bench.driver.status & 0x40


def test_ring_reset(bench: Bench) -> None:
    """2.6.1: one queue is reset, configured differently and used again, the other goes on."""
    bench.driver.start(ALL & ~F_RING_PACKED)
    assert bench.talk(b"one") == b"ONE"
    bench.driver.set(0x030, 0)
    bench.driver.set(0x0C0, 1)
    assert bench.driver.get(0x0C0) == 0
    assert bench.driver.get(0x044) == 0
    assert bench.talk(b"other", 1) == b"OTHER"
    assert bench.driver.set_up_queue(0, size=2)
    assert bench.device.queues[0].size == 2
    assert bench.talk(b"two") == b"TWO"
    assert bench.model.log[-2:] == ["reset 0", "enable 0"]


def test_ring_reset_needs_its_feature(bench: Bench) -> None:
    """QueueReset without VIRTIO_F_RING_RESET, or with another value than 1, does nothing."""
    bench.driver.start(F_VERSION_1)
    bench.driver.set(0x030, 0)
    bench.driver.set(0x0C0, 1)
    assert bench.talk(b"x") == b"X"
    bench.driver.start(ALL)
    bench.driver.set(0x030, 0)
    bench.driver.set(0x0C0, 2)
    assert bench.talk(b"x") == b"X"


def test_queue_ready_zero_stops_a_queue(bench: Bench) -> None:
    """4.2.2.2: the driver reads QueueReady back; while it is 0 the rings are not touched."""
    bench.driver.start(F_VERSION_1)
    bench.driver.queues[0].add([b"x"], [1])
    bench.driver.set(0x030, 0)
    bench.driver.set(0x044, 0)
    assert bench.driver.get(0x044) == 0
    assert not bench.device.process(0)
    assert bench.driver.queues[0].reap() == []


@pytest.mark.parametrize("value", [2, 3, 0xFFFFFFFF])
def test_queue_ready_is_0_or_1(bench: Bench, value: int) -> None:
    """4.2.2: QueueReady takes one and zero; anything else does nothing."""
    bench.driver.negotiate(F_VERSION_1)
    bench.driver.set(0x030, 0)
    bench.driver.set(0x044, value)
    assert bench.driver.get(0x044) == 0
    assert bench.device.refused == 1


def test_a_ready_queue_is_not_configured_before_driver_ok(bench: Bench) -> None:
    """4.2.3.2: between QueueReady and DRIVER_OK the rings stay where they are, too."""
    bench.driver.negotiate(F_VERSION_1)
    assert bench.driver.set_up_queue(0)
    before = bench.device.save()
    for register in (0x038, 0x080, 0x084, 0x090, 0x094, 0x0A0, 0x0A4):
        bench.driver.set(register, 4)
    bench.driver.set(0x044, 1)
    assert bench.device.save() == before
    assert bench.device.refused == 8


def test_config_generation_changes_with_the_configuration(bench: Bench) -> None:
    """2.5.1: the generation differs before and after a change, and the driver is interrupted."""
    bench.driver.start()
    before = bench.driver.get(0x0FC)
    with bench.device.config_change():
        bench.model.config[0:2] = b"NE"
    assert bench.driver.get(0x0FC) != before
    assert bench.driver.acknowledge() == 2
    assert bench.interrupts == 1


def test_no_interrupt_before_driver_ok(bench: Bench) -> None:
    """2.1.2: before DRIVER_OK changes are seen, not announced; late completions stay silent."""
    bench.driver.negotiate(ALL)
    bench.device.config_changed()
    bench.device.used_buffer_notification()
    assert bench.interrupts == 0
    assert bench.driver.get(0x060) == 0
    assert bench.driver.get(0x0FC) == 1


def test_registers_do_not_wait_for_io(bench: Bench) -> None:
    """Interrupt status, acknowledgement, status and kicks are answered while I/O is in progress."""
    bench.driver.start()
    bench.device.used_buffer_notification()
    busy, done = threading.Event(), threading.Event()

    def io_thread() -> None:
        with bench.device.lock:
            busy.set()
            done.wait(30)

    worker = threading.Thread(target=io_thread)
    worker.start()
    try:
        assert busy.wait(30)
        assert bench.driver.acknowledge() == 1
        assert bench.driver.get(0x060) == 0
        assert bench.driver.status == 15
        bench.driver.set(0x030, 1)
        assert bench.driver.get(0x044) == 1
        assert bench.driver.get(0x0FC) == 0
        bench.driver.kick(1)
        assert bench.kicks == [1]
    finally:
        done.set()
        worker.join(30)


def test_saved_and_restored_in_the_middle(memory: GuestMemory) -> None:
    """A device saved with chains in flight goes on in another one; nothing is lost or doubled."""
    old = Bench(memory)
    old.driver.start()
    old.talk(b"before")
    old.driver.queues[0].add([b"taken"], [5])
    old.driver.queues[0].add([b"waiting"], [7])
    chain = old.device.queues[0].pop(memory)
    old.driver.set(0x030, 1)
    device, transport = old.device.save(), old.transport.save()

    new = Bench(memory)
    new.device.restore(device)
    new.transport.restore(transport)
    assert new.interrupts == 1
    assert new.device.save() == device
    assert new.transport.save() == transport
    assert new.model.log == ["activate"]
    assert new.device.queues[0].in_flight == (chain,)
    (chain,) = new.device.queues[0].in_flight
    writer = chain.writer(memory)
    writer.write(b"TAKEN")
    new.device.queues[0].add_used(memory, chain.head, writer.used_length)
    assert new.device.process(0)
    assert [used.data for used in old.driver.queues[0].reap()] == [b"TAKEN", b"WAITING"]


def test_hostile_device_states_are_refused(bench: Bench, memory: GuestMemory) -> None:
    """A state that no device saves is refused, and the device stays as it was."""
    bench.driver.start()
    good = bench.device.save()
    fresh = Bench(memory).device
    bad = [
        evolve(good, version=2),
        evolve(good, device_id=1),
        evolve(good, device_features=F_VERSION_1),
        evolve(good, driver_features=good.driver_features | 1),
        evolve(good, driver_features=1 << 64),
        evolve(good, status=4),
        evolve(good, status=0x1F),
        evolve(good, status=3),
        evolve(good, status=256),
        evolve(good, interrupt_status=4),
        evolve(good, config_generation=-1),
        evolve(good, queues=good.queues[:1]),
        evolve(good, queues=(good.queues[0], evolve(good.queues[1], size=0))),
        evolve(good, queue_resets=(2,)),
        evolve(good, misconfigured=((0, "size", 0),)),
        evolve(good, misconfigured=((2, "size", 0),)),
    ]
    idle = evolve(good, status=11, queues=tuple(queue.save() for queue in fresh.queues))
    idle = evolve(idle, queues=tuple(evolve(q, features=o.features) for q, o in zip(
        idle.queues, good.queues, strict=True)))  # fmt: skip
    bad += [
        evolve(idle, misconfigured=((0, "features", 0),)),
        evolve(idle, misconfigured=((0, "size", 4),)),
    ]
    for state in bad:
        with pytest.raises(StateError):
            fresh.restore(state)
        assert fresh.status == 0
    with pytest.raises(StateError):
        bench.device.restore(good)
    with pytest.raises(StateError):
        bench.transport.restore(evolve(bench.transport.save(), queue_sel=1 << 32))
    fresh.restore(good)
