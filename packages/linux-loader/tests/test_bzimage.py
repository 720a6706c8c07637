"""The setup header of boot images, protocol 2.00 to 2.15."""

from __future__ import annotations

import pytest
from hypothesis import given

from linux_loader import ImageError
from linux_loader.bzimage import BzImage, parse_bzimage
from linux_loader.source import Source
from linux_loader.testing import build_bzimage, bzimages, lies


def parse(data: bytes) -> BzImage:
    return parse_bzimage(Source.of_bytes(data, "image"))


def test_the_newest_header_is_read_as_written() -> None:
    """Every field of protocol 2.15 that the loader uses comes back."""
    image = parse(build_bzimage(b"\xf4" * 40, payload=b"p" * 30, setup_sects=5))
    assert image.protocol == 0x20F
    assert image.version == "6.1.0-test"
    assert (image.setup_size, image.kernel_size) == (6 * 512, 80)
    assert (image.payload_offset, image.payload_size) == (6 * 512 + 40, 30)
    assert (image.pref_address, image.init_size) == (0x1000000, 0x100000)
    assert (image.cmdline_size, image.initrd_addr_max) == (2047, 0x7FFFFFFF)
    assert (image.kernel_alignment, image.relocatable) == (0x200000, True)
    assert image.header[0x1FE - 0x1F1 :][:2] == b"\x55\xaa"


def test_fields_that_are_too_young_are_not_read() -> None:
    """Protocol 2.00 has none of the later fields: the documented defaults stand for them."""
    image = parse(build_bzimage(b"\xf4" * 40, payload=b"p" * 30, protocol=0x200))
    assert image.cmdline_size == 255
    assert image.initrd_addr_max == 0x37FFFFFF
    assert image.payload_size == image.init_size == image.xloadflags == 0
    assert not image.relocatable
    assert image.pref_address == 0x100000


def test_no_setup_sectors_mean_four() -> None:
    """A setup_sects of 0 stands for 4, for the oldest images' sake."""
    assert parse(build_bzimage(b"\xf4", setup_sects=0)).setup_size == 5 * 512


@given(bzimages())
def test_every_valid_image_parses(data: bytes) -> None:
    """No image of the strategy is refused, and what it points at lies inside the file."""
    image = parse(data)
    assert image.setup_size + image.kernel_size <= len(data)
    assert image.payload_offset + image.payload_size <= len(data)


@given(lies(bzimages(), within=0x280))
def test_a_lie_is_parsed_or_refused(data: bytes) -> None:
    """Whatever is changed, the outcome is an image inside the file, or an ImageError."""
    try:
        image = parse(data)
    except ImageError:
        return
    assert image.setup_size + image.kernel_size <= len(data)
    assert image.payload_offset + image.payload_size <= len(data)


@pytest.mark.parametrize(
    ("offset", "value", "field"),
    [
        (0x201, b"\x00", "jump"),
        (0x202, b"HdrX", "header"),
        (0x206, b"\x00\x01", "version"),
        (0x206, b"\x00\x03", "version"),
        (0x1F1, b"\xff", "setup_sects"),
        (0x1F4, b"\xff\xff\x00\x00", "syssize"),
        (0x230, b"\x03\x00\x00\x00", "kernel_alignment"),
        (0x24C, b"\xff\xff\xff\xff", "payload_length"),
        (0x248, b"\xff\xff\xff\xff\x01", "payload_length"),
    ],
)
def test_each_lie_is_named(offset: int, value: bytes, field: str) -> None:
    """The error names the header field that lies."""
    data = bytearray(build_bzimage(b"\xf4" * 40))
    data[offset : offset + len(value)] = value
    with pytest.raises(ImageError) as caught:
        parse(bytes(data))
    assert caught.value.field == field


def test_an_unprintable_version_is_made_printable() -> None:
    """Control characters in the version string do not reach a terminal."""
    assert parse(build_bzimage(b"\xf4", version="6.1\x1b[2J")).version == "6.1?[2J"


def test_a_version_pointer_outside_the_setup_is_ignored() -> None:
    """A kernel_version that points past the setup code gives no version, as the protocol says."""
    data = bytearray(build_bzimage(b"\xf4" * 4000))
    data[0x20E:0x210] = b"\xff\xff"
    assert parse(bytes(data)).version == ""
