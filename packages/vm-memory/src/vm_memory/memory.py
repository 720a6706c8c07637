"""Guest memory: bytes, scalars, atomics, records, files and slices over a map of regions.

Rules that hold for every access:

- An access may span adjacent regions. A hole stops it: the exact forms then raise
  `MemoryAccessError` before they touch anything.
- A scalar whose address is a multiple of its size is read and written in one piece, so a guest
  that writes at the same time is seen before or after, never halfway. Larger and misaligned
  accesses give no such promise.
- Every way to write marks the pages dirty, where that is tracked, after the write. What bypasses
  that says so: `GuestRegion.buffer` and its typed views, and slices that are written later.
"""

from __future__ import annotations

from vm_memory._map import NOWHERE, MemoryMap
from vm_memory._records import RecordAccess

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from vm_memory._bytes import Buffer
    from vm_memory.address import GuestAddress
    from vm_memory.region import GuestRegion
    from vm_memory.transfer import File

__all__ = ["GuestMemory"]

# What the kernel moves in one call, and a transfer at a place of its own may be done again.
_ONE_CALL = 1 << 30


class GuestMemory(MemoryMap, RecordAccess):
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

    # --- files ---

    def read_from_file(
        self, address: GuestAddress, file: File, length: int, offset: int | None = None
    ) -> int:
        """Read from a file, pipe or socket straight into memory, once.

        Args:
            address: where the bytes go.
            file: a descriptor, or an object that has one.
            length: how many bytes at most; a hole shortens it.
            offset: where in the file; its own position, which then moves, when None.

        Returns:
            The bytes read, 0 at the end of the file. Exactly these are marked dirty.

        Raises:
            MemoryAccessError: when there is no memory at `address` itself.
            TransferError: when the system call fails.
            BackingLostError: when pages of the range are lost.
        """
        from vm_memory.transfer import transfer

        length = self._available(address, length)
        return transfer(self, address, file, length, offset, out=False, exact=False)

    def read_exact_from_file(
        self, address: GuestAddress, file: File, length: int, offset: int | None = None
    ) -> None:
        """Read exactly so many bytes from a file, as `read_from_file` until done.

        Raises:
            MemoryAccessError: when the range is not all memory; nothing is read then.
            ShortTransferError: when the file ends before.
            TransferError: when a system call fails.
            BackingLostError: when pages of the range are lost.
        """
        region = self._recent
        start = address - region.guest_address
        end = start + length
        if (
            offset is not None
            and 0 <= start < end <= region.size
            and length <= _ONE_CALL
            and not region.mapping.overlaid
        ):
            # One piece at a place of its own: what this leaves undone is done again below.
            fd = file if isinstance(file, int) else file.fileno()
            count = region.mapping.owner.pread(start, length, fd, offset)
            if region.dirty is not None and count > 0:
                region.dirty.mark(start, count)
            if count == length:
                return
        from vm_memory.transfer import transfer

        self._pieces(address, length)
        transfer(self, address, file, length, offset, out=False, exact=True)

    def write_to_file(
        self, address: GuestAddress, file: File, length: int, offset: int | None = None
    ) -> int:
        """Write from memory straight to a file, pipe or socket, once; returns the bytes written.

        Raises:
            MemoryAccessError: when there is no memory at `address` itself.
            TransferError: when the system call fails.
            BackingLostError: when pages of the range are lost.
        """
        from vm_memory.transfer import transfer

        length = self._available(address, length)
        return transfer(self, address, file, length, offset, out=True, exact=False)

    def write_all_to_file(
        self, address: GuestAddress, file: File, length: int, offset: int | None = None
    ) -> None:
        """Write exactly so many bytes to a file, as `write_to_file` until done.

        Raises:
            MemoryAccessError: when the range is not all memory; nothing is written then.
            TransferError: when a system call fails.
            BackingLostError: when pages of the range are lost.
        """
        region = self._recent
        start = address - region.guest_address
        end = start + length
        if (
            offset is not None
            and 0 <= start < end <= region.size
            and length <= _ONE_CALL
            and not region.mapping.overlaid
        ):
            # One piece at a place of its own: what this leaves undone is done again below.
            fd = file if isinstance(file, int) else file.fileno()
            count = region.mapping.owner.pwrite(start, length, fd, offset)
            if count == length:
                return
        from vm_memory.transfer import transfer

        self._pieces(address, length)
        transfer(self, address, file, length, offset, out=True, exact=True)

    def map_private_file(self, address: GuestAddress, fd: int, offset: int, length: int) -> bool:
        """Put a file's content into anonymous memory by mapping it, copy-on-write.

        Pages are read when touched, and shared with the host's page cache until written. The
        file must not be truncated while the memory lives: see `lost_regions`.

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

        from vm_memory._mapping import ANONYMOUS, PAGE

        pieces = self._pieces(address, length, write=True)
        if len(pieces) != 1 or (address | offset | length) % PAGE or offset < 0:
            return False
        region, start, _ = pieces[0]
        end = -(-os.fstat(fd).st_size // PAGE) * PAGE
        if region.mapping.flags != ANONYMOUS or start % PAGE or offset + length > end:
            return False
        region.mapping.overlay(start, length, fd, offset)
        self._wrote(address, pieces)
        return True

    @property
    def lost_regions(self) -> tuple[GuestRegion, ...]:
        """Regions with lost pages, those of mapped files included; a guest must stop then.

        Accesses to regions of a file raise `BackingLostError` by themselves. In anonymous memory
        with a file mapped into it, only transfers do, and the lost pages read as zeros.
        """
        return tuple(region for region in self.regions if region.lost)

    def discard(self, address: GuestAddress, length: int) -> None:
        """Give pages back to the host; the range reads as zeros then, whatever it is made of.

        This is what a balloon does. Memory that shows a file's content is only cleared. A huge page
        that was given back may not be had again: touching it then loses it.

        Raises:
            MemoryAccessError: when the range is not all memory.
            BackingLostError: when pages of it are lost.
        """
        from vm_memory._discard import discard

        pieces = self._pieces(address, length, write=True)
        for region, offset, count in pieces:
            discard(region, offset, count)
            if region.fragile:
                self._recent = NOWHERE
        self._wrote(address, pieces)
        self._check_lost(address, length, pieces)

    # --- dirty pages ---

    def is_dirty(self, address: GuestAddress) -> bool:
        """Whether the page of an address is marked; never where that is not tracked."""
        region = self.find_region(address)
        if region is None or region.dirty is None:
            return False
        return region.dirty.is_dirty(address - region.guest_address)

    def harvest_dirty(self, *, clear: bool = True) -> Iterator[tuple[GuestAddress, int]]:
        """Take the marks: address and length of each run of dirty pages, in order.

        Marks are taken as the iteration goes on, a bounded number at a time; those of an
        iteration that is abandoned are lost partly.

        Args:
            clear: whether to take the marks or only to look.
        """
        from vm_memory.address import GuestAddress

        start = end = -1
        for region in self.regions:
            if region.dirty is None:
                continue
            for batch in region.dirty.batches(clear=clear):
                for offset, length in zip(batch[::2], batch[1::2], strict=True):
                    first = region.guest_address + offset
                    if first == end:
                        end += length
                        continue
                    if end > start:
                        yield GuestAddress(start), end - start
                    start, end = first, first + length
        if end > start:
            yield GuestAddress(start), end - start

    def merge_dirty(self, address: GuestAddress, words: Buffer, page_size: int = 4096) -> None:
        """Add the marks of another bitmap, such as KVM's dirty log of the slot of a region.

        Args:
            address: the first address that it tells of, in a region that is tracked.
            words: whole 64-bit little-endian words; bits past the region's end are ignored.
            page_size: bytes that one bit stands for.

        Raises:
            MemoryAccessError: when no tracked region is there.
            InvalidValueError: when it is not whole words, or the page size no power of two.
        """
        from vm_memory.errors import MemoryAccessError

        region = self.find_region(address)
        if region is None or region.dirty is None:
            raise MemoryAccessError(address, 1, "no region that tracks dirty pages is there")
        region.dirty.merge(words, address - region.guest_address, page_size)
