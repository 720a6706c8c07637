"""Multiboot, version 2 (specification 2.0): a header of tags, information of tags."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from linux_loader.encode import encode_cmdline
from linux_loader.errors import ImageError, LoaderError
from linux_loader.multiboot import (
    LOADER_NAME,
    LoadAddresses,
    load_addresses,
    memory_sizes,
    module_name,
    place_modules,
    start,
)
from linux_loader.placement import Placement
from vm_memory._values import frozen

if TYPE_CHECKING:
    from linux_loader.entry import EntryState
    from linux_loader.request import BootRequest
    from linux_loader.source import Source

__all__ = ["Multiboot2Header", "find_multiboot2", "plan_multiboot2"]

_HEADER_MAGIC = 0xE85250D6
_LOADER_MAGIC = 0x36D76289
_SEARCHED = 32768
_COMMAND_LINE = 1 << 16

_CMDLINE, _NAME, _MODULE, _MEMORY, _MEMORY_MAP, _FRAMEBUFFER = 1, 2, 3, 4, 6, 8
_PROVIDED = {_CMDLINE, _NAME, _MODULE, _MEMORY, _MEMORY_MAP, _FRAMEBUFFER}
_HARMLESS = {4, 6, 8, 9, 10}
"""Header tags obeyed as we start: console, module alignment, EFI entries, relocation."""


@frozen(kw_only=True)
class Multiboot2Header:
    """A checked header.

    Attributes:
        offset: in the file.
        addresses: where the kernel goes; None for an ELF file, which says so itself.
        entry: guest-physical address of its entry tag, or None.
        wants_screen: whether it demands a framebuffer.
    """

    offset: int
    addresses: LoadAddresses | None
    entry: int | None
    wants_screen: bool


def find_multiboot2(source: Source) -> Multiboot2Header | None:
    """Find the header in the first 32 KiB of a file; None where there is none.

    Raises:
        ImageError: its tags are malformed, or demand what this loader does not have.
    """
    head = source.read_up_to(0, _SEARCHED)
    magic = _HEADER_MAGIC.to_bytes(4, "little")
    offset = head.find(magic)
    while offset >= 0:
        if offset % 8 == 0 and offset + 16 <= len(head):
            architecture, length, checksum = struct.unpack_from("<III", head, offset + 4)
            total = _HEADER_MAGIC + architecture + length + checksum
            if total & 0xFFFFFFFF == 0 and architecture == 0:
                return _parse(source, head, offset, length)
        offset = head.find(magic, offset + 1)
    return None


def _parse(source: Source, head: bytes, offset: int, length: int) -> Multiboot2Header:
    end = offset + length
    if length < 24 or end > len(head):
        raise ImageError("header_length", offset + 8, length, "must hold tags in the first 32 KiB")
    addresses: tuple[int, ...] | None = None
    entry = None
    wants_screen = False
    position = offset + 16
    while True:
        if position + 8 > end:
            raise ImageError("tags", position, end, "must end with a tag of type 0")
        kind, flags, size = struct.unpack_from("<HHI", head, position)
        if size < 8 or position + size > end:
            raise ImageError("size", position + 4, size, "a tag must end inside the header")
        body = head[position + 8 : position + size]
        demanded = not flags & 1
        if kind == 0:
            break
        if kind == 1 and demanded:
            _check_request(body, position)
        elif kind == 2:
            if len(body) < 16:
                raise ImageError("size", position + 4, size, "an address tag has 24 bytes")
            addresses = struct.unpack_from("<4I", body)
        elif kind == 3:
            if len(body) < 4:
                raise ImageError("size", position + 4, size, "an entry tag has 12 bytes")
            entry = int.from_bytes(body[:4], "little")
        elif kind == 5:
            wants_screen = wants_screen or demanded
        elif kind not in _HARMLESS and kind != 1 and demanded:
            raise ImageError("type", position, kind, "demands what this loader does not have")
        position += -(-size // 8) * 8
    return Multiboot2Header(
        offset=offset,
        addresses=None
        if addresses is None
        else load_addresses(
            source, offset, addresses[0], addresses[1], addresses[2], addresses[3], entry
        ),
        entry=entry,
        wants_screen=wants_screen,
    )


def _check_request(body: bytes, position: int) -> None:
    for (kind,) in struct.iter_unpack("<I", body[: len(body) & -4]):
        if kind not in _PROVIDED:
            raise ImageError(
                "mbi_tag_types", position + 8, kind, "demands information that is not provided"
            )


def plan_multiboot2(
    request: BootRequest, *, header: Multiboot2Header, kernel: list[Placement], entry: int
) -> tuple[list[Placement], EntryState]:
    """Plan the start of a kernel by Multiboot 2; each initrd becomes a module.

    Raises:
        LoaderError: something does not fit, or the kernel demands what there is not.
    """
    if request.rng_seed:
        request.refuse_linux_extras("Multiboot")
    screen = request.screen
    if header.wants_screen and screen is None:
        raise LoaderError("screen", None, None, "this kernel demands a framebuffer: give it one")
    modules = place_modules(request, kernel)
    tags = [
        _tag(_CMDLINE, encode_cmdline(request.cmdline, _COMMAND_LINE)),
        _tag(_NAME, LOADER_NAME),
        _tag(_MEMORY, struct.pack("<II", *memory_sizes(request))),
    ]
    for module in modules:
        ends = struct.pack("<II", module.address, module.address + module.size)
        tags.append(_tag(_MODULE, ends + module_name(module)))
    entries = [
        struct.pack("<QQII", item.address, item.size, item.type, 0) for item in request.memory_map
    ]
    tags.append(_tag(_MEMORY_MAP, struct.pack("<II", 24, 0) + b"".join(entries)))
    if screen is not None:
        place = struct.pack("<QIII", screen.address, screen.line, screen.width, screen.height)
        colours = struct.pack("<BBH6B", 32, 1, 0, 16, 8, 8, 8, 0, 8)
        tags.append(_tag(_FRAMEBUFFER, place + colours))
    tags.append(_tag(0, b""))
    body = b"".join(tags)
    data = struct.pack("<II", 8 + len(body), 0) + body
    tables, state = start(request, magic=_LOADER_MAGIC, rip=entry)
    information = Placement("multiboot information", request.layout.start_info, len(data), data)
    return [*kernel, *modules, *tables, information], state


def _tag(kind: int, body: bytes) -> bytes:
    tag = struct.pack("<II", kind, 8 + len(body)) + body
    return tag.ljust(-(-len(tag) // 8) * 8, b"\0")
