"""A virtio memory device (virtio 1.3, section 5.15): memory that the guest takes and gives back.

It has a region of its own in the guest's physical space, in blocks, all unplugged at first. The
machine's owner says how much the guest should have plugged; its driver asks for single blocks then,
or gives some back. Which blocks are plugged is the device's state: a reset by the driver changes
nothing of it, a reset of the machine unplugs all.

The host shows a guest blocks by groups of 128 MiB: in a group that has a plugged block, the others
can be reached too, which is allowed (5.15.6.1) and costs the host memory that the guest could have
had by plugging. A group without one is not there for its processors; devices that it points there
read zeros, and what they write costs the host memory. So `size` bounds what a hostile guest can
have the host spend, and `requested` what a friendly one has.
"""

from __future__ import annotations

import threading
from struct import Struct
from typing import TYPE_CHECKING, ClassVar

import attrs

from virtio_queue.constants import DEFAULT_QUEUE_FEATURES
from vm_memory import GuestAddress
from vmm_reference.config import parse_size
from vmm_reference.deviceconfig import DeviceConfig
from vmm_reference.errors import ConfigError
from vmm_reference.layout import BLOCK

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from virtio_queue import DescriptorChain, Queue
    from vm_memory import GuestMemory
    from vmm_reference.slots import VirtioSlot
    from vmm_reference.wiring import Wiring

    from .states import MemoryDeviceState

__all__ = ["CONFIG", "REQUEST", "RESPONSE", "Controls", "Memory", "MemoryDevice", "build"]

F_ACPI_PXM, F_UNPLUGGED_INACCESSIBLE = 1 << 0, 1 << 1  # 5.15.3

# block_size, node_id, addr, region_size, usable_region_size, plugged_size, requested_size (5.15.4)
CONFIG = Struct("<QH6xQQQQQ")
REQUEST = Struct("<H6xQH6x")  # type, addr, nb_blocks (5.15.6.2)
RESPONSE = Struct("<H6xH")  # type, state

PLUG, UNPLUG, UNPLUG_ALL, STATE = range(4)
ACK, NACK, BUSY, ERROR = range(4)
PLUGGED, UNPLUGGED, MIXED = range(3)

_MIN_BLOCK = 2 << 20  # what a guest maps at once
_MAX_SIZE = 1 << 40


class MemoryDevice:
    """The device.

    Args:
        address: guest-physical, of its region.
        size: of it, whole groups of 128 MiB.
        block: size of a block, a power of two from 2 MiB to 128 MiB.
        requested: bytes that the guest should have plugged at first.
        node: proximity domain of the memory in ACPI, or None.
        show: called with address, size and whether the guest is to see a group.
        discard: called with address and size of what was unplugged.

    Attributes:
        requested: change it inside `VirtioDevice.config_change`.
        plugged: bytes that the guest has plugged.
        refused: requests that could not be, or made no sense.
        changed: set when `plugged` has changed.
        unfinished: whether `process` left something for another call.
    """

    device_id = 24
    queue_sizes = (64,)

    def __init__(
        self,
        address: int,
        size: int,
        *,
        block: int = _MIN_BLOCK,
        requested: int = 0,
        node: int | None = None,
        show: Callable[[int, int, bool], object] = lambda _address, _size, _on: None,
        discard: Callable[[int, int], object] = lambda _address, _size: None,
    ) -> None:
        self.device_features = (
            DEFAULT_QUEUE_FEATURES | F_UNPLUGGED_INACCESSIBLE | F_ACPI_PXM * (node is not None)
        )
        self.requested = requested
        self.plugged = 0
        self.refused = 0
        self.changed = threading.Event()
        self.unfinished = False
        self._address, self._size, self._block = address, size, block
        self._node = node or 0
        self._blocks = bytearray(size // block)  # 1 where plugged
        self._group = BLOCK // block  # blocks in one
        self._shown: set[int] = set()  # groups that the guest sees
        self._show, self._discard = show, discard
        self._memory: GuestMemory | None = None
        self._queue: Queue | None = None

    def metrics(self) -> dict[str, int]:
        """How much the guest has and should have, and requests that were refused."""
        return {
            "plugged_bytes": self.plugged,
            "requested_bytes": self.requested,
            "refused": self.refused,
        }

    def read_config(self, offset: int, length: int) -> bytes:
        """The configuration space, 5.15.4."""
        config = CONFIG.pack(
            self._block, self._node, self._address, self._size, self._size, self.plugged,
            self.requested,
        )  # fmt: skip
        return config[offset : offset + length]

    def write_config(self, offset: int, data: bytes) -> None:
        """All of it is read-only."""

    def activate(self, memory: GuestMemory, driver_features: int, queues: Sequence[Queue]) -> None:
        """The driver is ready."""
        self._memory, self._queue = memory, queues[0]

    def reset(self) -> None:
        """Forget the driver; its memory stays as it is (5.15.5.2)."""
        self._memory = self._queue = None

    def process(self, queue_index: int) -> None:
        """Answer requests, at most a ring's worth.

        Raises:
            ChainError: the driver broke the ring.
        """
        memory, queue = self._memory, self._queue
        if memory is not None and queue is not None and queue_index == 0:
            self.unfinished = queue.serve(memory, lambda chain: self._serve(chain, memory))

    def _serve(self, chain: DescriptorChain, memory: GuestMemory) -> int:
        reader, writer = chain.reader(memory), chain.writer(memory)
        if reader.available < REQUEST.size or writer.available < RESPONSE.size:
            self.refused += 1
            return 0
        answer, state = self._answer(*REQUEST.unpack(reader.read(REQUEST.size)))
        self.refused += answer in (NACK, ERROR)
        return writer.write(RESPONSE.pack(answer, state))

    def _answer(self, kind: int, address: int, count: int) -> tuple[int, int]:
        """Do what a request says; returns a response's type and, of blocks, the state."""
        if kind == UNPLUG_ALL:
            for first, length in self._runs():
                self._change(first, length, plug=False)
            return ACK, 0
        first, misaligned = divmod(address - self._address, self._block)
        end = first + count
        if kind > STATE or misaligned or not count or first < 0 or end > len(self._blocks):
            return ERROR, 0
        have = self._blocks.count(1, first, end)
        if kind == STATE:
            return ACK, PLUGGED if have == count else UNPLUGGED if not have else MIXED
        if have != (count if kind == UNPLUG else 0):
            return ERROR, 0
        if kind == PLUG and self.plugged + count * self._block > self.requested:
            return NACK, 0
        return (ACK if self._change(first, count, plug=kind == PLUG) else BUSY), 0

    def _change(self, first: int, count: int, *, plug: bool) -> bool:
        """Plug blocks that are unplugged, or the other way round; whether the host could."""
        where = slice(first, first + count)
        groups = range(first // self._group, (first + count - 1) // self._group + 1)
        self._blocks[where] = bytes([plug]) * count
        try:
            self._show_what_has_blocks(groups)
        except OSError:  # no slot of KVM's, no memory for its tables
            self._blocks[where] = bytes([not plug]) * count
            self._show_what_has_blocks(groups)
            return False
        self.plugged += (count if plug else -count) * self._block
        if not plug:
            self._discard(self._address + first * self._block, count * self._block)
        self.changed.set()
        return True

    def _show_what_has_blocks(self, groups: range) -> None:
        for group in groups:
            first = group * self._group
            has = self._blocks.find(1, first, first + self._group) >= 0
            if has != (group in self._shown):
                self._show(self._address + group * BLOCK, BLOCK, has)
                self._shown ^= {group}

    def _runs(self) -> list[tuple[int, int]]:
        """First block and number of blocks of each run that is plugged."""
        runs, end = [], 0
        while (first := self._blocks.find(1, end)) >= 0:
            end = self._blocks.find(0, first)
            end = len(self._blocks) if end < 0 else end
            runs.append((first, end - first))
        return runs

    def save(self) -> MemoryDeviceState:
        """What is plugged, and how much should be."""
        from .states import MemoryDeviceState

        return MemoryDeviceState(self.requested, tuple(self._runs()))

    def restore(self, state: MemoryDeviceState) -> None:
        """Take over what was saved, into a device that has nothing plugged.

        Raises:
            StateError: it is of another region.
        """
        from .states import StateError

        end = 0
        for first, count in state.plugged:
            if first < end or not count or first + count > len(self._blocks):
                rule = f"must be runs of {len(self._blocks)} blocks, sorted"
                raise StateError("MemoryDeviceState.plugged", state.plugged, rule)
            end = first + count
        if state.requested > self._size:
            rule = f"must be at most {self._size}"
            raise StateError("MemoryDeviceState.requested", state.requested, rule)
        self.requested = state.requested
        for first, count in state.plugged:
            self._blocks[first : first + count] = b"\1" * count
        self.plugged = self._blocks.count(1) * self._block
        self._show_what_has_blocks(range(self._size // BLOCK))


@attrs.frozen
class Memory(DeviceConfig):
    """Memory that the guest takes and gives back as the machine's owner says.

    Attributes:
        size: the most that it may be, such as `4G`, a multiple of 128M; it costs the host nothing
            until the guest uses it.
        requested: how much the guest should have at first, whole blocks.
        block: the unit in which it comes and goes, a power of two from 2M to 128M.
        node: proximity domain of the memory in ACPI, or None.
    """

    kind: ClassVar[str] = "memory"
    positional: ClassVar[str] = "size"

    size: str
    requested: str = "0"
    block: str = "2M"
    node: int | None = None

    @property
    def reserved_memory(self) -> int:
        """All of it."""
        return parse_size(self.size, "size")

    def check(self, field: str) -> None:
        """Raise `ConfigError` unless the sizes fit each other."""
        super().check(field)
        size = parse_size(self.size, f"{field}.size")
        if size % BLOCK or not BLOCK <= size <= _MAX_SIZE:
            raise ConfigError(f"{field}.size", self.size, "must be a multiple of 128M, 1T at most")
        block = parse_size(self.block, f"{field}.block")
        if block & block - 1 or not _MIN_BLOCK <= block <= BLOCK:
            raise ConfigError(f"{field}.block", self.block, "must be a power of two, 2M to 128M")
        requested_bytes(self, self.requested, f"{field}.requested")
        node: object = self.node
        if node is not None and not (type(node) is int and 0 <= node < 1 << 16):
            raise ConfigError(f"{field}.node", node, "must be a whole number from 0 to 65535")


def requested_bytes(config: Memory, requested: str | int, field: str) -> int:
    """How much the guest should have, in bytes.

    Raises:
        ConfigError: it is no whole number of blocks, or more than the device has.
    """
    length = parse_size(requested, field)
    block, size = parse_size(config.block), parse_size(config.size)
    if length % block or not 0 <= length <= size:
        rule = f"must be whole blocks of {config.block}, {config.size} at most"
        raise ConfigError(field, requested, rule)
    return length


class Controls:
    """How the owner of a machine reaches its running device; from any thread.

    Attributes:
        device: for its counters.
    """

    def __init__(self, config: Memory, device: MemoryDevice, slot: VirtioSlot) -> None:
        self.device = device
        self._config = config
        self._slot = slot

    def request(self, size: str | int) -> int:
        """Have the guest take so much, or give back what is more; returns the bytes.

        Raises:
            ConfigError: it can't have so much.
        """
        length = requested_bytes(self._config, size, "size")
        with self._slot.device.lock, self._slot.device.config_change():
            self.device.requested = length
        return length


def build(config: Memory, wiring: Wiring) -> Controls:
    """A device in the part of the machine's memory that is its own."""
    address, size = wiring.area()
    wiring.announce_memory(address, size, config.node or 0)

    def show(start: int, length: int, on: bool) -> None:
        if on:
            wiring.show_memory(start, length)
        else:
            wiring.hide_memory(start)

    device = MemoryDevice(
        address,
        size,
        block=parse_size(config.block),
        requested=parse_size(config.requested),
        node=config.node,
        show=show,
        discard=lambda start, length: wiring.memory.discard(GuestAddress(start), length),
    )
    slot = wiring.virtio(device)
    return Controls(config, device, slot)
