"""Which pages were written: an atomic bitmap, one bit for each page.

Any thread may mark at any time, C code and the kernel too, while another harvests: each word of 64
pages is taken in one step, so a page is either in this harvest or in the next, and a write that
was marked before its word was taken can be seen by whoever reads the page afterwards.
"""

from __future__ import annotations

from vm_memory._native import ffi, lib
from vm_memory._owner import BITMAP, own
from vm_memory.errors import InvalidValueError, MappingError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from vm_memory._bytes import Buffer
    from vm_memory._native import CData

__all__ = ["DirtyBitmap", "DirtySlice"]

_mark = lib.vmm_bitmap_mark


class DirtyBitmap:
    """The dirty pages of a range of memory; offsets count bytes from its start.

    Attributes:
        size: bytes of memory it tells of.
        page_size: bytes that one bit stands for, a power of two.

    >>> bitmap = DirtyBitmap(1 << 20)
    >>> bitmap.mark(5000, 2)
    >>> bitmap.mark(8191, 2)
    >>> bitmap.harvest()
    [(4096, 8192)]
    >>> bitmap.harvest()
    []
    """

    __slots__ = ("_owner", "handle", "page_size", "size")

    def __init__(self, size: int, page_size: int = 4096) -> None:
        """Make a clean bitmap.

        Raises:
            InvalidValueError: when the page size is no power of two, or the size not 0 to 2**63.
            MappingError: when the host has no memory for it.
        """
        _check_page_size(page_size)
        if not 0 <= size <= 1 << 63:
            raise InvalidValueError("size", size, "must be 0 to 2**63 bytes")
        handle = lib.vmm_bitmap_new(size, page_size.bit_length() - 1)
        if not handle:
            raise MappingError(f"dirty bitmap of {size // page_size} pages", 12)
        self.handle: CData = handle
        self._owner = own(handle, BITMAP)
        self.size = size
        self.page_size = page_size

    def mark(self, offset: int, length: int) -> None:
        """Mark every page that a range touches. What lies past the end is ignored.

        Raises:
            InvalidValueError: when offset or length is negative.
        """
        try:
            _mark(self.handle, offset, length)
        except OverflowError:
            _check(offset, length)
            if offset < self.size:
                _mark(self.handle, offset, self.size - offset)

    def clear(self, offset: int = 0, length: int | None = None) -> None:
        """Forget the marks of every page that a range touches; of all pages by default.

        Raises:
            InvalidValueError: when offset or length is negative.
        """
        length = self.size if length is None else length
        _check(offset, length)
        if offset < self.size:
            lib.vmm_bitmap_clear(self.handle, offset, min(length, self.size - offset))

    def is_dirty(self, offset: int) -> bool:
        """Whether the page of a byte is marked; never past the end."""
        return 0 <= offset < self.size and bool(lib.vmm_bitmap_test(self.handle, offset))

    def count(self) -> int:
        """How many pages are marked."""
        return lib.vmm_bitmap_count(self.handle)

    def harvest(self) -> list[tuple[int, int]]:
        """Take all marks: offset and length of each run of dirty pages, in order."""
        return _coalesce(self.batches(clear=True))

    def ranges(self) -> list[tuple[int, int]]:
        """What `harvest` would return, without taking it."""
        return _coalesce(self.batches(clear=False))

    def batches(
        self,
        *,
        offset: int = 0,
        length: int | None = None,
        clear: bool = True,
        capacity: int = 65536,
    ) -> Iterator[memoryview]:
        """Harvest with bounded memory: batches of offset, length, offset, length, and so on.

        Marks are taken as the iteration goes on. A run that ends with one batch may continue
        at the start of the next.

        Args:
            offset: where to begin; rounded down to a whole word, 64 pages.
            length: how many bytes to look at, rounded up to a whole word; all when None.
            clear: whether to take the marks or only to look.
            capacity: ranges in one batch, 34 to 2**24.

        Yields:
            Views of 64-bit integers. A view is valid until the next step of the iteration.

        Raises:
            InvalidValueError: when an argument is out of its range.
        """
        length = self.size if length is None else length
        _check(offset, length)
        if not 34 <= capacity <= 1 << 24:
            raise InvalidValueError("capacity", capacity, "must be 34 to 2**24")
        word_size = 64 * self.page_size
        words = -(-self.size // word_size)
        position = min(offset // word_size, words)
        end = min(-(-(offset + length) // word_size), words)
        pairs = ffi.new("uint64_t[]", 2 * capacity)
        view = memoryview(ffi.buffer(pairs)).cast("Q")
        following = ffi.new("uint64_t *")
        while position < end:
            count = lib.vmm_bitmap_harvest(
                self.handle, position, end, clear, pairs, capacity, following
            )
            position = following[0]
            if count:
                yield view[: 2 * count]

    def take_words(self) -> bytes:
        """Take all marks as a bitmap: one bit a page, the first page in the lowest bit.

        This is how KVM reports dirty pages, in 64-bit little-endian words.
        """
        words = -(-self.size // (64 * self.page_size))
        target = ffi.new("uint64_t[]", max(words, 1))
        lib.vmm_bitmap_take(self.handle, 0, words, target)
        return bytes(ffi.buffer(target, 8 * words))

    def merge(self, words: Buffer, offset: int = 0, page_size: int = 4096) -> None:
        """Add the marks of another bitmap, such as KVM's dirty log of a slot.

        Args:
            words: whole 64-bit little-endian words, the first page in the lowest bit.
            offset: where its first page lies in this bitmap's range.
            page_size: bytes that one of its bits stands for.

        Raises:
            InvalidValueError: when it is not whole words, or another argument is out of range.
        """
        view = memoryview(words).cast("B")
        if len(view) % 8:
            raise InvalidValueError("words", len(view), "must be whole words of 8 bytes")
        _check_page_size(page_size)
        _check(offset, 0)
        if offset >= self.size:
            return
        pages = min(len(view) * 8, -(-(self.size - offset) // page_size))
        source = ffi.from_buffer(view)
        shift = page_size.bit_length() - 1
        lib.vmm_bitmap_merge(self.handle, offset, source, pages, shift)

    def copy(self, size: int | None = None) -> DirtyBitmap:
        """An independent bitmap with the same marks, for more or less memory if asked."""
        other = DirtyBitmap(self.size if size is None else size, self.page_size)
        for batch in self.batches(clear=False):
            for offset, length in zip(batch[::2], batch[1::2], strict=True):
                other.mark(offset, length)
        return other

    def slice_at(self, offset: int) -> DirtySlice:
        """The same marks seen from `offset` on."""
        _check(offset, 0)
        return DirtySlice(self, offset)

    def __repr__(self) -> str:
        return f"<DirtyBitmap {self.count()} of {-(-self.size // self.page_size)} pages>"


class DirtySlice:
    """A dirty bitmap from an offset on, for code that knows only its own part of memory.

    Attributes:
        bitmap: what it is a part of.
        base: the offset in it that is 0 here.
    """

    __slots__ = ("base", "bitmap")

    def __init__(self, bitmap: DirtyBitmap, base: int) -> None:
        """See `DirtyBitmap.slice_at`."""
        self.bitmap = bitmap
        self.base = base

    def mark(self, offset: int, length: int) -> None:
        """As `DirtyBitmap.mark`."""
        _check(offset, length)
        self.bitmap.mark(self.base + offset, length)

    def is_dirty(self, offset: int) -> bool:
        """As `DirtyBitmap.is_dirty`."""
        return offset >= 0 and self.bitmap.is_dirty(self.base + offset)

    def slice_at(self, offset: int) -> DirtySlice:
        """As `DirtyBitmap.slice_at`."""
        _check(offset, 0)
        return DirtySlice(self.bitmap, self.base + offset)


def _check_page_size(page_size: int) -> None:
    if page_size <= 0 or page_size & (page_size - 1) or page_size > 1 << 48:
        raise InvalidValueError("page_size", page_size, "must be a power of two up to 2**48")


def _check(offset: int, length: int) -> None:
    if offset < 0:
        raise InvalidValueError("offset", offset, "must not be negative")
    if length < 0:
        raise InvalidValueError("length", length, "must not be negative")


def _coalesce(batches: Iterator[memoryview]) -> list[tuple[int, int]]:
    result: list[tuple[int, int]] = []
    for batch in batches:
        pairs = list(zip(batch[::2].tolist(), batch[1::2].tolist(), strict=True))
        if result and sum(result[-1]) == pairs[0][0]:
            pairs[0] = (result[-1][0], result.pop()[1] + pairs[0][1])
        result += pairs
    return result
