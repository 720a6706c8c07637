"""Mappings of host memory: from a backing to an address that lives as long as it is used."""

from __future__ import annotations

import os

from vm_memory._native import ffi, lib
from vm_memory.errors import MappingError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vm_memory._native import CData
    from vm_memory.backing import Memfd

PAGE = os.sysconf("SC_PAGESIZE")
_LARGE = 2 << 20

# From <sys/mman.h>; the mmap module is not worth its import on the boot path.
_MAP_SHARED = 0x01
_MAP_PRIVATE = 0x02
_MAP_ANONYMOUS = 0x20
_MAP_NORESERVE = 0x4000


class Mapping:
    """One mapping of host memory, unmapped when neither this object nor a view of it is left.

    Attributes:
        handle: the C structure, released with its last Python reference.
        address: the first byte's address in this process.
        length: bytes, whole pages.
        private: whether it is anonymous and private, so that pages of it may be replaced.
    """

    __slots__ = ("address", "handle", "length", "private")

    def __init__(
        self, length: int, guest_address: int, fd: int = -1, offset: int = 0, guard: int = 0
    ) -> None:
        """Map `length` bytes, anonymous or of a file, whose descriptor it takes over."""
        length = -(-length // PAGE) * PAGE
        # Host and guest addresses that agree modulo 2 MiB let the kernel and KVM use large pages.
        alignment = _LARGE if length >= _LARGE and guest_address % _LARGE == 0 else PAGE
        kind = _MAP_SHARED if fd >= 0 else _MAP_PRIVATE | _MAP_ANONYMOUS
        error = ffi.new("int *")
        handle = lib.vmm_mapping_new(
            length, alignment, guard, kind | _MAP_NORESERVE, fd, offset, error
        )
        if not handle:
            raise MappingError(f"mmap of {length:#x} bytes", error[0], _host_numbers())
        self.handle: CData = ffi.gc(handle, lib.vmm_mapping_release, length)
        self.address = int(ffi.cast("uintptr_t", handle.base))
        self.length = length
        self.private = fd < 0

    @property
    def fd(self) -> int:
        """The file behind it, or -1. It belongs to the mapping: duplicate it to keep it."""
        return self.handle.fd

    def view(self, length: int) -> memoryview:
        """The first `length` bytes, writable. The view keeps the mapping alive."""
        handle = self.handle

        def keep(_base: CData, handle: CData = handle) -> None:
            """Hold `handle` for as long as cffi holds this function: until the view is gone."""

        return memoryview(ffi.buffer(ffi.gc(handle.base, keep), length))

    def overlay(self, start: int, length: int, fd: int, offset: int) -> None:
        """Replace pages by a private mapping of a file.

        Raises:
            MappingError: when the host refuses.
        """
        error = lib.vmm_mapping_overlay(self.handle, start, length, fd, offset)
        if error:
            raise MappingError(f"mmap of {length:#x} bytes of a file", error)


def create_memfd(backing: Memfd, size: int) -> int:
    """Make the file of a memfd backing, sized and sealed; returns its descriptor."""
    import fcntl

    fd = os.memfd_create(backing.name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(
            fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        )
    except OSError as error:
        os.close(fd)
        raise MappingError(
            f"memfd of {size:#x} bytes", error.errno or 0, _host_numbers()
        ) from error
    return fd


def _host_numbers() -> str:
    """The memory figures that explain a refusal."""
    wanted = ("MemTotal", "MemAvailable", "CommitLimit", "Committed_AS")
    try:
        with open("/proc/meminfo", encoding="ascii") as file:  # noqa: PTH123
            lines = [line for line in file if line.startswith(wanted)]
    except OSError:
        return ""
    return "the host has " + ", ".join(" ".join(line.split()) for line in lines)
