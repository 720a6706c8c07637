"""Regions over memory that somebody else mapped: what the kernel says of it, and the rules."""

from __future__ import annotations

import attrs

from vm_memory._mapping import MAP_PRIVATE, MAP_SHARED, PAGE, Mapping
from vm_memory._native import lib
from vm_memory.errors import InvalidValueError, MappingError
from vm_memory.region import GuestRegion

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vm_memory.address import GuestAddress
    from vm_memory.backing import Adopted
    from vm_memory.dirty import DirtyBitmap

_MAPS = "/proc/self/smaps"
# Files that only the kernel has: nobody can cut them.
_NAMELESS = ("/dev/zero (deleted)", "/anon_hugepage (deleted)")


@attrs.frozen
class _Found:
    """One mapping of this process, as proc_pid_smaps(5) tells of it.

    Attributes:
        start: first address.
        end: address behind it.
        rights: such as `rw-s`.
        file: what it is a mapping of; empty for anonymous memory.
        page: bytes of one of its pages.
        inherited: whether a child of fork has it.
    """

    start: int
    end: int
    rights: str
    file: str
    page: int
    inherited: bool


def adopt(
    backing: Adopted,
    ranges: Sequence[tuple[GuestAddress, int]],
    bitmaps: Sequence[DirtyBitmap | None],
) -> list[GuestRegion]:
    """The regions of a new map over memory that is there already.

    Raises:
        InvalidValueError: when the memory is too short, not all there, or not what it must be.
        MappingError: when the kernel does not say what is there.
    """
    found = _examine(backing.host_address, backing.length)
    page = found[0].page
    need = sum(-(-size // page) * page for _, size in ranges[:-1]) + sum(s for _, s in ranges[-1:])
    if need > backing.length:
        raise InvalidValueError(
            "length", backing.length, f"the regions need {need} bytes, each from a page's start on"
        )
    shared = all(part.rights[3] == "s" for part in found)
    fragile = any(part.file and part.file not in _NAMELESS for part in found)
    regions = []
    address = backing.host_address
    for (guest_address, size), bitmap in zip(ranges, bitmaps, strict=True):
        mapping = Mapping.adopt(
            address, size, backing.owner, MAP_SHARED if shared else MAP_PRIVATE, page
        )
        if fragile or page != PAGE:
            mapping.watch()
        if not all(part.inherited for part in found):
            error = lib.vmm_mapping_exclude(mapping.handle, 0, 1)
            if error:
                raise MappingError("madvise, to keep memory from children", error)
            mapping.inherited = False
        regions.append(
            GuestRegion(guest_address, size, mapping, backing, dirty=bitmap, fragile=fragile)
        )
        address += -(-size // page) * page
    return regions


def _examine(start: int, length: int) -> list[_Found]:
    """What is mapped from `start` on, without a gap and fit to be guest memory."""
    found: list[_Found] = []
    at, end = start, start + length
    for part in _mappings():
        if part.end <= at:
            continue
        if part.start > at or at >= end:
            break
        if not part.rights.startswith("rw"):
            rule = f"{at:#x} is mapped {part.rights}; guest memory must be readable and writable"
            raise InvalidValueError("host_address", start, rule)
        found.append(part)
        at = part.end
    if at < end:
        raise InvalidValueError("host_address", start, f"nothing is mapped at {at:#x}")
    page = found[0].page
    if any(part.page != page for part in found):
        raise InvalidValueError("host_address", start, "all pages must be of one size")
    if start % page:
        below = start // page * page
        rule = f"must be a multiple of the huge page, as {below:#x} or {below + page:#x}"
        raise InvalidValueError("host_address", start, rule)
    return found


def _mappings() -> Iterator[_Found]:
    """All mappings of this process by address.

    Raises:
        MappingError: when /proc cannot be read.
    """
    try:
        with open(_MAPS, encoding="utf-8", errors="replace") as file:  # noqa: PTH123
            lines = file.read().splitlines()
    except OSError as error:
        raise MappingError(f"reading {_MAPS}", error.errno or 0) from error
    head: list[str] = []
    page = PAGE
    for line in lines:
        name, _, value = line.partition(":")
        if name == "KernelPageSize":
            page = int(value.split()[0]) << 10
        elif name == "VmFlags":
            start, _, end = head[0].partition("-")
            path = head[5] if len(head) > 5 else ""
            file_name = path if head[4] != "0" else ""
            flags = value.split()
            yield _Found(int(start, 16), int(end, 16), head[1], file_name, page, "dc" not in flags)
        elif "-" in name.split(" ")[0]:
            head = line.split(maxsplit=5)
