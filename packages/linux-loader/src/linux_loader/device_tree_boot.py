"""Boot arm64 and riscv64 kernels, which are handed a device tree.

>>> from linux_loader import E820Entry, E820Type
>>> from linux_loader.fdt import DeviceTree, Node
>>> from linux_loader.testing import build_image, image_file
>>> from vm_memory import GuestAddress, GuestMemory
>>> base, size = 0x40000000, 64 << 20
>>> with GuestMemory.from_ranges([(GuestAddress(base), size)]) as memory:
...     with image_file(build_image("arm64", bytes(64))) as kernel:
...         loaded = load_image(
...             memory, kernel, memory_map=[E820Entry(base, size, E820Type.RAM)],
...             device_tree=DeviceTree(Node("")), cmdline="console=ttyAMA0")
>>> hex(loaded.entry.pc), hex(loaded.entry.arguments[0])
('0x40000000', '0x40200000')
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from linux_loader.e820 import checked_map, ram_ranges
from linux_loader.encode import encode_cmdline
from linux_loader.errors import ImageError, LoaderError, PlacementError
from linux_loader.fdt import DeviceTree, cells
from linux_loader.flat import check_volume
from linux_loader.image import parse_image, unwrap
from linux_loader.initrd import microcode_first
from linux_loader.placement import (
    FileRange,
    Placement,
    checked,
    describe,
    lowest_fit,
    table,
    write_placements,
)
from linux_loader.request import initrd_range
from linux_loader.source import Source, file_list

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from linux_loader.e820 import E820Entry
    from linux_loader.source import File
    from vm_memory import GuestMemory

__all__ = ["ImageEntry", "LoadedImage", "load_image"]

_ALIGNMENT = 2 << 20
_CMDLINE_SIZE = {"arm64": 2047, "riscv64": 1023}
_PSTATE = 0x3C5  # EL1h; D, A, I and F masked


@attrs.frozen
class ImageEntry:
    """State of the first processor.

    Attributes:
        architecture: `arm64` or `riscv64`.
        pc: guest-physical address of the first instruction; the MMU is off.
        arguments: x0 to x3 for arm64; a0 (hart) and a1 for riscv64. One points at the tree.
        pstate: for arm64; 0 for riscv64, which starts in S mode with interrupts off.
    """

    architecture: str
    pc: int
    arguments: tuple[int, ...]
    pstate: int


@attrs.frozen
class LoadedImage:
    """A guest whose memory is ready. Printed, it is a table of what lies where.

    Attributes:
        entry: state for its first processor.
        placements: what lies where, sorted.
        device_tree: as the guest gets it.
        wrapping: how the file wrapped the Image: `""`, `gzip`, `zboot zstd` and the like.
        mapped: bytes mapped from files instead of copied.
    """

    entry: ImageEntry
    placements: tuple[Placement, ...]
    device_tree: DeviceTree
    wrapping: str
    mapped: int

    def __str__(self) -> str:
        """The table."""
        return table(self.placements)


def load_image(
    memory: GuestMemory,
    kernel: File,
    *,
    memory_map: Iterable[E820Entry],
    device_tree: DeviceTree,
    cmdline: str = "",
    initrd: File | Sequence[File] | None = None,
    rng_seed: bytes = b"",
    firmware: int | None = None,
    zeroed: bool = False,
    map_files: bool = True,
) -> LoadedImage:
    """Load an arm64 or riscv64 kernel: Image, compressed Image or zboot; or UEFI for arm64.

    The kernel goes to the lowest RAM that its header allows, the tree and the initrds behind it.

    Args:
        memory: the guest's.
        kernel: path, or an open descriptor.
        memory_map: RAM of the guest; goes into the tree where that has no memory node.
        device_tree: the machine's. A copy of it gets `/chosen`: bootargs, linux,initrd-start and
            -end, rng-seed.
        cmdline: printable ASCII.
        initrd: path or descriptor, or several, which are concatenated.
        rng_seed: entropy.
        firmware: take the file for arm64 firmware that begins with a volume of UEFI (Debian's
            `AAVMF_CODE.fd` is one), and put it to this address outside RAM, where the caller's
            guest memory must have a region. It starts there by its first instruction, and finds
            the tree at the beginning of RAM. It takes command lines, initrds and entropy by
            other ways.
        zeroed: the caller states that the memory is fresh.
        map_files: as for `linux_loader.load`.

    Raises:
        LoaderError: the image, tree, command line or memory map cannot be used.
        OSError: a file cannot be read.
    """
    sources: list[Source] = []
    try:
        sources.append(Source.open(kernel))
        for file in file_list(initrd):
            sources.append(Source.open(file))  # noqa: PERF401  (each must be closed)
        initrds = microcode_first(sources[1:])
        ranges = checked_map(memory_map)
        if firmware is not None:
            for field, given in (("cmdline", cmdline), ("initrd", len(initrds)),
                                 ("rng_seed", len(rng_seed))):  # fmt: skip
                if given:
                    raise LoaderError(field, None, given, "firmware takes none: leave it out")
            placements, entry, tree = _plan_firmware(sources[0], firmware, ranges, device_tree)
            wrapping = ""
        else:
            placements, entry, tree, wrapping = _plan(
                sources, initrds, ranges, device_tree, cmdline, rng_seed
            )
        ordered = checked(placements, ranges)
        mapped = write_placements(ordered, memory, zeroed=zeroed, map_files=map_files)
    finally:
        for source in sources:
            source.close()
    return LoadedImage(entry, ordered, tree, wrapping, mapped)


def _plan(
    sources: list[Source],
    initrds: list[Source],
    memory_map: tuple[E820Entry, ...],
    device_tree: DeviceTree,
    cmdline: str,
    rng_seed: bytes,
) -> tuple[list[Placement], ImageEntry, DeviceTree, str]:
    source, wrapping = unwrap(sources[0], sources.append)
    image = parse_image(source)
    if image is None:
        raise ImageError("magic", 0x38, source.name, "must be an arm64 or riscv64 Image")
    ram = ram_ranges(memory_map)
    start = _place_kernel(ram, image.text_offset, image.image_size)
    content = FileRange(source=source, offset=0, size=source.size)
    placements = [Placement("kernel", start, image.image_size, content, zero=True)]

    taken = [(start, start + image.image_size)]
    total = sum([-(-item.size // 4) * 4 for item in initrds])
    behind = start + image.image_size + _ALIGNMENT * 2  # room for the tree before it
    loaded: list[Placement] = []
    if total:
        place = lowest_fit(ram, taken, total, behind, 4096)
        if place is None:
            raise PlacementError("initrd", None, total, f"no such room in {describe(ram)}")
        for item in initrds:
            size = -(-item.size // 4) * 4
            piece = FileRange(source=item, offset=0, size=item.size)
            loaded.append(Placement(f"initrd {item.name}", place, size, piece, zero=True))
            place += size
        taken.append((loaded[0].address, place))

    tree = DeviceTree.parse(device_tree.encode())
    chosen = tree.root.child("chosen")
    if cmdline:
        chosen.set("bootargs", encode_cmdline(cmdline, _CMDLINE_SIZE[image.architecture]))
    if loaded:
        first, size = initrd_range(loaded)
        chosen.set("linux,initrd-start", _wide(first))
        chosen.set("linux,initrd-end", _wide(first + size))
    if rng_seed:
        chosen.set("rng-seed", rng_seed)
    _describe_memory(tree, ram)
    blob = tree.encode()
    at_tree = lowest_fit(ram, taken, len(blob), start + image.image_size, _ALIGNMENT)
    if at_tree is None:
        raise PlacementError("device tree", None, len(blob), f"no such room in {describe(ram)}")
    placements += [*loaded, Placement("device tree", at_tree, len(blob), blob)]
    arm = image.architecture == "arm64"
    entry = ImageEntry(
        architecture=image.architecture,
        pc=start,
        arguments=(at_tree, 0, 0, 0) if arm else (0, at_tree),
        pstate=_PSTATE if arm else 0,
    )
    return placements, entry, tree, wrapping


def _plan_firmware(
    source: Source, address: int, memory_map: tuple[E820Entry, ...], device_tree: DeviceTree
) -> tuple[list[Placement], ImageEntry, DeviceTree]:
    ram = ram_ranges(memory_map)
    check_volume(source)
    size = source.size
    if address % 4096 or not 0 <= address <= (1 << 48) - size:
        raise LoaderError("firmware", None, address, "must be whole pages below 2**48")
    if any(start < address + size and address < stop for start, stop in ram):
        raise PlacementError("firmware", None, address, f"must lie outside RAM, {describe(ram)}")
    tree = DeviceTree.parse(device_tree.encode())
    _describe_memory(tree, ram)
    blob = tree.encode()
    if not ram:
        raise PlacementError("memory_map", None, 0, "must have RAM for the device tree")
    content = FileRange(source=source, offset=0, size=size)
    placements = [
        Placement("firmware", address, size, content, rom=True),
        Placement("device tree", ram[0][0], len(blob), blob),
    ]
    entry = ImageEntry(
        architecture="arm64", pc=address, arguments=(ram[0][0], 0, 0, 0), pstate=_PSTATE
    )
    return placements, entry, tree


def _place_kernel(ram: list[tuple[int, int]], text_offset: int, size: int) -> int:
    for start, stop in ram:
        base = -(-start // _ALIGNMENT) * _ALIGNMENT
        if base + text_offset + size <= stop:
            return base + text_offset
    raise PlacementError(
        "image_size", None, size, f"no RAM of that size at a 2 MiB boundary in {describe(ram)}"
    )


def _wide(value: int) -> bytes:
    return cells(value >> 32, value & 0xFFFFFFFF)


def _describe_memory(tree: DeviceTree, ram: list[tuple[int, int]]) -> None:
    """Add memory nodes where the tree has none."""
    root = tree.root
    if any(node.properties.get("device_type") == b"memory\0" for node in root.children):
        return
    root.properties.setdefault("#address-cells", cells(2))
    root.properties.setdefault("#size-cells", cells(2))
    if {root.properties["#address-cells"], root.properties["#size-cells"]} != {cells(2)}:
        raise PlacementError(
            "#address-cells", None, root.properties["#address-cells"], "must be 2, as #size-cells"
        )
    for start, stop in ram:
        node = root.child(f"memory@{start:x}")
        node.set("device_type", b"memory\0")
        node.set("reg", _wide(start) + _wide(stop - start))
