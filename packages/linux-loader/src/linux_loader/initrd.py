"""Several initrds as one: which comes first."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from linux_loader.source import Source

__all__ = ["is_microcode", "microcode_first"]

_LOOKED_AT = 4096


def is_microcode(source: Source) -> bool:
    """Tell whether a file is an early archive, which Linux reads microcode and tables from.

    It looks for them before it can decompress anything, and in the first archive only: an
    uncompressed cpio archive whose first names lie below `kernel/x86` or `kernel/firmware`.
    """
    head = source.read_up_to(0, _LOOKED_AT)
    if not head.startswith((b"070701", b"070702")):
        return False
    return b"kernel/x86/microcode" in head or b"kernel/firmware/acpi" in head


def microcode_first(sources: Sequence[Source]) -> list[Source]:
    """Return the initrds in their order, but early archives before all others."""
    return sorted(sources, key=lambda source: not is_microcode(source))
