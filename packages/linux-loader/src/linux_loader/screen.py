"""A linear framebuffer that is there when the guest starts."""

from __future__ import annotations

import struct

import attrs

from linux_loader.errors import PlacementError

__all__ = ["Screen"]

_VIDEO_TYPE_VLFB = 0x23


@attrs.frozen
class Screen:
    """A framebuffer of 32-bit pixels: blue, green, red and an unused byte.

    Attributes:
        address: guest-physical, page-aligned.
        width: pixels, 1 to 65535.
        height: pixels, 1 to 65535.
        stride: bytes from one line to the next; None for no gap between them.
    """

    address: int
    width: int
    height: int
    stride: int | None = None

    def __attrs_post_init__(self) -> None:
        """Check the ranges.

        Raises:
            PlacementError: a field is out of range.
        """
        if not 0 < self.width < 1 << 16 or not 0 < self.height < 1 << 16:
            raise PlacementError(
                "screen", None, (self.width, self.height), "must be 1 to 65535 pixels each way"
            )
        if self.address % 4096 or not 0 <= self.address < 1 << 52:
            raise PlacementError("screen", None, self.address, "must be page-aligned")
        if not self.width * 4 <= self.line < 1 << 16:
            raise PlacementError(
                "screen",
                None,
                self.line,
                "a line must hold 4 bytes a pixel and take less than 64 KiB",
            )

    @property
    def line(self) -> int:
        """Bytes from one line to the next."""
        return self.width * 4 if self.stride is None else self.stride

    @property
    def size(self) -> int:
        """Bytes of the whole framebuffer."""
        return self.line * self.height

    def screen_info(self) -> bytes:
        """Return `struct screen_info` of the zero page, 64 bytes, as a VESA framebuffer."""
        info = bytearray(64)
        info[0x0F] = _VIDEO_TYPE_VLFB
        struct.pack_into(
            "<HHHII",
            info,
            0x12,
            self.width,
            self.height,
            32,
            self.address & 0xFFFFFFFF,
            -(-self.size // 0x10000),
        )
        struct.pack_into("<H8B", info, 0x24, self.line, 8, 16, 8, 8, 8, 0, 8, 24)
        if self.address >> 32:
            struct.pack_into("<II", info, 0x36, 2, self.address >> 32)  # 64-bit base
        return bytes(info)
