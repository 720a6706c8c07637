"""Access to guest memory as scalars of 8 to 64 bits."""

from __future__ import annotations

from vm_memory._bytes import ByteAccess
from vm_memory.errors import InvalidValueError, MemoryAccessError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vm_memory.address import GuestAddress
    from vm_memory.region import GuestRegion
    from vm_memory.scalar import Scalar

__all__ = ["WordAccess"]


class WordAccess(ByteAccess):
    """Reading and writing scalars; aligned ones in one piece."""

    __slots__ = ()

    def read_u8(self, address: GuestAddress) -> int:
        """The byte at an address.

        Raises:
            MemoryAccessError: here and below, when the range is not all memory.
            BackingLostError: here and below, when pages of it are lost.
        """
        region = self._recent
        offset = address - region.guest_address
        if 0 <= offset < region.size:
            return region.buffer[offset]
        return self._read_scalar(address, 1)

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
                pass  # in another region
        return self._read_scalar(address, 4)

    def read_u64(self, address: GuestAddress) -> int:
        """The 64-bit word at an address; in one piece when that is a multiple of 8."""
        region = self._recent
        offset = address - region.guest_address
        if offset >= 0 and not offset & 7:
            try:
                return region.u64[offset >> 3]
            except IndexError:
                pass  # in another region
        return self._read_scalar(address, 8)

    def write_u8(self, address: GuestAddress, value: int) -> None:
        """Write a byte.

        Raises:
            InvalidValueError: here and below, when the value does not fit.
        """
        self._write_scalar(address, 1, value)

    def write_u16(self, address: GuestAddress, value: int) -> None:
        """Write a 16-bit word; in one piece when the address is a multiple of 2."""
        region = self._recent
        offset = address - region.guest_address
        if offset >= 0 and not offset & 1:
            try:
                region.u16[offset >> 1] = value
            except (IndexError, ValueError):
                pass  # in another region, or too large
            else:
                if region.dirty is not None:
                    region.dirty.mark(offset, 2)
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
                pass  # in another region, or too large
            else:
                if region.dirty is not None:
                    region.dirty.mark(offset, 4)
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
                pass  # in another region, or too large
            else:
                if region.dirty is not None:
                    region.dirty.mark(offset, 8)
                return
        self._write_scalar(address, 8, value)

    # --- big-endian ---

    def read_u16_be(self, address: GuestAddress) -> int:
        """The big-endian 16-bit word at an address; in one piece when aligned."""
        return int.from_bytes(self.read_u16(address).to_bytes(2, "little"), "big")

    def write_u16_be(self, address: GuestAddress, value: int) -> None:
        """Write a big-endian 16-bit word; in one piece when aligned."""
        swapped = int.from_bytes(unsigned(value, 2).to_bytes(2, "little"), "big")
        self.write_u16(address, swapped)

    def read_u32_be(self, address: GuestAddress) -> int:
        """The big-endian 32-bit word at an address; in one piece when aligned."""
        return int.from_bytes(self.read_u32(address).to_bytes(4, "little"), "big")

    def write_u32_be(self, address: GuestAddress, value: int) -> None:
        """Write a big-endian 32-bit word; in one piece when aligned."""
        swapped = int.from_bytes(unsigned(value, 4).to_bytes(4, "little"), "big")
        self.write_u32(address, swapped)

    def read_u64_be(self, address: GuestAddress) -> int:
        """The big-endian 64-bit word at an address; in one piece when aligned."""
        return int.from_bytes(self.read_u64(address).to_bytes(8, "little"), "big")

    def write_u64_be(self, address: GuestAddress, value: int) -> None:
        """Write a big-endian 64-bit word; in one piece when aligned."""
        swapped = int.from_bytes(unsigned(value, 8).to_bytes(8, "little"), "big")
        self.write_u64(address, swapped)

    def scalar(self, address: GuestAddress, size: int) -> Scalar:
        """One scalar, looked up once, for code that reads or writes it often.

        Args:
            address: where it is, a multiple of `size`.
            size: 1, 2, 4 or 8 bytes.

        Raises:
            MemoryAccessError: when the address is misaligned or not memory.
            InvalidValueError: when the size is another.
        """
        from vm_memory.scalar import Scalar

        region, offset = self._one(address, size, write=True)
        return Scalar(region, offset, size)

    # --- slow paths ---

    def _read_scalar(self, address: int, size: int) -> int:
        pieces = self._pieces(address, size)
        region, offset, count = pieces[0]
        if count == size and not offset & (size - 1):
            value = words(region, size)[offset // size]
        else:
            data = b"".join([r.buffer[start : start + n] for r, start, n in pieces])
            value = int.from_bytes(data, "little")
        self._check_lost(address, size, pieces)
        return value

    def _write_scalar(self, address: int, size: int, value: int) -> None:
        unsigned(value, size)
        pieces = self._pieces(address, size, write=True)
        region, offset, count = pieces[0]
        if count == size and not offset & (size - 1):
            words(region, size)[offset // size] = value
        else:
            data = value.to_bytes(size, "little")
            for region, start, count in pieces:
                region.buffer[start : start + count] = data[:count]
                data = data[count:]
        self._wrote(address, pieces)
        self._check_lost(address, size, pieces)

    def _one(self, address: int, size: int, *, write: bool) -> tuple[GuestRegion, int]:
        """Region and offset of an aligned scalar; the caller holds the region meanwhile."""
        if size not in _LIMITS:
            limit(size)
        region = self._recent
        offset = address - region.guest_address
        if 0 <= offset <= region.size - size and not offset & size - 1:
            return region, offset  # type: ignore[return-value]  # _Nowhere has no size
        if address % size:
            rule = f"the address must be a multiple of {size}"
            raise MemoryAccessError(address, size, rule)
        found, offset, count = self._pieces(address, size, write=write)[0]
        if count != size:
            raise MemoryAccessError(address, size, "it must lie within one region")
        return found, offset


def words(region: GuestRegion, size: int) -> memoryview:
    """A region's memory as words of a size."""
    if size == 1:
        return region.buffer
    return region.u16 if size == 2 else region.u32 if size == 4 else region.u64


def limit(size: int) -> int:
    """The first value that does not fit in so many bytes.

    Raises:
        InvalidValueError: when no scalar has that size.
    """
    found = _LIMITS.get(size)
    if found is None:
        raise InvalidValueError("size", size, "must be 1, 2, 4 or 8")
    return found


_LIMITS = {size: 1 << 8 * size for size in (1, 2, 4, 8)}


def unsigned(value: int, size: int) -> int:
    """The value, if it fits.

    Raises:
        InvalidValueError: when it does not, or no scalar has that size.
    """
    if not 0 <= value < limit(size):
        raise InvalidValueError("value", value, f"must fit in {size} unsigned bytes")
    return value
