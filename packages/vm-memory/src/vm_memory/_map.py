"""The map from guest addresses to regions: immutable, sorted, without overlaps."""

from __future__ import annotations

from bisect import bisect_right

from vm_memory._mapping import PAGE, Mapping
from vm_memory.backing import Adopted, Anonymous
from vm_memory.errors import (
    BackingLostError,
    ClosedError,
    InvalidValueError,
    MemoryAccessError,
    RegionError,
)
from vm_memory.region import GuestRegion, check_region

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Final, Self, TypeAlias

    from vm_memory._table import NativeTable
    from vm_memory.address import GuestAddress
    from vm_memory.backing import Backing
    from vm_memory.dirty import DirtyBitmap
    from vm_memory.options import Options

    Piece: TypeAlias = tuple[GuestRegion, int, int]

__all__ = ["MemoryMap"]

WHY_LOST = (
    "its file was truncated, the file system or the pool of huge pages has no room for them, the "
    "hardware failed, or they were still to be filled in when this process was forked"
)

_EMPTY = memoryview(bytearray())


class _Nowhere:
    """Stands for a region that contains no address, so that fast paths need no test for None."""

    guest_address = 1 << 65
    size = -1
    host_address = 0
    buffer = _EMPTY
    u16 = _EMPTY.cast("H")
    u32 = _EMPTY.cast("I")
    u64 = _EMPTY.cast("Q")
    dirty = None
    mapping: Mapping  # never asked for

    @staticmethod
    def _copy_out(offset: int, size: int, buffer: object, /) -> bool:
        del offset, size, buffer
        return False


NOWHERE: Final = _Nowhere()


class MemoryMap:
    """Regions by address. `GuestMemory` adds the access to what is in them."""

    __slots__ = ("__weakref__", "_closed", "_recent", "_starts", "_table", "regions")

    def __init__(self, regions: Iterable[GuestRegion] = ()) -> None:
        """Make a map of regions, which must be sorted by address and not overlap.

        Args:
            regions: the regions; they may be part of other maps too. None at all is a legal map.

        Raises:
            RegionError: when they overlap or are out of order.
        """
        self.regions: tuple[GuestRegion, ...] = tuple(regions)
        end = 0
        for region in self.regions:
            _check_order(region.guest_address, region.size, end)
            end = region.guest_address + region.size
        self._starts = [region.guest_address for region in self.regions]
        # The region that the last access went to: most accesses go there again. It is never a
        # fragile one, so what is fast needs not ask.
        self._recent: GuestRegion | _Nowhere = NOWHERE
        for region in self.regions:
            if not region.fragile:
                self._recent = region
                break
        self._closed = False
        self._table: NativeTable | None = None
        if not all(region.mapping.lasting for region in self.regions):
            from vm_memory._fork import tell_in_children

            tell_in_children(self)

    @classmethod
    def from_ranges(
        cls,
        ranges: Iterable[tuple[GuestAddress, int]],
        *,
        backing: Backing = Anonymous(),  # noqa: B008, an immutable value
        options: Options | None = None,
        dirty_page_size: int | None = None,
    ) -> Self:
        """Map new memory at each range: zeros, or what is in the backing's file.

        Args:
            ranges: guest address and size in bytes of each region, sorted by address.
            backing: what the memory is made of.
            options: how the kernel is to treat it.
            dirty_page_size: track which pages of so many bytes, a power of two, are written.

        Raises:
            RegionError: when a range is empty, misaligned, overlaps its neighbour or is out of
                order.
            InvalidValueError: when a value of the backing cannot be, on this host at least.
            MappingError: when the host refuses.

        >>> from vm_memory import GuestAddress, GuestMemory
        >>> GuestMemory.from_ranges([(GuestAddress(0), 0x1000), (GuestAddress(0x800), 0x1000)])
        Traceback (most recent call last):
        vm_memory.errors.RegionError: region of 0x1000 bytes at 0x800: it must not start before \
the end of the region in front of it, 0x1000
        """
        wanted = list(ranges)
        end = 0
        for address, size in wanted:
            check_region(address, size)
            _check_order(address, size, end)
            end = address + size
        regions = _create(wanted, backing, dirty_page_size, options)
        if options is not None:
            from vm_memory._policy import apply

            apply(options, [region.mapping for region in regions])
        return cls(regions)

    def find_region(self, address: GuestAddress) -> GuestRegion | None:
        """The region that contains an address, or None."""
        index = bisect_right(self._starts, address) - 1
        if index < 0:
            return None
        region = self.regions[index]
        return region if address < region.guest_address + region.size else None

    def check_range(self, address: GuestAddress, length: int) -> bool:
        """Whether there is memory behind every byte of a range; an empty range always has."""
        if length <= 0:
            return length == 0
        pieces = self._walk(address, length)
        return sum([count for _, _, count in pieces]) == length

    def insert(self, region: GuestRegion) -> Self:
        """A new map with one region more; this one stays as it is.

        Raises:
            RegionError: when it overlaps another.
            ClosedError: when the map was closed.
        """
        self._check_open()
        index = bisect_right(self._starts, region.guest_address)
        return type(self)((*self.regions[:index], region, *self.regions[index:]))

    def remove(self, address: GuestAddress, size: int) -> tuple[Self, GuestRegion]:
        """A new map without the region that has this address and size, and that region.

        Raises:
            RegionError: when no region is exactly there.
            ClosedError: when the map was closed.
        """
        self._check_open()
        index = bisect_right(self._starts, address) - 1
        region = self.regions[index] if index >= 0 else None
        if region is None or region.guest_address != address or region.size != size:
            raise RegionError(address, size, "no region has exactly this address and size")
        return type(self)((*self.regions[:index], *self.regions[index + 1 :])), region

    def holes(self, start: int = 0, end: int | None = None) -> list[tuple[GuestAddress, int]]:
        """The ranges between `start` and `end` without memory, as address and length.

        Args:
            start: where to begin.
            end: the first address not looked at; the end of the last region when None.
        """
        from vm_memory.address import GuestAddress

        result = []
        for region in self.regions:
            if end is not None and region.guest_address >= end:
                break
            if region.guest_address > start:
                result.append((GuestAddress(start), region.guest_address - start))
            start = max(start, region.guest_address + region.size)
        if end is not None and start < end:
            result.append((GuestAddress(start), end - start))
        return result

    @property
    def last_address(self) -> GuestAddress | None:
        """The highest address with memory behind it; None in an empty map."""
        return self.regions[-1].last_address if self.regions else None

    @property
    def size(self) -> int:
        """Bytes of memory, holes not counted."""
        return sum(region.size for region in self.regions)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def close(self) -> None:
        """Let go of the memory; every later access raises `ClosedError`.

        Memory is unmapped when nothing refers to it any more: slices, regions and other maps
        that are still in use keep theirs. Closing twice does nothing.
        """
        self._closed = True
        self._recent = NOWHERE
        self._starts = []
        self._table = None
        self.regions = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        ranges = ", ".join(f"{r.guest_address:#x}+{r.size:#x}" for r in self.regions)
        return f"<{type(self).__name__} {'closed' if self._closed else ranges}>"

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError

    def _in_child(self) -> None:
        """Refuse what a child of fork does not have; look for lost pages where it may lose some."""
        if not all(region.mapping.inherited for region in self.regions):
            self.close()
            return
        for region in self.regions:
            if not region.mapping.lasting:
                region.fragile = True
        self._recent = NOWHERE

    @property
    def native_table(self) -> int:
        """The address of the map as `struct vmm_table`, for C code of any extension.

        The layout is in `native/vm_memory.h`. The pointer is valid until the map is closed or
        gone; who keeps it longer calls the structure's `retain` before, `release` afterwards.

        Raises:
            ClosedError: when the map was closed.
        """
        return self._native().address

    def _native(self) -> NativeTable:
        """The table for C, made when it is first needed. Hold it for as long as C uses it."""
        table = self._table
        if table is None:
            from vm_memory._table import NativeTable

            self._check_open()
            table = NativeTable(self.regions)
            if not self._closed:
                self._table = table
        return table

    def _walk(self, address: int, length: int, *, write: bool = False) -> list[Piece]:
        """Region, offset and count of each piece from `address` on, until done or at a hole."""
        del write  # memory may be written wherever it may be read
        # Bound once: closing the map in another thread cannot pull it away halfway.
        regions = self.regions
        index = bisect_right(self._starts, address) - 1
        pieces: list[Piece] = []
        while length > 0 and 0 <= index < len(regions):
            region = regions[index]
            offset = address - region.guest_address
            count = region.size - offset
            if offset < 0 or count <= 0:
                break
            if count > length:
                count = length
            pieces.append((region, offset, count))
            address += count
            length -= count
            index += 1
        return pieces

    def _pieces(self, address: int, length: int, *, write: bool = False) -> list[Piece]:
        """All pieces of a range, or an exception."""
        region = self._recent
        offset = address - region.guest_address
        if 0 <= offset < offset + length <= region.size:
            return [(region, offset, length)]  # type: ignore[list-item]  # _Nowhere has no size
        if length < 0:
            raise InvalidValueError("length", length, "must not be negative")
        pieces = self._walk(address, length)
        end = address
        if pieces:
            last, offset, count = pieces[-1]
            end = last.guest_address + offset + count
        if end != address + length:
            self._check_open()
            raise MemoryAccessError(address, length, f"there is no memory at {end:#x}")
        if pieces and not last.fragile:
            self._recent = last
            if self._closed:  # by another thread, meanwhile
                self._recent = NOWHERE
        return pieces

    def _wrote(self, address: int, pieces: list[Piece]) -> None:
        """Mark pieces dirty, after they were written."""
        del address
        for region, offset, count in pieces:
            if region.dirty is not None:
                region.dirty.mark(offset, count)

    def _check_lost(self, address: int, length: int, pieces: list[Piece]) -> None:
        """Raise when an access just made may have gone to pages that are lost."""
        for region, _, _ in pieces:
            if region.fragile and region.mapping.lost:
                raise BackingLostError(
                    address,
                    length,
                    f"the region at {region.guest_address:#x} has lost pages: {WHY_LOST}",
                )


def _check_order(address: int, size: int, end: int) -> None:
    if address < end:
        raise RegionError(
            address,
            size,
            f"it must not start before the end of the region in front of it, {end:#x}",
        )


def _create(
    ranges: list[tuple[GuestAddress, int]],
    backing: Backing,
    dirty_page_size: int | None,
    options: Options | None,
) -> list[GuestRegion]:
    """The regions of a new map, all of one backing."""
    guard = 0 if options is None else options.guard
    if isinstance(backing, Anonymous) and backing.hugetlb is None:
        return [
            GuestRegion(
                address,
                size,
                Mapping(size, address, guard=guard),
                backing,
                dirty=_bitmap(size, dirty_page_size),
            )
            for address, size in ranges
        ]
    # Bitmaps first: what can be refused for its value is refused before anything is made.
    bitmaps = [_bitmap(size, dirty_page_size) for _, size in ranges]
    if isinstance(backing, Adopted):
        from vm_memory._adopting import adopt

        if options is not None:
            rule = "must be None: how adopted memory is treated is its owner's business"
            raise InvalidValueError("options", options, rule)
        return adopt(backing, ranges, bitmaps)
    import os

    from vm_memory._files import open_source

    source = open_source(backing, [(int(address), size) for address, size in ranges])
    regions = []
    offset = source.offset
    try:
        for (address, size), bitmap in zip(ranges, bitmaps, strict=True):
            fd = -1 if source.fd < 0 else os.dup(source.fd)
            try:
                mapping = Mapping(
                    size,
                    address,
                    flags=source.flags,
                    fd=fd,
                    offset=0 if fd < 0 else offset,
                    guard=guard,
                    page=source.page,
                )
            except BaseException:
                if fd >= 0:
                    os.close(fd)
                raise
            if source.fragile or source.page != PAGE:
                mapping.watch()
            regions.append(
                GuestRegion(
                    address,
                    size,
                    mapping,
                    backing,
                    file_offset=0 if fd < 0 else offset,
                    dirty=bitmap,
                    fragile=source.fragile,
                )
            )
            offset += mapping.length
    finally:
        if source.fd >= 0:
            os.close(source.fd)
    return regions


def _bitmap(size: int, page_size: int | None) -> DirtyBitmap | None:
    if page_size is None:
        return None
    from vm_memory.dirty import DirtyBitmap

    return DirtyBitmap(size, page_size)
