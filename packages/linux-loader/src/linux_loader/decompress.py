"""Compressed kernels, taken apart on the host by the C libraries that Python has for it.

Every algorithm that Linux can be built with: gzip, bzip2, xz, lzma, lz4 (legacy frames), zstd and
lzo (lzop files). Each is told how much may come out and stops there, whatever the stream says.
"""

from __future__ import annotations

from linux_loader.errors import ImageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import zstandard

__all__ = ["COMPRESSIONS", "MAX_KERNEL_SIZE", "compression_of", "decompress"]

MAX_KERNEL_SIZE = 1 << 30
"""KERNEL_IMAGE_SIZE of Linux on x86: no kernel unpacks to more."""

_WINDOW = 128 << 20  # zstd -22 --ultra, which Linux uses, needs this window
_XZ_MEMORY = 136 << 20  # Linux's largest dictionary of 128 MiB, and liblzma's own tables
_LZ4_BLOCK = 8 << 20  # of the legacy frame
_LZO_BLOCK = 256 << 10  # the most that Linux reads too
_LZO_FILTER = 0x800
_ZSTD_STEP = 1024  # 43 MB come out of it at most

_MAGICS = (
    (b"\x1f\x8b", "gzip"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\0", "xz"),
    (b"\x5d\0\0", "lzma"),
    (b"\x02\x21\x4c\x18", "lz4"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\x89LZO\0\r\n\x1a\n", "lzo"),
)
COMPRESSIONS = tuple(name for _, name in _MAGICS)
"""Names of the algorithms, as `compression_of` gives them."""


def compression_of(head: bytes) -> str | None:
    """Recognise a compressed stream by its first bytes (16 are enough).

    >>> compression_of(bytes.fromhex("28b52ffd"))
    'zstd'
    """
    for magic, name in _MAGICS:
        if head.startswith(magic):
            return name
    return None


def decompress(
    data: bytes | memoryview, *, limit: int = MAX_KERNEL_SIZE, size: int | None = None
) -> bytes:
    """Decompress one stream; what follows it is ignored.

    Besides what comes out, it allocates 136 MiB at most: the window that the stream asks for.

    Args:
        data: the stream.
        limit: the most bytes that may come out.
        size: how many bytes must come out, where that is known beforehand (Linux states it).

    Raises:
        ImageError: the stream is of no known kind, broken or cut short, holds more than `limit`
            bytes, or not the stated `size`.
    """
    view = memoryview(data).cast("B")
    name = compression_of(bytes(view[:16]))
    if name is None:
        raise ImageError(
            "compression", None, bytes(view[:8]), f"must be one of {', '.join(COMPRESSIONS)}"
        )
    if size is not None:
        if size > limit:
            raise ImageError(name, None, size, f"may unpack to {limit:#x} bytes at most")
        limit = size
    result = _UNPACKERS[name](view, limit)
    if size is not None and len(result) != size:
        raise ImageError(name, None, len(result), f"the image states {size:#x} bytes")
    return result


def _broken(name: str, cause: object) -> ImageError:
    return ImageError(name, None, str(cause), "the compressed stream must be whole and intact")


def _too_big(name: str, limit: int) -> ImageError:
    return ImageError(name, None, limit, "more bytes come out than the image states or may hold")


def _complete(name: str, result: bytes, eof: bool, limit: int) -> bytes:
    if len(result) > limit:
        raise _too_big(name, limit)
    if not eof:
        raise _broken(name, "it ends too early")
    return result


def _gzip(view: memoryview, limit: int) -> bytes:
    import zlib

    unpacker = zlib.decompressobj(wbits=31)
    try:
        result = unpacker.decompress(view, limit + 1)
    except zlib.error as error:
        raise _broken("gzip", error) from error
    return _complete("gzip", result, unpacker.eof, limit)


def _bzip2(view: memoryview, limit: int) -> bytes:
    import bz2

    unpacker = bz2.BZ2Decompressor()
    try:
        result = unpacker.decompress(view, limit + 1)
    except (OSError, ValueError) as error:
        raise _broken("bzip2", error) from error
    return _complete("bzip2", result, unpacker.eof, limit)


def _xz(view: memoryview, limit: int) -> bytes:
    import lzma

    return _liblzma("xz", lzma.FORMAT_XZ, view, limit)


def _lzma(view: memoryview, limit: int) -> bytes:
    import lzma

    return _liblzma("lzma", lzma.FORMAT_ALONE, view, limit)


def _liblzma(name: str, container: int, view: memoryview, limit: int) -> bytes:
    import lzma

    try:
        unpacker = lzma.LZMADecompressor(format=container, memlimit=_XZ_MEMORY)
        result = unpacker.decompress(view, limit + 1)
    except (lzma.LZMAError, EOFError) as error:
        raise _broken(name, error) from error
    return _complete(name, result, unpacker.eof, limit)


def _lz4(view: memoryview, limit: int) -> bytes:
    from lz4.block import LZ4BlockError  # type: ignore[import-untyped]
    from lz4.block import decompress as unpack

    pieces: list[bytes] = []
    total, position = 0, 4
    while True:
        length = int.from_bytes(view[position : position + 4], "little")
        position += 4
        if not length or position + length > len(view):
            raise _broken("lz4", f"the block before byte {position} does not end in the stream")
        room = limit - total
        try:
            piece = unpack(
                view[position : position + length],
                uncompressed_size=min(_LZ4_BLOCK, room + 1),
            )
        except (LZ4BlockError, ValueError) as error:
            raise (
                _too_big("lz4", limit) if room < _LZ4_BLOCK else _broken("lz4", error)
            ) from error
        pieces.append(piece)
        total += len(piece)
        position += length
        if total > limit:
            raise _too_big("lz4", limit)
        # Every block but the last is full. Linux appends the size: four bytes, no block.
        if len(piece) < _LZ4_BLOCK or position + 4 >= len(view):
            return b"".join(pieces)


def _zstd(view: memoryview, limit: int) -> bytes:
    import zstandard

    unpacker = zstandard.ZstdDecompressor(max_window_size=_WINDOW)
    try:
        stated = zstandard.get_frame_parameters(view).content_size
        if stated != zstandard.CONTENTSIZE_UNKNOWN:
            if stated > limit:
                raise _too_big("zstd", limit)
            return unpacker.decompress(view) if stated else b""
        return _zstd_unsized(unpacker, view, limit)
    except zstandard.ZstdError as error:
        raise _broken("zstd", error) from error


def _zstd_unsized(unpacker: zstandard.ZstdDecompressor, view: memoryview, limit: int) -> bytes:
    """Decompress a frame that does not state its size, in pieces that keep a bomb small."""
    stream = unpacker.decompressobj()
    pieces: list[bytes] = []
    total = 0
    for position in range(0, len(view), _ZSTD_STEP):
        piece = stream.decompress(view[position : position + _ZSTD_STEP])
        pieces.append(piece)
        total += len(piece)
        if total > limit:
            raise _too_big("zstd", limit)
        if stream.eof:
            return b"".join(pieces)
    raise _broken("zstd", "it ends too early")


def _lzo(view: memoryview, limit: int) -> bytes:
    """Decompress an lzop file, whose numbers are big-endian."""
    from lzallright import LZOCompressor, LZOError

    def number(offset: int, size: int) -> int:
        if offset + size > len(view):
            raise _broken("lzo", "it ends too early")
        return int.from_bytes(view[offset : offset + size], "big")

    # magic 9, version 2, library 2, needed 2 (since 0.940), method 1, level 1 (likewise), flags 4
    recent = number(9, 2) >= 0x0940
    position = 17 if recent else 14
    flags = number(position, 4)
    position += 4
    if flags & _LZO_FILTER:
        position += 4
    position += 12 if recent else 8  # mode, and one or two words of time
    position += 1 + number(position, 1) + 4  # name, and the header's checksum
    before = 4 * ((flags & 1 != 0) + (flags & 0x100 != 0))  # Adler-32, CRC-32 of what comes out
    after = 4 * ((flags & 2 != 0) + (flags & 0x200 != 0))  # of what went in, where it shrank

    pieces: list[bytes] = []
    total = 0
    while True:
        size = number(position, 4)
        if not size:
            return b"".join(pieces)
        length = number(position + 4, 4)
        if size > _LZO_BLOCK or not 0 < length <= size:
            raise _broken("lzo", f"a block of {length} bytes for {size}")
        position += 8 + before + (after if length < size else 0)
        number(position + length - 1, 1)
        block = bytes(view[position : position + length])
        position += length
        total += size
        if total > limit:
            raise _too_big("lzo", limit)
        if length < size:
            try:
                block = LZOCompressor.decompress(block, size)
            except LZOError as error:
                raise _broken("lzo", error.args[0]) from error
            if len(block) != size:
                raise _broken("lzo", f"a block of {len(block)} bytes, not {size}")
        pieces.append(block)


_UNPACKERS = {
    "gzip": _gzip,
    "bzip2": _bzip2,
    "xz": _xz,
    "lzma": _lzma,
    "lz4": _lz4,
    "zstd": _zstd,
    "lzo": _lzo,
}
