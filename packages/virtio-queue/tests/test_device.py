"""`VirtioDevice` without a transport: what registers cannot show."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from virtio_queue import MmioTransport, UsageError, VirtioDevice, device
from virtio_queue.constants import DEFAULT_QUEUE_FEATURES, F_RING_RESET, F_VERSION_1
from virtio_queue.testing import ALL_QUEUE_FEATURES, Echo, MmioDriver

if TYPE_CHECKING:
    from vm_memory import GuestMemory


class Plain:
    """A device of the least a model can be: no queue reset, no configuration."""

    device_id = 7
    device_features = DEFAULT_QUEUE_FEATURES
    queue_sizes = (4,)

    def read_config(self, offset: int, length: int) -> bytes:
        return b""

    def write_config(self, offset: int, data: bytes) -> None:
        pass

    def activate(self, *args: object) -> None:
        pass

    def process(self, queue_index: int) -> None:
        pass

    def reset(self) -> None:
        pass


def _device(memory: GuestMemory, model: Plain | Echo) -> tuple[VirtioDevice, MmioDriver]:
    made = VirtioDevice(model, memory, lambda: None)
    return made, MmioDriver(MmioTransport(made, made.process))


def test_version_1_is_always_offered(memory: GuestMemory) -> None:
    """6.3: a device MUST offer VIRTIO_F_VERSION_1, whatever its model says."""
    made, _ = _device(memory, Echo(memory, features=0))
    assert made.device_features == F_VERSION_1


def test_ring_reset_needs_a_model_that_can(memory: GuestMemory) -> None:
    """Offering VIRTIO_F_RING_RESET without the methods for it is refused at once."""

    class Overstating(Plain):
        device_features = DEFAULT_QUEUE_FEATURES | F_RING_RESET

    with pytest.raises(UsageError, match="reset_queue"):
        VirtioDevice(Overstating(), memory, lambda: None)


def test_a_queue_of_an_active_plain_device_stays_ready(memory: GuestMemory) -> None:
    """A model that cannot stop one queue keeps it; before DRIVER_OK any queue can be stopped."""
    made, driver = _device(memory, Plain())
    driver.negotiate(F_VERSION_1)
    driver.set_up_queue(0)
    driver.set(0x044, 0)
    assert driver.get(0x044) == 0
    driver.start()
    driver.set(0x030, 0)
    driver.set(0x044, 0)
    assert driver.get(0x044) == 1
    assert made.refused == 1
    assert made.read_config(0, 4) == bytes(4)
    assert made.read_config(-1, 4) == bytes(4)
    assert made.read_config(0, -1) == b""


def test_failed_stops_a_device(memory: GuestMemory) -> None:
    """2.1: a driver that gave up gets nothing any more, until it resets."""
    made, driver = _device(memory, Echo(memory))
    driver.start()
    driver.queues[0].add([b"x"], [1])
    driver.write_status(0x80 | 15)
    assert not made.active
    driver.kick()
    assert driver.queues[0].reap() == []
    driver.set(0x030, 0)
    driver.set(0x0C0, 1)
    assert made.queues[0].ready
    made.write_config(0, b"X")
    assert made.read_config(0, 1) == b"0"


def test_a_queue_reset_forgives_a_misconfiguration(memory: GuestMemory) -> None:
    """2.6.1: after a queue reset the queue starts from its defaults, and so do its faults."""
    made, driver = _device(memory, Echo(memory))
    driver.negotiate(ALL_QUEUE_FEATURES)
    driver.set(0x030, 1)
    driver.set(0x080, 0x11)
    driver.set(0x030, 0)
    driver.set(0x080, 0x11)
    driver.set(0x0C0, 1)
    assert driver.set_up_queue(0)
    assert not made.status & 0x40
    driver.add_status(4)
    assert made.status & 0x40
    assert "descriptor_area" in made.reset_reason


def test_features_of_a_page_that_does_not_exist(memory: GuestMemory) -> None:
    """Zeros are fine there, anything else is refused."""
    made, driver = _device(memory, Echo(memory))
    driver.add_status(1)
    driver.add_status(2)
    made.write_driver_features(2, 0)
    assert made.refused == 0
    made.write_driver_features(2, 1)
    assert made.refused == 1
    assert made.driver_features == 0


def test_needs_reset_is_said_once(memory: GuestMemory) -> None:
    """The first reason stays, and the driver is interrupted once."""
    calls: list[int] = []
    made = VirtioDevice(Echo(memory), memory, lambda: calls.append(1))
    made.needs_reset("early")
    assert calls == []
    driver = MmioDriver(MmioTransport(made, made.process))
    driver.start()
    made.needs_reset("first")
    made.needs_reset("second")
    assert made.reset_reason == "first"
    assert len(calls) == 1


def test_a_boot_imports_nothing_heavy() -> None:
    """What a VMM needs before its first KVM_RUN brings neither attrs nor typing nor the like."""
    code = (
        "import sys, virtio_queue.device, virtio_queue.mmio; "
        "print(*{'attr', 'attrs', 'typing', 're', 'inspect', 'logging', 'dataclasses', "
        "'contextlib', 'asyncio', 'cffi', 'hypothesis'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.split() == []


def test_protocols_are_found_beside_the_device() -> None:
    """`virtio_queue.device` names the protocols without importing them before they are used."""
    assert device.DeviceModel.__name__ == "DeviceModel"
    assert isinstance(Echo, type)
    with pytest.raises(AttributeError):
        _ = device.nothing_of_that_name
