"""Changing the map of memory under readers that do not stop: memory hotplug.

>>> from vm_memory import GuestAddress, GuestMemory
>>> holder = MemoryHolder(GuestMemory.from_ranges([(GuestAddress(0), 4096)]))
>>> (extra,) = GuestMemory.from_ranges([(GuestAddress(4096), 4096)]).regions
>>> with holder.lock():
...     _ = holder.replace(holder.memory.insert(extra))
>>> holder.memory.size
8192
"""

from __future__ import annotations

import threading

from vm_memory.errors import VmMemoryError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType

    from vm_memory.memory import GuestMemory

__all__ = ["MemoryHolder", "NotLockedError"]


class NotLockedError(VmMemoryError, RuntimeError):
    """A map was to be replaced by a thread that does not hold the lock, or locked by its holder."""


class MemoryHolder:
    """The current map of memory, which can be swapped for another as a whole.

    Readers take `memory` once for each piece of work: reading an attribute needs no lock and sees
    one map or the other, complete. The old map lives until its last reader lets go of it.
    Writers hold the lock from before they read the map until after they replaced it.

    Attributes:
        memory: the map at this moment.
    """

    __slots__ = ("_lock", "_owner", "memory")

    def __init__(self, memory: GuestMemory) -> None:
        """Begin with a map."""
        self.memory = memory
        self._lock = threading.Lock()
        self._owner: int | None = None

    def lock(self) -> MemoryHolder:
        """Wait until no other thread changes the map; a context manager.

        Raises:
            NotLockedError: on entering it, when this thread is in it already.
        """
        return self

    def __enter__(self) -> MemoryHolder:
        if self._owner == threading.get_ident():
            raise NotLockedError("this thread holds the lock already, and would wait for itself")
        self._lock.acquire()
        self._owner = threading.get_ident()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._owner = None
        self._lock.release()

    def replace(self, memory: GuestMemory) -> GuestMemory:
        """Make another map the current one; returns the old one, which is not closed.

        Raises:
            NotLockedError: when this thread does not hold the lock.
        """
        if self._owner != threading.get_ident():
            raise NotLockedError("hold lock() while reading the old map and replacing it")
        old, self.memory = self.memory, memory
        return old
