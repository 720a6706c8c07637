"""One contiguous piece of guest memory."""

from __future__ import annotations

from vm_memory.errors import RegionError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vm_memory._mapping import Mapping
    from vm_memory.address import GuestAddress
    from vm_memory.backing import Backing

__all__ = ["GuestRegion"]


class GuestRegion:
    """A range of guest addresses with host memory behind each byte; immutable.

    Maps share regions, and a region outlives the maps that it is part of. Its memory is
    unmapped when no region and no view refers to it any more.

    Attributes:
        guest_address: where it starts; a multiple of 8, so that what is aligned for the guest is
            aligned for the host.
        size: bytes, at least 1.
        host_address: where it starts in this process; valid only while a reference to the region
            or to a view of it is held.
        buffer: all of it as a writable view of bytes. Writes through it are not tracked.
        backing: what it is made of.
        file_offset: where it starts in the backing's file; 0 without a file.
        mapping: the host memory, which several regions may share.
        u16: all whole 16-bit words of it, little-endian; untracked like `buffer`.
        u32: likewise 32-bit words.
        u64: likewise 64-bit words.
    """

    __slots__ = (
        "__weakref__",
        "backing",
        "buffer",
        "file_offset",
        "guest_address",
        "host_address",
        "mapping",
        "size",
        "u16",
        "u32",
        "u64",
    )

    def __init__(
        self,
        guest_address: GuestAddress,
        size: int,
        mapping: Mapping,
        backing: Backing,
        file_offset: int = 0,
    ) -> None:
        """Wrap a mapping; `GuestMemory.from_ranges` is the usual way to get a region."""
        self.guest_address = guest_address
        self.size = size
        self.mapping = mapping
        self.host_address = mapping.address
        self.buffer = mapping.view(size)
        self.backing = backing
        self.file_offset = file_offset
        # Typed views for scalars: reading through one takes a fifth of the time of a C call.
        self.u16 = self.buffer[: size & ~1].cast("H")
        self.u32 = self.buffer[: size & ~3].cast("I")
        self.u64 = self.buffer[: size & ~7].cast("Q")

    @property
    def last_address(self) -> GuestAddress:
        """The address of its last byte."""
        from vm_memory.address import GuestAddress

        return GuestAddress(self.guest_address + self.size - 1)

    @property
    def fd(self) -> int | None:
        """The descriptor of the file behind it, owned by the region; None without a file."""
        fd = self.mapping.fd
        return None if fd < 0 else fd

    def __repr__(self) -> str:
        return f"<GuestRegion {self.guest_address:#x}+{self.size:#x} {self.backing!r}>"


def check_region(guest_address: int, size: int) -> None:
    """Refuse a range that no region can have.

    Raises:
        RegionError: when it is empty, misaligned, or leaves the address space.
    """
    if size <= 0:
        raise RegionError(guest_address, size, "the size must be at least 1 byte")
    if not 0 <= guest_address <= (1 << 64) - size:
        raise RegionError(guest_address, size, "it must lie within 0 to 2**64 - 1")
    if guest_address % 8:
        below = guest_address & ~7
        raise RegionError(
            guest_address,
            size,
            f"it must start at a multiple of 8, as {below:#x} or {below + 8:#x}",
        )
    if size > 1 << 47:
        raise RegionError(guest_address, size, "the size must not exceed 2**47 bytes")
