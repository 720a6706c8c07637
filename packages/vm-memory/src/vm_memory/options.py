"""How guest memory is to be treated by the kernel, whatever it is made of."""

from __future__ import annotations

import enum

import attrs

from vm_memory.errors import InvalidValueError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Advice", "Lock", "NumaMode", "NumaPolicy", "Options"]


class Lock(enum.Enum):
    """Which pages must stay in RAM, never to be swapped out."""

    NONE = "none"
    TOUCHED = "touched"
    ALL = "all"


class Advice(enum.IntEnum):
    """What is expected of pages (madvise(2)); their content is not affected."""

    NORMAL = 0
    RANDOM = 1
    SEQUENTIAL = 2
    WILLNEED = 3
    HUGEPAGE = 14
    NOHUGEPAGE = 15
    COLD = 20
    PAGEOUT = 21


class NumaMode(enum.IntEnum):
    """Where pages are taken from (set_mempolicy(2))."""

    PREFERRED = 1
    BIND = 2
    INTERLEAVE = 3


@attrs.frozen
class NumaPolicy:
    """From which NUMA nodes of the host the pages of a region come.

    Attributes:
        mode: bind to the nodes, interleave over them, or prefer one.
        nodes: the nodes' numbers; exactly one for `PREFERRED`.
    """

    mode: NumaMode
    nodes: tuple[int, ...] = attrs.field()

    @nodes.validator
    def _check(self, _attribute: object, nodes: tuple[int, ...]) -> None:
        if not nodes or not all(0 <= node < 1024 for node in nodes):
            raise InvalidValueError("nodes", nodes, "must be one or more numbers from 0 to 1023")
        if self.mode is NumaMode.PREFERRED and len(nodes) != 1:
            raise InvalidValueError("nodes", nodes, "must be a single node that is preferred")


def _check_guard(_instance: object, _attribute: object, guard: int) -> None:
    if not 0 <= guard <= 1 << 40 or guard % 4096:
        nearest = min(max(-(-guard // 4096) * 4096, 0), 1 << 40)
        raise InvalidValueError("guard", guard, f"must be whole pages up to 2**40, as {nearest}")


def _check_prefault(_instance: object, _attribute: object, threads: int) -> None:
    if not 0 <= threads <= 256:
        raise InvalidValueError("prefault", threads, "must be 0 to 256 threads")


@attrs.frozen
class Options:
    """Options of new regions.

    Attributes:
        prefault: touch all pages at once, with so many threads; 0 leaves them for later.
        progress: called during prefault, with the bytes done and the bytes in all, in the thread
            that makes the map. Raising in it abandons the map.
        lock: pages that are never swapped out.
        dump: whether core dumps contain the memory.
        inherit: whether a child of fork has it. In a child that has not, maps are closed and
            views show zeros. Private huge pages are shared with a child only until either side
            writes and the host has no more of them: then the child's are lost.
        guard: bytes of inaccessible address space in front of and behind each region.
        transparent_hugepages: use them or not; None leaves that to the system.
        mergeable: let the kernel merge pages of equal content (KSM).
        numa: where pages come from.
    """

    prefault: int = attrs.field(default=0, validator=_check_prefault)
    progress: Callable[[int, int], None] | None = None
    lock: Lock = Lock.NONE
    dump: bool = True
    inherit: bool = True
    guard: int = attrs.field(default=0, validator=_check_guard)
    transparent_hugepages: bool | None = None
    mergeable: bool = False
    numa: NumaPolicy | None = None
