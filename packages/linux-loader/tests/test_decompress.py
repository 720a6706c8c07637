"""The seven compressions of Linux: round trips, broken streams and bombs."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from linux_loader import ImageError
from linux_loader.decompress import COMPRESSIONS, compression_of, decompress
from linux_loader.testing import compress

every = pytest.mark.parametrize("name", COMPRESSIONS)


def plain(size: int) -> bytes:
    return bytes((index * index >> 3) & 0xFF for index in range(4096)) * (size // 4096)


@every
@settings(max_examples=40)
@given(data=st.binary(min_size=1, max_size=3000))
def test_round_trip(name: str, data: bytes) -> None:
    """What was compressed comes out, with its size stated beforehand or not."""
    packed = compress(name, data)
    assert compression_of(packed) == name
    assert decompress(packed, size=len(data)) == data
    assert decompress(packed, limit=1 << 20) == data


@every
def test_streams_of_several_blocks(name: str) -> None:
    """Streams longer than one block of any of the formats come out whole."""
    data = plain((2 if name == "bzip2" else 17) << 20)
    packed = compress(name, data)
    assert decompress(packed, size=len(data)) == data
    assert decompress(memoryview(packed), limit=len(data)) == data


@every
def test_exactly_one_block(name: str) -> None:
    """A stream that fills its block (8 MiB for lz4) is not mistaken for one that goes on."""
    data = plain((1 if name == "bzip2" else 8) << 20)
    assert decompress(compress(name, data), size=len(data)) == data


@every
@pytest.mark.parametrize("stated", [0, 100, (1 << 20) - 1, (1 << 20) + 1, 20 << 20])
def test_a_wrong_size_is_refused(name: str, stated: int) -> None:
    """A stream that holds more or fewer bytes than stated is an error."""
    with pytest.raises(ImageError):
        decompress(compress(name, bytes(1 << 20)), size=stated)


@every
def test_a_bomb_is_stopped_at_the_limit(name: str) -> None:
    """64 MiB that shrank to almost nothing are refused where 1 MiB is the limit."""
    with pytest.raises(ImageError):
        decompress(compress(name, bytes(64 << 20)), limit=1 << 20)


@every
def test_a_size_above_the_limit_is_refused_unread(name: str) -> None:
    """A stated size above the limit is refused before anything is unpacked."""
    with pytest.raises(ImageError):
        decompress(compress(name, b"x"), size=1 << 31)


@every
@settings(max_examples=40)
@given(data=st.data())
def test_broken_streams_raise_only_image_errors(name: str, data: st.DataObject) -> None:
    """A cut or changed stream gives bytes within the limit, or ImageError."""
    packed = bytearray(compress(name, plain(8192)))
    if data.draw(st.booleans()):
        packed = packed[: data.draw(st.integers(0, len(packed) - 1))]
    else:
        position = data.draw(st.integers(0, len(packed) - 1))
        packed[position] ^= data.draw(st.integers(1, 255))
    try:
        result = decompress(bytes(packed), limit=1 << 16)
    except ImageError:
        return
    assert len(result) <= 1 << 16


@every
def test_a_cut_stream_is_refused(name: str) -> None:
    """Half a stream is an error, also where no size was stated."""
    packed = compress(name, plain(1 << 16))
    with pytest.raises(ImageError):
        decompress(packed[: len(packed) // 2], limit=1 << 20)


@settings(max_examples=50)
@given(st.sampled_from(COMPRESSIONS), st.binary(max_size=64))
def test_noise_behind_a_magic(name: str, noise: bytes) -> None:
    """Random bytes behind a stream's magic give nothing large, or ImageError."""
    head = compress(name, b"")[:9]
    try:
        assert len(decompress(head + noise, limit=4096)) <= 4096
    except ImageError:
        return


def test_an_unknown_stream_is_refused() -> None:
    """The error lists the compressions that are known."""
    assert compression_of(b"PK\3\4") is None
    with pytest.raises(ImageError, match="zstd"):
        decompress(b"PK\3\4" + bytes(20))


def test_regression_a_dictionary_that_lies_is_not_allocated() -> None:
    """LZMA's header may ask for 4 GiB; more than Linux's 128 MiB is refused. Found by fuzzing."""
    data = plain(8192)
    packed = bytearray(compress("lzma", data))
    packed[1:5] = (128 << 20).to_bytes(4, "little")
    assert decompress(bytes(packed), size=len(data)) == data
    packed[1:5] = (160 << 20).to_bytes(4, "little")
    tracemalloc.start()
    try:
        with pytest.raises(ImageError, match="lzma"):
            decompress(bytes(packed), limit=1 << 20)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
