"""Access to guest memory as bytes."""

from __future__ import annotations

from vm_memory._native import lib
from vm_memory.errors import InvalidValueError
from vm_memory.permissions import Permissions

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeAlias

    from vm_memory._map import Piece, _Nowhere
    from vm_memory.address import GuestAddress
    from vm_memory.region import GuestRegion

    Buffer: TypeAlias = bytes | bytearray | memoryview

__all__ = ["ByteAccess"]

_fill = lib.vmm_fill
_copy = lib.vmm_copy
_READ = Permissions.READ


class ByteAccess:
    """Reading and writing bytes, over whatever finds the pieces of a range."""

    __slots__ = ()

    if TYPE_CHECKING:
        _recent: GuestRegion | _Nowhere

        def _walk(self, address: int, length: int, *, write: bool = False) -> list[Piece]: ...
        def _pieces(self, address: int, length: int, *, write: bool = False) -> list[Piece]: ...
        def _wrote(self, address: int, pieces: list[Piece]) -> None: ...
        def _check_lost(self, address: int, length: int, pieces: list[Piece]) -> None: ...
        def _check_open(self) -> None: ...

    def read(self, address: GuestAddress, length: int) -> bytes:
        """Exactly `length` bytes.

        Raises:
            MemoryAccessError: when the range is not all memory.
            BackingLostError: when pages of it are lost.
        """
        region = self._recent
        offset = address - region.guest_address
        end = offset + length
        if 0 <= offset <= end <= region.size:
            return region.buffer[offset:end].tobytes()
        pieces = self._pieces(address, length)
        data = b"".join([region.buffer[start : start + count] for region, start, count in pieces])
        self._check_lost(address, length, pieces)
        return data

    def write(self, address: GuestAddress, data: Buffer) -> None:
        """Write all of `data`, or nothing.

        Raises:
            MemoryAccessError: when the range is not all memory.
            BackingLostError: when pages of it are lost.
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
                if region.dirty is not None:
                    region.dirty.mark(offset, length)
                return
        view = _flat(data)
        done = 0
        pieces = self._pieces(address, len(view), write=True)
        for region, start, count in pieces:
            region.buffer[start : start + count] = view[done : done + count]
            done += count
        self._wrote(address, pieces)
        self._check_lost(address, done, pieces)

    def read_into(self, address: GuestAddress, buffer: bytearray | memoryview) -> None:
        """Fill a writable buffer from memory. Long copies let other threads run meanwhile.

        Raises:
            MemoryAccessError: when the range is not all memory; the buffer is unchanged then.
            BackingLostError: when pages of it are lost.
        """
        region = self._recent
        if region._copy_out(address - region.guest_address, region.size, buffer):
            return
        view = _flat(buffer)
        length = len(view)
        pieces = self._pieces(address, length)
        done = 0
        for region, start, count in pieces:
            part = view if count == length else view[done : done + count]
            if not region._copy_out(start, region.size, part):
                part[:] = region.buffer[start : start + count]  # with gaps, or not writable
            done += count
        self._check_lost(address, length, pieces)

    def read_partial(self, address: GuestAddress, length: int) -> bytes:
        """Up to `length` bytes: what there is in front of the first hole.

        Raises:
            MemoryAccessError: when there is no memory at `address` itself.
        """
        region = self._recent
        offset = address - region.guest_address
        end = offset + length
        if 0 <= offset <= end <= region.size:
            return region.buffer[offset:end].tobytes()
        pieces = self._front(address, length)
        data = b"".join([region.buffer[start : start + count] for region, start, count in pieces])
        self._check_lost(address, len(data), pieces)
        return data

    def write_partial(self, address: GuestAddress, data: Buffer) -> int:
        """Write what fits in front of the first hole; returns how many bytes that were.

        Raises:
            MemoryAccessError: when there is no memory at `address` itself.
        """
        region = self._recent
        offset = address - region.guest_address
        end = offset + len(data)
        if type(data) is bytes and 0 <= offset <= end <= region.size:
            region.buffer[offset:end] = data
            if region.dirty is not None:
                region.dirty.mark(offset, len(data))
            return len(data)
        view = _flat(data)
        done = 0
        pieces = self._front(address, len(view), write=True)
        for region, start, count in pieces:
            region.buffer[start : start + count] = view[done : done + count]
            done += count
        self._wrote(address, pieces)
        self._check_lost(address, done, pieces)
        return done

    def fill(self, address: GuestAddress, length: int, value: int = 0) -> None:
        """Set every byte of a range to one value, 0 to 255.

        Raises:
            MemoryAccessError: when the range is not all memory.
            InvalidValueError: when the value is no byte.
            BackingLostError: when pages of it are lost.
        """
        if not 0 <= value <= 255:
            raise InvalidValueError("value", value, "must be 0 to 255")
        pieces = self._pieces(address, length, write=True)
        for region, offset, count in pieces:
            _fill(region.host_address + offset, value, count)
        self._wrote(address, pieces)
        self._check_lost(address, length, pieces)

    def copy(self, target: GuestAddress, source: GuestAddress, length: int) -> None:
        """Copy within the memory, as memmove does: the ranges may overlap.

        That is told by their addresses: the same bytes at two places are not seen to overlap.

        Raises:
            MemoryAccessError: when either range is not all memory; nothing is written then.
            BackingLostError: when pages of them are lost.
        """
        froms = self._pieces(source, length)
        tos = self._pieces(target, length, write=True)
        parts = _parts(tos, froms)
        # Forwards or backwards, so that nothing is overwritten before it is read.
        for to, start, count in parts if target <= source else reversed(parts):
            _copy(to, start, count)
        self._wrote(target, tos)
        self._check_lost(source, length, froms)
        self._check_lost(target, length, tos)

    def slices(
        self,
        address: GuestAddress,
        length: int,
        permissions: Permissions = Permissions.READ_WRITE,
    ) -> list[memoryview]:
        """The pieces of a range as writable views, one for each region, without a copy.

        The views work wherever buffers do: `os.preadv`, `readinto`, `recv_into`, numpy. They stay
        valid after the map was closed. With `WRITE` the range is marked dirty at once; who writes
        later, while somebody harvests, calls `mark_dirty` again afterwards.

        Raises:
            MemoryAccessError: when the range is not all memory.
        """
        region = self._recent
        offset = address - region.guest_address
        end = offset + length
        if 0 <= offset < end <= region.size:
            if region.dirty is not None and permissions is not _READ:
                region.dirty.mark(offset, length)
            return [region.buffer[offset:end]]
        write = permissions is not _READ
        pieces = self._pieces(address, length, write=write)
        if write:
            self._wrote(address, pieces)
        return [region.buffer[start : start + count] for region, start, count in pieces]

    def _front(self, address: int, length: int, *, write: bool = False) -> list[Piece]:
        """The pieces in front of the first hole; of a range that is not empty at least one."""
        if length < 0:
            raise InvalidValueError("length", length, "must not be negative")
        pieces = self._walk(address, length, write=write)
        # None: this tells what is missing, the memory or its translation or the permission.
        return pieces if pieces or not length else self._pieces(address, 1, write=write)

    def _available(self, address: int, length: int, *, write: bool = False) -> int:
        """How many bytes of a range lie in front of the first hole; at least one."""
        region = self._recent
        offset = address - region.guest_address
        if 0 <= offset < offset + length <= region.size:
            return length
        return sum([count for _, _, count in self._front(address, length, write=write)])


def _parts(tos: list[Piece], froms: list[Piece]) -> list[tuple[int, int, int]]:
    """Host addresses of target and source, and bytes, of what is in one piece in both."""
    parts = []
    sources = iter(froms)
    start = left = 0
    for region, offset, count in tos:
        to = region.host_address + offset
        while count:
            if not left:
                other, other_offset, left = next(sources)
                start = other.host_address + other_offset
            step = min(count, left)
            parts.append((to, start, step))
            to += step
            start += step
            count -= step
            left -= step
    return parts


def _flat(data: Buffer) -> memoryview:
    """A buffer as plain bytes, whatever its format and shape."""
    view = memoryview(data)
    return view if view.format == "B" and view.ndim == 1 else view.cast("B")
