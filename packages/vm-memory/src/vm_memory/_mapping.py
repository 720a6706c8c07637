"""Mappings of host memory: from a backing to an address that lives as long as it is used."""

from __future__ import annotations

import os

from vm_memory._native import ffi, lib
from vm_memory._owner import MAPPING, own
from vm_memory.errors import MappingError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vm_memory._native import CData

PAGE = os.sysconf("SC_PAGESIZE")
_LARGE = 2 << 20

# From <sys/mman.h>; the mmap module is not worth its import on the boot path.
MAP_SHARED = 0x01
MAP_PRIVATE = 0x02
MAP_ANONYMOUS = 0x20
MAP_NORESERVE = 0x4000
MAP_HUGETLB = 0x40000

# From <errno.h>; the errno module likewise.
ENOMEM, EACCES, ENODEV = 12, 13, 19

ANONYMOUS = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE


class Mapping:
    """One mapping of host memory, unmapped when neither this object nor a view of it is left.

    One that was adopted is let go then, and not unmapped.

    Attributes:
        handle: the C structure; valid while this object or a view lives.
        address: the first byte's address in this process.
        length: bytes; whole pages, unless it was adopted.
        flags: how it was mapped, as for mmap(2).
        page: bytes of one of its pages.
        inherited: whether a child of fork has it.
        overlaid: whether pages were replaced by those of a file.
        owner: what keeps the C structure, and moves bytes to and from the memory.
    """

    __slots__ = ("address", "flags", "handle", "inherited", "length", "overlaid", "owner", "page")

    def __init__(
        self,
        length: int,
        guest_address: int,
        *,
        flags: int = ANONYMOUS,
        fd: int = -1,
        offset: int = 0,
        guard: int = 0,
        page: int = PAGE,
    ) -> None:
        """Map `length` bytes, anonymous or of a file, whose descriptor it takes over.

        Raises:
            MappingError: when the host refuses.
        """
        length = -(-length // page) * page
        # Host and guest addresses that agree modulo 2 MiB let the kernel and KVM use large pages.
        large = length >= _LARGE and guest_address % _LARGE == 0
        alignment = max(page, _LARGE) if large else page
        error = ffi.new("int *")
        handle = lib.vmm_mapping_new(length, alignment, guard, flags, fd, offset, error)
        if not handle:
            raise refused(f"mmap of {length:#x} bytes", error[0], page)
        self.handle: CData = handle
        self.owner = own(handle, MAPPING, length)
        self.address = int(ffi.cast("uintptr_t", handle.base))
        self.length = length
        self.flags = flags
        self.page = page
        self.inherited = True
        self.overlaid = False

    @classmethod
    def adopt(cls, address: int, length: int, owner: object, flags: int, page: int) -> Mapping:
        """Use memory that somebody else mapped, and keep its owner.

        Args:
            address: its first byte, at a page's start.
            length: bytes; the last page may be used partly.
            owner: what is kept alive.
            flags: MAP_SHARED or MAP_PRIVATE, as it was mapped.
            page: bytes of one of its pages.

        Raises:
            MappingError: when the host has no memory.
        """
        handle = lib.vmm_mapping_adopt(address, -(-length // page) * page, id(owner))
        if not handle:
            raise MappingError(f"adopting {length:#x} bytes", ENOMEM)
        mapping = cls.__new__(cls)
        mapping.handle = handle
        mapping.owner = own(handle, MAPPING, length)
        mapping.address = address
        mapping.length = length
        mapping.flags = flags
        mapping.page = page
        mapping.inherited = True
        mapping.overlaid = False
        return mapping

    @property
    def fd(self) -> int:
        """The file behind it, or -1. It belongs to the mapping: duplicate it to keep it."""
        return self.handle.fd

    @property
    def lost(self) -> bool:
        """Whether pages vanished, with their file's end for example."""
        return bool(lib.vmm_mapping_lost(self.handle))

    @property
    def lasting(self) -> bool:
        """Whether all pages are in a child of fork, whatever happens on either side."""
        return self.inherited and (self.page == PAGE or bool(self.flags & MAP_SHARED))

    def lose(self) -> None:
        """Say that pages are gone, or will never come."""
        lib.vmm_mapping_lose(self.handle)

    def view(self, length: int) -> memoryview:
        """The first `length` bytes, writable. The view keeps the mapping alive."""
        return memoryview(self.owner)[:length]

    def watch(self, *, each: bool = False) -> None:
        """Turn the loss of pages into something that `lost` tells, instead of a dead process.

        Args:
            each: a page is lost alone, and not with all behind it as where a file was cut.

        Raises:
            MappingError: when there are too many such mappings, 8192.
        """
        error = lib.vmm_mapping_guard_faults(self.handle, self.page, each)
        if error:
            raise MappingError("watching a mapping for lost pages", error)

    def overlay(self, start: int, length: int, fd: int, offset: int) -> None:
        """Replace pages by a private mapping of a file.

        Raises:
            MappingError: when the host refuses.
        """
        error = lib.vmm_mapping_overlay(self.handle, start, length, fd, offset)
        if error:
            raise MappingError(f"mmap of {length:#x} bytes of a file", error)
        self.overlaid = True


def refused(operation: str, errno: int, page: int = PAGE) -> MappingError:
    """The exception for a refusal, with what explains it: for want of memory the host's numbers."""
    if page != PAGE:
        folder = f"/sys/kernel/mm/hugepages/hugepages-{page >> 10}kB"
        numbers = [f"{_number(f'{folder}/{name}')} {name}" for name in _HUGE]
        return MappingError(
            operation,
            errno,
            f"huge pages of {page >> 10} KiB: {', '.join(numbers)}; "
            f"write a larger number to {folder}/nr_hugepages",
        )
    if errno != ENOMEM:
        return MappingError(operation, errno, _HINTS.get(errno, ""))
    try:
        with open("/proc/meminfo", encoding="ascii") as file:  # noqa: PTH123
            lines = [" ".join(line.split()) for line in file if line.startswith(_WANTED)]
    except OSError:
        lines = []
    return MappingError(operation, errno, f"the host has {', '.join(lines)}")


_HINTS = {
    EACCES: "shared memory needs a file that is open for reading and writing",
    ENODEV: "a file of this kind has no pages that could be mapped",
}
_HUGE = ("nr_hugepages", "free_hugepages", "resv_hugepages")
_WANTED = ("MemTotal", "MemAvailable", "CommitLimit", "Committed_AS")


def _number(path: str) -> str:
    try:
        with open(path, encoding="ascii") as file:  # noqa: PTH123
            return file.read().strip()
    except OSError:
        return "unknown"
