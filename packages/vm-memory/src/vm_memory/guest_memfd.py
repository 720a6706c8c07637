"""Private memory of a confidential guest, which only KVM can reach."""

from __future__ import annotations

import os

from vm_memory.errors import InvalidValueError, MappingError

__all__ = ["GuestMemfd"]


class GuestMemfd:
    """A reference to a guest_memfd, for the slot of the region that it lies alongside.

    Attributes:
        fd: a descriptor of its own, closed when the object is gone.
        offset: where in it the region starts, in bytes.
    """

    __slots__ = ("fd", "offset")

    def __init__(self, fd: int, offset: int = 0) -> None:
        """Duplicate a descriptor.

        Raises:
            InvalidValueError: when the offset is no multiple of the page size, or negative.
            MappingError: when the descriptor cannot be duplicated.
        """
        self.fd = -1
        self.offset = offset
        if offset < 0 or offset % 4096:
            raise InvalidValueError("offset", offset, "must be a multiple of the page size, 4096")
        try:
            self.fd = os.dup(fd)
        except OSError as error:
            raise MappingError(f"dup of guest_memfd {fd}", error.errno or 0) from error

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
