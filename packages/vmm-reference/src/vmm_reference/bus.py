"""Which device answers an address: one `Bus` for the ports, one for the MMIO space.

Every trapped access of every vCPU goes through `Bus.read` or `Bus.write`, so both are a binary
search over a handful of ranges and one call. What no range claims, or what reaches over the end of
one, behaves as an empty bus does: reads give all ones, writes vanish, and both are counted.
"""

from __future__ import annotations

from _thread import allocate_lock
from bisect import bisect_right

from .errors import VmmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from threading import Lock
    from typing import Protocol
else:
    Protocol = object

__all__ = ["Bus", "BusDevice", "OverlapError"]


class BusDevice(Protocol):
    """A register file. Nothing that a guest passes may make one of these methods raise."""

    def read(self, offset: int, length: int) -> bytes:
        """The `length` bytes at `offset`; exactly that many, whatever the width."""

    def write(self, offset: int, data: bytes) -> None:
        """Store `data` at `offset`; what the device does not have is ignored."""


class OverlapError(VmmError, ValueError):
    """A range can't be claimed: it is outside the bus, or another device has a part of it.

    Attributes:
        start: the first address of the refused range.
        size: its length in bytes.
        rule: what is wrong with it.
    """

    def __init__(self, start: int, size: int, rule: str) -> None:
        super().__init__(start, size, rule)
        self.start = start
        self.size = size
        self.rule = rule

    def __str__(self) -> str:
        return f"range {self.start:#x} of {self.size:#x} bytes: {self.rule}"


# First address, first address behind it, device, offset of the first address, the device's lock.
_Entry = tuple[int, int, BusDevice, int, "Lock"]


class Bus:
    r"""An address space of `size` addresses, from 0, in which devices own ranges.

    vCPU threads access it at the same time: each device is entered under a lock of its own, which
    `lock` hands out so that the I/O thread enters the device in turn with them. Ranges may come
    and go while accesses are under way.

    Attributes:
        unclaimed_reads: reads answered with all ones because no range holds them whole.
        unclaimed_writes: writes that were ignored for the same reason.

    Example:
        >>> class Scratch:
        ...     def read(self, offset, length): return bytes(length)
        ...     def write(self, offset, data): print(offset, data)
        >>> ports = Bus(0x10000)
        >>> ports.add(0x80, 1, Scratch())
        >>> ports.write(0x80, b"*")
        0 b'*'
        >>> ports.read(0x81, 1), ports.unclaimed_reads
        (b'\xff', 1)
    """

    __slots__ = ("_changing", "_table", "size", "unclaimed_reads", "unclaimed_writes")

    def __init__(self, size: int = 1 << 64) -> None:
        self.size = size
        self.unclaimed_reads = 0
        self.unclaimed_writes = 0
        # First addresses and entries, replaced as one value: a reader never sees half a change.
        self._table: tuple[tuple[int, ...], tuple[_Entry, ...]] = ((), ())
        self._changing = allocate_lock()

    def add(
        self,
        start: int,
        size: int,
        device: BusDevice,
        *,
        offset: int = 0,
        lock: Lock | None = None,
    ) -> None:
        """Let `device` answer the `size` addresses from `start`.

        Args:
            start: the first address.
            size: how many addresses, at least 1.
            device: what answers them.
            offset: what the device is told for the first address; for a device whose registers
                lie in more than one range.
            lock: what to hold while in the device. By default the lock of another range of the
                same device on this bus, else a new one.

        Raises:
            OverlapError: the range is empty, leaves the bus, or meets a range that is taken.
        """
        end = start + size
        if size < 1:
            raise OverlapError(start, size, "must hold at least one address")
        if start < 0 or end > self.size:
            raise OverlapError(start, size, f"must lie within the {self.size:#x} addresses")
        with self._changing:
            for first, behind, other, _, _ in self._table[1]:
                if start < behind and first < end:
                    raise OverlapError(
                        start, size, f"meets {first:#x}..{behind - 1:#x} of {type(other).__name__}"
                    )
            if lock is None:
                lock = self._lock_of(device) or allocate_lock()
            self._replace((*self._table[1], (start, end, device, offset, lock)))

    def remove(self, start: int) -> None:
        """Give up the range that begins at `start`.

        Raises:
            KeyError: no range begins there.
        """
        with self._changing:
            left = tuple(entry for entry in self._table[1] if entry[0] != start)
            if len(left) == len(self._table[1]):
                raise KeyError(f"no range begins at {start:#x}")
            self._replace(left)

    def lock(self, device: BusDevice) -> Lock:
        """The lock under which the vCPUs enter `device`.

        Raises:
            KeyError: the device has no range on this bus.
        """
        lock = self._lock_of(device)
        if lock is None:
            raise KeyError(f"{type(device).__name__} has no range on this bus")
        return lock

    def read(self, address: int, length: int) -> bytes:
        """What a guest reads: `length` bytes, little-endian, all ones where nobody answers."""
        starts, entries = self._table
        index = bisect_right(starts, address) - 1
        if index >= 0:
            start, end, device, offset, lock = entries[index]
            if address + length <= end:
                with lock:
                    return device.read(address - start + offset, length)
        self.unclaimed_reads += 1
        return b"\xff" * length

    def write(self, address: int, data: bytes) -> None:
        """What a guest writes: `data` goes to the device that holds its whole range, or nowhere."""
        starts, entries = self._table
        index = bisect_right(starts, address) - 1
        if index >= 0:
            start, end, device, offset, lock = entries[index]
            if address + len(data) <= end:
                with lock:
                    device.write(address - start + offset, data)
                return
        self.unclaimed_writes += 1

    def __iter__(self) -> Iterator[tuple[int, int, BusDevice]]:
        """The ranges as `(start, size, device)`, sorted by address."""
        return iter([(start, end - start, device) for start, end, device, _, _ in self._table[1]])

    def _lock_of(self, device: BusDevice) -> Lock | None:
        return next((entry[4] for entry in self._table[1] if entry[2] is device), None)

    def _replace(self, entries: tuple[_Entry, ...]) -> None:
        entries = tuple(sorted(entries, key=lambda entry: entry[0]))
        self._table = (tuple(entry[0] for entry in entries), entries)
