"""What a caller wants booted, apart from the kernel itself; the protocols' common ground."""

from __future__ import annotations

from linux_loader.e820 import checked_map, ram_ranges
from linux_loader.encode import encode_cmdline
from linux_loader.errors import LoaderError, PlacementError
from linux_loader.layout import Layout
from linux_loader.placement import FileRange, Placement, describe, highest_fit

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from linux_loader.e820 import E820Entry
    from linux_loader.screen import Screen
    from linux_loader.source import Source

__all__ = ["BootRequest"]


class BootRequest:
    """Checked wishes: memory map, command line, initrds, addresses."""

    def __init__(
        self,
        *,
        memory_map: Iterable[E820Entry],
        cmdline: str,
        initrds: Sequence[Source],
        rsdp: int,
        layout: Layout | None,
        rng_seed: bytes = b"",
        screen: Screen | None = None,
    ) -> None:
        if not 0 <= rsdp < 1 << 64:
            raise PlacementError("rsdp", None, rsdp, "must be a guest-physical address")
        self.memory_map = checked_map(memory_map)
        self.ram = ram_ranges(self.memory_map)
        self.cmdline = cmdline
        self.initrds = initrds
        if len(initrds) > 1:
            from linux_loader.initrd import microcode_first

            self.initrds = microcode_first(initrds)
        self.rsdp = rsdp
        self.layout = layout or Layout()
        self.rng_seed = rng_seed
        self.screen = screen

    def refuse_linux_extras(self, protocol: str) -> None:
        """Refuse what only the Linux protocols can hand over.

        Raises:
            LoaderError: entropy or a framebuffer was given.
        """
        for field, value in (("rng_seed", len(self.rng_seed)), ("screen", self.screen)):
            if value:
                raise LoaderError(
                    field, None, value, f"{protocol} cannot hand it over: leave it out"
                )

    def refuse_extras(self, what: str) -> None:
        """Refuse all that an image without a boot protocol cannot be told.

        Raises:
            LoaderError: a command line, initrd, seed or screen was given.
        """
        self.refuse_linux_extras(what)
        for field, given in (("cmdline", self.cmdline), ("initrd", len(self.initrds))):
            if given:
                raise LoaderError(field, None, given, f"{what} takes none: leave it out")

    def cmdline_placement(self, capacity: int, *, address: int) -> Placement:
        """Place the command line; `capacity` is the image's own limit, its NUL not counted."""
        data = encode_cmdline(self.cmdline, capacity)
        return Placement("command line", address, len(data), data)

    def initrd_placements(self, taken: Iterable[Placement], limit: int) -> list[Placement]:
        """Place the initrds one behind the other, each padded to 4 bytes, as high as they fit.

        Args:
            taken: what is placed already.
            limit: the first address that may not be used.

        Raises:
            PlacementError: there is no such room.
        """
        sizes = [-(-source.size // 4) * 4 for source in self.initrds]
        total = sum(sizes)
        if not total:
            return []
        used = [(item.address, item.address + item.size) for item in taken]
        address = highest_fit(self.ram, used, total, limit)
        if address is None:
            raise PlacementError(
                "initrd",
                None,
                total,
                f"no free RAM of that many bytes below {limit:#x}; "
                f"RAM is {describe(self.ram)}: give the guest more",
            )
        result = []
        for source, size in zip(self.initrds, sizes, strict=True):
            if size:
                content = FileRange(source=source, offset=0, size=source.size)
                result.append(Placement(f"initrd {source.name}", address, size, content, zero=True))
            address += size
        return result


def initrd_range(placements: Sequence[Placement]) -> tuple[int, int]:
    """Return address and size of the initrds together; zeros for none."""
    if not placements:
        return (0, 0)
    first, last = placements[0], placements[-1]
    # The padding behind the last one is not part of it.
    return first.address, last.address + last.content_size - first.address
