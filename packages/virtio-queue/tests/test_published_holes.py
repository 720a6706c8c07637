"""The holes that other monitors had in rings, chains, registers and status, each as a test.

Where registers matter, the test runs over virtio-mmio and over virtio-pci: a check that exists
once cannot be forgotten in one of two transports. What belongs to one kind of device (a disk's
capacity, a network header) is tested with that device.
"""

from __future__ import annotations

import logging
import threading
import tracemalloc
from struct import Struct
from typing import TYPE_CHECKING

import pytest
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from virtio_queue import (
    EndOfChainError,
    GuestError,
    MmioTransport,
    PciTransport,
    Queue,
    StateError,
    VirtioDevice,
)
from virtio_queue.constants import (
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_WRITE,
    F_INDIRECT_DESC,
    F_VERSION_1,
)
from virtio_queue.testing import Echo, MmioDriver, PciDriver, SplitDriver
from vm_memory import GuestAddress, GuestMemory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NEEDS_RESET = 0x40
DATA = 0x2_0000


class Machine:
    """Echo behind either transport, and what its driver may write once it is active."""

    driver: MmioDriver | PciDriver
    transport: MmioTransport | PciTransport

    def __init__(self, memory: GuestMemory, pci: bool) -> None:
        self.memory = memory
        self.pci = pci
        self.model = Echo(memory)
        self.device = VirtioDevice(self.model, memory, lambda: None)
        if pci:
            window = PciTransport(
                self.device, self.device.process, vectors=3, msix_enabled=lambda: True,
                signal=lambda _: None, intx=lambda _: None,
            )  # fmt: skip
            self.transport, self.driver = window, PciDriver(window)
            # queue_size and the three addresses in halves
            self.fields = [(0x18, 2), *((at, 4) for at in range(0x20, 0x38, 4))]
        else:
            registers = MmioTransport(self.device, self.device.process)
            self.transport, self.driver = registers, MmioDriver(registers)
            self.fields = [(at, 4) for at in (0x38, 0x80, 0x84, 0x90, 0x94, 0xA0, 0xA4)]

    def write(self, offset: int, width: int, value: int) -> None:
        """Write a register."""
        self.transport.write(offset, (value & (1 << 8 * width) - 1).to_bytes(width, "little"))

    def select(self, queue: int) -> None:
        """Select a queue."""
        self.write(*((0x16, 2) if self.pci else (0x30, 4)), queue)

    def enable(self, value: int = 1) -> None:
        """Write queue_enable or QueueReady."""
        self.write(*((0x1C, 2) if self.pci else (0x44, 4)), value)

    def talks(self) -> bool:
        """Whether a request is answered."""
        ring = self.driver.queues[0]
        ring.add([b"still here"], [10])
        self.driver.kick(0)
        return [used.data for used in ring.reap()] == [b"STILL HERE"]

    def refused(self, reason: str) -> None:
        """Require that the device asks for a reset, serves nothing, and lives again after one."""
        assert self.device.status & NEEDS_RESET
        assert reason in self.device.reset_reason
        assert not self.device.active
        self.driver.start(F_VERSION_1)
        assert self.talks()


@pytest.fixture(params=["mmio", "pci"])
def machine(request: pytest.FixtureRequest, memory: GuestMemory) -> Machine:
    """A device behind each of the transports."""
    return Machine(memory, request.param == "pci")


@pytest.fixture(scope="module", params=["mmio", "pci"])
def machines(request: pytest.FixtureRequest) -> Iterator[Callable[[], Machine]]:
    """Fresh devices for the examples of a property."""
    with GuestMemory.from_ranges([(GuestAddress(0), 1 << 20)]) as memory:
        yield lambda: Machine(memory, request.param == "pci")


# 1: configuration after activation


@given(data=st.data())
def test_01_cve_2026_5747_queue_registers_after_driver_ok(
    machines: Callable[[], Machine], data: st.DataObject
) -> None:
    """Size and addresses written after DRIVER_OK, in any order and of any value: nothing moves."""
    machine = machines()
    machine.driver.start()
    before = machine.device.save()
    writes = st.tuples(st.sampled_from(machine.fields), st.integers(0, 0xFFFF_FFFF))
    for (offset, width), value in data.draw(st.lists(writes, max_size=12)):
        machine.select(value & 1)
        machine.write(offset, width, value)
        machine.enable()
    assert machine.device.save() == before
    assert machine.talks()


def test_01_cve_2026_5747_a_queue_that_was_never_enabled(machine: Machine) -> None:
    """A queue left out before DRIVER_OK cannot be slipped in afterwards."""
    machine.driver.negotiate(F_VERSION_1)
    assert machine.driver.set_up_queue(0)
    machine.driver.add_status(4)
    machine.select(1)
    for offset, width in machine.fields:
        machine.write(offset, width, 0x10000)
    machine.enable()
    assert not machine.device.queues[1].ready
    assert machine.device.queues[1].descriptor_area == 0
    assert not machine.device.process(1)
    assert machine.talks()


# 2: buffers at the border of regions


def test_02_cve_2019_18960_a_buffer_across_regions_is_split() -> None:
    """A buffer over two neighbouring regions comes in two pieces; past the end it is refused."""
    ranges = [(GuestAddress(0), 0x8000), (GuestAddress(0x8000), 0x8000)]
    with GuestMemory.from_ranges(ranges) as memory:
        driver = SplitDriver(memory, 8)
        queue = Queue(8)
        driver.configure(queue)
        for index, address in enumerate((0x7FF8, 0xFFF8)):
            driver.write_descriptor(index, address, 16, DESC_F_WRITE)
            driver.make_available(index)
        driver.publish()
        batch = queue.pop_batch(memory)
        assert len(batch) == 1
        assert [length for _, length in batch.iovecs(0)[1]] == [8, 8]
        chain = batch.chain(0)
        assert chain.writer(memory).write(bytes(range(16))) == 16
        assert driver.read(0x7FF8, 16) == bytes(range(16))
        with pytest.raises(GuestError):
            queue.pop(memory)


# 3, 7: in flight


def test_03_cve_2026_45782_the_same_head_twice(machine: Machine) -> None:
    """A head offered again while the device works on it stops the device, not the program."""
    machine.driver.start(F_VERSION_1)
    ring = machine.driver.queues[0]
    assert isinstance(ring, SplitDriver)
    ring.add([b"x"], [1])
    (chain,) = machine.device.queues[0].chains(machine.memory)
    ring.make_available(chain.head)
    ring.publish()
    with pytest.raises(GuestError):
        machine.device.queues[0].pop(machine.memory)

    def take_all(queue_index: int) -> None:
        for _ in machine.device.queues[queue_index].chains(machine.memory):
            pass

    machine.model.process = take_all  # type: ignore[method-assign]
    machine.driver.kick(0)
    assert machine.device.status & NEEDS_RESET
    assert "2.7.13.1" in machine.device.reset_reason


def test_07_cve_2016_5403_requests_in_flight_are_bounded(memory: GuestMemory) -> None:
    """However often buffers are offered, a queue holds no more than its size."""
    driver = SplitDriver(memory, 8)
    queue = Queue(8)
    driver.configure(queue)
    for index in range(8):
        driver.write_descriptor(index, DATA, 1)
    refused = 0
    for turn in range(1000):
        driver.make_available(turn % 8)
        driver.publish()
        try:
            queue.pop(memory)
        except GuestError:
            refused += 1
    assert refused == 1000 - 8
    assert len(queue.in_flight) == 8


@pytest.mark.parametrize("number", [2, 0x7FFF, 0x8000, 0xFFFF, 0x1_0000, 0x8000_0000, 0xFFFF_FFFF])
def test_07_cve_2011_2512_a_negative_queue_number(machine: Machine, number: int) -> None:
    """A kick of a queue that is not there reaches nobody, and the device goes on."""
    machine.driver.start(F_VERSION_1)
    called: list[int] = []
    machine.transport._notify = called.append
    offset = 0x3000 + 4 * min(number, 0x3FF) if machine.pci else 0x50
    machine.write(offset, 4, number)
    assert called == []
    machine.transport._notify = machine.device.process
    assert machine.talks()


# 5, 8, 17: places that do not exist


@given(offset=st.integers(-64, 1 << 20), length=st.integers(0, 64))
def test_05_cve_2021_45464_configuration_past_its_end(
    machines: Callable[[], Machine], offset: int, length: int
) -> None:
    """A read past the structure is zeros, a write changes nothing; neither leaves the window."""
    machine = machines()
    machine.driver.start(F_VERSION_1)
    config = bytes(machine.model.config)
    assert machine.device.read_config(offset, length) == (
        config[offset : offset + length].ljust(length, b"\0") if offset >= 0 else bytes(length)
    )
    machine.device.write_config(offset, b"!" * length)
    if offset < 0 or offset + length > len(config):
        assert machine.model.config == config
    assert len(machine.model.config) == len(config)


@given(selector=st.integers(2, 0xFFFF), value=st.integers(0, 0xFFFF_FFFF))
def test_05_08_queue_select_out_of_range(
    machines: Callable[[], Machine], selector: int, value: int
) -> None:
    """queue_select 0xffff, then its size, addresses and vector: nothing is read, nothing moves."""
    machine = machines()
    machine.driver.negotiate(F_VERSION_1)
    before = machine.device.save()
    machine.select(selector)
    for offset, width in machine.fields:
        machine.write(offset, width, value)
        if machine.pci:
            assert machine.transport.read(offset, width) == bytes(width)
    if machine.pci:
        machine.write(0x1A, 2, value)
        assert machine.transport.read(0x1A, 2) == b"\xff\xff"
    machine.enable()
    assert machine.device.save() == before


@pytest.mark.parametrize("vector", [3, 4, 0x7FF, 0x800, 0xFFFE, 0xFFFF])
def test_08_vectors_out_of_the_table_then_an_interrupt(memory: GuestMemory, vector: int) -> None:
    """config_msix_vector and queue_msix_vector past the table: NO_VECTOR, and silence."""
    machine = Machine(memory, pci=True)
    sent: list[int] = []
    assert isinstance(machine.transport, PciTransport)
    machine.transport._signal = sent.append
    machine.driver.start(F_VERSION_1)
    machine.select(0)
    for offset in (0x10, 0x1A):
        machine.write(offset, 2, vector)
        assert machine.transport.read(offset, 2) == b"\xff\xff"
    machine.device.config_changed()
    machine.device.used_buffer_notification(0)
    assert sent == []


@given(
    offset=st.integers(-8, 0x4010), width=st.sampled_from([0, 1, 2, 3, 5, 8, 16]),
    fill=st.integers(0, 255),
)  # fmt: skip
def test_17_accesses_of_any_width_anywhere(
    machines: Callable[[], Machine], offset: int, width: int, fill: int
) -> None:
    """1, 2, 3, 8 bytes, misaligned, over two registers: as many bytes come back, none raises."""
    machine = machines()
    machine.driver.start(F_VERSION_1)
    assert len(machine.transport.read(offset, width)) == width
    machine.transport.write(offset, bytes([fill]) * width)
    assert len(machine.transport.read(offset, width)) == width
    machine.driver.start(F_VERSION_1)
    assert machine.talks()


# 9, 11, 12, 13: chains


def test_09_lengths_that_fit_alone_and_not_together() -> None:
    """Each descriptor is inside memory, the sum is past 2^32: the sum is what is checked."""
    with GuestMemory.from_ranges([(GuestAddress(0), 4 << 20)]) as memory:
        driver = SplitDriver(memory, 2048)
        queue = Queue(2048)
        driver.configure(queue)
        count = ((1 << 32) >> 22) + 1
        for index in range(count):
            last = index == count - 1
            driver.write_descriptor(index, 0, 4 << 20, 0 if last else DESC_F_NEXT, index + 1)
        driver.make_available(0)
        driver.publish()
        with pytest.raises(GuestError, match=r"2\.7\.5\.2"):
            queue.pop(memory)


def _nest(ring: SplitDriver) -> None:
    ring.write_descriptor(0, DATA, 16, DESC_F_INDIRECT)
    ring.write_descriptor(0, DATA, 16, DESC_F_INDIRECT, table=DATA)


MALFORMED: dict[str, tuple[str, Callable[[SplitDriver], None]]] = {
    "loop": ("2.7.5.2", lambda ring: ring.write_descriptor(0, DATA, 1, DESC_F_NEXT, 0)),
    "next": ("2.7.5", lambda ring: ring.write_descriptor(0, DATA, 1, DESC_F_NEXT, ring.size)),
    "head": ("2.7.5", lambda ring: ring.make_available(ring.size)),
    "avail-idx": ("2.7.6.1", lambda ring: ring.set_avail_idx(0x8000)),
    "hole": ("2.7.5", lambda ring: ring.write_descriptor(0, 1 << 40, 1)),
    "nested": ("2.7.5.3.1", _nest),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_11_13_a_malformed_chain_stops_the_device_once(machine: Machine, what: str) -> None:
    """NEEDS_RESET, one reason, and no busy loop: further kicks do not reach the model."""
    machine.driver.start(F_VERSION_1 | F_INDIRECT_DESC)
    ring = machine.driver.queues[0]
    assert isinstance(ring, SplitDriver)
    section, spoil = MALFORMED[what]
    spoil(ring)
    if what not in ("head", "avail-idx"):
        ring.make_available(0)
    if what != "avail-idx":
        ring.publish()
    calls: list[int] = []
    process = machine.model.process

    def counted(queue_index: int) -> None:
        calls.append(queue_index)
        process(queue_index)

    machine.model.process = counted  # type: ignore[method-assign]
    for _ in range(100):
        machine.driver.kick(0)
    assert calls == [0]
    machine.model.process = process  # type: ignore[method-assign]
    machine.refused(section)


@pytest.mark.parametrize("place", [(1 << 20) - 8, 1 << 29, 0x3_0008, (1 << 64) - 16])
def test_11_rings_outside_ram_in_the_hole_or_unaligned(machine: Machine, place: int) -> None:
    """A queue whose table is not all memory, or not aligned, does not become ready."""
    machine.driver.negotiate(F_VERSION_1)
    machine.select(0)
    low, high = (0x20, 0x24) if machine.pci else (0x80, 0x84)
    machine.write(low, 4, place & 0xFFFF_FFFF)
    machine.write(high, 4, place >> 32)
    machine.enable()
    assert not machine.device.queues[0].ready
    machine.refused("descriptor_area")


@given(
    writes=st.lists(
        st.tuples(
            st.sampled_from(["descriptor_area", "driver_area", "device_area"]), st.booleans(),
            st.sampled_from([0, 1, 2, 4, 8, 16, 0x8001, 0x8002, 0x8004, 0x8010]),
        ),
        max_size=10,
    ),
    saved=st.booleans(),
)  # fmt: skip
def test_11_halves_of_addresses_in_any_order(
    machines: Callable[[], Machine], writes: list[tuple[str, bool, int]], saved: bool
) -> None:
    """A queue runs at the addresses that the driver wrote last, or not at all."""
    machine = machines()
    machine.driver.negotiate(F_VERSION_1)
    machine.select(0)
    names = ["descriptor_area", "driver_area", "device_area"]
    believed = dict.fromkeys(names, 0)
    first, step = (0x20, 8) if machine.pci else (0x80, 16)
    for name, high, value in writes:
        machine.write(first + step * names.index(name) + 4 * high, 4, value)
        kept = believed[name] & 0xFFFF_FFFF if high else believed[name] & ~0xFFFF_FFFF
        believed[name] = kept | value << 32 * high
    if saved:
        state, registers = machine.device.save(), machine.transport.save()
        machine = machines()
        machine.device.restore(state)
        machine.transport.restore(registers)  # type: ignore[arg-type]
        assert machine.device.save() == state
    machine.enable()
    queue = machine.device.queues[0]
    assert queue.ready is not bool(machine.device.status & NEEDS_RESET)
    if queue.ready:
        assert {name: getattr(queue, name) for name in names} == believed


@pytest.mark.parametrize(
    ("readable", "writable"), [([], [16, 1]), ([bytes(16), b"\0"], []), ([bytes(16)], [])],
    ids=["write-only-header", "read-only-status", "missing-status"],
)  # fmt: skip
def test_11_headers_and_statuses_of_the_wrong_direction(
    memory: GuestMemory, readable: list[bytes], writable: list[int]
) -> None:
    """A header that cannot be read and a status that cannot be written are a typed error."""
    driver = SplitDriver(memory, 8)
    queue = Queue(8)
    driver.configure(queue)
    head = driver.add(readable, writable)
    (chain,) = queue.chains(memory)
    writer = chain.writer(memory)

    def serve() -> None:
        chain.reader(memory).read_struct(Struct("<IIQ"))
        writer.split_at(max(writer.available - 1, 0)).write_exact(b"\0")

    with pytest.raises(EndOfChainError):
        serve()
    assert writer.used_length == 0
    queue.add_used(memory, head, 0)
    assert driver.reap()[0].length == 0


def test_11_zero_lengths_reach_nothing(memory: GuestMemory) -> None:
    """Elements of no bytes may point anywhere; they have no iovec."""
    driver = SplitDriver(memory, 8)
    queue = Queue(8)
    driver.configure(queue)
    driver.write_descriptor(0, 1 << 63, 0, DESC_F_NEXT, 1)
    driver.write_descriptor(1, (1 << 64) - 1, 0, DESC_F_WRITE)
    driver.make_available(0)
    driver.publish()
    batch = queue.pop_batch(memory)
    assert batch.iovecs(0) == ([], [])
    assert batch.chain(0).reader(memory).read(1) == b""


@given(rewrites=st.lists(st.tuples(st.integers(0, 63), st.binary(min_size=1, max_size=16))))
def test_12_a_header_rewritten_between_check_and_use(
    machines: Callable[[], Machine], rewrites: list[tuple[int, bytes]]
) -> None:
    """Descriptors, header and rings are copied once: what the guest writes later is not seen."""
    memory = machines().memory
    driver = SplitDriver(memory, 4)
    queue = Queue(4)
    driver.configure(queue)
    driver.add([b"header of a request"], [7])
    batch = queue.pop_batch(memory, header=16)
    seen = batch.chain(0), batch.headers, batch.iovecs(0)
    for at, junk in rewrites:
        driver.write(driver.descriptor_area + at, junk)
        driver.write(seen[0].readable[0][0] + at % 16, junk)
        driver.write(driver.driver_area + 4, junk)
    assert (batch.chain(0), batch.headers, batch.iovecs(0)) == seen
    assert seen[1] == b"header of a requ"
    queue.complete_batch(memory, batch)


# 16: status


def test_16_steps_of_the_status_machine(machine: Machine) -> None:
    """FEATURES_OK before DRIVER, cleared bits, DRIVER_OK twice, features after FEATURES_OK."""
    driver, device = machine.driver, machine.device
    driver.write_status(0)
    for early in (8, 4, 9, 12):
        driver.write_status(early)
        assert device.status & ~1 == 0
    driver.start(F_VERSION_1)
    driver.write_status(3)
    driver.write_features((1 << 64) - 1)
    driver.write_status(15)
    assert (device.status, device.driver_features) == (15, F_VERSION_1)
    assert machine.model.log.count("activate") == 1
    assert machine.talks()


def test_16_a_failing_activation_leaves_no_lock_behind(machine: Machine) -> None:
    """Activation fails while others read registers: NEEDS_RESET, and every register answers."""
    machine.model.fail = "activate"
    machine.driver.negotiate(F_VERSION_1)
    machine.driver.set_up_queue(0)
    stop = threading.Event()
    reads = [0]

    def vcpu() -> None:
        while not stop.is_set():
            machine.transport.read(0x14 if machine.pci else 0x70, 1 if machine.pci else 4)
            machine.device.read_config(0, 8)
            reads[0] += 1

    other = threading.Thread(target=vcpu)
    other.start()
    try:
        assert machine.driver.add_status(4) & NEEDS_RESET
        # From a third thread: a lock that activation had kept would stop it.
        third = threading.Thread(target=machine.device.write_status, args=(0,))
        third.start()
        third.join(30)
        assert not third.is_alive()
    finally:
        stop.set()
        other.join(30)
    assert reads[0] > 0
    assert machine.device.status == 0
    machine.model.fail = ""
    machine.driver.start(F_VERSION_1)
    assert machine.talks()


def test_16_a_driver_comes_back_after_a_failed_reset(machine: Machine) -> None:
    """A reset that fails is visible, and neither half of the device works until one succeeds."""
    machine.driver.start(F_VERSION_1)
    machine.model.fail = "reset"
    machine.driver.write_status(0)
    assert machine.driver.status == NEEDS_RESET
    for status in (1, 3, 11, 15):
        machine.driver.write_status(status)
        assert machine.driver.status == NEEDS_RESET
    assert not machine.device.process(0)
    machine.model.fail = ""
    machine.driver.start(F_VERSION_1)
    assert machine.talks()


# 20, 22: snapshots, floods


def test_20_a_state_that_is_active_without_driver_ok(machine: Machine) -> None:
    """Queues that run in a device whose driver never got there: the state is refused as a whole."""
    machine.driver.start(F_VERSION_1)
    good = machine.device.save()
    fresh = Machine(machine.memory, machine.pci)
    for status in (0, 1, 3, 0x40, 4, 12):
        with pytest.raises(StateError):
            fresh.device.restore(evolve(good, status=status))
        assert fresh.device.status == 0
        assert not any(queue.ready for queue in fresh.device.queues)
    fresh.device.restore(good)
    assert fresh.device.active


def test_22_a_guest_cannot_flood_the_log_or_memory(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    """What a guest can trigger is counted; nothing is logged, nothing is kept but the last."""
    machine.driver.start(F_VERSION_1)
    with caplog.at_level(logging.DEBUG):
        for _ in range(100):
            machine.write(machine.fields[0][0], machine.fields[0][1], 3)
        tracemalloc.start()
        before, _ = tracemalloc.get_traced_memory()
        for turn in range(5000):
            machine.write(machine.fields[turn % 5][0], machine.fields[turn % 5][1], turn)
            machine.transport.read(0xFFFF, 3)
        after, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert machine.device.refused >= 5000
    assert after - before < 64 << 10
    assert caplog.records == []
