"""Where everything goes: computed and checked first, written afterwards."""

from __future__ import annotations

from linux_loader.e820 import ram_ranges
from linux_loader.errors import PlacementError
from vm_memory._values import field, frozen

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from linux_loader.e820 import E820Entry
    from linux_loader.entry import EntryState
    from linux_loader.kinds import Format, Protocol
    from linux_loader.source import Source
    from vm_memory import GuestMemory

__all__ = ["FileRange", "Placement", "Plan"]

_PAGE = 4096
_MAP_AT_LEAST = 64 << 10  # below this, a mapping costs more than the copy it saves


@frozen(kw_only=True)
class FileRange:
    """Bytes that are still in a file."""

    source: Source
    offset: int
    size: int


@frozen
class Placement:
    """One piece of guest memory and what it will hold.

    Attributes:
        name: for the table and for messages.
        address: guest-physical.
        size: bytes that belong to it.
        content: what is written at its beginning; None for room that the guest will use itself.
        zero: whether the bytes behind the content must be zero.
        rom: whether it lies outside RAM, as firmware does.
    """

    name: str
    address: int
    size: int
    content: bytes | FileRange | None = field(default=None, repr=False)
    zero: bool = False
    rom: bool = False

    @property
    def content_size(self) -> int:
        """Bytes of the content."""
        if self.content is None:
            return 0
        return self.content.size if isinstance(self.content, FileRange) else len(self.content)


@frozen
class Plan:
    """What will be where, and how the first processor starts. Printed, it is a table.

    Attributes:
        placements: sorted by address; none overlaps another.
        entry: state of the first processor.
        format: what the kernel's file is.
        protocol: how it is started.
        version: the version string of a boot image's header; empty where there is none.
    """

    placements: tuple[Placement, ...]
    entry: EntryState
    format: Format
    protocol: Protocol
    version: str = ""

    def find(self, name: str) -> Placement:
        """Return the placement of that name.

        Raises:
            KeyError: there is none.
        """
        for placement in self.placements:
            if placement.name == name:
                return placement
        raise KeyError(name)

    def write(self, memory: GuestMemory, *, zeroed: bool = False, map_files: bool = True) -> int:
        """Put the contents into guest memory; nothing outside the placements is touched.

        Args:
            memory: the guest's.
            zeroed: the caller states that this memory is fresh, so what must be zero is so.
            map_files: map large page-aligned pieces of files copy-on-write where the memory
                allows it, instead of copying them.

        Returns:
            How many bytes were mapped instead of copied.

        Raises:
            PlacementError: the memory has a hole where the memory map promised some.
            ImageError: a file changed since it was planned.
        """
        return write_placements(self.placements, memory, zeroed=zeroed, map_files=map_files)

    def __str__(self) -> str:
        """A table: range, size, name, one placement a line."""
        return table(self.placements)


def table(placements: Iterable[Placement]) -> str:
    """Return a table: range, size, name, one placement a line."""
    lines = [
        f"{item.address:#014x}-{end:#014x} {item.size:>12,} {item.name}"
        for item in placements
        for end in (item.address + item.size - 1,)
    ]
    return "\n".join(lines)


def write_placements(
    placements: Sequence[Placement], memory: GuestMemory, *, zeroed: bool, map_files: bool
) -> int:
    """Put contents into guest memory; see `Plan.write`."""
    from vm_memory import GuestAddress

    for placement in placements:
        if not memory.check_range(GuestAddress(placement.address), placement.size):
            raise PlacementError(
                placement.name,
                None,
                placement.address,
                f"its {placement.size:#x} bytes must lie in the guest's memory",
            )
    mapped = 0
    for placement in placements:
        content = placement.content
        if isinstance(content, FileRange):
            mapped += _write_file(memory, placement, content, map_files, zeroed)
        elif content:
            memory.write(GuestAddress(placement.address), content)
        rest = placement.size - placement.content_size
        if rest and placement.zero and not zeroed:
            memory.fill(GuestAddress(placement.address + placement.content_size), rest)
    return mapped


def checked(
    placements: Iterable[Placement], memory_map: tuple[E820Entry, ...]
) -> tuple[Placement, ...]:
    """Return the placements sorted, once it is sure that they lie in RAM and do not overlap.

    Raises:
        PlacementError: one lies outside RAM, or overlaps another.
    """
    ordered = sorted([item for item in placements if item.size], key=lambda item: item.address)
    ram = ram_ranges(memory_map)
    before: Placement | None = None
    for item in ordered:
        end = item.address + item.size
        if before is not None and item.address < before.address + before.size:
            raise PlacementError(
                item.name,
                None,
                item.address,
                f"overlaps {before.name} at {before.address:#x} of {before.size:#x} bytes",
            )
        before = item
        if item.rom or any(start <= item.address and end <= stop for start, stop in ram):
            continue
        raise PlacementError(
            item.name,
            None,
            item.address,
            f"its {item.size:#x} bytes must lie in RAM, which is {describe(ram)}",
        )
    return tuple(ordered)


def describe(ram: list[tuple[int, int]]) -> str:
    """Name RAM ranges for a message."""
    shown = [f"{start:#x}-{stop - 1:#x}" for start, stop in ram[:4]]
    return (", ".join(shown) or "empty") + (", ..." if len(ram) > 4 else "")


def highest_fit(
    ram: list[tuple[int, int]], taken: list[tuple[int, int]], size: int, limit: int
) -> int | None:
    """Return the highest page-aligned address below `limit` where `size` free bytes of RAM are.

    Args:
        ram: ranges of RAM as (start, end).
        taken: ranges that are in use.
        size: bytes wanted.
        limit: the first address that may not be used.
    """
    for start, stop in reversed(ram):
        top = min(stop, limit)
        while True:
            address = (top - size) & -_PAGE
            if address < start or address < 0:
                break
            below = [used for used, end in taken if used < address + size and address < end]
            if not below:
                return address
            top = min(below)
    return None


def lowest_fit(
    ram: list[tuple[int, int]], taken: list[tuple[int, int]], size: int, least: int, alignment: int
) -> int | None:
    """Return the lowest aligned address, `least` or above, where `size` free bytes of RAM are."""
    for start, stop in ram:
        address = (max(start, least) + alignment - 1) & -alignment
        for used_start, used_stop in sorted(taken):
            if used_stop <= address or used_start >= address + size:
                continue
            address = (used_stop + alignment - 1) & -alignment
        if address + size <= stop:
            return address
    return None


def _write_file(
    memory: GuestMemory,
    placement: Placement,
    content: FileRange,
    map_files: bool,
    zeroed: bool,
) -> int:
    """Bring a file's bytes into memory; return how many were mapped."""
    from vm_memory import GuestAddress

    address, offset, size = placement.address, content.offset, content.size
    source = content.source
    head, whole = size, 0
    fd = None
    if map_files and size >= _MAP_AT_LEAST:
        fd = source.mappable(placement.name, offset, size)
    if fd is not None:
        skew = -address % _PAGE
        # Only whole pages: the rest of the last one must not show what follows in the file.
        pages = (size - skew) & -_PAGE
        if (offset + skew) % _PAGE == 0 and memory.map_private_file(
            GuestAddress(address + skew), fd, offset + skew, pages
        ):
            head, whole = skew, pages
    _copy(memory, placement.name, address, source, offset, head, zeroed)
    if whole:
        done = head + whole
        _copy(memory, placement.name, address + done, source, offset + done, size - done, zeroed)
    return whole


def _copy(
    memory: GuestMemory,
    name: str,
    address: int,
    source: Source,
    offset: int,
    size: int,
    zeroed: bool,
) -> None:
    """Read a file's bytes into memory, but for those that are zeros there and here."""
    from vm_memory import GuestAddress, Permissions

    end = offset + size
    for start, stop in source.data_ranges(offset, end) if zeroed else ((offset, end),):
        if start < stop:
            at = GuestAddress(address + start - offset)
            source.read_into(name, start, memory.slices(at, stop - start, Permissions.WRITE))
