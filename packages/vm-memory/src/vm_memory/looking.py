"""Looking into memory: search, hexdump, sparse export and comparison, for debuggers and snapshots.

Search for bytes, export and comparison stay away from pages that nothing ever touched, save a few
at borders, so looking through a large, mostly empty memory is quick and allocates next to nothing.

>>> from vm_memory import GuestAddress, GuestMemory
>>> memory = GuestMemory.from_ranges([(GuestAddress(0), 1 << 30)])
>>> memory.write(GuestAddress(0x12345), b"Linux version 6.1")
>>> [hex(address) for address in search(memory, b"Linux version")]
['0x12345']
>>> print(hexdump(memory, GuestAddress(0x12340), 32))
00012340  00 00 00 00 00 4c 69 6e  75 78 20 76 65 72 73 69  |.....Linux versi|
00012350  6f 6e 20 36 2e 31 00 00  00 00 00 00 00 00 00 00  |on 6.1..........|
"""

from __future__ import annotations

import os
from itertools import pairwise

from vm_memory._mapping import MAP_ANONYMOUS, MAP_SHARED, PAGE
from vm_memory._native import ffi, lib
from vm_memory.address import GuestAddress
from vm_memory.errors import InvalidValueError, MemoryAccessError, TransferError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import re
    from collections.abc import Iterable, Iterator

    from vm_memory.memory import GuestMemory
    from vm_memory.region import GuestRegion
    from vm_memory.transfer import File

__all__ = [
    "compare",
    "data_ranges",
    "export_sparse",
    "hexdump",
    "import_sparse",
    "search",
    "search_pattern",
]

# How much is looked at in one step. A match of a pattern is found if it is not longer than this.
_WINDOW = 1 << 20
# Of the top bytes of entries: bits 63 and 62 tell that a page is in memory, or in swap
# (Documentation/admin-guide/mm/pagemap.rst).
_TOUCHED = bytes(top >> 6 != 0 for top in range(256))


def search(
    memory: GuestMemory, needle: bytes, start: int = 0, end: int | None = None
) -> Iterator[GuestAddress]:
    """Every address at which some bytes are found, overlapping occurrences too, in order.

    Args:
        memory: where to look; a match may span adjacent regions.
        needle: what to look for, at least one byte.
        start: the first address of a match.
        end: the first address that no match may reach beyond; the end of memory when None.

    Raises:
        InvalidValueError: when the needle is empty.
    """
    if not needle:
        raise InvalidValueError("needle", needle, "must not be empty")
    source = ffi.from_buffer(needle)
    for span_start, pieces in _spans(memory, start, end):
        tail = b""
        position = span_start
        for region, offset, count in pieces:
            # Matches across the border: the last bytes in front of it with the first behind.
            if tail:
                head = bytes(region.buffer[offset : offset + min(count, len(needle) - 1)])
                joined = tail + head
                at = joined.find(needle)
                while 0 <= at < len(tail):
                    yield GuestAddress(position - len(tail) + at)
                    at = joined.find(needle, at + 1)
            for first, length in _touched(region, offset, count, len(needle), needle):
                done = 0
                while True:
                    host = region.host_address + first + done
                    at = lib.vmm_find(host, length - done, source, len(needle))
                    if at < 0:
                        break
                    yield GuestAddress(position + first - offset + done + at)
                    done += at + 1
            keep = len(needle) - 1
            if keep:
                last = bytes(region.buffer[max(offset, offset + count - keep) : offset + count])
                tail = (tail + last)[-keep:]
            position += count


def search_pattern(
    memory: GuestMemory, pattern: re.Pattern[bytes], start: int = 0, end: int | None = None
) -> Iterator[tuple[GuestAddress, bytes]]:
    """Every match of a regular expression over bytes: its address and what it matched.

    Matches do not overlap. One that is longer than 1 MiB may be missed or cut.

    Args:
        memory: where to look; a match may span adjacent regions.
        pattern: compiled from bytes. Anchors and look-around see the window that is looked at.
        start: the first address of a match.
        end: the first address that no match may reach beyond; the end of memory when None.
    """
    for span_start, pieces in _spans(memory, start, end):
        length = sum(count for _, _, count in pieces)
        position = 0
        while position < length:
            size = min(2 * _WINDOW, length - position)
            window = memory.read(GuestAddress(span_start + position), size)
            final = position + size == length
            following = position + (size if final else _WINDOW)
            for match in pattern.finditer(window):
                if match.start() >= _WINDOW and not final:
                    break
                if match.end() > match.start():
                    yield GuestAddress(span_start + position + match.start()), match.group()
                    following = max(following, position + match.end())
            position = following


def hexdump(memory: GuestMemory, address: GuestAddress, length: int) -> str:
    """Sixteen bytes a line, with their address and text; `--` where there is no memory."""
    lines = []
    end = address + length
    for row in range(address & ~15, end, 16):
        codes, text = [], []
        for at in range(row, row + 16):
            if not address <= at < end:
                code, char = "  ", " "
            elif memory.check_range(GuestAddress(at), 1):
                value = memory.read_u8(GuestAddress(at))
                code, char = f"{value:02x}", chr(value) if 32 <= value < 127 else "."
            else:
                code, char = "--", " "
            codes.append(code)
            text.append(char)
        half = " ".join(codes[:8]) + "  " + " ".join(codes[8:])
        lines.append(f"{row:08x}  {half}  |{''.join(text)}|")
    return "\n".join(lines)


def data_ranges(
    memory: GuestMemory,
    page_size: int = PAGE,
    within: Iterable[tuple[int, int]] | None = None,
) -> Iterator[tuple[GuestAddress, int]]:
    """The ranges of pages that are not all zero: address and length, in order, coalesced.

    Args:
        memory: where to look.
        page_size: what counts as a page, from the start of each region or range.
        within: look at these alone, address and length, each in one region and in order.

    Raises:
        MemoryAccessError: one of `within` is not in a region.
    """
    _check_page(page_size)
    zero = ffi.new("int *")
    start = end = -1
    if within is None:
        looked_at = ((region, 0, region.size) for region in memory.regions)
    else:
        looked_at = ((*_place(memory, address, size), size) for address, size in within)
    for region, offset, size in looked_at:
        # For a short range it costs less to look at its pages than to ask which were touched.
        short = within is not None and size <= _WINDOW
        for first, length in [(offset, size)] if short else _touched(region, offset, size):
            done = 0
            while done < length:
                host = region.host_address + first + done
                count = lib.vmm_zero_run(host, min(length - done, 64 << 20), page_size, zero)
                if not zero[0]:
                    at = region.guest_address + first + done
                    if at != end:
                        if end > start:
                            yield GuestAddress(start), end - start
                        start = at
                    end = at + count
                done += count
    if end > start:
        yield GuestAddress(start), end - start


def _place(memory: GuestMemory, address: int, size: int) -> tuple[GuestRegion, int]:
    """The region that holds a range, and where in it."""
    region = memory.find_region(GuestAddress(address))
    if region is None or address + size > region.guest_address + region.size:
        raise MemoryAccessError(address, size, "is not in one region")
    return region, address - region.guest_address


def export_sparse(memory: GuestMemory, file: File) -> int:
    """Write memory to a file with holes where it is all zero; returns the bytes of data.

    The regions lie in the file one behind the other, each at the next multiple of the page size,
    as `FilePrivate` and `FileShared` map them.

    Args:
        memory: what to write.
        file: a regular file open for writing; its length is set, and what was in it replaced.

    Raises:
        TransferError: when a system call fails.
    """
    fd = file if isinstance(file, int) else file.fileno()
    written = 0
    offsets = _file_offsets(memory)
    try:
        os.ftruncate(fd, 0)
        os.ftruncate(fd, offsets[-1])
    except OSError as error:
        raise TransferError(0, offsets[-1], 0, error.errno or 0) from error
    for address, length in data_ranges(memory):
        done = 0
        while done < length:
            at = GuestAddress(address + done)
            region = memory.find_region(at)
            if region is None:
                break
            inside = at - region.guest_address
            count = min(length - done, region.size - inside)
            place = offsets[memory.regions.index(region)] + inside
            memory.write_all_to_file(at, fd, count, place)
            done += count
        written += length
    return written


def import_sparse(memory: GuestMemory, file: File) -> int:
    """Read what `export_sparse` wrote into memory of the same regions; returns the bytes read.

    Holes of the file are not read: the memory must be new, or discarded before.

    Raises:
        InvalidValueError: when the file has not the length of these regions.
        TransferError: when a system call fails.
    """
    fd = file if isinstance(file, int) else file.fileno()
    offsets = _file_offsets(memory)
    size = os.fstat(fd).st_size
    if size != offsets[-1]:
        raise InvalidValueError("file", size, f"must have {offsets[-1]} bytes for these regions")
    total = 0
    for region, start in zip(memory.regions, offsets, strict=False):
        position = start
        while position < start + region.size:
            try:
                position = os.lseek(fd, position, os.SEEK_DATA)
                end = min(os.lseek(fd, position, os.SEEK_HOLE), start + region.size)
            except OSError:
                break  # nothing but a hole behind
            if position < end:
                at = GuestAddress(region.guest_address + position - start)
                memory.read_exact_from_file(at, fd, end - position, position)
                total += end - position
            position = max(end, position)
    return total


def compare(
    one: GuestMemory, other: GuestMemory, page_size: int = PAGE
) -> Iterator[tuple[GuestAddress, int]]:
    """Where two memories differ: address and length of runs of pages, in order.

    What only one of them has counts as different. Pages are counted from the start of each
    common piece.
    """
    _check_page(page_size)
    edges = sorted(
        {edge for memory in (one, other) for r in memory.regions
         for edge in (r.guest_address, r.guest_address + r.size)}
    )  # fmt: skip
    start = end = -1
    for first, behind in pairwise(edges):
        mine, its = one.find_region(GuestAddress(first)), other.find_region(GuestAddress(first))
        if mine is not None and its is not None:
            different = _differences(mine, its, first, behind - first, page_size)
        elif mine is not None or its is not None:
            different = iter([(first, behind - first)])
        else:
            continue
        for at, count in different:
            if at != end:
                if end > start:
                    yield GuestAddress(start), end - start
                start = at
            end = at + count
    if end > start:
        yield GuestAddress(start), end - start


def _differences(
    one: GuestRegion, other: GuestRegion, first: int, length: int, page_size: int
) -> Iterator[tuple[int, int]]:
    """Where two regions differ from address `first` on. Untouched in both is equal."""
    equal = ffi.new("int *")
    mine, its = first - one.guest_address, first - other.guest_address
    touched = [(start - mine, count) for start, count in _touched(one, mine, length)]
    touched += [(start - its, count) for start, count in _touched(other, its, length)]
    done = 0
    for start, count in sorted(touched):
        done = max(done, start // page_size * page_size)
        end = min(-(-(start + count) // page_size) * page_size, length)
        while done < end:
            count = lib.vmm_equal_run(
                one.host_address + mine + done,
                other.host_address + its + done,
                min(end - done, max(_WINDOW // page_size, 1) * page_size),
                page_size,
                equal,
            )
            if not equal[0]:
                yield first + done, count
            done += count


def _check_page(page_size: int) -> None:
    if page_size <= 0:
        raise InvalidValueError("page_size", page_size, "must be at least 1")


def _file_offsets(memory: GuestMemory) -> list[int]:
    offsets = [0]
    for region in memory.regions:
        offsets.append(offsets[-1] + -(-region.size // PAGE) * PAGE)
    return offsets


def _spans(
    memory: GuestMemory, start: int, end: int | None
) -> Iterator[tuple[int, list[tuple[GuestRegion, int, int]]]]:
    """Stretches of adjacent regions between two addresses, cut to them."""
    pieces: list[tuple[GuestRegion, int, int]] = []
    first = behind = -1
    for region in memory.regions:
        low = max(region.guest_address, start)
        high = region.guest_address + region.size
        high = high if end is None else min(high, end)
        if low >= high:
            continue
        if low != behind:
            if pieces:
                yield first, pieces
            first, pieces = low, []
        pieces.append((region, low - region.guest_address, high - low))
        behind = high
    if pieces:
        yield first, pieces


def _touched(
    region: GuestRegion, offset: int, length: int, overlap: int = 1, needle: bytes = b"\1"
) -> Iterator[tuple[int, int]]:
    """The parts of a range that may be anything but zeros: offset and length.

    Args:
        region: of which region.
        offset: where the range begins.
        length: how long it is.
        overlap: what is looked for has this many bytes, so parts are widened by one byte less.
        needle: what is looked for; when it could lie in zeros alone, everything is looked at.
    """
    mapping = region.mapping
    end = offset + length
    if any(needle) and mapping.flags & MAP_SHARED:
        runs = _allocated(mapping.fd, region.file_offset // PAGE, offset // PAGE, -(-end // PAGE))
    elif any(needle) and mapping.flags & MAP_ANONYMOUS and not mapping.overlaid:
        runs = _present(mapping.address, offset // PAGE, -(-end // PAGE))
    else:
        yield offset, length
        return
    start = stop = -1
    for first, behind in runs:
        low = max(first * PAGE - overlap + 1, offset)
        high = min(behind * PAGE + overlap - 1, end)
        if low <= stop:
            stop = high
            continue
        if stop > start:
            yield start, stop - start
        start, stop = low, high
    if stop > start:
        yield start, stop - start


def _allocated(fd: int, base: int, first: int, end: int) -> Iterator[tuple[int, int]]:
    """Runs of pages that a file has, by number from page `base` of it on."""
    place = os.lseek(fd, 0, os.SEEK_CUR)
    try:
        while first < end:
            data = os.lseek(fd, (base + first) * PAGE, os.SEEK_DATA)
            hole = os.lseek(fd, data, os.SEEK_HOLE)
            low, high = data // PAGE - base, min(-(-hole // PAGE) - base, end)
            if low < high:
                yield low, high
            first = max(high, low, first + 1)
    except OSError:
        return  # ENXIO: nothing but a hole behind
    finally:
        os.lseek(fd, place, os.SEEK_SET)


def _present(host: int, first: int, end: int) -> Iterator[tuple[int, int]]:
    """Runs of pages that were touched, by number from `host` on."""
    try:
        fd = os.open("/proc/self/pagemap", os.O_RDONLY)
    except OSError:
        yield first, end
        return
    try:
        while first < end:
            count = min(end - first, 65536)
            data = os.pread(fd, 8 * count, (host // PAGE + first) * 8)
            if len(data) < 8 * count:
                yield first, end
                return
            marks = data[7::8].translate(_TOUCHED)  # little-endian: the bits are in the last byte
            run = marks.find(1)
            while run >= 0:
                behind = marks.find(0, run)
                behind = count if behind < 0 else behind
                yield first + run, first + behind
                run = marks.find(1, behind)
            first += count
    finally:
        os.close(fd)
