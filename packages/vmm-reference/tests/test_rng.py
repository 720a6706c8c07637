from __future__ import annotations

from collections.abc import Iterator

import pytest

from virtio_queue.device import VirtioDevice
from virtio_queue.mmio import MmioTransport
from virtio_queue.testing import Arena, MmioDriver, SplitDriver
from vm_memory import GuestAddress, GuestMemory
from vmm_reference.devices.rng import MAX_REQUEST, Rng


class Machine:
    """An entropy device with a driver, and entropy that can be told from anything else."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.interrupts = 0
        self.memory = GuestMemory.from_ranges([(GuestAddress(0), 4 << 20)])
        self.model = Rng(self.entropy)
        self.device = VirtioDevice(self.model, self.memory, self.interrupt)
        transport = MmioTransport(self.device, self.device.process)
        self.driver = MmioDriver(transport, arena=Arena(0x1000, 3 << 20))
        self.driver.start()

    def entropy(self, length: int) -> bytes:
        self.asked.append(length)
        return b"\x5a" * length

    def interrupt(self) -> None:
        self.interrupts += 1


@pytest.fixture
def machine() -> Iterator[Machine]:
    machine = Machine()
    yield machine
    machine.memory.close()


def test_buffers_are_filled(machine: Machine) -> None:
    """Every writable byte gets entropy, over all elements of a buffer."""
    machine.driver.queues[0].add([], [10, 0, 1, 53])
    machine.driver.kick()
    (used,) = machine.driver.queues[0].reap()
    assert (used.length, used.data) == (64, b"\x5a" * 64)
    assert (machine.asked, machine.model.served, machine.interrupts) == ([64], 64, 1)


def test_request_is_capped(machine: Machine) -> None:
    """A guest that asks for megabytes gets 64 KiB, and is told so (Firecracker #5762)."""
    machine.driver.queues[0].add([], [1 << 20, 1 << 20])
    machine.driver.kick()
    (used,) = machine.driver.queues[0].reap()
    assert (used.length, machine.asked) == (MAX_REQUEST, [65536])


def test_nothing_to_fill(machine: Machine) -> None:
    """A buffer without a writable byte is given back empty, and nobody is asked."""
    machine.driver.queues[0].add([b"read only"])
    machine.driver.kick()
    (used,) = machine.driver.queues[0].reap()
    assert (used.length, machine.asked, machine.device.active) == (0, [], True)


def test_less_entropy_than_asked(machine: Machine) -> None:
    """A source that gives less fills less, and the guest is told how much."""
    machine.model._entropy = lambda length: b"few"
    machine.driver.queues[0].add([], [100])
    machine.driver.kick()
    (used,) = machine.driver.queues[0].reap()
    assert (used.length, used.data) == (3, b"few")


def test_more_entropy_than_asked(machine: Machine) -> None:
    """A source that gives more than asked writes nothing beyond the cap."""
    machine.model._entropy = lambda length: bytes(2 * length)
    machine.driver.queues[0].add([], [MAX_REQUEST + 1])
    machine.driver.kick()
    (used,) = machine.driver.queues[0].reap()
    assert used.length == MAX_REQUEST


def test_buffer_outside_memory_needs_a_reset(machine: Machine) -> None:
    """A descriptor that leaves guest memory stops the device, not the machine."""
    queue = machine.driver.queues[0]
    assert isinstance(queue, SplitDriver)
    queue.write_descriptor(0, (4 << 20) - 8, 64, 2)
    queue.make_available(0)
    queue.publish()
    machine.driver.kick()
    assert machine.driver.status & 64
    machine.driver.start()
    machine.driver.queues[0].add([], [16])
    machine.driver.kick()
    assert machine.driver.queues[0].reap()[0].length == 16


def test_configuration_is_empty(machine: Machine) -> None:
    """There is no configuration: it reads as zeros, and writes vanish."""
    assert machine.driver.transport.read(0x100, 4) == bytes(4)
    machine.driver.transport.write(0x100, b"\xff")
    machine.model.write_config(0, b"\xff")
    assert machine.driver.get(0x008) == 4


def test_kick_before_the_driver_is_ready() -> None:
    """A kick on a device that is not started, or on a queue it has not, does nothing."""
    machine = Machine()
    machine.driver.set(0x070, 0)
    for queue in (0, 1, 0xFFFF):
        machine.driver.set(0x050, queue)
        machine.model.process(queue)
    assert machine.asked == []
    machine.memory.close()
