"""Images put elsewhere than where they were linked for: who may be, and by how much."""

from __future__ import annotations

from typing import TYPE_CHECKING

from linux_loader.elf import ET_DYN, ElfImage, ElfSegment, Relocation
from linux_loader.errors import ImageError, LoaderError

if TYPE_CHECKING:
    from linux_loader.bzimage import BzImage

__all__ = ["check_bzimage_offset", "move_elf"]

_FOUR_GIB = 1 << 32


def move_elf(elf: ElfImage, offset: int, image: BzImage | None) -> ElfImage:
    """Return the image with all its addresses so many bytes higher.

    An image may be moved when it says so: by its type ET_DYN, by the note of a kernel that moves
    itself (XEN_ELFNOTE_PHYS32_RELOC), or by the header of the boot image that it comes from, whose
    64-bit entry finds out where it lies.

    Args:
        elf: the image.
        offset: bytes, negative to go down.
        image: the boot image that it comes from; None for a file of its own.

    Raises:
        ImageError: the image cannot be moved.
        LoaderError: it cannot be moved by so much.
    """
    first = min(segment.address for segment in elf.segments)
    end = max(segment.address + segment.memory_size for segment in elf.segments)
    limits = _limits(elf, image)
    # A kernel's alignment is of its start; a segment's is of what it is moved by (gABI, p_align).
    aligned = offset if elf.relocation is None else first + offset
    if aligned % limits.alignment:
        below = offset - aligned % limits.alignment
        rule = f"must move the image to a multiple of {limits.alignment:#x}, as {below:#x} does"
        raise LoaderError("offset", None, offset, rule)
    if first + offset < limits.minimum or end + offset > limits.maximum + 1:
        raise LoaderError(
            "offset",
            None,
            offset,
            f"must leave the image, {first:#x}-{end - 1:#x}, "
            f"within {limits.minimum:#x}-{limits.maximum:#x}",
        )
    segments = [
        ElfSegment(
            offset=segment.offset,
            address=segment.address + offset,
            virtual_address=segment.virtual_address,
            file_size=segment.file_size,
            memory_size=segment.memory_size,
            flags=segment.flags,
        )
        for segment in elf.segments
    ]
    # Only what moves the PVH entry too lets a start by PVH be elsewhere.
    moves_pvh = elf.pvh_entry is not None and (elf.kind == ET_DYN or elf.relocation is not None)
    return ElfImage(
        bits=elf.bits,
        kind=elf.kind,
        machine=elf.machine,
        entry=elf.entry + offset,
        pvh_entry=elf.pvh_entry + offset if moves_pvh and elf.pvh_entry is not None else None,
        relocation=elf.relocation,
        alignment=elf.alignment,
        segments=tuple(segments),
    )


def _limits(elf: ElfImage, image: BzImage | None) -> Relocation:
    if elf.relocation is not None:
        return elf.relocation
    if elf.kind == ET_DYN:
        if elf.alignment & (elf.alignment - 1):
            raise ImageError("p_align", None, elf.alignment, "must be a power of two")
        return Relocation(alignment=elf.alignment, minimum=0, maximum=_FOUR_GIB - 1)
    if image is not None and elf.bits == 64:
        check_bzimage_offset(image, 0)
        return Relocation(
            alignment=image.kernel_alignment, minimum=image.pref_address, maximum=_FOUR_GIB - 1
        )
    raise ImageError(
        "e_type",
        16,
        elf.kind,
        "this image cannot be moved: it must be ET_DYN (3), or have the note "
        "XEN_ELFNOTE_PHYS32_RELOC; leave the offset out",
    )


def check_bzimage_offset(image: BzImage, offset: int) -> None:
    """Check that a boot image may be loaded so many bytes above its preferred address.

    Raises:
        ImageError: it is not relocatable.
        LoaderError: the offset is negative, or no multiple of its alignment.
    """
    if not image.relocatable:
        raise ImageError("relocatable_kernel", 0x234, 0, "must be 1 for an image that is moved")
    if offset < 0 or offset % image.kernel_alignment:
        rule = f"must be a multiple of kernel_alignment ({image.kernel_alignment:#x}), 0 or more"
        raise LoaderError("offset", None, offset, rule)
