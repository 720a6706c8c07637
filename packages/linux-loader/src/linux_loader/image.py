"""The Image format of arm64 and riscv64 (Documentation/arch/{arm64,riscv}): checked, unwrapped.

A file may hold it as it is, compressed (Image.gz and the like), or as an EFI zboot image, which is
a PE file around a compressed Image.
"""

from __future__ import annotations

import struct

from linux_loader.decompress import MAX_KERNEL_SIZE, compression_of, decompress
from linux_loader.errors import ImageError
from linux_loader.source import Source
from vm_memory._values import frozen

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["KernelImage", "parse_image", "unwrap"]

_HEADER = struct.Struct("<8xQQQ")
_OLD_TEXT_OFFSET = 0x80000


@frozen(kw_only=True)
class KernelImage:
    """A checked header.

    Attributes:
        architecture: `arm64` or `riscv64`.
        text_offset: where the image starts behind a 2 MiB boundary of RAM.
        image_size: bytes it needs from there, its BSS included.
        flags: as in the header; for arm64 bit 0 big-endian, bits 1 and 2 page size, bit 3
            whether it may lie anywhere in RAM.
        version: riscv64's header version, 0x10000 times major; 0 for arm64.
    """

    architecture: str
    text_offset: int
    image_size: int
    flags: int
    version: int


def unwrap(source: Source, opened: Callable[[Source], None]) -> tuple[Source, str]:
    """Return what a compressed file or a zboot image holds; others are returned as they are.

    Args:
        source: the file.
        opened: told of each new source, so that it can be closed.

    Returns:
        The Image itself, and how it was wrapped: `""`, `gzip`, `zboot zstd` and the like.

    Raises:
        ImageError: the wrapping is broken.
    """
    head = source.read_up_to(0, 64)
    compression = compression_of(head)
    if compression is not None:
        data = decompress(source.read("image", 0, source.size), limit=MAX_KERNEL_SIZE)
        return _opened(data, source, opened), compression
    if head[:2] == b"MZ" and head[4:8] == b"zimg" and len(head) == 64:
        offset, size = struct.unpack_from("<II", head, 8)
        payload = source.read("zboot payload", offset, size)
        compression = compression_of(payload[:16])
        stated = head[24:56].split(b"\0")[0].decode("ascii", "replace")
        if compression is None or not stated.startswith(compression):
            raise ImageError("comp_type", 24, stated, "must name the payload's compression")
        data = decompress(payload, limit=MAX_KERNEL_SIZE)
        return _opened(data, source, opened), f"zboot {compression}"
    return source, ""


def _opened(data: bytes, source: Source, opened: Callable[[Source], None]) -> Source:
    inner = Source.of_bytes(data, f"image in {source.name}")
    opened(inner)
    return inner


def parse_image(source: Source) -> KernelImage | None:
    """Read and check the header of an unwrapped Image; None where the file is none.

    Raises:
        ImageError: it is shorter than its header says, or says what cannot be.
    """
    head = source.read_up_to(0, 64)
    if len(head) < 64:
        return None
    text_offset, size, flags = _HEADER.unpack_from(head)
    if head[0x38:0x3C] == b"ARM\x64":
        architecture, version = "arm64", 0
    elif head[0x38:0x3C] == b"RSC\x05":
        architecture, version = "riscv64", int.from_bytes(head[0x20:0x24], "little")
    else:
        return None
    if not size:
        if architecture == "riscv64":
            raise ImageError("image_size", 16, 0, "must tell how much memory the kernel needs")
        # Before Linux 3.17 the field was zero and the offset not to be trusted.
        text_offset, size = _OLD_TEXT_OFFSET, source.size
    if size < source.size:
        size = source.size
    if text_offset >= 1 << 30 or text_offset % 4096:
        raise ImageError("text_offset", 8, text_offset, "must be below 1 GiB, in whole pages")
    if size > MAX_KERNEL_SIZE:
        raise ImageError("image_size", 16, size, f"must be at most {MAX_KERNEL_SIZE:#x}")
    return KernelImage(
        architecture=architecture,
        text_offset=text_offset,
        image_size=size,
        flags=flags,
        version=version,
    )
