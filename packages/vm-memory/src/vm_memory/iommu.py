"""Memory as a device behind an IOMMU sees it: I/O virtual addresses, with permissions.

>>> from vm_memory import GuestAddress, GuestMemory, Permissions
>>> memory = GuestMemory.from_ranges([(GuestAddress(0), 0x10000)])
>>> tlb = Iotlb()
>>> tlb.set_mapping(0x8000_0000, 0x1000, 0x1000, Permissions.READ)
>>> view = IommuMemory(memory, tlb)
>>> memory.write(GuestAddress(0x1004), b"data")
>>> view.read(GuestAddress(0x8000_0004), 4)
b'data'
>>> view.write(GuestAddress(0x8000_0004), b"x")
Traceback (most recent call last):
vm_memory.errors.TranslationError: 1 bytes at guest address 0x80000004: 0x80000004+0x1 does not \
permit it
"""

from __future__ import annotations

import threading
from bisect import bisect_right

import attrs

from vm_memory._map import NOWHERE
from vm_memory._records import RecordAccess
from vm_memory.errors import InvalidValueError, TranslationError
from vm_memory.permissions import Permissions
from vm_memory.scalar import Scalar

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vm_memory._map import Piece
    from vm_memory.address import GuestAddress
    from vm_memory.dirty import DirtyBitmap
    from vm_memory.memory import GuestMemory
    from vm_memory.transfer import File

__all__ = ["IommuMemory", "Iotlb", "Translation"]


@attrs.frozen
class Translation:
    """A range of I/O virtual addresses and what it stands for.

    Attributes:
        iova: the first I/O virtual address.
        length: bytes.
        target: the guest-physical address that `iova` stands for.
        permissions: what a device may do there.
    """

    iova: int
    length: int
    target: int
    permissions: Permissions


class Iotlb:
    """The translations that are known; readers need no lock.

    Whoever restricts a mapping must invalidate it here before it tells the driver so; one that was
    widened may come as late as the next miss.
    """

    __slots__ = ("_lock", "_table")

    def __init__(self) -> None:
        """Begin without translations."""
        self._lock = threading.Lock()
        self._table: tuple[list[int], list[Translation]] = ([], [])

    def set_mapping(self, iova: int, target: int, length: int, permissions: Permissions) -> None:
        """Add a translation, in place of what was known of these addresses.

        Raises:
            InvalidValueError: when a range is empty or leaves 64 bits.
        """
        _check(iova, length)
        _check(target, length)
        with self._lock:
            self._splice(iova, length, [Translation(iova, length, target, permissions)])

    def invalidate_mapping(self, iova: int, length: int) -> None:
        """Forget the translation of a range; what lies around it stays.

        Raises:
            InvalidValueError: when the range is empty or leaves 64 bits.
        """
        _check(iova, length)
        with self._lock:
            self._splice(iova, length, [])

    def invalidate_all(self) -> None:
        """Forget everything."""
        with self._lock:
            self._table = ([], [])

    @property
    def translations(self) -> tuple[Translation, ...]:
        """What is known, sorted by address."""
        return tuple(self._table[1])

    def lookup(self, iova: int, length: int, access: Permissions) -> list[tuple[int, int]]:
        """Translate a range for an access: guest-physical address and length of each piece.

        Raises:
            TranslationError: when any part is not mapped or does not permit the access; it
                tells the one from the other.
        """
        found, misses, denied = self._resolve(iova, length, access)
        if misses or denied:
            raise TranslationError(iova, length, tuple(misses), tuple(denied))
        return [(target, count) for _, target, count in found]

    def _resolve(
        self, iova: int, length: int, access: Permissions
    ) -> tuple[list[tuple[int, int, int]], list[tuple[int, int]], list[tuple[int, int]]]:
        starts, table = self._table
        found: list[tuple[int, int, int]] = []
        misses: list[tuple[int, int]] = []
        denied: list[tuple[int, int]] = []
        end = iova + length
        index = max(bisect_right(starts, iova) - 1, 0)
        while iova < end:
            entry = table[index] if index < len(table) else None
            index += 1
            if entry is not None and entry.iova + entry.length <= iova:
                continue
            start = end if entry is None else min(entry.iova, end)
            if iova < start:
                misses.append((iova, start - iova))
            if entry is None or start == end:
                break
            iova = max(iova, start)
            count = min(end, entry.iova + entry.length) - iova
            if entry.permissions & access == access:
                found.append((iova, entry.target + iova - entry.iova, count))
            else:
                denied.append((iova, count))
            iova += count
        return found, misses, denied

    def _splice(self, iova: int, length: int, middle: list[Translation]) -> None:
        """Publish a table with other entries for a range; neighbours that continue are joined."""
        starts, table = self._table
        end = iova + length
        first = bisect_right(starts, iova)
        if first and table[first - 1].iova + table[first - 1].length >= iova:
            first -= 1  # it reaches into the range, or up to it
        behind = bisect_right(starts, end)
        found = [
            attrs.evolve(entry, length=min(iova - entry.iova, entry.length))
            for entry in table[first:behind]
            if entry.iova < iova
        ]
        found += middle
        for entry in table[first:behind]:
            skipped = max(end - entry.iova, 0)
            if skipped < entry.length:
                found.append(
                    attrs.evolve(
                        entry,
                        iova=entry.iova + skipped,
                        length=entry.length - skipped,
                        target=entry.target + skipped,
                    )
                )
        joined: list[Translation] = []
        for entry in found:
            if joined and _continues(joined[-1], entry):
                joined[-1] = attrs.evolve(joined[-1], length=joined[-1].length + entry.length)
            else:
                joined.append(entry)
        self._table = (
            [*starts[:first], *[entry.iova for entry in joined], *starts[behind:]],
            [*table[:first], *joined, *table[behind:]],
        )


def _continues(one: Translation, other: Translation) -> bool:
    """Whether two translations are one: addresses, targets and permissions go on alike."""
    return (
        one.iova + one.length == other.iova
        and one.target + one.length == other.target
        and one.permissions == other.permissions
    )


class IommuMemory(RecordAccess):
    """Guest memory through an IOMMU, with every form of access that guest memory has.

    Every access is translated when it is made, with one exception: `slices` and `iovecs` are the
    memory itself, and outlive an invalidation. Whoever has one finishes with it first.

    Attributes:
        memory: the guest-physical memory behind.
        iotlb: the translations.
        enabled: whether addresses are translated; if not they are guest-physical.
        dirty: marks by I/O virtual address while translating, in addition to the memory's own.
    """

    __slots__ = ("_recent", "dirty", "enabled", "iotlb", "memory")

    def __init__(
        self,
        memory: GuestMemory,
        iotlb: Iotlb,
        *,
        enabled: bool = True,
        dirty: DirtyBitmap | None = None,
    ) -> None:
        """See the attributes."""
        self.memory = memory
        self.iotlb = iotlb
        self.enabled = enabled
        self.dirty = dirty
        self._recent = NOWHERE  # nothing is fast here: translations change at any time

    def check_range(
        self, address: GuestAddress, length: int, access: Permissions = Permissions.READ_WRITE
    ) -> bool:
        """Whether a range is mapped for an access, and all memory."""
        if length <= 0:
            return length == 0
        if not self.enabled:
            return self.memory.check_range(address, length)
        found, misses, denied = self.iotlb._resolve(address, length, access)
        return (
            not misses
            and not denied
            and all(
                self.memory.check_range(target, count)  # type: ignore[arg-type]
                for _, target, count in found
            )
        )

    def with_memory(self, memory: GuestMemory) -> IommuMemory:
        """The same view over another map, after memory was added for example."""
        return IommuMemory(memory, self.iotlb, enabled=self.enabled, dirty=self.dirty)

    def scalar(self, address: GuestAddress, size: int) -> Scalar:
        """One scalar, whose address is translated anew by each access.

        Raises:
            TranslationError: when it is not mapped for reading and writing, here and at access.
            MemoryAccessError: when the address is misaligned or not memory.
            InvalidValueError: when the size is not 1, 2, 4 or 8.
        """
        self._one(address, size, write=False)
        self._one(address, size, write=True)
        return _TranslatedScalar(self, address, size)

    # --- files: as in GuestMemory, and TranslationError too ---

    def read_from_file(
        self, address: GuestAddress, file: File, length: int, offset: int | None = None
    ) -> int:
        """As `GuestMemory.read_from_file`.

        Raises:
            TranslationError: when `address` itself is not mapped for writing.
        """
        from vm_memory.transfer import transfer_pieces

        length = self._available(address, length, write=True)
        return transfer_pieces(self, address, file, length, offset, out=False, exact=False)

    def read_exact_from_file(
        self, address: GuestAddress, file: File, length: int, offset: int | None = None
    ) -> None:
        """As `GuestMemory.read_exact_from_file`.

        Raises:
            TranslationError: when the range is not all mapped for writing.
        """
        from vm_memory.transfer import transfer_pieces

        self._pieces(address, length, write=True)
        transfer_pieces(self, address, file, length, offset, out=False, exact=True)

    def write_to_file(
        self, address: GuestAddress, file: File, length: int, offset: int | None = None
    ) -> int:
        """As `GuestMemory.write_to_file`.

        Raises:
            TranslationError: when `address` itself is not mapped for reading.
        """
        from vm_memory.transfer import transfer_pieces

        length = self._available(address, length)
        return transfer_pieces(self, address, file, length, offset, out=True, exact=False)

    def write_all_to_file(
        self, address: GuestAddress, file: File, length: int, offset: int | None = None
    ) -> None:
        """As `GuestMemory.write_all_to_file`.

        Raises:
            TranslationError: when the range is not all mapped for reading.
        """
        from vm_memory.transfer import transfer_pieces

        self._pieces(address, length)
        transfer_pieces(self, address, file, length, offset, out=True, exact=True)

    def _walk(self, address: int, length: int, *, write: bool = False) -> list[Piece]:
        if not self.enabled:
            return self.memory._walk(address, length, write=write)
        access = Permissions.WRITE if write else Permissions.READ
        pieces: list[Piece] = []
        for iova, target, count in self.iotlb._resolve(address, length, access)[0]:
            if iova != address:
                break
            found = self.memory._walk(target, count, write=write)
            pieces += found
            address += sum([n for _, _, n in found])
        return pieces

    def _pieces(self, address: int, length: int, *, write: bool = False) -> list[Piece]:
        if not self.enabled:
            return self.memory._pieces(address, length, write=write)
        if length < 0:
            raise InvalidValueError("length", length, "must not be negative")
        pieces: list[Piece] = []
        access = Permissions.WRITE if write else Permissions.READ
        for target, count in self.iotlb.lookup(address, length, access):
            pieces += self.memory._pieces(target, count, write=write)
        return pieces

    def _wrote(self, address: int, pieces: list[Piece]) -> None:
        self.memory._wrote(address, pieces)
        if self.enabled and self.dirty is not None:
            self.dirty.mark(address, sum(count for _, _, count in pieces))

    def _check_lost(self, address: int, length: int, pieces: list[Piece]) -> None:
        self.memory._check_lost(address, length, pieces)

    def _check_open(self) -> None:
        self.memory._check_open()


class _TranslatedScalar(Scalar):
    """Holds no memory, so that what is invalidated is out of reach."""

    __slots__ = ("_address", "_memory")

    def __init__(self, memory: IommuMemory, address: GuestAddress, size: int) -> None:
        self._memory = memory
        self._address = address
        self._size = size

    def load(self) -> int:
        return self._memory._read_scalar(self._address, self._size)

    def store(self, value: int) -> None:
        self._memory._write_scalar(self._address, self._size, value)


def _check(address: int, length: int) -> None:
    if length <= 0 or not 0 <= address <= (1 << 64) - length:
        raise InvalidValueError(
            "range", (address, length), "must be at least 1 byte within 0 to 2**64 - 1"
        )
