"""The Linux boot protocol: zero page and 64-bit or 32-bit entry (Documentation/arch/x86/boot.rst).

Offsets into the zero page are those of `struct boot_params`.
"""

from __future__ import annotations

import struct

from linux_loader.bzimage import XLF_KERNEL_64
from linux_loader.e820 import encode, ram_ranges
from linux_loader.entry import TableState, long_mode, protected_mode
from linux_loader.errors import ImageError, LoaderError, PlacementError
from linux_loader.kinds import Protocol
from linux_loader.layout import Layout
from linux_loader.placement import FileRange, Placement, describe, lowest_fit
from linux_loader.request import initrd_range
from linux_loader.tables import descriptor_table, identity_page_tables

TYPE_CHECKING = False
if TYPE_CHECKING:
    from linux_loader.bzimage import BzImage
    from linux_loader.e820 import E820Entry
    from linux_loader.entry import EntryState
    from linux_loader.request import BootRequest
    from linux_loader.screen import Screen
    from linux_loader.source import Source

__all__ = ["plan_linux", "zero_page"]

_E820_TABLE = 0x2D0
_E820_MAX = 128
_HEADER = 0x1F1
_CL_MAGIC = 0xA33F
_OLD = Layout(zero_page=0x90000, cmdline=0x91000, stack=0x94FF0)
"""Kernels before protocol 2.02 look for everything at 0x90000, whatever they are told."""


def zero_page(
    *,
    memory_map: tuple[E820Entry, ...],
    cmdline: int,
    initrd: tuple[int, int],
    rsdp: int,
    image: BzImage | None,
    code32_start: int = 0,
    setup_data: int = 0,
    screen: Screen | None = None,
) -> bytes:
    """Return `struct boot_params`, 4096 bytes.

    Args:
        memory_map: sorted; the first 128 entries go in, the others are for `setup_data`.
        cmdline: guest-physical address of the command line.
        initrd: address and size of the initrd, zeros where there is none.
        rsdp: guest-physical address of the ACPI root pointer, 0 to let the kernel search.
        image: the boot image whose setup header to pass on; None for a bare vmlinux.
        code32_start: where the protected-mode code was put.
        setup_data: guest-physical address of the first `struct setup_data`, 0 for none.
        screen: a framebuffer.
    """
    page = bytearray(4096)
    if screen is not None:
        page[:64] = screen.screen_info()
    if image is None:
        # What a loader that has only a vmlinux must make up; the version allows all fields below.
        struct.pack_into("<HH4sH", page, 0x1FE, 0xAA55, 0x6AEB, b"HdrS", 0x20F)
        struct.pack_into("<I", page, 0x22C, 0x7FFFFFFF)  # initrd_addr_max
        struct.pack_into("<I", page, 0x230, 0x200000)  # kernel_alignment
        struct.pack_into("<I", page, 0x238, 2047)  # cmdline_size
        page[0x211] = 1  # LOADED_HIGH
    else:
        page[_HEADER : _HEADER + len(image.header)] = image.header
    page[0x210] = 0xFF  # type_of_loader: none of the registered ones
    page[0x211] = page[0x211] & 1  # flags for the loader to set: none of them applies
    if code32_start:
        struct.pack_into("<I", page, 0x214, code32_start)
    address, size = initrd
    struct.pack_into("<II", page, 0x218, address & 0xFFFFFFFF, size & 0xFFFFFFFF)
    struct.pack_into("<II", page, 0x0C0, address >> 32, size >> 32)
    struct.pack_into("<I", page, 0x228, cmdline & 0xFFFFFFFF)
    struct.pack_into("<I", page, 0x0C8, cmdline >> 32)
    struct.pack_into("<Q", page, 0x250, setup_data)
    struct.pack_into("<Q", page, 0x070, rsdp)
    table = encode(memory_map[:_E820_MAX])
    page[0x1E8] = len(table) // 20
    # What kernels before E820 read: KiB above 1 MiB, in 16 bits and in 32.
    above = (
        sum(
            [
                stop - max(start, 1 << 20)
                for start, stop in ram_ranges(memory_map)
                if start <= 1 << 20 < stop
            ]
        )
        >> 10
    )
    struct.pack_into("<H", page, 0x002, min(above, 0xFC00))
    struct.pack_into("<I", page, 0x1E0, min(above, 0xFFFFFFFF))
    if image is not None and image.protocol < 0x202:
        struct.pack_into("<HH", page, 0x020, _CL_MAGIC, _OLD.cmdline - _OLD.zero_page)
    page[_E820_TABLE : _E820_TABLE + len(table)] = table
    return bytes(page)


def plan_linux(
    request: BootRequest,
    *,
    kernel: list[Placement],
    entry: int,
    image: BzImage | None,
    code32_start: int = 0,
    wide: bool,
) -> tuple[list[Placement], EntryState]:
    """Plan the start of a kernel by the 64-bit protocol, or the 32-bit one.

    Args:
        request: the rest of what is wanted.
        kernel: its pieces.
        entry: guest-physical address of the first instruction.
        image: the boot image it came from or is, for its setup header and limits.
        code32_start: where the protected-mode code of `image` lies.
        wide: 64-bit.

    Raises:
        LoaderError: something does not fit.
    """
    layout = request.layout
    if image is not None and image.protocol < 0x202:
        layout = _OLD
    gdt = descriptor_table(long=wide)
    placements = [
        *kernel,
        Placement("GDT", layout.gdt, len(gdt), gdt),
        Placement("stack", layout.stack & -4096, layout.stack % 4096),
        request.cmdline_placement(
            2047 if image is None else image.cmdline_size, address=layout.cmdline
        ),
    ]
    if wide:
        tables = identity_page_tables(layout.page_tables)
        placements.append(Placement("page tables", layout.page_tables, len(tables), tables))
    initrds = request.initrd_placements(placements, _initrd_limit(image))
    extras = _extras(request, image)
    page = zero_page(
        memory_map=request.memory_map,
        cmdline=layout.cmdline,
        initrd=initrd_range(initrds),
        rsdp=request.rsdp,
        image=image,
        code32_start=code32_start,
        setup_data=layout.setup_data if extras else 0,
        screen=request.screen,
    )
    placements += initrds
    if extras:
        from linux_loader.setup_data import setup_data_list

        data = setup_data_list(layout.setup_data, extras)
        placements.append(Placement("setup data", layout.setup_data, len(data), data))
    placements.append(Placement("zero page", layout.zero_page, len(page), page))
    table = TableState(layout.gdt, len(gdt) - 1)
    state = (
        long_mode(
            rip=entry,
            rsp=layout.stack,
            rsi=layout.zero_page,
            gdt=table,
            page_tables=layout.page_tables,
        )
        if wide
        else protected_mode(rip=entry, rsp=layout.stack, rsi=layout.zero_page, gdt=table)
    )
    return placements, state


def _extras(request: BootRequest, image: BzImage | None) -> list[tuple[int, bytes]]:
    """Return what goes into the list of `setup_data`."""
    if not request.rng_seed and len(request.memory_map) <= _E820_MAX:
        return []
    from linux_loader.setup_data import SETUP_E820_EXT, SETUP_RNG_SEED

    extras = []
    if len(request.memory_map) > _E820_MAX:
        extras.append((SETUP_E820_EXT, encode(request.memory_map[_E820_MAX:])))
    if request.rng_seed:
        extras.append((SETUP_RNG_SEED, request.rng_seed))
    if image is not None and image.protocol < 0x209:
        raise ImageError(
            "version", 0x206, image.protocol, "has no setup_data: no seed, and 128 ranges at most"
        )
    return extras


def plan_bzimage(
    request: BootRequest, source: Source, image: BzImage, protocol: Protocol, offset: int = 0
) -> tuple[list[Placement], EntryState]:
    """Plan the start of a boot image's own protected-mode code, at its preferred address if free.

    With an offset it goes so many bytes above that, and nowhere else.

    Raises:
        LoaderError: the image cannot run where there is RAM, or has no 64-bit entry.
    """
    wide = protocol is Protocol.LINUX64
    if wide and not image.xloadflags & XLF_KERNEL_64:
        raise ImageError(
            "xloadflags", 0x236, image.xloadflags, "has no XLF_KERNEL_64: use the linux32 protocol"
        )
    if wide and image.kernel_size <= 0x200:
        raise ImageError(
            "syssize", 0x1F4, image.kernel_size, "must reach the 64-bit entry at 0x200"
        )
    content = FileRange(source=source, offset=image.setup_size, size=image.kernel_size)
    room = max(image.kernel_size, image.init_size)
    if offset:
        from linux_loader.moving import check_bzimage_offset

        check_bzimage_offset(image, offset)
        if image.pref_address + offset + room > 1 << 32:
            raise LoaderError("offset", None, offset, "must leave the kernel below 4 GiB")
    if image.relocatable:
        address = image.pref_address + offset if offset else _load_address(request, image, room)
        kernel = [Placement("kernel", address, room, content)]
    else:
        address = image.code32_start
        kernel = [Placement("kernel", address, image.kernel_size, content)]
        # It runs at its preferred address, over what it was loaded from where the two meet.
        start = max(image.pref_address, address + image.kernel_size)
        end = image.pref_address + image.init_size
        if end > start:
            kernel.append(Placement("kernel's working room", start, end - start))
    return plan_linux(
        request,
        kernel=kernel,
        entry=address + (0x200 if wide else 0),
        image=image,
        code32_start=address,
        wide=wide,
    )


def _load_address(request: BootRequest, image: BzImage, room: int) -> int:
    """Choose where a relocatable image goes: its preferred address, else the lowest that is free.

    Below 4 GiB, which the page tables of `identity_page_tables` reach.
    """
    wanted = image.pref_address
    for start, stop in request.ram:
        if start <= wanted and wanted + room <= min(stop, 1 << 32):
            return wanted
    found = lowest_fit(request.ram, [], room, 1 << 20, image.kernel_alignment)
    if found is None or found + room > 1 << 32:
        raise PlacementError(
            "init_size", None, room, f"no RAM of that size above 1 MiB: {describe(request.ram)}"
        )
    return found


def _initrd_limit(image: BzImage | None) -> int:
    return min((0x7FFFFFFF if image is None else image.initrd_addr_max) + 1, 1 << 32)
