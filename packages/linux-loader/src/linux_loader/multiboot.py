"""Multiboot, version 1 (specification 0.6.96): header, information structure, modules."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from linux_loader.encode import encode_cmdline
from linux_loader.entry import TableState, protected_mode
from linux_loader.errors import ImageError, LoaderError, PlacementError
from linux_loader.placement import FileRange, Placement, describe, lowest_fit
from linux_loader.tables import descriptor_table
from vm_memory._values import frozen

if TYPE_CHECKING:
    from collections.abc import Sequence

    from linux_loader.entry import EntryState
    from linux_loader.request import BootRequest
    from linux_loader.source import Source

__all__ = ["MultibootHeader", "find_multiboot", "plan_multiboot"]

_HEADER_MAGIC = 0x1BADB002
_LOADER_MAGIC = 0x2BADB002
_SEARCHED = 8192
_ALIGN_MODULES, _MEMORY_INFO, _VIDEO_MODE, _ADDRESSES = 1, 2, 4, 1 << 16
LOADER_NAME = b"linux-loader\0"
_COMMAND_LINE = 1 << 16


@frozen(kw_only=True)
class LoadAddresses:
    """Where a kernel that is not ELF goes: the address fields of its header.

    Attributes:
        offset: in the file, of what goes to `address`.
        address: guest-physical.
        file_size: bytes taken from the file.
        memory_size: bytes it occupies, its BSS included.
        entry: guest-physical, or None where another tag tells it.
    """

    offset: int
    address: int
    file_size: int
    memory_size: int
    entry: int | None


@frozen(kw_only=True)
class MultibootHeader:
    """A checked header.

    Attributes:
        offset: in the file.
        flags: what the kernel asks for.
        addresses: where it goes; None for an ELF file, which says so itself.
    """

    offset: int
    flags: int
    addresses: LoadAddresses | None


def find_multiboot(source: Source) -> MultibootHeader | None:
    """Find the header in the first 8 KiB of a file; None where there is none.

    Raises:
        ImageError: the header's addresses contradict each other or the file.
    """
    head = source.read_up_to(0, _SEARCHED)
    magic = _HEADER_MAGIC.to_bytes(4, "little")
    offset = head.find(magic)
    while offset >= 0:
        if offset % 4 == 0 and offset + 12 <= len(head):
            flags, checksum = struct.unpack_from("<II", head, offset + 4)
            if (_HEADER_MAGIC + flags + checksum) & 0xFFFFFFFF == 0:
                addresses = None
                if flags & _ADDRESSES:
                    if offset + 32 > len(head):
                        raise ImageError(
                            "header_addr", offset, len(head), "the address fields are cut off"
                        )
                    at_header, load, load_end, bss_end, entry = struct.unpack_from(
                        "<5I", head, offset + 12
                    )
                    addresses = load_addresses(
                        source, offset, at_header, load, load_end, bss_end, entry
                    )
                return MultibootHeader(offset=offset, flags=flags, addresses=addresses)
        offset = head.find(magic, offset + 1)
    return None


def load_addresses(
    source: Source,
    offset: int,
    at_header: int,
    load: int,
    load_end: int,
    bss_end: int,
    entry: int | None,
) -> LoadAddresses:
    """Check the address fields that both versions have.

    Raises:
        ImageError: they contradict each other or the file.
    """
    if at_header < load or at_header - load > offset:
        raise ImageError("load_addr", offset, load, "must be where the file, or less, begins")
    start = offset - (at_header - load)
    if load_end and load_end < load:
        raise ImageError("load_end_addr", offset, load_end, "must not lie below load_addr")
    size = load_end - load if load_end else source.size - start
    if start + size > source.size:
        raise ImageError("load_end_addr", offset, load_end, "must not lie behind the file's end")
    if bss_end and bss_end < load + size:
        raise ImageError("bss_end_addr", offset, bss_end, "must not lie below load_end_addr")
    memory = bss_end - load if bss_end else size
    if load + memory > 1 << 32:
        raise ImageError("load_addr", offset, load, f"its {memory:#x} bytes must fit 32 bits")
    if entry is not None and not load <= entry < load + memory:
        raise ImageError("entry_addr", offset, entry, "must lie in what is loaded")
    return LoadAddresses(
        offset=start, address=load, file_size=size, memory_size=memory, entry=entry
    )


def kernel_placement(source: Source, addresses: LoadAddresses) -> Placement:
    """Place a kernel by its header's address fields."""
    content = FileRange(source=source, offset=addresses.offset, size=addresses.file_size)
    return Placement("kernel", addresses.address, addresses.memory_size, content, zero=True)


def place_modules(request: BootRequest, kernel: Sequence[Placement]) -> list[Placement]:
    """Place each initrd as a module on pages of its own, above the kernel and below 4 GiB.

    Raises:
        PlacementError: there is no such room.
    """
    taken = [(item.address, item.address + item.size) for item in kernel]
    least = max([1 << 20, *[end for _, end in taken]])
    result = []
    for source in request.initrds:
        address = lowest_fit(request.ram, taken, max(source.size, 1), least, 4096)
        if address is None or address + source.size > 1 << 32:
            raise PlacementError(
                f"module {source.name}",
                None,
                source.size,
                f"no free RAM of that many bytes above {least:#x} and below 4 GiB; "
                f"RAM is {describe(request.ram)}",
            )
        content = FileRange(source=source, offset=0, size=source.size)
        result.append(Placement(f"module {source.name}", address, source.size, content))
        least = address + max(source.size, 1)
    return result


def module_name(placement: Placement) -> bytes:
    """Return the string that goes with a module: its file's name, printable, with its NUL."""
    name = placement.name.removeprefix("module ").rsplit("/", 1)[-1]
    return "".join([char if " " <= char <= "~" else "?" for char in name]).encode() + b"\0"


def memory_sizes(request: BootRequest) -> tuple[int, int]:
    """Return mem_lower and mem_upper: KiB of RAM from 0 and from 1 MiB upwards."""
    lower = sum([min(stop, 0xA0000) for start, stop in request.ram if start == 0])
    upper = sum([stop - (1 << 20) for start, stop in request.ram if start <= 1 << 20 < stop])
    return lower >> 10, min(upper >> 10, 0xFFFFFFFF)


def start(request: BootRequest, *, magic: int, rip: int) -> tuple[list[Placement], EntryState]:
    """Return what both versions start with: 32-bit protected mode, EAX magic, EBX information."""
    layout = request.layout
    if rip >> 32:
        raise ImageError("entry", None, rip, "the entry is in 32-bit mode: it must fit 32 bits")
    gdt = descriptor_table(long=False)
    state = protected_mode(
        rip=rip,
        rsp=layout.stack,
        rax=magic,
        rbx=layout.start_info,
        gdt=TableState(layout.gdt, len(gdt) - 1),
    )
    placements = [
        Placement("GDT", layout.gdt, len(gdt), gdt),
        Placement("stack", layout.stack & -4096, layout.stack % 4096),
    ]
    return placements, state


def plan_multiboot(
    request: BootRequest, *, header: MultibootHeader, kernel: list[Placement], entry: int
) -> tuple[list[Placement], EntryState]:
    """Plan the start of a kernel by Multiboot; each initrd becomes a module.

    Raises:
        LoaderError: something does not fit, or the kernel demands what there is not.
    """
    if request.rng_seed:
        request.refuse_linux_extras("Multiboot")
    demanded = header.flags & 0xFFFF & ~(_ALIGN_MODULES | _MEMORY_INFO | _VIDEO_MODE)
    if demanded:
        raise ImageError("flags", header.offset + 4, demanded, "demands what this loader lacks")
    if header.flags & _VIDEO_MODE and request.screen is None:
        raise LoaderError("screen", None, None, "this kernel demands a framebuffer: give it one")
    modules = place_modules(request, kernel)
    address = request.layout.start_info
    cmdline = encode_cmdline(request.cmdline, _COMMAND_LINE)

    # Behind the structure: memory map, modules, then the strings.
    memory_map = b"".join(
        [
            struct.pack("<IQQI", 20, item.address, item.size, item.type)
            for item in request.memory_map
        ]
    )
    at_map = address + 116
    at_modules = at_map + len(memory_map)
    at_strings = at_modules + 16 * len(modules)
    strings = LOADER_NAME + cmdline
    table = b""
    for module in modules:
        table += struct.pack(
            "<IIII", module.address, module.address + module.size, at_strings + len(strings), 0
        )
        strings += module_name(module)
    lower, upper = memory_sizes(request)
    info = bytearray(116)
    flags = 0x001 | 0x004 | 0x040 | 0x200 | (0x008 if modules else 0)
    struct.pack_into("<4xII4xI", info, 0, lower, upper, at_strings + len(LOADER_NAME))
    struct.pack_into("<II", info, 20, len(modules), at_modules if modules else 0)
    struct.pack_into("<II", info, 44, len(memory_map), at_map)
    struct.pack_into("<I", info, 64, at_strings)
    if request.screen is not None:
        flags |= 0x1000
        screen = request.screen
        struct.pack_into(
            "<QIIIBB6B",
            info,
            88,
            screen.address,
            screen.line,
            screen.width,
            screen.height,
            32,
            1,
            *(16, 8, 8, 8, 0, 8),
        )
    struct.pack_into("<I", info, 0, flags)
    data = bytes(info) + memory_map + table + strings
    tables, state = start(request, magic=_LOADER_MAGIC, rip=entry)
    information = Placement("multiboot information", address, len(data), data)
    return [*kernel, *modules, *tables, information], state
