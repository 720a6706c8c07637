"""What guest memory is made of: each backing is a value that says what it is."""

from __future__ import annotations

import attrs

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os

__all__ = ["Anonymous", "Backing", "FilePrivate", "FileShared", "Memfd"]


@attrs.frozen
class Anonymous:
    """Private memory of this process, without a file behind it.

    Pages appear when first touched, so more may be mapped than the host has, unless the pages
    are huge ones: those are reserved at once.

    Attributes:
        hugetlb: use huge pages of this size, `"2M"` or another size that the host has.
    """

    hugetlb: str | None = None


@attrs.frozen
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


@attrs.frozen
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


@attrs.frozen
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


Backing = Anonymous | Memfd | FileShared | FilePrivate
"""Any of them."""
