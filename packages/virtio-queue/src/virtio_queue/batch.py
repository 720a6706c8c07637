"""Several chains at once, as flat arrays (`Queue.pop_batch`)."""

from __future__ import annotations

import struct

from virtio_queue._native import ffi, lib
from virtio_queue.chain import DescriptorChain

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from virtio_queue._native import CData

__all__ = ["CHAIN_SIZE", "MAX_HEADER", "ChainBatch"]

MAX_HEADER = 64
"""Most bytes of a chain that `Queue.pop_batch` copies as its header."""

# `struct vq_chain` without the members that count iovecs.
_CHAIN = struct.Struct("=5I12x2Q")
CHAIN_SIZE = _CHAIN.size
"""Bytes of a `struct vq_chain`."""
_CHAIN_WORDS = 12
_CHAIN_QUADS = 6
_unpack_chain = _CHAIN.unpack_from
_unpack_two = struct.Struct("=4Q").unpack_from
_new = object.__new__


class ChainBatch:
    """Chains taken by one call, in arrays that C code can walk without Python.

    The queue owns it and fills it again once all of its chains have been used; copy what is to
    live longer. Made by `Queue.pop_batch` only.

    Attributes:
        native: address of a `struct vq_batch` (layout in `native/virtio_queue.h`), for C code of
            any extension.
    """

    __slots__ = (
        "_chains",
        "_count",
        "_headers",
        "_headers_size",
        "_iovecs",
        "_totals",
        "handle",
        "native",
        "segments",
        "table",
    )

    def __init__(self, chains: int, segments: int, iovecs: int) -> None:
        handle = lib.vq_batch_new(chains, segments, iovecs)
        if not handle:
            raise MemoryError(f"a batch of {chains} chains and {segments} segments")
        self.handle: CData = ffi.gc(handle, lib.vq_batch_free)
        self.native = int(ffi.cast("uintptr_t", handle))  # type: ignore[call-overload]
        self._headers = ffi.buffer(handle.headers, MAX_HEADER * chains)
        self.table = memoryview(ffi.buffer(handle.chains, _CHAIN.size * chains))
        self._chains = self.table.cast("I")
        self._totals = self.table.cast("Q")
        self.segments = memoryview(ffi.buffer(handle.segments, 16 * segments))
        self._iovecs = (
            memoryview(ffi.buffer(handle.iovecs, 16 * iovecs)).cast("Q") if iovecs else None
        )

        # Set by `Queue.pop_batch`: how many chains, and bytes of all their headers.
        self._count = 0
        self._headers_size = 0

    def __len__(self) -> int:
        return self._count

    @property
    def outstanding(self) -> int:
        """How many of the chains have not been used yet."""
        return self.handle.outstanding

    @property
    def heads(self) -> list[int]:
        """The head of each chain, in the order they were made available."""
        return self._chains[: _CHAIN_WORDS * len(self) : _CHAIN_WORDS].tolist()

    @property
    def writable_lengths(self) -> list[int]:
        """Bytes of each chain's device-writable part."""
        return self._totals[5 : _CHAIN_QUADS * len(self) : _CHAIN_QUADS].tolist()

    @property
    def headers(self) -> bytes:
        """The first bytes of each chain, as many as `pop_batch` was asked for, one after the other.

        Read once when the chain was taken; what a shorter chain lacks is zeros.
        `struct.iter_unpack` takes them apart.
        """
        headers: bytes = self._headers[: self._headers_size]
        return headers

    def chain(self, index: int) -> DescriptorChain:
        """Copy one chain out of the arrays.

        Raises:
            IndexError: `index` is not from 0 to `len` - 1.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"chain {index} of a batch of {len(self)}")
        return make_chain(self.table, _CHAIN.size * index, self.segments)

    def __iter__(self) -> Iterator[DescriptorChain]:
        for index in range(len(self)):
            yield self.chain(index)

    def iovecs(self, index: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Return (host address, length) of each readable and each writable piece of a chain.

        Pieces end where regions of guest memory end; empty elements have none. The addresses
        are valid while the guest's memory is.

        Raises:
            IndexError: `index` is not from 0 to `len` - 1, or the batch was made without iovecs.
        """
        if not 0 <= index < len(self) or self._iovecs is None:
            raise IndexError(f"iovecs of chain {index} of a batch of {len(self)}")
        base = _CHAIN_WORDS * index
        first, readable, writable = self._chains[base + 5 : base + 8].tolist()
        middle = first + readable
        return (
            _pairs(self._iovecs[2 * first : 2 * middle]),
            _pairs(self._iovecs[2 * middle : 2 * (middle + writable)]),
        )


def make_chain(table: memoryview, at: int, segments: memoryview) -> DescriptorChain:
    """Build a chain from a `struct vq_chain` at byte `at` of `table`."""
    chain = _new(DescriptorChain)
    (
        chain.head,
        chain.slots,
        first,
        readable,
        writable,
        chain.readable_length,
        chain.writable_length,
    ) = _unpack_chain(table, at)
    if readable == writable == 1:
        # A header or data, and a place for the answer: most requests of most devices.
        address, length, other, room = _unpack_two(segments, 16 * first)
        chain.readable = ((address, length),)
        chain.writable = ((other, room),)
        return chain
    middle = first + readable
    words = segments[16 * first : 16 * (middle + writable)].cast("Q")
    pairs = tuple(_pairs(words))
    chain.readable = pairs[:readable]
    chain.writable = pairs[readable:]
    return chain


def _pairs(words: memoryview[int]) -> list[tuple[int, int]]:
    flat = iter(words.tolist())
    return list(zip(flat, flat, strict=True))
