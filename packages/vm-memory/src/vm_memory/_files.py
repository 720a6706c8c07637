"""Backings other than plain anonymous memory: files, memfds and huge pages."""

from __future__ import annotations

import fcntl
import os

import attrs

from vm_memory._mapping import (
    ANONYMOUS,
    MAP_ANONYMOUS,
    MAP_HUGETLB,
    MAP_NORESERVE,
    MAP_PRIVATE,
    MAP_SHARED,
    PAGE,
    refused,
)
from vm_memory._native import lib
from vm_memory.backing import Anonymous, FilePrivate, FileShared, Memfd
from vm_memory.errors import InvalidValueError, MappingError, RegionError

_UNITS = {"K": 10, "M": 20, "G": 30}


@attrs.frozen
class Source:
    """Where the pages of new regions come from.

    Attributes:
        flags: for mmap(2).
        page: bytes of a page.
        fd: the file, to be closed by whoever asked; -1 without one.
        offset: where in it the first region begins.
        fragile: whether somebody else can take pages away.
    """

    flags: int
    page: int = PAGE
    fd: int = -1
    offset: int = 0
    fragile: bool = False


def hugepage_sizes() -> list[int]:
    """The sizes of huge pages that this host has, in bytes."""
    try:
        names = os.listdir("/sys/kernel/mm/hugepages")  # noqa: PTH208
    except OSError:
        return []
    return sorted(int(name.removeprefix("hugepages-").removesuffix("kB")) << 10 for name in names)


def parse_hugetlb(text: str) -> int:
    """The bytes of a huge page given as text, such as 2M.

    Raises:
        InvalidValueError: when this host has no huge pages of that size.
    """
    unit = _UNITS.get(text[-1:].upper())
    digits = text[:-1]
    size = int(digits) << unit if unit is not None and digits.isdecimal() else 0
    sizes = hugepage_sizes()
    if size not in sizes:
        known = ", ".join(
            f"{size >> 20}M" if size >= 1 << 20 else f"{size >> 10}K" for size in sizes
        )
        raise InvalidValueError(
            "hugetlb", text, f"this host has huge pages of {known or 'no size'}"
        )
    return size


def open_source(
    backing: Anonymous | Memfd | FileShared | FilePrivate, ranges: list[tuple[int, int]]
) -> Source:
    """Open what is behind a backing, large enough for the ranges one behind the other.

    Raises:
        InvalidValueError: when the backing's values cannot be.
        RegionError: when a range does not fit its page size.
        MappingError: when the host refuses.
    """
    if isinstance(backing, (Anonymous, Memfd)):
        page = PAGE if backing.hugetlb is None else parse_hugetlb(backing.hugetlb)
        _check_pages(ranges, page)
        huge = 0
        if page != PAGE:
            huge = MAP_HUGETLB | (page.bit_length() - 1) << 26
        if isinstance(backing, Memfd):
            flags = MAP_SHARED if huge else MAP_SHARED | MAP_NORESERVE
            total = sum(-(-size // page) * page for _, size in ranges)
            return Source(flags, page, _create_memfd(backing.name, total, page))
        return Source(MAP_PRIVATE | MAP_ANONYMOUS | huge if huge else ANONYMOUS, page)
    return _open_file(backing, ranges)


def _check_pages(ranges: list[tuple[int, int]], page: int) -> None:
    if page == PAGE:
        return
    for address, size in ranges:
        if address % page or size % page:
            start, end = address // page * page, -(-(address + size) // page) * page
            raise RegionError(
                address,
                size,
                f"start and size must be multiples of the huge page, {page:#x}, "
                f"as {end - start:#x} bytes at {start:#x}",
            )


def _create_memfd(name: str, size: int, page: int) -> int:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    if page != PAGE:
        flags |= os.MFD_HUGETLB | (page.bit_length() - 1) << 26
    fd = -1
    try:
        fd = os.memfd_create(name, flags)
        os.ftruncate(fd, size)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    except OSError as error:
        if fd >= 0:
            os.close(fd)
        raise refused(f"memfd of {size:#x} bytes", error.errno or 0, page) from error
    return fd


def _open_file(backing: FileShared | FilePrivate, ranges: list[tuple[int, int]]) -> Source:
    shared = isinstance(backing, FileShared)
    try:
        if isinstance(backing.file, int):
            fd = os.dup(backing.file)
        else:
            fd = os.open(backing.file, (os.O_RDWR if shared else os.O_RDONLY) | os.O_CLOEXEC)
    except OSError as error:
        raise MappingError(f"opening {backing.file!r}", error.errno or 0) from error
    try:
        page = lib.vmm_file_page_size(fd) or PAGE
        _check_pages(ranges, page)
        if backing.offset < 0 or backing.offset % page:
            below = max(backing.offset, 0) // page * page
            rule = f"must be a multiple of the page size, as {below} or {below + page}"
            raise InvalidValueError("offset", backing.offset, rule)
        total = sum(-(-size // page) * page for _, size in ranges)
        end = os.fstat(fd).st_size
        if end == 0:
            place = os.lseek(fd, 0, os.SEEK_CUR)
            end = os.lseek(fd, 0, os.SEEK_END)  # a block device says 0 above
            os.lseek(fd, place, os.SEEK_SET)
        if backing.offset + total > -(-end // page) * page:
            rule = f"has {end} bytes, but the regions need {total} from offset {backing.offset} on"
            raise InvalidValueError("file", backing.file, rule)
    except BaseException as error:
        os.close(fd)
        if isinstance(error, OSError) and not isinstance(error, MappingError):
            raise MappingError(f"sizing {backing.file!r}", error.errno or 0) from error
        raise
    flags = (MAP_SHARED if shared else MAP_PRIVATE) | MAP_NORESERVE
    # A memfd that is sealed against shrinking is as safe as our own; huge pages may run out.
    try:
        fragile = page != PAGE or not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
    except OSError:
        fragile = True
    return Source(flags, page, fd, backing.offset, fragile)
