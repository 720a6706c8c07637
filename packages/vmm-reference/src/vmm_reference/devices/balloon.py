"""A virtio memory balloon: section 5.5 of the virtio specification, version 1.3.

The guest puts pages into the balloon, and the host takes what was behind them; it reports pages
that it does not use, and the host takes those too, until the guest touches them again. A page goes
back to the host only if it is whole and RAM: whatever a driver claims, nothing else is touched.
"""

from __future__ import annotations

from struct import Struct, iter_unpack
from typing import TYPE_CHECKING, ClassVar

import attrs

from virtio_queue.constants import DEFAULT_QUEUE_FEATURES
from vmm_reference.config import parse_size
from vmm_reference.deviceconfig import DeviceConfig
from vmm_reference.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from virtio_queue import DescriptorChain, Queue
    from vm_memory import GuestAddress, GuestMemory
    from vmm_reference.slots import VirtioSlot
    from vmm_reference.wiring import Wiring

    from .states import BalloonState

__all__ = ["PAGE", "STATISTICS", "Balloon", "Controls", "MemoryBalloon", "build"]

PAGE = 4096

# Feature masks, 5.5.3
F_STATS_VQ, F_DEFLATE_ON_OOM, F_FREE_PAGE_HINT, F_REPORTING = 1 << 1, 1 << 2, 1 << 3, 1 << 5

# struct virtio_balloon_config, 5.5.4: num_pages, actual, free_page_hint_cmd_id, poison_val.
CONFIG = Struct("<IIII")
_ACTUAL = 4

CMD_ID_STOP, CMD_ID_DONE = 0, 1
_FIRST_CMD_ID = 2

# What the queues are for, in the order of 5.5.2, and the feature that each needs.
ROLES = {
    "inflate": 0,
    "deflate": 0,
    "statistics": F_STATS_VQ,
    "hints": F_FREE_PAGE_HINT,
    "reports": F_REPORTING,
}
QUEUE_SIZE = 128

STATISTICS = (
    "swap_in", "swap_out", "major_faults", "minor_faults", "free", "total", "available", "caches",
    "hugetlb_allocations", "hugetlb_failures", "oom_kills", "allocation_stalls",
    "pages_scanned_async", "pages_scanned_direct", "pages_reclaimed_async",
    "pages_reclaimed_direct",
)  # fmt: skip
"""Names of the statistics, by their tags (5.5.6.3); those of memory are in bytes."""

_STAT = Struct("<HQ")
_MOST_STATISTICS = 64
_MOST_PAGES = 1 << 14  # page numbers of one buffer; Linux sends 256
BUDGET = 1 << 14  # pages that a call of `process` gives back


class Balloon:
    """A balloon in the guest's memory.

    Args:
        target: pages that the guest should put into it.
        deflate_on_oom: whether the guest may take pages out of it before it runs out of memory.
        hinting: whether the guest can be asked once for what it does not use.
        reporting: whether the guest says all the time what it does not use.
        kick: called with a queue's number when `process` should be called for it.
        config_changed: called when the device has changed its configuration by itself.

    Attributes:
        target: pages that should be in it; change it inside `VirtioDevice.config_change`.
        actual: pages that the driver says are in it.
        statistics: what the guest said last, by name.
        inflated: pages that went into it, so far.
        deflated: pages that came out.
        hinted: pages given back as the hints said.
        reported: pages given back as the reports said.
        refused: pages or ranges that were no whole pages of RAM, and buffers that made no sense.
        hints_done: whether the guest has answered the last `start_hinting`.
        unfinished: whether `process` left something for another call.
    """

    device_id = 5
    queue_sizes = (QUEUE_SIZE,) * len(ROLES)

    def __init__(
        self,
        target: int = 0,
        *,
        deflate_on_oom: bool = True,
        hinting: bool = True,
        reporting: bool = True,
        kick: Callable[[int], None] = lambda _: None,
        config_changed: Callable[[], None] = lambda: None,
    ) -> None:
        self.target = target
        self.actual = 0
        self.statistics: dict[str, int] = {}
        self.inflated = self.deflated = self.hinted = self.reported = self.refused = 0
        self.unfinished = False
        self.device_features = (
            DEFAULT_QUEUE_FEATURES | F_STATS_VQ | F_DEFLATE_ON_OOM * deflate_on_oom
            | F_FREE_PAGE_HINT * hinting | F_REPORTING * reporting
        )  # fmt: skip
        self._kick = kick
        self._config_changed = config_changed
        self._last = _FIRST_CMD_ID - 1  # command that was given
        self._wanted = CMD_ID_STOP  # the command that the guest should answer
        self._answering = CMD_ID_STOP  # the one that it does
        self._asked = False  # for statistics
        self._memory: GuestMemory | None = None
        self._queues: Sequence[Queue] = ()
        self._roles: dict[int, str] = {}
        self._held: DescriptorChain | None = None  # the buffer of statistics, until they are wanted

    @property
    def hints_done(self) -> bool:
        """Whether the guest has answered the last `start_hinting`."""
        return self._wanted in (CMD_ID_STOP, CMD_ID_DONE)

    def metrics(self) -> dict[str, int]:
        """Pages in the balloon, those that went back, and the guest's own statistics."""
        return {
            "target_pages": self.target,
            "actual_pages": self.actual,
            "inflated_pages": self.inflated,
            "deflated_pages": self.deflated,
            "hinted_pages": self.hinted,
            "reported_pages": self.reported,
            "refused": self.refused,
            **{f"guest_{name}": value for name, value in self.statistics.items()},
        }

    def read_config(self, offset: int, length: int) -> bytes:
        """The configuration space, 5.5.4."""
        return CONFIG.pack(self.target, self.actual, self._wanted, 0)[offset : offset + length]

    def write_config(self, offset: int, data: bytes) -> None:
        """The driver says how many pages are in the balloon."""
        config = bytearray(self.read_config(0, CONFIG.size))
        if offset <= _ACTUAL and offset + len(data) >= _ACTUAL + 4:
            config[offset : offset + len(data)] = data
            (self.actual,) = Struct("<I").unpack_from(config, _ACTUAL)

    def activate(self, memory: GuestMemory, driver_features: int, queues: Sequence[Queue]) -> None:
        """The driver is ready."""
        self._memory, self._queues = memory, queues
        self._roles = _roles(driver_features, [queue.ready for queue in queues])
        for number, queue in enumerate(queues):
            chains = list(queue.in_flight) if queue.ready else []
            if chains and self._roles.get(number) == "statistics":
                self._held = chains.pop(0)
            if chains:
                queue.add_used_batch(memory, [(chain.head, 0) for chain in chains])

    def reset(self) -> None:
        """Forget the driver: all pages are its guest's own again."""
        self._memory, self._queues, self._roles = None, (), {}
        self._held = None
        self.actual = 0
        self._wanted = self._answering = CMD_ID_STOP
        self._last = _FIRST_CMD_ID - 1
        self._asked = False
        self.statistics = {}

    def process(self, queue_index: int) -> None:
        """Take what the driver says.

        Raises:
            ChainError: the driver broke a ring.
        """
        self.unfinished = False
        memory = self._memory
        role = self._roles.get(queue_index)
        if memory is None or role is None or not self._queues[queue_index].ready:
            return
        queue = self._queues[queue_index]
        if role == "statistics":
            self._take_statistics(queue, memory)
            return
        left = BUDGET
        while left > 0:
            chain = queue.pop(memory)
            if chain is None:
                self.unfinished = queue.enable_notifications(memory)
                return
            left -= 1 + self._take(role, chain, memory)
            queue.add_used(memory, chain.head, 0)
        self.unfinished = True

    def _take(self, role: str, chain: DescriptorChain, memory: GuestMemory) -> int:
        """Do what one buffer says; returns the number of pages that were given back."""
        before = self.inflated + self.hinted + self.reported
        if role in ("inflate", "deflate"):
            reader = chain.reader(memory)
            if reader.available % 4 or reader.available > 4 * _MOST_PAGES or chain.writable:
                self.refused += 1
                return 0
            pages = [page for (page,) in iter_unpack("<I", reader.read(reader.available))]
            if role == "deflate":
                self.deflated += len(pages)
            else:
                self.inflated += self._give_back(memory, _runs(pages))
        elif role == "reports":
            self.reported += self._give_back(memory, _whole_pages(chain.writable))
        elif chain.readable:
            reader = chain.reader(memory)
            if reader.available != 4:
                self.refused += 1
                return 0
            self._answering = int.from_bytes(reader.read(4), "little")
            if self._answering == CMD_ID_STOP and self._wanted not in (CMD_ID_STOP, CMD_ID_DONE):
                self._wanted = CMD_ID_DONE  # the driver has its pages back with the configuration
                self._config_changed()
        elif self._answering == self._wanted and not self.hints_done:
            # Hints of a command that is over are of pages that may be in use again.
            self.hinted += self._give_back(memory, _whole_pages(chain.writable))
        return self.inflated + self.hinted + self.reported - before

    def _give_back(self, memory: GuestMemory, ranges: Iterable[tuple[int, int]]) -> int:
        """Let the host have what is RAM of some ranges of pages; returns how many pages."""
        done = 0
        for first, count in ranges:
            address: GuestAddress = first * PAGE  # type: ignore[assignment]
            if count and memory.check_range(address, count * PAGE):
                memory.discard(address, count * PAGE)
                done += count
            else:
                self.refused += 1
        return done

    # Statistics -------------------------------------------------------------------------

    def _take_statistics(self, queue: Queue, memory: GuestMemory) -> None:
        """Read statistics, and keep the buffer until new ones are wanted (5.5.6.3)."""
        for _ in range(queue.size):
            if self._held is not None and not self._asked:
                break
            if self._held is not None:
                queue.add_used(memory, self._held.head, 0)
                self._held, self._asked = None, False
            chain = queue.pop(memory)
            if chain is None:
                break
            self._held = chain
            reader = chain.reader(memory)
            data = reader.read(min(reader.available, _MOST_STATISTICS * _STAT.size))
            whole = data[: len(data) // _STAT.size * _STAT.size]
            if whole:
                self.statistics = {
                    STATISTICS[tag]: value
                    for tag, value in _STAT.iter_unpack(whole)
                    if tag < len(STATISTICS)
                }
        self.unfinished = queue.enable_notifications(memory) and self._held is None

    def ask_for_statistics(self) -> None:
        """Have the guest say how it is; `statistics` changes when it has. Under the lock."""
        for number, role in self._roles.items():
            if role == "statistics":
                self._asked = True
                self._kick(number)

    # Hints ------------------------------------------------------------------------------

    def start_hinting(self) -> None:
        """Ask for all pages that are not in use; inside `VirtioDevice.config_change`."""
        self._last = self._last + 1 if self._last < 0xFFFFFFFF else _FIRST_CMD_ID
        self._wanted = self._last

    def stop_hinting(self) -> None:
        """Ask no more; inside `VirtioDevice.config_change`."""
        self._wanted = CMD_ID_DONE

    # State ------------------------------------------------------------------------------

    def save(self) -> BalloonState:
        """Target, size and what was asked for."""
        from .states import BalloonState

        return BalloonState(
            target=self.target,
            actual=self.actual,
            last=self._last,
            wanted=self._wanted,
            answering=self._answering,
        )

    def restore(self, state: BalloonState) -> None:
        """Take up what was saved."""
        self.target, self.actual = state.target, state.actual
        self._last, self._wanted, self._answering = state.last, state.wanted, state.answering


def _roles(features: int, ready: Sequence[bool]) -> dict[int, str]:
    """What each queue is for.

    5.5.2 gives each role its number; Linux before 6.11 leaves no gap where a feature was not
    accepted. Which one it is shows in the queues that the driver has set up.
    """
    negotiated = [
        (number, role)
        for number, (role, feature) in enumerate(ROLES.items())
        if not feature or features & feature
    ]
    if all(ready[number] for number, _ in negotiated):
        return dict(negotiated)
    return {number: role for number, (_, role) in enumerate(negotiated)}


def _runs(pages: Iterable[int]) -> list[tuple[int, int]]:
    """Page numbers as (first, count), neighbours together."""
    runs: list[tuple[int, int]] = []
    for page in sorted(set(pages)):
        if runs and page == sum(runs[-1]):
            runs[-1] = runs[-1][0], runs[-1][1] + 1
        else:
            runs.append((page, 1))
    return runs


def _whole_pages(segments: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The whole pages within some ranges, as (first, count); count is 0 where there is none."""
    found = []
    for address, length in segments:
        first = -(-address // PAGE)
        found.append((first, max((address + length) // PAGE - first, 0)))
    return found


@attrs.frozen
class MemoryBalloon(DeviceConfig):
    """A memory balloon.

    Attributes:
        size: what the guest is to put into it at first, such as `64M`, whole pages of 4 KiB.
        deflate_on_oom: whether the guest may take pages out before it runs out of memory.
        hinting: whether the guest can be asked for what it does not use.
        reporting: whether the guest gives back all the time what it does not use.
    """

    kind: ClassVar[str] = "balloon"
    positional: ClassVar[str] = "size"

    size: str = "0"
    deflate_on_oom: bool = True
    hinting: bool = True
    reporting: bool = True

    def check(self, field: str) -> None:
        """Raise `ConfigError` unless the size is one."""
        super().check(field)
        _pages(self.size, f"{field}.size")
        for name in ("deflate_on_oom", "hinting", "reporting"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{field}.{name}", getattr(self, name), "must be true or false")


def _pages(size: str | int, field: str) -> int:
    length = parse_size(size, field)
    if length % PAGE or not 0 <= length // PAGE <= 0xFFFFFFFF:
        raise ConfigError(field, size, f"must be whole pages of {PAGE} bytes, below 16T")
    return length // PAGE


class Controls:
    """How the owner of a machine reaches its running balloon; from any thread.

    Attributes:
        balloon: the device, for its counters and `statistics`.
    """

    def __init__(self, balloon: Balloon, slot: VirtioSlot) -> None:
        self.balloon = balloon
        self._slot = slot

    def set_size(self, size: str | int) -> None:
        """Have the guest put so much into the balloon, or take it out.

        Raises:
            ConfigError: it is no size in whole pages.
        """
        pages = _pages(size, "size")
        with self._slot.device.lock, self._slot.device.config_change():
            self.balloon.target = pages

    def ask_for_statistics(self) -> None:
        """Have `balloon.statistics` renewed, which takes the guest a moment."""
        with self._slot.device.lock:
            self.balloon.ask_for_statistics()

    def start_hinting(self) -> None:
        """Take from the guest what it does not use now."""
        with self._slot.device.lock, self._slot.device.config_change():
            self.balloon.start_hinting()

    def stop_hinting(self) -> None:
        """Let the guest have its pages again before it has told of all."""
        with self._slot.device.lock, self._slot.device.config_change():
            self.balloon.stop_hinting()


def build(config: MemoryBalloon, wiring: Wiring) -> Controls:
    """A balloon in the machine's memory."""
    balloon = Balloon(
        _pages(config.size, "size"),
        deflate_on_oom=config.deflate_on_oom,
        hinting=config.hinting,
        reporting=config.reporting,
        kick=lambda queue: slot.kick(queue),
        config_changed=lambda: slot.device.config_changed(),
    )
    slot = wiring.virtio(balloon)
    return Controls(balloon, slot)
