"""Images without any header: binaries at a stated address, firmware at the reset vector."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import attrs

from linux_loader.entry import TableState, long_mode, protected_mode, real_mode
from linux_loader.errors import ImageError, LoaderError, PlacementError
from linux_loader.placement import FileRange, Placement
from linux_loader.tables import descriptor_table, identity_page_tables

if TYPE_CHECKING:
    from linux_loader.entry import EntryState
    from linux_loader.request import BootRequest
    from linux_loader.source import Source

__all__ = ["Flat", "check_volume", "find_volume", "is_firmware", "plan_firmware", "plan_flat"]

_FOUR_GIB = 1 << 32
_FIRMWARE_MAX = 16 << 20
_LOW_COPY = 128 << 10


@attrs.frozen
class Flat:
    """How to start a binary that does not say so itself.

    Attributes:
        address: guest-physical address of its first byte.
        bits: 16 (real mode), 32 (protected mode, flat segments) or 64 (long mode, the first
            4 GiB mapped to themselves).
        entry: guest-physical address of the first instruction; None for the first byte. Below
            1 MiB for 16 bits, below 4 GiB for the others.
    """

    address: int
    bits: int = 16
    entry: int | None = None


def plan_flat(
    request: BootRequest, source: Source, flat: Flat
) -> tuple[list[Placement], EntryState]:
    """Plan the start of a flat binary.

    Raises:
        LoaderError: it is empty, does not fit, or its entry cannot be reached in its mode.
    """
    request.refuse_extras("a flat binary")
    if not source.size:
        raise ImageError("size", None, 0, f"{source.name} must hold code")
    entry = flat.address if flat.entry is None else flat.entry
    limits = {16: 1 << 20, 32: _FOUR_GIB, 64: _FOUR_GIB}
    if flat.bits not in limits:
        raise LoaderError("bits", None, flat.bits, "must be 16, 32 or 64")
    if not flat.address <= entry < flat.address + source.size:
        raise LoaderError("entry", None, entry, "must lie in the binary")
    if entry >= limits[flat.bits]:
        raise LoaderError(
            "entry", None, entry, f"{flat.bits}-bit code must start below {limits[flat.bits]:#x}"
        )
    layout = request.layout
    content = FileRange(source=source, offset=0, size=source.size)
    placements = [
        Placement("binary", flat.address, source.size, content),
        Placement("stack", layout.stack & -4096, layout.stack % 4096),
    ]
    if flat.bits == 16:
        return placements, real_mode(address=entry, rsp=layout.stack)
    gdt = descriptor_table(long=flat.bits == 64)
    table = TableState(layout.gdt, len(gdt) - 1)
    placements.append(Placement("GDT", layout.gdt, len(gdt), gdt))
    if flat.bits == 32:
        return placements, protected_mode(rip=entry, rsp=layout.stack, gdt=table)
    tables = identity_page_tables(layout.page_tables)
    placements.append(Placement("page tables", layout.page_tables, len(tables), tables))
    return placements, long_mode(
        rip=entry, rsp=layout.stack, rsi=0, gdt=table, page_tables=layout.page_tables
    )


def is_firmware(source: Source) -> bool:
    """Tell whether a file looks like firmware: whole pages, and a jump in its last 16 bytes."""
    if source.size % 4096 or not 64 << 10 <= source.size <= _FIRMWARE_MAX:
        return False
    vector = source.read("reset vector", source.size - 16, 16)
    # They begin with a jump, after no-operations or a cache flush, or ask CR0 which mode it is.
    vector = vector.lstrip(b"\x90").removeprefix(b"\x0f\x09")
    return vector.startswith((b"\xe9", b"\xea", b"\xeb", b"\x0f\x20\xc0"))


def find_volume(source: Source) -> int | None:
    """Where arm64 firmware has its first volume of UEFI; None where the file is no such firmware.

    It begins with a branch, in the sixteen bytes that the volume's header leaves for it, or in a
    page of its own in front. On x86 firmware begins at its end, and these bytes are zeros.
    """
    (word,) = struct.unpack("<I", source.read_up_to(0, 4).ljust(4, b"\0"))
    if word >> 26 != 5:  # A64's B, whose operand counts words
        return None
    for offset in (0, (word & 0x1FFFFFF) * 4):
        if offset + 64 <= source.size and source.read("volume", offset + 0x28, 4) == b"_FVH":
            return offset
    return None


def check_volume(source: Source) -> None:
    """Check the header of a firmware volume (UEFI PI 1.8, volume 3, section 3.2.1).

    Raises:
        ImageError: there is none, or it lies about its size.
    """
    at = find_volume(source)
    if at is None:
        rule = "must be a branch, to a volume of UEFI or at its beginning"
        raise ImageError("ZeroVector", 0, source.read_up_to(0, 4), rule)
    head = source.read("volume header", at, 64)
    length, header = struct.unpack_from("<Q8xH", head, 0x20)
    rest = source.size - at
    if not 64 <= length <= rest:
        raise ImageError("FvLength", at + 0x20, length, f"must be 64 to {rest:#x}, the file's rest")
    if header % 2 or not 64 <= header <= min(length, 4096):
        rule = "must be even, 64 to 4096, in the volume"
        raise ImageError("HeaderLength", at + 0x30, header, rule)
    words = source.read("volume header", at, header)
    if sum(struct.unpack(f"<{header // 2}H", words)) & 0xFFFF:
        raise ImageError("Checksum", at + 0x32, head[0x32:0x34], "must make the header's sum 0")


def plan_firmware(request: BootRequest, source: Source) -> tuple[list[Placement], EntryState]:
    """Plan the start of firmware as after a reset: it ends at 4 GiB, its first code 16 bytes below.

    The last 128 KiB lie below 1 MiB too, as PC chipsets show them. Both places are outside RAM:
    the caller's guest memory must have regions there.

    Raises:
        LoaderError: it is too large, or things were given that firmware takes by other ways.
    """
    request.refuse_extras("firmware")
    size = source.size
    if not 16 <= size <= _FIRMWARE_MAX:
        raise ImageError("size", None, size, "firmware has 16 bytes to 16 MiB")
    if any(stop > _FOUR_GIB - size and start < _FOUR_GIB for start, stop in request.ram):
        raise PlacementError("memory_map", None, size, "RAM must leave room for firmware at 4 GiB")
    low = min(size, _LOW_COPY)
    return [
        Placement(
            "firmware",
            _FOUR_GIB - size,
            size,
            FileRange(source=source, offset=0, size=size),
            rom=True,
        ),
        Placement(
            "firmware below 1 MiB",
            (1 << 20) - low,
            low,
            FileRange(source=source, offset=size - low, size=low),
            rom=True,
        ),
    ], real_mode(address=0xFFFFFFF0, rsp=0)
