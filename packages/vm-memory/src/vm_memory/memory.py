"""Guest memory: bytes, scalars, atomics and zero-copy slices over a map of regions.

Rules that hold for every access:

- An access may span adjacent regions. A hole stops it: the exact forms then raise
  `MemoryAccessError` before they touch anything.
- A scalar whose address is a multiple of its size is read and written in one piece, so a guest
  that writes at the same time is seen before or after, never halfway. Larger and misaligned
  accesses give no such promise.
- Scalars are little-endian.
"""

from __future__ import annotations

from vm_memory._map import MemoryMap
from vm_memory._native import lib
from vm_memory.atomic import Order
from vm_memory.errors import InvalidValueError, MemoryAccessError
from vm_memory.permissions import Permissions

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeAlias

    from vm_memory.address import GuestAddress
    from vm_memory.region import GuestRegion

    Buffer: TypeAlias = bytes | bytearray | memoryview

__all__ = ["GuestMemory"]

_load = lib.vmm_load
_store = lib.vmm_store
_fill = lib.vmm_fill

# What an atomic load or store may ask for (C11, 7.17.7).
_LOADS = (Order.RELAXED, Order.ACQUIRE, Order.SEQ_CST)
_STORES = (Order.RELAXED, Order.RELEASE, Order.SEQ_CST)


class GuestMemory(MemoryMap):
    r"""The guest-physical address space.

    Attributes:
        regions: what it is made of, sorted by address.

    >>> from vm_memory import GuestAddress, GuestMemory
    >>> memory = GuestMemory.from_ranges([(GuestAddress(0), 65536), (GuestAddress(65536), 4096)])
    >>> memory.write_u32(GuestAddress(0x8000), 0xCAFE)
    >>> memory.read(GuestAddress(0x8000), 4)
    b'\xfe\xca\x00\x00'
    >>> [len(piece) for piece in memory.slices(GuestAddress(0xFFF0), 32)]
    [16, 16]
    """

    __slots__ = ()

    # --- bytes ---

    def read(self, address: GuestAddress, length: int) -> bytes:
        """Exactly `length` bytes.

        Raises:
            MemoryAccessError: when the range is not all memory.
        """
        region = self._recent
        offset = address - region.guest_address
        end = offset + length
        if 0 <= offset <= end <= region.size:
            return region.buffer[offset:end].tobytes()
        pieces = self._pieces(address, length)
        return b"".join([region.buffer[start : start + count] for region, start, count in pieces])

    def write(self, address: GuestAddress, data: Buffer) -> None:
        """Write all of `data`, or nothing.

        Raises:
            MemoryAccessError: when the range is not all memory.
        """
        length = len(data)
        region = self._recent
        offset = address - region.guest_address
        end = offset + length
        if 0 <= offset <= end <= region.size:
            try:
                region.buffer[offset:end] = data
            except (TypeError, ValueError):
                pass  # not a flat buffer of bytes: below it is made one
            else:
                return
        view = memoryview(data).cast("B")
        done = 0
        for region, start, count in self._pieces(address, len(view)):
            region.buffer[start : start + count] = view[done : done + count]
            done += count

    def read_partial(self, address: GuestAddress, length: int) -> bytes:
        """Up to `length` bytes: what there is in front of the first hole.

        Raises:
            MemoryAccessError: when there is no memory at `address` itself.
        """
        return self.read(address, self._available(address, length))

    def write_partial(self, address: GuestAddress, data: Buffer) -> int:
        """Write what fits in front of the first hole; returns how many bytes that were.

        Raises:
            MemoryAccessError: when there is no memory at `address` itself.
        """
        view = memoryview(data).cast("B")
        length = self._available(address, len(view))
        self.write(address, view[:length])
        return length

    def fill(self, address: GuestAddress, length: int, value: int = 0) -> None:
        """Set every byte of a range to one value, 0 to 255.

        Raises:
            MemoryAccessError: when the range is not all memory.
            InvalidValueError: when the value is no byte.
        """
        if not 0 <= value <= 255:
            raise InvalidValueError("value", value, "must be 0 to 255")
        for region, offset, count in self._pieces(address, length):
            _fill(region.host_address + offset, value, count)

    def slices(
        self,
        address: GuestAddress,
        length: int,
        permissions: Permissions = Permissions.READ_WRITE,
    ) -> list[memoryview]:
        """The pieces of a range as writable views, one for each region, without a copy.

        The views work wherever buffers do: `os.preadv`, `readinto`, `recv_into`, numpy. They stay
        valid after the map was closed. With `WRITE` the range counts as written at once.

        Raises:
            MemoryAccessError: when the range is not all memory.
        """
        region = self._recent
        offset = address - region.guest_address
        end = offset + length
        if 0 <= offset < end <= region.size:
            return [region.buffer[offset:end]]
        pieces = self._pieces(address, length)
        return [region.buffer[start : start + count] for region, start, count in pieces]

    # --- scalars ---

    def read_u8(self, address: GuestAddress) -> int:
        """The byte at an address."""
        region = self._recent
        offset = address - region.guest_address
        if 0 <= offset < region.size:
            return region.buffer[offset]
        return self.read(address, 1)[0]

    def read_u16(self, address: GuestAddress) -> int:
        """The 16-bit word at an address; in one piece when that is a multiple of 2."""
        region = self._recent
        offset = address - region.guest_address
        if offset >= 0 and not offset & 1:
            try:
                return region.u16[offset >> 1]
            except IndexError:
                pass  # in another region
        return self._read_scalar(address, 2)

    def read_u32(self, address: GuestAddress) -> int:
        """The 32-bit word at an address; in one piece when that is a multiple of 4."""
        region = self._recent
        offset = address - region.guest_address
        if offset >= 0 and not offset & 3:
            try:
                return region.u32[offset >> 2]
            except IndexError:
                pass
        return self._read_scalar(address, 4)

    def read_u64(self, address: GuestAddress) -> int:
        """The 64-bit word at an address; in one piece when that is a multiple of 8."""
        region = self._recent
        offset = address - region.guest_address
        if offset >= 0 and not offset & 7:
            try:
                return region.u64[offset >> 3]
            except IndexError:
                pass
        return self._read_scalar(address, 8)

    def write_u8(self, address: GuestAddress, value: int) -> None:
        """Write a byte."""
        self._write_scalar(address, 1, value)

    def write_u16(self, address: GuestAddress, value: int) -> None:
        """Write a 16-bit word; in one piece when the address is a multiple of 2."""
        region = self._recent
        offset = address - region.guest_address
        if offset >= 0 and not offset & 1:
            try:
                region.u16[offset >> 1] = value
            except (IndexError, ValueError):
                pass
            else:
                return
        self._write_scalar(address, 2, value)

    def write_u32(self, address: GuestAddress, value: int) -> None:
        """Write a 32-bit word; in one piece when the address is a multiple of 4."""
        region = self._recent
        offset = address - region.guest_address
        if offset >= 0 and not offset & 3:
            try:
                region.u32[offset >> 2] = value
            except (IndexError, ValueError):
                pass
            else:
                return
        self._write_scalar(address, 4, value)

    def write_u64(self, address: GuestAddress, value: int) -> None:
        """Write a 64-bit word; in one piece when the address is a multiple of 8."""
        region = self._recent
        offset = address - region.guest_address
        if offset >= 0 and not offset & 7:
            try:
                region.u64[offset >> 3] = value
            except (IndexError, ValueError):
                pass
            else:
                return
        self._write_scalar(address, 8, value)

    # --- atomics ---

    def atomic_load(self, address: GuestAddress, size: int, order: Order = Order.ACQUIRE) -> int:
        """Read 1, 2, 4 or 8 bytes as one, ordered with what surrounds it.

        Raises:
            MemoryAccessError: when the address is no multiple of `size`, or no memory.
            InvalidValueError: when the size is another, or a load cannot have that order.
        """
        if order not in _LOADS:
            raise InvalidValueError("order", order, "a load is RELAXED, ACQUIRE or SEQ_CST")
        region, offset = self._one(address, size)
        return _load(region.host_address + offset, size, order)

    def atomic_store(
        self, address: GuestAddress, size: int, value: int, order: Order = Order.RELEASE
    ) -> None:
        """Write 1, 2, 4 or 8 bytes as one, ordered with what surrounds it.

        Raises:
            MemoryAccessError: when the address is no multiple of `size`, or no memory.
            InvalidValueError: when the size is another, the value does not fit, or a store
                cannot have that order.
        """
        if order not in _STORES:
            raise InvalidValueError("order", order, "a store is RELAXED, RELEASE or SEQ_CST")
        region, offset = self._one(address, size)
        _store(region.host_address + offset, size, _unsigned(value, size), order)

    # --- mapping files in ---

    def map_private_file(self, address: GuestAddress, fd: int, offset: int, length: int) -> bool:
        """Put a file's content into anonymous memory by mapping it, copy-on-write.

        Pages are read when touched, and shared with the host's page cache until written. The
        file must not be truncated while the memory lives.

        Args:
            address: where to; what was there is gone.
            fd: an open file, which may be closed afterwards.
            offset: where in the file to begin.
            length: how many bytes.

        Returns:
            Whether it was done. False, and nothing changed, where the memory is not anonymous,
            the range is not within one region, address, offset and length are not all multiples
            of the page size, or the file is shorter than the range: then copy instead.

        Raises:
            MemoryAccessError: when the range is not all memory.
            MappingError: when the host refuses, a file that cannot be mapped for one.
        """
        import os

        from vm_memory._mapping import PAGE

        pieces = self._pieces(address, length)
        if len(pieces) != 1 or (address | offset | length) % PAGE or offset < 0:
            return False
        region, start, _ = pieces[0]
        end = -(-os.fstat(fd).st_size // PAGE) * PAGE
        if not region.mapping.private or start % PAGE or offset + length > end:
            return False
        region.mapping.overlay(start, length, fd, offset)
        return True

    # --- slow paths ---

    def _available(self, address: int, length: int) -> int:
        """How many bytes of a range lie in front of the first hole; at least one."""
        count = sum(count for _, _, count in self._walk(address, length))
        if count == 0 and length > 0:
            self._check_open()
            raise MemoryAccessError(address, length, "there is no memory at its first byte")
        return count

    def _read_scalar(self, address: int, size: int) -> int:
        pieces = self._pieces(address, size)
        region, offset, count = pieces[0]
        if count == size and not offset & (size - 1):
            return _words(region, size)[offset // size]
        data = b"".join([r.buffer[start : start + n] for r, start, n in pieces])
        return int.from_bytes(data, "little")

    def _write_scalar(self, address: int, size: int, value: int) -> None:
        _unsigned(value, size)
        pieces = self._pieces(address, size)
        region, offset, count = pieces[0]
        if count == size and not offset & (size - 1):
            _words(region, size)[offset // size] = value
        else:
            data = value.to_bytes(size, "little")
            for region, start, count in pieces:
                region.buffer[start : start + count] = data[:count]
                data = data[count:]

    def _one(self, address: int, size: int) -> tuple[GuestRegion, int]:
        """Region and offset for an atomic access; the caller holds the region meanwhile."""
        if size not in (1, 2, 4, 8):
            raise InvalidValueError("size", size, "must be 1, 2, 4 or 8")
        if address % size:
            raise MemoryAccessError(address, size, f"the address must be a multiple of {size}")
        pieces = self._pieces(address, size)
        region, offset, count = pieces[0]
        if count != size:
            raise MemoryAccessError(address, size, "it must lie within one region")
        return region, offset


def _words(region: GuestRegion, size: int) -> memoryview:
    if size == 1:
        return region.buffer
    return {2: region.u16, 4: region.u32, 8: region.u64}[size]


def _unsigned(value: int, size: int) -> int:
    if not 0 <= value < 1 << (8 * size):
        raise InvalidValueError("value", value, f"must fit in {size} unsigned bytes")
    return value
