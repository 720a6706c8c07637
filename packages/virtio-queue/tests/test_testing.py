"""The drivers for tests: what they refuse to do, and what they find in bad devices."""

from __future__ import annotations

import struct
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtio_queue import MmioTransport, PciTransport, Queue, UsageError, VirtioDevice
from virtio_queue.constants import F_IN_ORDER, F_INDIRECT_DESC, F_VERSION_1
from virtio_queue.testing import (
    Arena,
    DeviceRuleError,
    Driver,
    Echo,
    MmioDriver,
    PackedDriver,
    PciDriver,
    SplitDriver,
)
from virtio_queue.testing.strategies import queue_features, split_sizes
from virtio_queue.testing.transport import TransportDriver

if TYPE_CHECKING:
    from collections.abc import Callable

    from vm_memory import GuestMemory

AnyDriver = SplitDriver | PackedDriver
both = pytest.mark.parametrize("kind", [SplitDriver, PackedDriver])


@given(st.lists(st.tuples(st.integers(0, 40), st.sampled_from([1, 2, 16])), max_size=20))
def test_arena_blocks_are_disjoint_and_aligned(wishes: list[tuple[int, int]]) -> None:
    """Blocks lie in the arena, apart from each other; freed ones are joined again."""
    arena = Arena(0x1003, 1000)
    blocks = []
    for length, align in wishes:
        address = arena.allocate(length, align=align)
        assert address % align == 0
        blocks.append((address, max(length, 1)))
    ordered = sorted(blocks)
    for (first, length), (second, _) in pairwise(ordered):
        assert first + length <= second
    assert all(at >= 0x1003 and at + length <= 0x1003 + 1000 for at, length in blocks)
    for address, _ in blocks:
        arena.free(address)
    assert arena.allocate(1000) == 0x1003


def test_arena_refuses_what_it_cannot_do() -> None:
    """A full arena and a block that is none are the caller's errors."""
    arena = Arena(0, 16)
    arena.allocate(9)
    with pytest.raises(UsageError, match="larger"):
        arena.allocate(8)
    with pytest.raises(UsageError, match="not a block"):
        arena.free(3)


@both
def test_a_full_ring_is_said(memory: GuestMemory, kind: type[AnyDriver]) -> None:
    """Nothing is made available, and nothing of the arena is kept, when there is no room."""
    driver = kind(memory, 2, features=F_INDIRECT_DESC, arena=Arena(0x1000, 400))
    for _ in range(20):
        with pytest.raises(UsageError, match="free descriptors"):
            driver.add([b"x" * 10] * 3)
    with pytest.raises(UsageError, match="element"):
        driver.add()
    driver.add([b"a", b"b", b"c"], indirect=True)
    driver.add([b"a"])
    with pytest.raises(UsageError, match="free descriptors"):
        driver.add([b"x"], indirect=True)
    plain = kind(memory, 2, arena=Arena(0x2000, 400))
    with pytest.raises(UsageError, match="F_INDIRECT_DESC"):
        plain.add([b"x"], indirect=True)


def test_bases_say_what_to_use(memory: GuestMemory) -> None:
    """The shared parts of drivers are no drivers."""
    with pytest.raises(UsageError, match="SplitDriver"):
        Driver(memory, 4)
    base = TransportDriver(memory)
    calls: list[Callable[[], object]] = [
        base.read_status,
        lambda: base.write_status(0),
        base.read_features,
        lambda: base.write_features(0),
        lambda: base.queue_limit(0),
        lambda: base.enable_queue(0, SplitDriver(memory, 4)),
    ]
    for call in calls:
        with pytest.raises(UsageError, match="MmioDriver"):
            call()


def _use(driver: AnyDriver, head: int, length: int) -> None:
    """Play a device that writes whatever it likes."""
    if isinstance(driver, SplitDriver):
        slot = driver.last_used % driver.size
        driver.write(driver.device_area + 4 + 8 * slot, struct.pack("<II", head, length))
        driver.store16(driver.device_area + 2, driver.last_used + 1)
    else:
        driver.write_descriptor(driver.next_used, 0, length, head, 0x8082)


@both
def test_bad_devices_are_found(memory: GuestMemory, kind: type[AnyDriver]) -> None:
    """A buffer that is not the device's, and more bytes than fit, break a rule."""
    driver = kind(memory, 4)
    driver.add([b"x"], [4])
    _use(driver, 1, 0)
    with pytest.raises(DeviceRuleError, match="not the device's"):
        driver.reap()
    driver = kind(memory, 4, arena=Arena(0x8000, 4096))
    head = driver.add([b"x"], [4])
    _use(driver, head, 5)
    with pytest.raises(DeviceRuleError, match="buffer of 4") as caught:
        driver.reap()
    assert caught.value.section in ("2.7.8", "2.8.22")


def test_a_used_idx_that_jumps_is_found(memory: GuestMemory) -> None:
    """2.7.8: the device uses only what was made available."""
    driver = SplitDriver(memory, 4)
    driver.add([b"x"])
    driver.store16(driver.device_area + 2, 2)
    with pytest.raises(DeviceRuleError, match="ahead"):
        driver.reap()


@both
def test_2_7_9_a_batch_named_by_its_last_buffer(memory: GuestMemory, kind: type[AnyDriver]) -> None:
    """With IN_ORDER a device may name the last buffer only; the skipped ones are used in full."""
    driver = kind(memory, 8, features=F_IN_ORDER)
    heads = [driver.add([], [4]) for _ in range(3)]
    if isinstance(driver, SplitDriver):
        driver.write(driver.device_area + 4, struct.pack("<II", heads[2], 1))
        driver.store16(driver.device_area + 2, 3)
    else:
        driver.write_descriptor(0, 0, 1, heads[2], 0x8082)
    reaped = [(used.head, used.length) for used in driver.reap()]
    assert reaped == [(heads[0], 4), (heads[1], 4), (heads[2], 1)]


@given(size=split_sizes(), features=queue_features())
def test_strategies_make_what_queues_take(size: int, features: int) -> None:
    """Sizes and features of the strategies can be configured."""
    queue = Queue(64)
    queue.set_features(features)
    queue.set_size(size)
    assert features & F_VERSION_1


class _Stub(TransportDriver):
    """A device that is only a status register, which may refuse steps."""

    def __init__(self, memory: GuestMemory, *, sticky: int, refuses: int, limit: int = 0) -> None:
        super().__init__(memory)
        self.sticky, self.refuses, self.limit = sticky, refuses, limit
        self.value = 0

    def read_status(self) -> int:
        return self.value | self.sticky

    def write_status(self, status: int) -> None:
        self.value = status & ~self.refuses

    def read_features(self) -> int:
        return F_VERSION_1

    def write_features(self, features: int) -> None:
        pass

    def queue_limit(self, index: int) -> int:
        return self.limit

    def enable_queue(self, index: int, driver: AnyDriver) -> bool:
        return False


@pytest.mark.parametrize(
    ("sticky", "refuses", "limit", "rule"),
    [
        (0x40, 0, 0, "not 0 after a reset"),
        (0, 8, 0, "were refused"),
        (0, 0, 4, "does not become ready"),
    ],
)
def test_devices_that_do_not_come_up(
    memory: GuestMemory, sticky: int, refuses: int, limit: int, rule: str
) -> None:
    """No reset, refused features, a queue that stays disabled: each is named."""
    driver = _Stub(memory, sticky=sticky, refuses=refuses, limit=limit)
    with pytest.raises(DeviceRuleError, match=rule):
        driver.start()


def test_queues_that_are_enabled_already(memory: GuestMemory) -> None:
    """A queue that runs before it was set up, over both transports; a vector that is not there."""
    device = VirtioDevice(Echo(memory), memory, lambda: None)
    registers = MmioTransport(device, device.process)
    window = PciTransport(
        device, device.process, vectors=1, msix_enabled=lambda: True,
        signal=lambda _: None, intx=lambda _: None,
    )  # fmt: skip
    for driver in (MmioDriver(registers), PciDriver(window)):
        driver.negotiate(F_VERSION_1)
        assert driver.set_up_queue(0)
        with pytest.raises(DeviceRuleError, match="before it was set up"):
            driver.set_up_queue(0)
    with pytest.raises(UsageError, match="MSI-X"):
        PciDriver(window, queue_vectors=(1,)).start()
