"""The kernel inside a boot image, taken out of it here or found where it was kept."""

from __future__ import annotations

from linux_loader.decompress import MAX_KERNEL_SIZE, compression_of, decompress
from linux_loader.errors import ImageError
from linux_loader.source import Source

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os

    from linux_loader.bzimage import BzImage
    from linux_loader.elf import ElfImage
    from linux_loader.source import File

__all__ = ["unpack", "unpack_kernel", "unpack_payload"]


def unpack(
    source: Source,
    image: BzImage,
    cache: str | os.PathLike[str] | None,
    sources: list[Source],
) -> tuple[Source, ElfImage] | None:
    """Return the kernel inside a boot image, or None where only the image itself can unpack it."""
    from linux_loader.elf import parse_elf

    offset, size = image.payload_offset, image.payload_size
    if size < 16 or compression_of(source.read("payload", offset, 16)) is None:
        return None

    def unpack_piece(piece: bytes) -> bytes:
        return unpack_payload(piece, limit=image.unpacked_limit)

    if cache is not None:
        from linux_loader.cache import DecompressionCache

        folder = DecompressionCache(cache)
        kernel = folder.open(source, offset, size, unpack_piece)
        sources.append(kernel)
        try:
            return kernel, parse_elf(kernel)
        except ImageError:
            folder.forget(kernel)
    data = unpack_piece(source.read("payload", offset, size))
    kernel = Source.of_bytes(data, f"kernel of {source.name}")
    sources.append(kernel)
    return kernel, parse_elf(kernel)


def unpack_payload(payload: bytes, *, limit: int = MAX_KERNEL_SIZE) -> bytes:
    """Decompress the payload of a boot image, which ends with the size of what comes out.

    Args:
        payload: the compressed kernel.
        limit: the most bytes that may come out; a boot image states it as `init_size`.

    Raises:
        ImageError: the payload is broken, or something else comes out than it says.
    """
    return decompress(payload, limit=limit, size=int.from_bytes(payload[-4:], "little"))


def unpack_kernel(file: File) -> bytes:
    """Return the kernel inside a boot image: an ELF file (vmlinux).

    Args:
        file: path of the boot image, or an open descriptor.

    Raises:
        ImageError: it is no boot image, holds no payload that can be unpacked here, or is broken.
        OSError: it cannot be read.
    """
    from linux_loader.bzimage import parse_bzimage

    with Source.open(file) as source:
        image = parse_bzimage(source)
        payload = source.read("payload", image.payload_offset, image.payload_size)
    if len(payload) < 16:
        raise ImageError("payload_length", 0x24C, len(payload), "there is no kernel in this image")
    return unpack_payload(payload, limit=image.unpacked_limit)
