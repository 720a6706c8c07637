"""A piece of guest memory from which a driver takes its rings and buffers."""

from __future__ import annotations

from virtio_queue.errors import UsageError

__all__ = ["Arena"]


class Arena:
    """First-fit allocation of guest addresses; touches no memory.

    Args:
        start: first guest address.
        size: bytes.

    Example:
        >>> arena = Arena(0x1000, 0x1000)
        >>> block = arena.allocate(16, align=16)
        >>> hex(block)
        '0x1000'
        >>> arena.free(block)
    """

    def __init__(self, start: int, size: int) -> None:
        self._holes = [(start, size)]
        self._blocks: dict[int, int] = {}

    def allocate(self, length: int, *, align: int = 1) -> int:
        """Return the address of `length` unused bytes; at least one is set aside.

        Raises:
            UsageError: no hole is large enough.
        """
        length = max(length, 1)
        for index, (start, size) in enumerate(self._holes):
            address = -(-start // align) * align
            rest = start + size - address - length
            if rest >= 0:
                parts = [(start, address - start), (address + length, rest)]
                self._holes[index : index + 1] = [part for part in parts if part[1]]
                self._blocks[address] = length
                return address
        raise UsageError("allocate", f"no {length} bytes left in the arena; make it larger")

    def free(self, address: int) -> None:
        """Give a block back.

        Raises:
            UsageError: `address` is not that of a block in use.
        """
        if address not in self._blocks:
            raise UsageError("free", f"{address:#x} is not a block of this arena")
        self._holes.append((address, self._blocks.pop(address)))
        self._holes.sort()
        merged: list[tuple[int, int]] = []
        for start, size in self._holes:
            if merged and merged[-1][0] + merged[-1][1] == start:
                merged[-1] = (merged[-1][0], merged[-1][1] + size)
            else:
                merged.append((start, size))
        self._holes = merged
