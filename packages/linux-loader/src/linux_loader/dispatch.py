"""Which protocol's planner an image goes to."""

from __future__ import annotations

from linux_loader.errors import ImageError, LoaderError
from linux_loader.kinds import Format, Protocol, format_of
from linux_loader.placement import FileRange, Placement, Plan, checked
from linux_loader.source import Source

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os
    from collections.abc import Callable
    from typing import TypeAlias

    from linux_loader.bzimage import BzImage
    from linux_loader.elf import ElfImage
    from linux_loader.entry import EntryState
    from linux_loader.flat import Flat
    from linux_loader.request import BootRequest

    Folder: TypeAlias = str | os.PathLike[str] | None
    Planned: TypeAlias = tuple[list[Placement], EntryState]

_WORTH_KNOWING = 4 << 20
"""A kernel smaller than this is copied faster than looked up."""

__all__ = ["plan_image"]


def plan_image(
    sources: list[Source],
    request: BootRequest,
    *,
    protocol: Protocol | None,
    kaslr: bool,
    cache: Folder,
    flat: Flat | None,
    offset: int,
) -> Plan:
    """Plan the start of an x86 image.

    Args:
        sources: the kernel first; what is opened on the way is appended.
        request: what goes with it.
        protocol: how to start it, None for what suits it.
        kaslr: leave a boot image to its own decompressor.
        cache: folder of unpacked kernels.
        flat: take it for a flat binary, whatever it holds.
        offset: bytes to put it above the addresses that it was linked for.

    Raises:
        LoaderError: the image is of no known kind, or cannot be started so.
    """
    source = sources[0]
    kind = format_of(source.read_up_to(0, 1024))
    if flat is not None:
        kind = Format.FLAT
    version = ""
    if kaslr and kind is not Format.BZIMAGE:
        raise LoaderError("kaslr", None, source.name, "needs a boot image, with a decompressor")
    if offset and kind not in (Format.BZIMAGE, Format.ELF64, Format.ELF32):
        raise LoaderError("offset", None, offset, "moves ELF and boot images only: leave it out")
    if flat is not None:
        from linux_loader.flat import plan_flat

        kind, protocol, planned = Format.FLAT, Protocol.FLAT, plan_flat(request, source, flat)
    elif kind is Format.BZIMAGE:
        from linux_loader.bzimage import parse_bzimage
        from linux_loader.unpacking import unpack

        image = parse_bzimage(source)
        version = image.version
        unpacked = None if kaslr else unpack(source, image, cache, sources)
        if unpacked is None:
            protocol, planned = _start_bzimage(request, source, image, protocol, offset)
        else:
            protocol, planned = _start_elf(request, *unpacked, protocol, image, offset)
    elif kind is None:
        kind, protocol, planned = _start_other(request, source, protocol)
    else:
        from linux_loader.elf import parse_elf

        if cache is not None and source.size >= _WORTH_KNOWING:
            from linux_loader.cache import DecompressionCache

            DecompressionCache(cache).know_zeros(source)
        protocol, planned = _start_elf(request, source, parse_elf(source), protocol, None, offset)
    placements, entry = planned
    return Plan(checked(placements, request.memory_map), entry, kind, protocol, version)


def _start_bzimage(
    request: BootRequest,
    source: Source,
    image: BzImage,
    protocol: Protocol | None,
    offset: int,
) -> tuple[Protocol, Planned]:
    from linux_loader.bzimage import XLF_KERNEL_64
    from linux_loader.linux import plan_bzimage

    if protocol is None:
        protocol = Protocol.LINUX64 if image.xloadflags & XLF_KERNEL_64 else Protocol.LINUX32
    if protocol not in (Protocol.LINUX64, Protocol.LINUX32):
        raise ImageError(
            "protocol",
            None,
            protocol.value,
            "a boot image that unpacks itself starts by a Linux protocol; without kaslr it may be "
            "unpacked here",
        )
    return protocol, plan_bzimage(request, source, image, protocol, offset)


def _start_elf(
    request: BootRequest,
    source: Source,
    elf: ElfImage,
    protocol: Protocol | None,
    image: BzImage | None,
    offset: int,
) -> tuple[Protocol, Planned]:
    if offset:
        from linux_loader.moving import move_elf

        pvh_entry = elf.pvh_entry
        elf = move_elf(elf, offset, image)
        if pvh_entry is not None and elf.pvh_entry is None and protocol is Protocol.PVH:
            raise ImageError(
                "XEN_ELFNOTE_PHYS32_RELOC", None, None, "must be there for a PVH start elsewhere"
            )
    kernel = [
        Placement(
            f"kernel segment {index}",
            segment.address,
            segment.memory_size,
            FileRange(source=source, offset=segment.offset, size=segment.file_size),
            zero=True,
        )
        for index, segment in enumerate(elf.segments)
    ]
    if protocol is None and image is None:
        if elf.pvh_entry is not None:
            protocol = Protocol.PVH
        else:
            planner = None if offset else _multiboot(source, None, kernel, elf.entry)
            if planner is not None:
                return planner[0], planner[1](request)
    if protocol is None:
        protocol = Protocol.LINUX64 if elf.bits == 64 else Protocol.LINUX32
    if protocol is Protocol.PVH:
        from linux_loader.pvh import plan_pvh

        if elf.pvh_entry is None:
            raise ImageError(
                "XEN_ELFNOTE_PHYS32_ENTRY", None, None, "this image has no PVH entry note"
            )
        return protocol, plan_pvh(request, kernel=kernel, entry=elf.pvh_entry)
    if protocol in (Protocol.MULTIBOOT, Protocol.MULTIBOOT2):
        if offset:
            rule = f"a {protocol.value} kernel goes where its header says: leave it out"
            raise LoaderError("offset", None, offset, rule)
        planner = _multiboot(source, protocol, kernel, elf.entry)
        if planner is None:
            raise ImageError("magic", None, protocol.value, "this image has no such header")
        return protocol, planner[1](request)
    if protocol not in (Protocol.LINUX64, Protocol.LINUX32):
        raise LoaderError("protocol", None, protocol.value, "does not fit an ELF image")
    from linux_loader.linux import plan_linux

    wide = protocol is Protocol.LINUX64
    if wide and elf.bits == 32:
        raise ImageError("EI_CLASS", 4, 1, "a 32-bit kernel has no 64-bit entry: use linux32")
    return protocol, plan_linux(request, kernel=kernel, entry=elf.entry, image=image, wide=wide)


def _start_other(
    request: BootRequest, source: Source, protocol: Protocol | None
) -> tuple[Format, Protocol, Planned]:
    """Start a file that begins with nothing known: by its Multiboot header, or as firmware."""
    planner = _multiboot(source, protocol, None, None)
    if planner is not None:
        return Format.MULTIBOOT, planner[0], planner[1](request)
    from linux_loader.flat import is_firmware, plan_firmware

    if protocol is Protocol.RESET or (protocol is None and is_firmware(source)):
        return Format.FIRMWARE, Protocol.RESET, plan_firmware(request, source)
    from linux_loader.image import parse_image

    foreign = parse_image(source)
    if foreign is not None:
        raise ImageError("kernel", 0x38, foreign.architecture, "not x86: use load_image for it")
    raise ImageError(
        "kernel",
        0,
        source.name,
        "must be an ELF image, a Linux boot image (bzImage), a Multiboot kernel or firmware; "
        "a flat binary needs its address",
    )


def _multiboot(
    source: Source,
    protocol: Protocol | None,
    kernel: list[Placement] | None,
    entry: int | None,
) -> tuple[Protocol, Callable[[BootRequest], Planned]] | None:
    """Find a Multiboot header, the newer version first; its address fields outdo those of ELF."""
    if protocol in (None, Protocol.MULTIBOOT2):
        from linux_loader.multiboot import kernel_placement
        from linux_loader.multiboot2 import find_multiboot2, plan_multiboot2

        newer = find_multiboot2(source)
        if newer is not None:
            placed = kernel
            if newer.addresses is not None:
                placed = [kernel_placement(source, newer.addresses)]
            begin = newer.entry if newer.entry is not None else entry
            if placed is not None and begin is not None:
                return Protocol.MULTIBOOT2, lambda request: plan_multiboot2(
                    request, header=newer, kernel=placed, entry=begin
                )
    if protocol in (None, Protocol.MULTIBOOT):
        from linux_loader.multiboot import find_multiboot, kernel_placement, plan_multiboot

        older = find_multiboot(source)
        if older is not None:
            placed = kernel
            if older.addresses is not None:
                placed = [kernel_placement(source, older.addresses)]
                entry = older.addresses.entry
            if placed is not None and entry is not None:
                return Protocol.MULTIBOOT, lambda request: plan_multiboot(
                    request, header=older, kernel=placed, entry=entry
                )
    return None
