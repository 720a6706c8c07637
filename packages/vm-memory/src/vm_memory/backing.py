"""What guest memory is made of: each backing is a value that says what it is."""

from __future__ import annotations

from vm_memory._values import field, frozen
from vm_memory.errors import InvalidValueError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os

__all__ = ["Adopted", "Anonymous", "Backing", "FilePrivate", "FileShared", "Memfd"]


def _check_host_address(_instance: object, _attribute: object, address: int) -> None:
    if address <= 0 or address % 4096:
        below = max(address // 4096, 1) * 4096
        rule = f"must be a multiple of the page size, as {below:#x} or {below + 4096:#x}"
        raise InvalidValueError("host_address", address, rule)


def _check_length(adopted: Adopted, _attribute: object, length: int) -> None:
    if length <= 0:
        raise InvalidValueError("length", length, "must be at least 1 byte")
    if length > (1 << 64) - adopted.host_address:
        rule = f"must not pass 2**64 from host address {adopted.host_address:#x} on"
        raise InvalidValueError("length", length, rule)


@frozen
class Adopted:
    """Memory that somebody else mapped in this process, and that stays theirs.

    It is accessed, tracked and given to KVM as memory of our own. It is never unmapped here, not
    even when pages of its file are lost: these read as zeros then, and accesses raise
    `BackingLostError`. What it is made of is asked of the kernel once, when a map is made; nothing
    but the owner keeps that true afterwards:

    - Unmapping, moving, replacing or protecting it while anything here refers to it lets later
      accesses end the process, or reach what is mapped there instead. The owner is kept for as
      long as a region, a view or C code refers to the memory, so an object that unmaps only when
      it is gone is safe; `mmap.mmap.close` is refused only while a view is open, which is why
      `from_buffer` holds one.
    - An owner that itself refers to the map or its regions is never freed.

    Attributes:
        host_address: its first byte in this process, a multiple of the page size.
        length: bytes, 1 or more. The first region begins at its start, the others follow, each at
            the next page.
        owner: any object; kept alive, and not looked at.

    >>> import mmap
    >>> from vm_memory import Adopted, GuestAddress, GuestMemory
    >>> theirs = mmap.mmap(-1, 8192)
    >>> ranges = [(GuestAddress(0x1000), 8192)]
    >>> memory = GuestMemory.from_ranges(ranges, backing=Adopted.from_buffer(theirs))
    >>> memory.write(GuestAddress(0x1004), b"here")
    >>> theirs[4:8]
    b'here'
    """

    host_address: int = field(validator=_check_host_address)
    length: int = field(validator=_check_length)
    owner: object = field(eq=False, repr=False)

    @classmethod
    def from_buffer(cls, buffer: object) -> Adopted:
        """What an object shows by the buffer protocol: an mmap, shared memory, an array.

        The view that is taken of it is the owner, so the object can't let the memory go.

        Raises:
            InvalidValueError: when it shows no writable, contiguous bytes that begin at a page.
        """
        from vm_memory._native import ffi

        try:
            view = ffi.from_buffer(buffer, require_writable=True)
        except (TypeError, ValueError, BufferError) as error:
            raise InvalidValueError("buffer", type(buffer), f"cannot be used: {error}") from error
        return cls(int(ffi.cast("uintptr_t", view)), len(view), view)


@frozen
class Anonymous:
    """Private memory of this process, without a file behind it.

    Pages appear when first touched, so more may be mapped than the host has, unless the pages
    are huge ones: those are reserved at once.

    Attributes:
        hugetlb: use huge pages of this size, `"2M"` or another size that the host has.
    """

    hugetlb: str | None = None


@frozen
class Memfd:
    """Memory in an anonymous file (`memfd_create`), which other processes can map too.

    All regions of a map lie one behind the other in one file. The file is sealed against
    shrinking, growing and further seals, so no process can pull a page away.

    Attributes:
        name: how the file is called in `/proc/PID/maps`.
        hugetlb: use huge pages of this size, `"2M"` or another size that the host has.
    """

    name: str = "guest-memory"
    hugetlb: str | None = None


@frozen
class FileShared:
    """A file; what is written reaches it, and every other process that maps it.

    On hugetlbfs its pages are huge. A file that is truncated meanwhile loses its pages: accesses
    then raise `BackingLostError`.

    Attributes:
        file: path, or an open descriptor, which stays the caller's.
        offset: where in the file the first region begins; the others follow.
    """

    file: str | os.PathLike[str] | int
    offset: int = 0


@frozen
class FilePrivate:
    """The content of a file, copy-on-write: what is written stays in this process.

    This restores a snapshot without reading it: pages come when touched. The file must not be
    changed meanwhile; when it is truncated, accesses raise `BackingLostError`.

    Attributes:
        file: path, or an open descriptor, which stays the caller's.
        offset: where in the file the first region begins; the others follow.
    """

    file: str | os.PathLike[str] | int
    offset: int = 0


Backing = Anonymous | Memfd | FileShared | FilePrivate | Adopted
"""Any of them."""
