"""A rule-based state machine that plays good and bad drivers against any device.

Subclass `DeviceMachine`, say how to make the model and which buffers it understands, and hand
the subclass' `TestCase` to pytest:

    class BlockMachine(DeviceMachine):
        buffers = block_requests()

        def make_model(self, memory):
            return Block(memory, ...)

    TestBlock = BlockMachine.TestCase
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from virtio_queue.constants import F_INDIRECT_DESC
from virtio_queue.device import VirtioDevice
from virtio_queue.errors import UsageError
from virtio_queue.mmio import CONFIG_OFFSET, MmioTransport
from virtio_queue.pci import DEVICE_OFFSET, ISR_OFFSET, NOTIFY_OFFSET, WINDOW_SIZE, PciTransport
from virtio_queue.testing.arena import Arena
from virtio_queue.testing.driver import DeviceRuleError
from virtio_queue.testing.mmio import MmioDriver
from virtio_queue.testing.pci import PciDriver
from virtio_queue.testing.strategies import buffers as any_buffers
from vm_memory import GuestAddress, GuestMemory

if TYPE_CHECKING:
    from virtio_queue.model import DeviceModel

__all__ = ["DeviceMachine"]

_LADDER = (1, 2, 8, 4)
_MMIO_REGISTERS = st.one_of(st.sampled_from([*range(0, 0x100, 4)]), st.integers(0, 0x200))
_PCI_REGISTERS = st.one_of(
    st.integers(0, 0x40),
    st.integers(0, 16).map(lambda at: DEVICE_OFFSET + at),
    st.integers(0, 16).map(lambda at: NOTIFY_OFFSET + at),
    st.integers(0, WINDOW_SIZE),
)
_VALUES = st.one_of(
    st.sampled_from([0, 1, 2, 3, 8, 15, 0x40, 0x80, 0xFFFF]), st.integers(0, 2**32 - 1)
)


class DeviceMachine(RuleBasedStateMachine):
    """Drives one device through the registers of virtio-mmio, or of virtio-pci with INTx.

    What it requires of every device, whatever the driver does:

    - no register access and no kick raises;
    - the status field holds each step only with the ones before it;
    - a device that is not active, or a queue that is not ready, is not used;
    - a correct driver gets back what it made available, each buffer once, with no more bytes
      than it has room for (for devices that answer at once, see `answers`);
    - a saved device goes on in a fresh one.

    Attributes:
        pci: whether the registers are those of virtio-pci.
        memory_size: bytes of guest memory.
        buffers: strategy for arguments of `Driver.add`.
        answers: whether the device uses every buffer before `process` returns. A device that
            keeps buffers (receive queues, an asynchronous backend) sets it to False.
    """

    pci = False
    memory_size = 1 << 20
    buffers: st.SearchStrategy[tuple[list[bytes], list[int]]] = any_buffers()
    answers = True

    def make_model(self, memory: GuestMemory) -> DeviceModel:
        """Return a fresh model, as after power-on."""
        raise UsageError("make_model", "override it to return the device under test")

    def transplant(self, old: Any, new: Any) -> None:
        """Move the model's own state (save and restore); nothing by default."""
        del old, new

    def __init__(self) -> None:
        super().__init__()
        self.memory = GuestMemory.from_ranges([(GuestAddress(0), self.memory_size)])
        self.interrupts = 0
        # Whether the driver has kept every rule since it started the device.
        self.honest = False
        self._power_on()

    def _power_on(self) -> None:
        self.device = VirtioDevice(self.make_model(self.memory), self.memory, self._interrupt)
        self.transport: MmioTransport | PciTransport
        if self.pci:
            self.transport = PciTransport(
                self.device, self.device.process, vectors=0, msix_enabled=lambda: False,
                signal=lambda _: None, intx=self._line,
            )  # fmt: skip
        else:
            self.transport = MmioTransport(self.device, self.device.process)
        self._fresh_driver()

    def _fresh_driver(self) -> None:
        arena = Arena(0x1000, self.memory_size - 0x1000)
        self.driver: MmioDriver | PciDriver
        if isinstance(self.transport, PciTransport):
            self.driver = PciDriver(self.transport, arena=arena)
        else:
            self.driver = MmioDriver(self.transport, arena=arena)

    def _interrupt(self) -> None:
        self.interrupts += 1

    def _line(self, level: bool) -> None:
        if level:
            self._interrupt()

    def teardown(self) -> None:
        """Give the memory back."""
        self.memory.close()

    # Good drivers.

    @rule(refused=st.integers(0, 2**64 - 1), size=st.sampled_from([1, 2, 4, 8, 64]))
    def start(self, refused: int, size: int) -> None:
        """Bring the device up from whatever state it is in, without some of its features."""
        self._fresh_driver()
        keep = (1 << 32) | ~refused
        self.driver.start(self.device.device_features & keep, size=size)
        self.honest = True

    @precondition(lambda self: self.honest)
    @rule(data=st.data(), buffer=st.data(), indirect=st.booleans())
    def add_and_kick(self, data: st.DataObject, buffer: st.DataObject, indirect: bool) -> None:
        """Make a buffer available where there is room, kick, and take back what was used."""
        index = data.draw(st.integers(0, len(self.driver.queues) - 1), label="queue")
        readable, writable = buffer.draw(self.buffers, label="buffer")
        queue = self.driver.queues[index]
        indirect = indirect and bool(queue.features & F_INDIRECT_DESC)
        if queue.free < (1 if indirect else len(readable) + len(writable)):
            return
        head = queue.add(readable, writable, indirect=indirect)
        before = self.interrupts
        if queue.kick_needed():
            self.driver.kick(index)
        elif self.answers and not self.device.status & 0x40:
            raise DeviceRuleError("2.7.10", "an idle device that answers at once wants kicks")
        if self.device.status & 0x40:
            self.honest = False
            return
        used = queue.reap()
        if self.answers:
            if [item.head for item in used] != [head]:
                raise DeviceRuleError("2.6", f"buffer {head} made available, {used} used")
            if self.interrupts == before:
                raise DeviceRuleError("2.7.7.2", "a used buffer the driver waits for, no interrupt")

    @rule()
    def acknowledge(self) -> None:
        """Handle interrupts."""
        if isinstance(self.driver, PciDriver):
            self.driver.read_isr()
        else:
            self.driver.acknowledge()
        assert self.device.interrupt_status == 0

    @rule()
    def power_cycle_through_a_saved_state(self) -> None:
        """Save everything, restore it into a fresh device, and go on there."""
        state, registers = self.device.save(), self.transport.save()
        old = self.device
        driver = self.driver
        self._power_on()
        self.transplant(old.model, self.device.model)
        self.device.restore(state)
        self.transport.restore(registers)  # type: ignore[arg-type]
        driver.transport = self.transport
        self.driver = driver
        assert self.device.save().queues == state.queues or self.device.status != state.status
        assert self.device.status & ~0x40 == state.status & ~0x40

    # Bad drivers.

    @rule(features=st.integers(0, 2**64 - 1))
    def accept_any_features(self, features: int) -> None:
        """Accept some feature bits, offered or not: FEATURES_OK stays clear if any was not."""
        self.honest = False
        self._fresh_driver()
        driver = self.driver
        driver.write_status(0)
        driver.add_status(1)
        driver.add_status(2)
        driver.write_features(features)
        stray = features & ~driver.read_features()
        if stray and driver.add_status(8) & 8:
            raise DeviceRuleError("2.2.2", f"features {stray:#x} were accepted, not offered")

    @rule(data=st.data(), value=_VALUES, width=st.sampled_from([0, 1, 2, 3, 4, 4, 4, 8]))
    def write_anything_anywhere(self, data: st.DataObject, value: int, width: int) -> None:
        """Any register, any value, any width: at worst the device asks for a reset."""
        register = data.draw(_PCI_REGISTERS if self.pci else _MMIO_REGISTERS, label="register")
        harmless = register >= DEVICE_OFFSET or register == ISR_OFFSET
        if not self.pci:
            harmless = register >= CONFIG_OFFSET or register in (0x060, 0x064)
        self.honest = self.honest and harmless
        self.transport.write(register, value.to_bytes(8, "little")[:width])

    @rule(data=st.data(), width=st.sampled_from([0, 1, 2, 3, 4, 8, 64]))
    def read_anything_anywhere(self, data: st.DataObject, width: int) -> None:
        """Any register at any width reads as many bytes as were asked for."""
        register = data.draw(_PCI_REGISTERS if self.pci else _MMIO_REGISTERS, label="register")
        assert len(self.transport.read(register, width)) == width

    @precondition(lambda self: bool(self.driver.queues))
    @rule(data=st.data(), junk=st.binary(min_size=1, max_size=16), place=st.integers(0, 300))
    def scribble_over_a_ring(self, data: st.DataObject, junk: bytes, place: int) -> None:
        """Overwrite a piece of a queue's areas, kick, and expect the device to survive."""
        self.honest = False
        index = data.draw(st.integers(0, len(self.driver.queues) - 1), label="queue")
        queue = self.driver.queues[index]
        areas = [queue.descriptor_area, queue.driver_area, queue.device_area]
        address = data.draw(st.sampled_from(areas), label="area") + place
        self.memory.write(GuestAddress(address), junk)
        self.driver.kick(index)
        self.device.process(index)

    @rule(index=st.integers(0, 2**32 - 1))
    def kick_anything(self, index: int) -> None:
        """Kick any number, existing or not."""
        place = NOTIFY_OFFSET + 4 * (index & 0x3FF) if self.pci else 0x050
        self.transport.write(place, index.to_bytes(4, "little"))

    # What always holds.

    @invariant()
    def status_is_a_prefix_of_the_way(self) -> None:
        """2.1: each step has the ones before it, and the device is active only at the end."""
        status = self.device.status
        present = [bool(status & bit) for bit in _LADDER]
        assert present == sorted(present, reverse=True), f"status {status:#x}"
        assert not self.device.active or status & ~0x40 == 15
        assert not (self.device.active and status & 0x40)

    @invariant()
    def queues_are_within_their_bounds(self) -> None:
        """2.6: never more chains in flight than the queue has places; registers stay in range."""
        assert self.device.interrupt_status & ~3 == 0
        for queue in self.device.queues:
            assert 1 <= queue.size <= queue.max_size
            assert len(queue.in_flight) <= queue.size
