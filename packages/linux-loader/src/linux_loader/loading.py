"""From files to a guest that is ready to run: recognise, plan, write."""

from __future__ import annotations

from linux_loader.dispatch import plan_image
from linux_loader.request import BootRequest
from linux_loader.source import Source, file_list
from vm_memory._values import frozen

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Sequence

    from linux_loader.e820 import E820Entry
    from linux_loader.entry import EntryState
    from linux_loader.flat import Flat
    from linux_loader.kinds import Format, Protocol
    from linux_loader.layout import Layout
    from linux_loader.placement import Plan
    from linux_loader.screen import Screen
    from linux_loader.source import File
    from vm_memory import GuestMemory

__all__ = ["Loaded", "load", "plan"]


@frozen
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
    flat: Flat | None = None,
    offset: int = 0,
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
        cache: a folder that keeps unpacked kernels, and knows which parts of kernels are zeros and
            need not be copied into fresh memory; None for none. It is made where it is missing.
            See `linux_loader.cache.default_folder`.
        layout: where the loader's own tables go.
        rng_seed: entropy for the guest's random number generator; 32 bytes are enough. Linux
            protocols only.
        screen: a framebuffer that the guest may draw on from the start. Linux protocols only.
        flat: take the file for a binary without a header, to be put and started as this says.
        offset: bytes to put an ELF or boot image above the addresses that it was linked for;
            its entries move with it. The image must say that it can be moved: as ET_DYN, by the
            note XEN_ELFNOTE_PHYS32_RELOC, or as a relocatable boot image.
        zeroed: the caller states that the memory is fresh, so that it need not be cleared.
        map_files: map large page-aligned pieces of files copy-on-write where the memory allows
            it. The files must then not be changed while the guest lives.

    Returns:
        The processor's state, the plan and what the image was found to be.

    Raises:
        LoaderError: the image, the command line or the memory map cannot be used.
        OSError: a file cannot be read.
    """
    initrds = file_list(initrd)
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
            flat=flat,
            offset=offset,
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
    flat: Flat | None = None,
    offset: int = 0,
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
        file_list(initrd),
        memory_map=memory_map,
        cmdline=cmdline,
        protocol=protocol,
        rsdp=rsdp,
        kaslr=kaslr,
        cache=cache,
        layout=layout,
        rng_seed=rng_seed,
        screen=screen,
        flat=flat,
        offset=offset,
    )


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
    flat: Flat | None,
    offset: int,
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
    return plan_image(
        sources, request, protocol=protocol, kaslr=kaslr, cache=cache, flat=flat, offset=offset
    )
