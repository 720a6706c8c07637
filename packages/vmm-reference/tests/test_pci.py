"""The PCI bus: configuration space, BARs that move, MSI-X and its masks, hostile accesses."""

from __future__ import annotations

import os
import select
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtio_queue.pci import NOTIFY_OFFSET
from virtio_queue.testing import Echo, PciDriver
from vm_memory import GuestAddress, GuestMemory
from vmm_reference import layout
from vmm_reference.bus import Bus
from vmm_reference.devices.states import StateError
from vmm_reference.pci.bus import CONFIG_ADDRESS, PciBus
from vmm_reference.pci.config import BAR0, COMMAND, ConfigSpace
from vmm_reference.pci.hotplug import PciHotplug
from vmm_reference.pci.msix import ENTRY_SIZE, MsiRoutes
from vmm_reference.pci.states import PciConfigState, PciFunctionState
from vmm_reference.pci.virtio import PciSlot

RAM = 1 << 20
SLOT = 5


class FakeVm:
    """A record of what KVM would be told: a fake, since no test could read it back from KVM."""

    def __init__(self) -> None:
        self.routing: dict[int, tuple[int, int]] = {}
        self.irqfds: set[tuple[int, int]] = set()
        self.ioeventfds: dict[int, int] = {}

    def set_gsi_routing(self, entries: list[object]) -> None:
        """Messages only."""
        messages = [entry for entry in entries if hasattr(entry, "address")]
        self.routing = {entry.gsi: (entry.address, entry.data) for entry in messages}  # type: ignore[attr-defined]

    def irqfd(self, fd: int, gsi: int) -> None:
        """As KVM: an eventfd has one listener."""
        assert fd not in {known for known, _ in self.irqfds}
        self.irqfds.add((fd, gsi))

    def irqfd_deassign(self, fd: int, gsi: int) -> None:
        """Only what is assigned."""
        self.irqfds.remove((fd, gsi))

    def ioeventfd(self, fd: int, address: int, length: int) -> None:
        """As KVM: one at each place."""
        assert address not in self.ioeventfds
        self.ioeventfds[address] = fd

    def ioeventfd_deassign(self, fd: int, address: int, length: int) -> None:
        """Only what is assigned."""
        assert self.ioeventfds.pop(address) == fd


class FakeLoop:
    """Descriptors that somebody would listen to."""

    def __init__(self) -> None:
        self.fds: set[int] = set()

    def add(self, fd: int, events: int, callback: object) -> None:
        """Listen."""
        self.fds.add(fd)

    def remove(self, fd: int) -> None:
        """Stop listening."""
        self.fds.discard(fd)

    def call_soon(self, callback: object) -> None:
        """At once: there is one thread."""
        callback()  # type: ignore[operator]


class FakeWiring:
    """What a slot needs of a machine."""

    def __init__(self) -> None:
        self.memory = GuestMemory.from_ranges([(GuestAddress(0), RAM)])
        self.vm, self.loop = FakeVm(), FakeLoop()
        self.ports, self.mmio = Bus(0x10000), Bus()
        self.undo: list[object] = []

    def on_close(self, callback: object) -> None:
        """Later."""
        self.undo.append(callback)

    def close(self) -> None:
        """In reverse order."""
        while self.undo:
            self.undo.pop()()  # type: ignore[operator]


class Bench:
    """A bus with an echo device in slot 5, and accesses as a guest makes them."""

    def __init__(self) -> None:
        self.wiring = FakeWiring()
        self.levels: list[tuple[int, bool]] = []
        self.resets = 0
        self.bus = PciBus(
            self.wiring.ports,
            self.wiring.mmio,
            lambda gsi, level: self.levels.append((gsi, level)),
            self.reset,
        )
        self.routes = MsiRoutes(self.wiring.vm)  # type: ignore[arg-type]
        self.slot = self.plug(SLOT)

    def reset(self) -> None:
        self.resets += 1

    def plug(self, number: int, vectors: int | None = None) -> PciSlot:
        return PciSlot(
            self.wiring,  # type: ignore[arg-type]
            Echo(self.wiring.memory),
            self.bus,
            number,
            self.routes,
            placed=True,
            vectors=vectors,
        )

    def get(self, offset: int, length: int, slot: int = SLOT) -> int:
        data = self.wiring.mmio.read(layout.ECAM + (slot << 15) + offset, length)
        return int.from_bytes(data, "little")

    def set(self, offset: int, length: int, value: int, slot: int = SLOT) -> None:
        at = layout.ECAM + (slot << 15) + offset
        self.wiring.mmio.write(at, value.to_bytes(length, "little"))

    def bar(self) -> int:
        return self.get(BAR0, 4) & ~0xF | self.get(BAR0 + 4, 4) << 32

    def capability(self, kind: int, number: int | None = None, slot: int = SLOT) -> int:
        at, seen = self.get(0x34, 1, slot), 0
        while at:
            assert seen < 48, "the list is a circle"
            seen += 1
            if self.get(at, 1, slot) == kind and number in (None, self.get(at + 3, 1, slot)):
                return at
            at = self.get(at + 1, 1, slot)
        raise AssertionError(f"no capability {kind:#x}")

    def enable(self, *, msix: bool = True) -> None:
        """Memory, and MSI-X with all its vectors unmasked."""
        self.set(COMMAND, 2, 0x6)
        if msix:
            at = self.capability(0x11)
            self.set(at + 2, 2, 0x8000)
            for vector in range(len(self.slot.msix)):
                self.message(vector, 0xFEE00000, 0x40 + vector)

    def message(self, vector: int, address: int, data: int, control: int = 0) -> None:
        at = self.bar() + 0x4000 + vector * ENTRY_SIZE
        for offset, value in enumerate((address & 0xFFFFFFFF, address >> 32, data, control)):
            self.wiring.mmio.write(at + 4 * offset, value.to_bytes(4, "little"))

    def pending(self) -> int:
        return int.from_bytes(self.wiring.mmio.read(self.bar() + 0x6000, 8), "little")


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.wiring.close()
    assert not made.wiring.vm.irqfds
    assert not made.wiring.vm.ioeventfds
    assert not made.wiring.vm.routing
    assert not made.wiring.loop.fds


def readable(fd: int) -> bool:
    return bool(select.select([fd], [], [], 0)[0])


def test_both_ways_into_configuration_space_agree(bench: Bench) -> None:
    """Ports 0xCF8 and 0xCFC and memory show the same, for each slot, of each width."""
    ports = bench.wiring.ports
    for slot in (0, SLOT, 6):
        for register in range(0, 256, 4):
            address = 1 << 31 | slot << 11 | register
            ports.write(CONFIG_ADDRESS, address.to_bytes(4, "little"))
            assert ports.read(CONFIG_ADDRESS, 4) == address.to_bytes(4, "little")
            for offset, length in ((0, 4), (0, 2), (2, 2), (0, 1), (3, 1), (1, 2)):
                data = ports.read(CONFIG_ADDRESS + 4 + offset, length)
                assert int.from_bytes(data, "little") == bench.get(register + offset, length, slot)
    assert bench.get(0, 4, SLOT) == 0x1AF4 | 0x1040 + bench.slot.device.model.device_id << 16
    assert bench.get(0, 4, 6) == 0xFFFFFFFF
    ports.write(CONFIG_ADDRESS, bytes(4))
    assert ports.read(CONFIG_ADDRESS + 4, 4) == b"\xff" * 4


def test_the_reset_register_resets(bench: Bench) -> None:
    """Port 0xCF9 as chipsets have it: the hard reset alone, written as one byte."""
    for data in (b"\x02", b"\x04", b"\x06"):
        bench.wiring.ports.write(CONFIG_ADDRESS + 1, data)
    assert bench.resets == 1


def test_a_driver_comes_up_through_its_bar(bench: Bench) -> None:
    """The driver of virtio_queue.testing goes through the bus; answers and vectors are right."""
    bench.enable()
    bar = bench.bar()

    class Window:
        """What the driver takes for the transport: accesses on the bus."""

        device = bench.slot.device
        capabilities = staticmethod(bench.slot.transport.capabilities)

        def read(self, offset: int, length: int) -> bytes:
            return bench.wiring.mmio.read(bar + offset, length)

        def write(self, offset: int, data: bytes) -> None:
            bench.wiring.mmio.write(bar + offset, data)

    for _ in range(2):
        driver = PciDriver(Window(), queue_vectors=(1, 2), config_vector=0)  # type: ignore[arg-type]
        driver.start()
        driver.queues[0].add([b"hello"], [5])
        driver.kick(0)
        assert readable(bench.slot.kicks[0])
        os.eventfd_read(bench.slot.kicks[0])
        assert bench.slot.device.process(0)
        (used,) = driver.queues[0].reap()
        assert used.data == b"HELLO"
        assert readable(bench.slot.msix._own[1])
        os.eventfd_read(bench.slot.msix._own[1])


def test_queues_share_a_vector(bench: Bench) -> None:
    """A device that offers two has one for its configuration, and the other for all its queues."""
    slot = bench.plug(SLOT + 1, vectors=2)
    control = bench.get(bench.capability(0x11, slot=SLOT + 1) + 2, 2, SLOT + 1)
    assert control & 0x7FF == 1  # one less than there are
    calls = [slot.call(queue) for queue in range(2)]
    slot.transport.write(0x10, b"\0\0")  # config_msix_vector
    for queue in range(2):
        slot.transport.write(0x16, bytes((queue, 0)))
        slot.transport.write(0x1A, b"\1\0")
        assert slot.transport.read(0x1A, 2) == b"\1\0"
    assert slot.msix._fds[1] >= set(calls)
    slot.transport.write(0x1A, b"\2\0")
    assert slot.transport.read(0x1A, 2) == b"\xff\xff"


@pytest.mark.parametrize("msix", [True, False])
def test_an_eventfd_of_a_pump_goes_with_the_device(bench: Bench, msix: bool) -> None:
    """It is made when a driver comes, after the vectors, and KVM lets go of it before it closes."""
    bench.enable(msix=msix)
    fd = bench.slot.call(0)
    assert (fd in bench.wiring.loop.fds) is not msix
    bench.slot.transport.write(0x1A, b"\1\0")  # queue_msix_vector
    assert (fd in {known for known, _ in bench.wiring.vm.irqfds}) is msix


def test_17_a_bar_moves_and_comes_back(bench: Bench) -> None:
    """Sizing reads the mask; kicks and registers follow the BAR, and are nowhere without it."""
    bench.enable()
    first = bench.bar()
    queues = len(bench.slot.kicks)
    assert set(bench.wiring.vm.ioeventfds) == {first + NOTIFY_OFFSET + 4 * n for n in range(queues)}
    bench.set(BAR0, 4, 0xFFFFFFFF)
    bench.set(BAR0 + 4, 4, 0xFFFFFFFF)
    assert bench.bar() == (1 << 64) - 0x8000
    bench.set(BAR0 + 4, 4, 1)
    bench.set(BAR0, 4, 0xD0000000)
    moved = 0x1D0000000
    assert bench.wiring.mmio.read(moved + 0x14, 1) == b"\0"  # the status
    assert bench.wiring.mmio.read(first + 0x14, 1) == b"\xff"
    assert set(bench.wiring.vm.ioeventfds) == {moved + NOTIFY_OFFSET + 4 * n for n in range(queues)}
    bench.set(COMMAND, 2, 0)
    assert not bench.wiring.vm.ioeventfds
    assert bench.wiring.mmio.read(moved + 0x14, 1) == b"\xff"


@pytest.mark.parametrize("bad", [layout.ECAM, layout.ECAM - 0x4000 & ~0x7FFF, (1 << 64) - 0x8000])
def test_17_a_bar_on_another_device_is_nowhere(bench: Bench, bad: int) -> None:
    """It takes nothing from the other, and works again where it fits."""
    bench.enable()
    good = bench.bar()
    bench.plug(6)
    bench.set(COMMAND, 2, 2, 6)
    for at in (bad, bench.get(BAR0, 4, 6) & ~0xF):
        before = bench.slot.unmapped_bars
        bench.set(BAR0 + 4, 4, at >> 32)
        bench.set(BAR0, 4, at & 0xFFFFFFFF)
        mapped = bench.slot._mapped
        if at in {start for start, _, device in bench.wiring.mmio if device is not bench.slot}:
            assert mapped is None
            assert bench.slot.unmapped_bars > before
        assert bench.get(0, 4, 0) == 0x0D578086
    bench.set(BAR0 + 4, 4, 0)
    bench.set(BAR0, 4, good)
    assert bench.slot._mapped == good
    assert bench.wiring.mmio.read(good + 0x14, 1) == b"\0"


def test_a_masked_message_waits(bench: Bench) -> None:
    """Masked it is pending and KVM does not listen; unmasked KVM listens to what is still there."""
    bench.enable()
    vm, msix = bench.wiring.vm, bench.slot.msix
    at = bench.capability(0x11)
    fd, gsi = msix._own[1], msix._gsis[1]
    assert (fd, gsi) in vm.irqfds
    assert vm.routing[gsi] == (0xFEE00000, 0x41)
    bench.message(1, 0xFEE00000, 0x41, control=1)
    assert (fd, gsi) not in vm.irqfds
    assert bench.pending() == 0
    msix.signal(1)
    assert bench.pending() == 2
    bench.message(1, 0x1FEE01000, 0x55, control=0)
    assert (fd, gsi) in vm.irqfds
    assert readable(fd)  # for KVM, which looks when it begins to listen
    assert vm.routing[gsi] == (0x1FEE01000, 0x55)
    os.eventfd_read(fd)
    bench.set(at + 2, 2, 0xC000)  # the function's mask
    msix.signal(2)
    assert bench.pending() == 4
    assert not vm.irqfds
    bench.set(at + 2, 2, 0x8000)
    assert len(vm.irqfds) == len(msix)
    os.eventfd_read(msix._own[2])


def test_who_signals_for_a_queue_follows_its_vector(bench: Bench) -> None:
    """The eventfd that a pump or the kernel has goes where the driver maps the queue."""
    bench.enable()
    call = bench.slot.call(0)
    vm, gsis = bench.wiring.vm, bench.slot.msix._gsis
    bar = bench.bar()

    def map_to(vector: int) -> None:
        bench.wiring.mmio.write(bar + 0x16, bytes(2))
        bench.wiring.mmio.write(bar + 0x1A, vector.to_bytes(2, "little"))

    assert call not in {fd for fd, _ in vm.irqfds}
    for vector in (1, 2, 1):
        map_to(vector)
        assert (call, gsis[vector]) in vm.irqfds
        assert sum(fd == call for fd, _ in vm.irqfds) == 1
    map_to(0xFFFF)
    assert call not in {fd for fd, _ in vm.irqfds}
    bench.set(bench.capability(0x11) + 2, 2, 0)
    assert call in bench.wiring.loop.fds


def test_8_vectors_and_queues_that_do_not_exist(bench: Bench) -> None:
    """A vector behind the table, or of a queue behind the last, is none, and sends nothing."""
    bench.enable()
    bar = bench.bar()
    for queue, vector in ((0xFFFF, 0), (0xFFFF, 0xFFFE), (0, len(bench.slot.msix)), (0, 0x7FF)):
        bench.wiring.mmio.write(bar + 0x16, queue.to_bytes(2, "little"))
        bench.wiring.mmio.write(bar + 0x1A, vector.to_bytes(2, "little"))
        assert bench.wiring.mmio.read(bar + 0x1A, 2) == b"\xff\xff"
    bench.wiring.mmio.write(bar + 0x10, b"\x00\x40")
    assert bench.wiring.mmio.read(bar + 0x10, 2) == b"\xff\xff"
    bench.slot.device.config_changed()
    bench.slot.device.used_buffer_notification(0)
    assert bench.pending() == 0


def test_8_the_table_takes_whole_words(bench: Bench) -> None:
    """Bytes, halves, odd places and what lies behind change nothing; every width can be read."""
    bench.enable()
    bar = bench.bar()
    before = bench.slot.msix.save_table()
    for offset, length in ((0, 1), (0, 2), (2, 4), (1, 4), (len(before), 4), (len(before) - 4, 8)):
        bench.wiring.mmio.write(bar + 0x4000 + offset, b"\xa5" * length)
    bench.wiring.mmio.write(bar + 0x6000, b"\xff" * 8)  # the pending bits are read-only
    assert bench.slot.msix.save_table() == before
    for offset in (0, 1, 7, len(before) - 1, len(before), 0x1FFF):
        for length in (1, 2, 3, 4, 8):
            assert len(bench.slot.read(0x4000 + offset, length)) == length
    assert bench.slot.read(0x7FF8, 8) == bytes(8)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["config", "bar", "port"]),
            st.one_of(st.integers(0, 0xFFF), st.integers(0, 0x7FFF), st.just(0x34)),
            st.sampled_from([1, 2, 3, 4, 8]),
            st.binary(min_size=8, max_size=8),
            st.booleans(),
        ),
        max_size=30,
    )
)
def test_17_no_access_of_any_size_raises(accesses: list[tuple[str, int, int, bytes, bool]]) -> None:
    """Configuration space, BAR and ports take anything, and the list of capabilities stays one."""
    bench = Bench()
    try:
        bench.enable()
        fixed = bench.get(0, 4), bench.get(0x34, 1), bench.get(8, 4), bench.get(0x2C, 4)
        for where, offset, length, data, write in accesses:
            if where == "port":
                bus, at = bench.wiring.ports, CONFIG_ADDRESS + offset % 8
            else:
                bus = bench.wiring.mmio
                config = layout.ECAM + (SLOT << 15) + offset % 0x1000
                at = config if where == "config" else (bench.slot._mapped or 0) + offset
            if write:
                bus.write(at, data[:length])
            else:
                assert len(bus.read(at, length)) == length
        assert fixed == (bench.get(0, 4), bench.get(0x34, 1), bench.get(8, 4), bench.get(0x2C, 4))
        bench.capability(0x11)
        bench.capability(0x09, 5)
    finally:
        bench.wiring.close()
    assert not bench.wiring.vm.irqfds
    assert not bench.wiring.vm.ioeventfds


def test_the_window_in_configuration_space_reaches_the_bar(bench: Bench) -> None:
    """4.1.4.9: registers are reached without the BAR; what leads out of it does nothing."""
    at = bench.capability(0x09, 5)
    bench.set(at + 4, 1, 0)
    bench.set(at + 8, 4, 0x14)
    bench.set(at + 12, 4, 1)
    bench.set(at + 16, 1, 3)
    assert bench.slot.device.status == 3
    assert bench.get(at + 16, 1) == 3
    for bar, offset, length in ((1, 0x14, 1), (0, 0x8000, 4), (0, 0x15, 4), (0, 0x14, 3)):
        bench.set(at + 4, 1, bar)
        bench.set(at + 8, 4, offset)
        bench.set(at + 12, 4, length)
        assert bench.get(at + 16, 4) == 0
        bench.set(at + 16, 4, 0)
    assert bench.slot.device.status == 3


def test_functions_share_a_line(bench: Bench) -> None:
    """INTx of two slots on one line falls when the last of them has; the command bit mutes it."""
    other = bench.plug(SLOT + 8)
    gsi = layout.intx_gsi(SLOT)
    for slot in (bench.slot, other):
        slot._set_intx(True)
    assert bench.get(6, 2) & 8
    bench.slot._set_intx(False)
    assert bench.levels == [(gsi, True)]
    bench.set(COMMAND, 2, 0x400, SLOT + 8)
    assert bench.levels == [(gsi, True), (gsi, False)]
    bench.set(COMMAND, 2, 0, SLOT + 8)
    other._set_intx(False)
    assert bench.levels[2:] == [(gsi, True), (gsi, False)]


def test_a_function_comes_back_as_it_was(bench: Bench) -> None:
    """BAR, MSI-X and what is pending, in a fresh function; another function's state is refused."""
    bench.enable()
    bench.set(BAR0, 4, 0xD0000000)
    bench.message(2, 0xFEE00000, 0x77, control=1)
    bench.slot.msix.signal(2)
    state = bench.slot.save()
    fresh = Bench()
    try:
        fresh.slot.restore(state)
        assert fresh.slot.save() == state
        assert fresh.slot._mapped == 0xD0000000
        assert fresh.pending() == 4
        assert len(fresh.wiring.vm.irqfds) == len(fresh.slot.msix) - 1
        registers = bytearray(state.config.registers)
        registers[2] ^= 1
        for bad in (
            PciFunctionState(PciConfigState(bytes(registers)), state.msix_table),
            PciFunctionState(state.config, state.msix_table + bytes(16)),
            PciFunctionState(state.config, state.msix_table, (len(fresh.slot.msix),)),
        ):
            with pytest.raises(StateError):
                fresh.slot.restore(bad)
        assert fresh.slot.save() == state
    finally:
        fresh.wiring.close()


def test_hotplug_registers_tell_once() -> None:
    """What changed is read once, by whole registers; an ejected slot is passed on."""
    told: list[str] = []
    ejected: list[int] = []
    hotplug = PciHotplug(lambda: told.append("look"), ejected.append)
    hotplug.plugged(3)
    hotplug.ask_for(31)
    assert told == ["look", "look"]
    assert hotplug.read(0, 1) == b"\0"
    fresh = PciHotplug(lambda: told.append("again"), ejected.append)
    fresh.restore(hotplug.save())
    assert told[2:] == ["again"]
    assert fresh.read(0, 4) == (8).to_bytes(4, "little")
    assert fresh.read(4, 4) == (1 << 31).to_bytes(4, "little")
    assert fresh.read(0, 4) == fresh.read(4, 4) == bytes(4)
    fresh.write(8, b"\x08")
    fresh.write(8, (8 | 1).to_bytes(4, "little"))
    assert ejected == [3]  # slot 0 is the bridge's


def test_read_only_bits_stay() -> None:
    """Whatever is written everywhere, only what the masks name changes."""
    config = ConfigSpace(vendor=0x1AF4, device=0x1042, class_code=0x018000, pin=1)
    config.add_bar(0, 0x1000, 0xC0000000)
    config.add_capability(b"\x11\0\x02\0", b"\0\0\0\x80")
    before = config.read(0, 256)
    config.write(0, b"\xff" * 256)
    config.write(0, bytes(256))
    after = config.read(0, 256)
    changed = {at for at in range(256) if before[at] != after[at]}
    assert changed <= {*range(BAR0, BAR0 + 8)}
    assert config.read(0x34, 1) == b"\x40"
