"""From files to a guest that is ready to run: recognise, plan, write."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from linux_loader.errors import ImageError, LoaderError
from linux_loader.kinds import Format, Protocol, format_of
from linux_loader.placement import FileRange, Placement, Plan, checked
from linux_loader.request import BootRequest
from linux_loader.source import Source

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Sequence
    from typing import TypeAlias

    from linux_loader.bzimage import BzImage
    from linux_loader.e820 import E820Entry
    from linux_loader.elf import ElfImage
    from linux_loader.entry import EntryState
    from linux_loader.layout import Layout
    from linux_loader.screen import Screen
    from vm_memory import GuestMemory

    File: TypeAlias = str | os.PathLike[str] | int

__all__ = ["Loaded", "load", "plan"]


@attrs.frozen
class Loaded:
    """A guest whose memory is ready.

    Attributes:
        entry: state for its first processor.
        plan: what lies where; prints as a table.
        format: what the kernel's file is.
        protocol: how it will be started.
        version: the version string of the image's header; empty where it has none.
        mapped: bytes mapped from files instead of copied.
    """

    entry: EntryState
    plan: Plan
    format: Format
    protocol: Protocol
    version: str
    mapped: int


def load(
    memory: GuestMemory,
    kernel: File,
    *,
    memory_map: Iterable[E820Entry],
    cmdline: str = "",
    initrd: File | Sequence[File] | None = None,
    protocol: Protocol | None = None,
    rsdp: int = 0,
    kaslr: bool = False,
    cache: str | os.PathLike[str] | None = None,
    layout: Layout | None = None,
    rng_seed: bytes = b"",
    screen: Screen | None = None,
    zeroed: bool = False,
    map_files: bool = True,
) -> Loaded:
    """Load a kernel into guest memory, with everything that its boot protocol hands over.

    The image is recognised by its content. Nothing is written before all of it is planned.

    Args:
        memory: the guest's.
        kernel: path of the image, or an open file descriptor, which stays the caller's.
        memory_map: the guest-physical memory map to hand over; the loader places things in its
            RAM. The ranges must not overlap.
        cmdline: the kernel's command line, printable ASCII.
        initrd: path or descriptor of an initrd, or several, which are concatenated in their order,
            archives with microcode first.
        protocol: how to start it; None for what suits the image: Linux's 64-bit protocol for a
            boot image, PVH for an ELF file that has such an entry.
        rsdp: guest-physical address of the ACPI root pointer; 0 to let the guest search.
        kaslr: start a boot image in its own decompressor, which randomises the kernel's address,
            instead of unpacking it here.
        cache: a folder that keeps unpacked kernels; None to keep none. See
            `linux_loader.cache.default_folder`.
        layout: where the loader's own tables go.
        rng_seed: entropy for the guest's random number generator; 32 bytes are enough. Linux
            protocols only.
        screen: a framebuffer that the guest may draw on from the start. Linux protocols only.
        zeroed: the caller states that the memory is fresh, so that it need not be cleared.
        map_files: map large page-aligned pieces of files copy-on-write where the memory allows
            it. The files must then not be changed while the guest lives.

    Returns:
        The processor's state, the plan and what the image was found to be.

    Raises:
        LoaderError: the image, the command line or the memory map cannot be used.
        OSError: a file cannot be read.
    """
    initrds = _files(initrd)
    sources: list[Source] = []
    try:
        made = _plan(
            sources,
            kernel,
            initrds,
            memory_map=memory_map,
            cmdline=cmdline,
            protocol=protocol,
            rsdp=rsdp,
            kaslr=kaslr,
            cache=cache,
            layout=layout,
            rng_seed=rng_seed,
            screen=screen,
        )
        mapped = made.write(memory, zeroed=zeroed, map_files=map_files)
    finally:
        for source in sources:
            source.close()
    return Loaded(made.entry, made, made.format, made.protocol, made.version, mapped)


def plan(
    kernel: File,
    *,
    memory_map: Iterable[E820Entry],
    cmdline: str = "",
    initrd: File | Sequence[File] | None = None,
    protocol: Protocol | None = None,
    rsdp: int = 0,
    kaslr: bool = False,
    cache: str | os.PathLike[str] | None = None,
    layout: Layout | None = None,
    rng_seed: bytes = b"",
    screen: Screen | None = None,
) -> Plan:
    """Plan what `load` would write, without any guest memory. Arguments are those of `load`.

    The files stay open as long as the plan lives, so that `Plan.write` writes what was planned.

    Raises:
        LoaderError: the image, the command line or the memory map cannot be used.
        OSError: a file cannot be read.
    """
    return _plan(
        [],
        kernel,
        _files(initrd),
        memory_map=memory_map,
        cmdline=cmdline,
        protocol=protocol,
        rsdp=rsdp,
        kaslr=kaslr,
        cache=cache,
        layout=layout,
        rng_seed=rng_seed,
        screen=screen,
    )


def _files(initrd: File | Sequence[File] | None) -> Sequence[File]:
    if initrd is None:
        return ()
    return initrd if isinstance(initrd, (list, tuple)) else (initrd,)


def _plan(
    sources: list[Source],
    kernel: File,
    initrds: Sequence[File],
    *,
    memory_map: Iterable[E820Entry],
    cmdline: str,
    protocol: Protocol | None,
    rsdp: int,
    kaslr: bool,
    cache: str | os.PathLike[str] | None,
    layout: Layout | None,
    rng_seed: bytes,
    screen: Screen | None,
) -> Plan:
    """Plan; every file opened is appended to `sources`."""
    source = Source.open(kernel)
    sources.append(source)
    for initrd in initrds:
        sources.append(Source.open(initrd))  # noqa: PERF401  (each must be closed, whatever comes)
    request = BootRequest(
        memory_map=memory_map,
        cmdline=cmdline,
        initrds=sources[1:],
        rsdp=rsdp,
        layout=layout,
        rng_seed=rng_seed,
        screen=screen,
    )
    kind = format_of(source.read_up_to(0, 1024))
    if kind is None:
        raise ImageError(
            "kernel", 0, source.name, "must be an ELF image or a Linux boot image (bzImage)"
        )
    version = ""
    if kind is Format.BZIMAGE:
        from linux_loader.bzimage import XLF_KERNEL_64, parse_bzimage

        image = parse_bzimage(source)
        version = image.version
        unpacked = None if kaslr else _unpack(source, image, cache, sources)
        if unpacked is None:
            from linux_loader.linux import plan_bzimage

            if protocol is None:
                wide = image.xloadflags & XLF_KERNEL_64
                protocol = Protocol.LINUX64 if wide else Protocol.LINUX32
            if protocol is Protocol.PVH:
                raise ImageError(
                    "protocol", None, "pvh", "the entry is inside the payload: unpack it (no kaslr)"
                )
            placements, entry = plan_bzimage(request, source, image, protocol)
        else:
            kernel_source, elf = unpacked
            if protocol is None:
                protocol = _linux(elf)
            placements, entry = _plan_elf(request, kernel_source, elf, protocol, image)
    else:
        from linux_loader.elf import parse_elf

        if kaslr:
            raise LoaderError(
                "kaslr", None, kind.value, "needs a boot image, which has a decompressor"
            )
        elf = parse_elf(source)
        if protocol is None:
            protocol = Protocol.PVH if elf.pvh_entry is not None else _linux(elf)
        placements, entry = _plan_elf(request, source, elf, protocol, None)
    return Plan(checked(placements, request.memory_map), entry, kind, protocol, version)


def _unpack(
    source: Source,
    image: BzImage,
    cache: str | os.PathLike[str] | None,
    sources: list[Source],
) -> tuple[Source, ElfImage] | None:
    """Return the kernel inside a boot image, or None where only the image itself can unpack it."""
    from linux_loader.decompress import compression_of
    from linux_loader.elf import parse_elf

    offset, size = image.payload_offset, image.payload_size
    if size < 16 or compression_of(source.read("payload", offset, 16)) is None:
        return None
    if cache is not None:
        from linux_loader.cache import DecompressionCache

        folder = DecompressionCache(cache)
        kernel = folder.open(source, offset, size, unpack_payload)
        sources.append(kernel)
        try:
            return kernel, parse_elf(kernel)
        except ImageError:
            folder.forget(kernel)
    payload = unpack_payload(source.read("payload", offset, size))
    kernel = Source.of_bytes(payload, f"kernel of {source.name}")
    sources.append(kernel)
    return kernel, parse_elf(kernel)


def unpack_payload(payload: bytes) -> bytes:
    """Decompress the payload of a boot image, which ends with the size of what comes out.

    Raises:
        ImageError: the payload is broken, or something else comes out than it says.
    """
    from linux_loader.decompress import decompress

    return decompress(payload, size=int.from_bytes(payload[-4:], "little"))


def _linux(elf: ElfImage) -> Protocol:
    return Protocol.LINUX64 if elf.bits == 64 else Protocol.LINUX32


def _plan_elf(
    request: BootRequest,
    source: Source,
    elf: ElfImage,
    protocol: Protocol,
    image: BzImage | None,
) -> tuple[list[Placement], EntryState]:
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
    if protocol is Protocol.PVH:
        from linux_loader.pvh import plan_pvh

        if elf.pvh_entry is None:
            raise ImageError(
                "XEN_ELFNOTE_PHYS32_ENTRY", None, None, "this image has no PVH entry note"
            )
        return plan_pvh(request, kernel=kernel, entry=elf.pvh_entry)
    from linux_loader.linux import plan_linux

    wide = protocol is Protocol.LINUX64
    if wide and elf.bits == 32:
        raise ImageError("EI_CLASS", 4, 1, "a 32-bit kernel has no 64-bit entry: use linux32")
    return plan_linux(request, kernel=kernel, entry=elf.entry, image=image, wide=wide)
