"""For tests of code that uses guest memory: a plain model of it, and Hypothesis strategies.

The model is a dictionary of bytes with holes. It knows nothing of regions, pages or host memory,
and so is the oracle for this package's own tests. Needs the extra `vm-memory[testing]`.
"""

from __future__ import annotations

import attrs
from hypothesis import strategies as st

from vm_memory.address import GuestAddress

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vm_memory.memory import GuestMemory

__all__ = ["MemoryModel", "RegionModel", "addresses_near", "range_lists"]


@attrs.define(eq=False)
class RegionModel:
    """What a region contains, wherever it is mapped.

    Attributes:
        data: its bytes.
        dirty: the offsets of bytes that were written and not harvested yet.
    """

    data: bytearray
    dirty: set[int] = attrs.field(factory=set)


@attrs.define(eq=False)
class MemoryModel:
    """A map of memory as a dictionary: from address to region and offset.

    Attributes:
        bytes_at: where each byte is that there is.
    """

    bytes_at: dict[int, tuple[RegionModel, int]] = attrs.field(factory=dict)

    def with_region(self, start: int, region: RegionModel) -> MemoryModel:
        """A new map with one region more."""
        extra = {start + offset: (region, offset) for offset in range(len(region.data))}
        return MemoryModel({**self.bytes_at, **extra})

    def without(self, region: RegionModel) -> MemoryModel:
        """A new map without a region."""
        return MemoryModel(
            {at: what for at, what in self.bytes_at.items() if what[0] is not region}
        )

    def available(self, address: int, length: int) -> int:
        """How many bytes there are from an address to the first hole, `length` at most."""
        count = 0
        while count < length and address + count in self.bytes_at:
            count += 1
        return count

    def read(self, address: int, length: int) -> bytes | None:
        """The bytes of a range; None if it has a hole."""
        if self.available(address, length) != length:
            return None
        places = [self.bytes_at[address + i] for i in range(length)]
        return bytes([region.data[offset] for region, offset in places])

    def write(self, address: int, data: bytes) -> bool:
        """Write bytes and mark them dirty; whether there was no hole."""
        if self.available(address, len(data)) != len(data):
            return False
        for i, value in enumerate(data):
            region, offset = self.bytes_at[address + i]
            region.data[offset] = value
            region.dirty.add(offset)
        return True

    def dirty(self, page_size: int) -> set[int]:
        """The addresses of all bytes in pages that were written, counted from each region."""
        pages = {
            (id(region), offset // page_size)
            for region, _ in self.bytes_at.values()
            for offset in region.dirty
        }
        return {
            address
            for address, (region, offset) in self.bytes_at.items()
            if (id(region), offset // page_size) in pages
        }

    def clean(self) -> None:
        """Forget what was written."""
        for region, _ in self.bytes_at.values():
            region.dirty.clear()

    def agrees_with(self, memory: GuestMemory) -> bool:
        """Whether a memory has exactly these bytes."""
        found = {
            region.guest_address + offset: value
            for region in memory.regions
            for offset, value in enumerate(bytes(region.buffer))
        }
        return found == {at: region.data[off] for at, (region, off) in self.bytes_at.items()}


@st.composite
def range_lists(
    draw: st.DrawFn, *, most: int = 4, largest: int = 64, bases: tuple[int, ...] = (0, 1 << 32)
) -> list[tuple[GuestAddress, int]]:
    """Ranges for `GuestMemory.from_ranges`: sorted, some adjacent, some with holes between.

    Args:
        draw: given by Hypothesis.
        most: how many ranges at most.
        largest: bytes of the largest range.
        bases: where the first may start.
    """
    at = draw(st.sampled_from(bases)) + 8 * draw(st.integers(0, 2))
    ranges = []
    for _ in range(draw(st.integers(0, most))):
        size = draw(st.integers(1, largest))
        ranges.append((GuestAddress(at), size))
        gap = draw(st.sampled_from([0, 0, 8, 16]))
        at += -(-size // 8) * 8 + gap
    return ranges


def addresses_near(ranges: list[tuple[GuestAddress, int]]) -> st.SearchStrategy[GuestAddress]:
    """Addresses around the edges of ranges, inside them, and where integers have theirs."""
    edges = {0, 1 << 32, 1 << 47, 1 << 52, 1 << 64}
    for start, size in ranges:
        edges |= {start, start + size}
    near = st.builds(lambda edge, by: GuestAddress(edge + by), st.sampled_from(sorted(edges)),
                     st.integers(-9, 9))  # fmt: skip
    inside = [st.integers(start, start + size - 1).map(GuestAddress) for start, size in ranges]
    return st.one_of(near, *inside)
