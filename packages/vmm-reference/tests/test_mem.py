"""A virtio memory device: requests against a plain model, and what the owner of a machine does."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virtio_queue.testing.stateful import DeviceMachine
from vm_memory import GuestMemory
from vmm_reference.config import MachineConfig
from vmm_reference.devices.mem import (
    CONFIG,
    REQUEST,
    RESPONSE,
    Memory,
    MemoryDevice,
)
from vmm_reference.devices.states import MemoryDeviceState, StateError
from vmm_reference.errors import ConfigError
from vmm_reference.machine import Machine
from vmm_reference.testing import Bench, tiny_kernel

MIB = 1 << 20
ADDRESS, SIZE, BLOCK, GROUP = 5 << 30, 512 * MIB, 32 * MIB, 128 * MIB
COUNT = SIZE // BLOCK
PLUG, UNPLUG, UNPLUG_ALL, STATE = range(4)
ACK, NACK, BUSY, ERROR = range(4)


class Host:
    """What the device shows and discards."""

    def __init__(self) -> None:
        self.shown: set[int] = set()
        self.discarded: list[tuple[int, int]] = []
        self.fails = False

    def show(self, address: int, size: int, on: bool) -> None:
        assert size == GROUP
        assert (address in self.shown) is not on
        if on and self.fails:
            raise OSError(12, "no memory")
        self.shown ^= {address}

    def discard(self, address: int, size: int) -> None:
        assert ADDRESS <= address < address + size <= ADDRESS + SIZE
        self.discarded.append((address, size))


def made(host: Host, requested: int = 0, node: int | None = None) -> MemoryDevice:
    return MemoryDevice(
        ADDRESS, SIZE, block=BLOCK, requested=requested, node=node,
        show=host.show, discard=host.discard,
    )  # fmt: skip


def ask(bench: Bench, kind: int, first: int = 0, count: int = 1) -> tuple[int, int]:
    """Send one request about blocks; returns the response's type and state."""
    request = REQUEST.pack(kind, ADDRESS + first * BLOCK, count)
    (used,) = bench.send(0, [request], [RESPONSE.size])
    kind, state = RESPONSE.unpack(used.data)
    return kind, state


def config_of(device: MemoryDevice) -> tuple[int, ...]:
    return tuple(CONFIG.unpack(device.read_config(0, CONFIG.size)))


def test_configuration_and_features() -> None:
    """Sizes as they are; a proximity domain only where there is one."""
    device = made(Host(), requested=3 * BLOCK, node=7)
    assert config_of(device) == (BLOCK, 7, ADDRESS, SIZE, SIZE, 0, 3 * BLOCK)
    assert device.device_features & 3 == 3
    assert made(Host()).device_features & 3 == 2
    assert device.read_config(60, 4) == b""


def test_blocks_come_and_go() -> None:
    """No more than requested; each only once; groups are shown while they have a block."""
    host = Host()
    device = made(host, requested=3 * BLOCK)
    bench = Bench(device)
    assert ask(bench, PLUG, 3, 2) == (ACK, 0)
    assert host.shown == {ADDRESS, ADDRESS + GROUP}
    assert ask(bench, PLUG, 4) == (ERROR, 0)
    assert ask(bench, PLUG, 0, 2) == (NACK, 0)
    assert [ask(bench, STATE, *where)[1] for where in ((3, 2), (0, 3), (2, 2))] == [0, 1, 2]
    assert config_of(device)[5] == 2 * BLOCK
    assert ask(bench, UNPLUG, 2, 2) == (ERROR, 0)
    assert ask(bench, UNPLUG, 4) == (ACK, 0)
    assert host.shown == {ADDRESS}
    assert host.discarded == [(ADDRESS + 4 * BLOCK, BLOCK)]
    assert ask(bench, PLUG, COUNT - 1) == (ACK, 0)
    assert ask(bench, UNPLUG_ALL) == (ACK, 0)
    assert (host.shown, device.plugged) == (set(), 0)
    assert device.metrics() == {
        "plugged_bytes": 0, "requested_bytes": 3 * BLOCK, "refused": 3,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "address", "count"),
    [
        (PLUG, ADDRESS + 1, 1),
        (PLUG, ADDRESS - BLOCK, 1),
        (PLUG, ADDRESS, 0),
        (PLUG, ADDRESS + SIZE, 1),
        (PLUG, ADDRESS, COUNT + 1),
        (UNPLUG, ADDRESS + SIZE - BLOCK, 2),
        (STATE, 0, 0xFFFF),
        (STATE, (1 << 64) - BLOCK, 2),
        (9, ADDRESS, 1),
    ],
)
def test_14_requests_outside_the_region_are_errors(kind: int, address: int, count: int) -> None:
    """Sums can't wrap: nothing is shown, nothing is discarded."""
    host = Host()
    bench = Bench(made(host, requested=SIZE))
    (used,) = bench.send(0, [REQUEST.pack(kind, address, count)], [RESPONSE.size])
    assert RESPONSE.unpack(used.data) == (ERROR, 0)
    assert (host.shown, host.discarded) == (set(), [])


def test_short_requests_and_responses_are_counted() -> None:
    """Neither is read or written beyond its end."""
    device = made(Host(), requested=SIZE)
    bench = Bench(device)
    for readable, writable in (([b"\0" * 23], [10]), ([bytes(24)], [9]), ([bytes(24)], [])):
        (used,) = bench.send(0, readable, writable)
        assert used.length == 0
    assert device.refused == 3


def test_a_host_that_has_no_more_is_busy() -> None:
    """Nothing has changed then, and the guest may try again."""
    host = Host()
    device = made(host, requested=SIZE)
    bench = Bench(device)
    assert ask(bench, PLUG, 3) == (ACK, 0)
    host.fails = True
    assert ask(bench, PLUG, 0, COUNT // 2)[0] == ERROR  # block 3 is plugged
    assert ask(bench, PLUG, 4, 8) == (BUSY, 0)
    assert (host.shown, device.plugged) == ({ADDRESS}, BLOCK)
    host.fails = False
    assert ask(bench, PLUG, 4, 8) == (ACK, 0)


def test_a_reset_by_the_driver_changes_no_block() -> None:
    """What is plugged stays plugged (5.15.5.2)."""
    device = made(Host(), requested=SIZE)
    bench = Bench(device)
    ask(bench, PLUG, 2, 5)
    bench.transport.write(0x70, bytes(4))
    bench.driver.start((1 << 64) - 1)
    assert ask(bench, STATE, 2, 5) == (ACK, 0)


@dataclasses.dataclass
class Model:
    """The same in the plainest form: a set of blocks."""

    requested: int
    plugged: set[int] = dataclasses.field(default_factory=set)

    def ask(self, kind: int, first: int, count: int) -> tuple[int, int]:
        if kind == UNPLUG_ALL:
            self.plugged.clear()
            return ACK, 0
        blocks = set(range(first, first + count))
        if not blocks or not blocks <= set(range(COUNT)):
            return ERROR, 0
        have = blocks & self.plugged
        if kind == STATE:
            return ACK, 0 if have == blocks else 2 if have else 1
        if have != (blocks if kind == UNPLUG else set()):
            return ERROR, 0
        if kind == PLUG and len(self.plugged | blocks) * BLOCK > self.requested:
            return NACK, 0
        self.plugged = self.plugged | blocks if kind == PLUG else self.plugged - blocks
        return ACK, 0


requests = st.tuples(
    st.sampled_from([PLUG, PLUG, UNPLUG, STATE, UNPLUG_ALL]),
    st.integers(-1, COUNT),
    st.integers(0, COUNT + 1),
)


@given(st.integers(0, COUNT), st.lists(requests, max_size=40))
def test_against_a_plain_model(requested: int, asked: list[tuple[int, int, int]]) -> None:
    """Answers, sizes and groups are the model's; a restored device is the same."""
    host, model = Host(), Model(requested * BLOCK)
    device = made(host, requested=requested * BLOCK)
    bench = Bench(device)
    for request in asked:
        assert ask(bench, *request) == model.ask(*request)
        assert device.plugged == len(model.plugged) * BLOCK
        assert host.shown == {ADDRESS + n * BLOCK // GROUP * GROUP for n in model.plugged}
    other = Host()
    fresh = made(other)
    fresh.restore(device.save())
    assert (fresh.save(), other.shown, other.discarded) == (device.save(), host.shown, [])


@pytest.mark.parametrize(
    "state",
    [
        MemoryDeviceState(0, ((COUNT, 1),)),
        MemoryDeviceState(0, ((0, COUNT + 1),)),
        MemoryDeviceState(0, ((3, 0),)),
        MemoryDeviceState(0, ((3, 2), (4, 1))),
        MemoryDeviceState(SIZE + 1, ()),
    ],
)
def test_states_of_other_regions_are_refused(state: MemoryDeviceState) -> None:
    """Nothing is shown of them."""
    host = Host()
    device = made(host)
    with pytest.raises(StateError):
        device.restore(state)
    assert (host.shown, device.save()) == (set(), MemoryDeviceState(0, ()))


class MemoryMachine(DeviceMachine):
    """Requests that are nearly right, and anything else."""

    buffers = st.tuples(
        st.one_of(
            st.builds(
                lambda kind, first, count: [REQUEST.pack(kind, ADDRESS + first * BLOCK, count)],
                st.integers(0, 4),
                st.integers(0, COUNT),
                st.integers(0, 0xFFFF),
            ),
            st.lists(st.binary(min_size=1, max_size=30), max_size=2),
        ),
        st.lists(st.sampled_from([1, 9, 10, 64]), max_size=2),
    ).filter(any)

    def make_model(self, memory: GuestMemory) -> MemoryDevice:
        return made(Host(), requested=SIZE // 2)

    def transplant(self, old: MemoryDevice, new: MemoryDevice) -> None:
        new.restore(old.save())


TestMemory = MemoryMachine.TestCase
TestMemory.__doc__ = "A memory device survives any driver."


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (Memory("100M"), "size"),
        (Memory("2T"), "size"),
        (Memory("1G", block="3M"), "block"),
        (Memory("1G", block="1M"), "block"),
        (Memory("1G", requested="1M"), "requested"),
        (Memory("1G", requested="2G"), "requested"),
        (Memory("1G", node=-1), "node"),
        (Memory("many"), "size"),
    ],
)
def test_configurations_that_can_not_be(config: Memory, field: str) -> None:
    """The field is named."""
    with pytest.raises(ConfigError, match=rf"it\.{field}"):
        config.check("it")


FOREVER = """
    PUT 's'
1:  jmp 1b
"""


@pytest.mark.kvm
def test_a_machine_asks_and_keeps_what_was_asked(tmp_path: Path) -> None:
    """By name and size; a guest without a driver takes none; the configuration remembers."""
    path = tmp_path / "kernel"
    path.write_bytes(tiny_kernel(FOREVER))
    config = MachineConfig(kernel=str(path), memory="32M", devices=[Memory("1G", id="more")])
    with Machine(config) as machine:
        machine.console.expect("s", 30)
        machine.resize_memory("512M", "more", timeout=None)
        assert machine.metrics()["more"]["requested_bytes"] == 512 * MIB
        with pytest.raises(TimeoutError, match="has 0 of"):
            machine.resize_memory("256M", "more", timeout=0)
        for size, name in (("2G", "more"), ("1M", "more"), ("512M", "rng0"), ("512M", "none")):
            with pytest.raises(ConfigError):
                machine.resize_memory(size, name)
        with pytest.raises(ConfigError, match="resize it to 0"):
            machine.unplug("more")
        machine.snapshot(tmp_path / "snapshot")
        machine.reset()
        machine.console.expect("s", 30)
        assert machine.metrics()["more"]["requested_bytes"] == 256 * MIB
    with Machine.restore(tmp_path / "snapshot") as machine:
        assert machine.metrics()["more"]["requested_bytes"] == 256 * MIB


@pytest.mark.kvm
def test_memory_can_not_come_with_a_device_plugged_later(tmp_path: Path) -> None:
    """The space is laid out at power-on."""
    path = tmp_path / "kernel"
    path.write_bytes(tiny_kernel(FOREVER))
    config = MachineConfig(kernel=str(path), memory="32M", transport="pci")
    with Machine(config) as machine:
        with pytest.raises(ConfigError, match="from the start"):
            machine.plug(Memory("1G"))
        with pytest.raises(ConfigError, match="memory0"):
            machine.resize_memory("0")
