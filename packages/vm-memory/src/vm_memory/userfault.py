"""Pages supplied on demand: userfaultfd(2).

A thread that touches a missing page, a vCPU inside KVM_RUN included, stands still until the page
is supplied. A Python thread does so with the interpreter's lock in its hands, and no other Python
thread runs then. So a program that supplies pages itself must do so in another process;
`vm_memory.filler` serves them by threads of C, which never need that lock.
"""

from __future__ import annotations

import errno
import os
import select

import attrs

from vm_memory._fork import tell_in_children
from vm_memory._mapping import PAGE
from vm_memory._native import ffi, lib
from vm_memory.errors import InvalidValueError, MappingError, MemoryAccessError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Any, Self

    from vm_memory.address import GuestAddress
    from vm_memory.memory import GuestMemory
    from vm_memory.region import GuestRegion

__all__ = ["PageFault", "Removal", "Userfault"]

_EVENT_REMOVE, _THREAD_ID = 1 << 3, 1 << 8
_MISSING, _WRITE_PROTECT = 1, 2  # modes of UFFDIO_REGISTER
_DONT_WAKE, _COPY_PROTECTED = 1, 2  # modes of UFFDIO_COPY
_KIND_FAULT, _KIND_REMOVE = 0x12, 0x15
_FLAG_WRITE, _FLAG_PROTECTED = 1, 2

_KNOB = "/proc/sys/vm/unprivileged_userfaultfd"
_DEVICE = "/dev/userfaultfd"


@attrs.frozen
class PageFault:
    """Somebody touched a page and waits.

    Attributes:
        address: the page's guest address.
        write: whether it was a write.
        protected: whether the page is there but write-protected, not missing.
        thread: who waits, as `threading.get_native_id` has it.
    """

    address: GuestAddress
    write: bool
    protected: bool
    thread: int = attrs.field(default=0, eq=False)


@attrs.frozen
class Removal:
    """Pages were thrown away: they are missing again, and mean zeros from now on.

    Attributes:
        address: where the range starts.
        length: its bytes.
    """

    address: GuestAddress
    length: int


@attrs.frozen
class _Foreign:
    """A region of another process's memory."""

    guest_address: int
    host_address: int
    size: int
    page_size: int = PAGE


class Userfault:
    """A userfaultfd over guest memory; what it reports and does is in guest addresses.

    Memory is held, not closed. Closing this lets everybody who waits go on: with zeros where
    pages were missing, and where they were write-protected without that.

    A child of fork has no missing pages, only zeros: there this is closed, and the memory of which
    pages may have been missing is lost.

    Args:
        memory: the guest memory; ranges of it are registered one by one.

    Raises:
        MappingError: this process may not have one; the hint says what to do.
    """

    def __init__(self, memory: GuestMemory) -> None:
        self._regions: tuple[GuestRegion | _Foreign, ...] = memory.regions
        self._missing: set[GuestRegion] = set()
        self._fd = -1
        error = ffi.new("int *")
        fd = lib.vmm_userfault_open(_EVENT_REMOVE | _THREAD_ID, error)
        if fd < 0:
            raise MappingError("userfaultfd", error[0], _hint(error[0]))
        self._fd = fd
        tell_in_children(memory)
        tell_in_children(self)

    @classmethod
    def inherited(cls, fd: int, regions: Iterable[tuple[int, int, int]]) -> Self:
        """The userfaultfd of another process, which passed it on; that process registers ranges.

        What is supplied here appears in the memory of that process. It is open until both have
        closed it.

        Args:
            fd: taken over.
            regions: guest address, host address in the other process, and bytes of each region,
                of pages of 4 KiB.
        """
        self = cls.__new__(cls)
        self._regions = tuple(_Foreign(*region) for region in regions)
        self._missing = set()
        self._fd = fd
        tell_in_children(self)
        return self

    def fileno(self) -> int:
        """The descriptor, which is readable when `read` has something to give.

        Raises:
            InvalidValueError: it was closed.
        """
        if self._fd < 0:
            raise InvalidValueError("userfault", self, "was closed")
        return self._fd

    def register(
        self, address: GuestAddress, length: int, *, missing: bool = True, protect: bool = False
    ) -> None:
        """Report faults of a range: on missing pages, on write-protected ones, or both.

        Pages that are there already are not missing; `write_protect` protects them.

        Raises:
            MemoryAccessError: the range is not all memory.
            InvalidValueError: it is not whole pages, or neither kind of fault is asked for.
            MappingError: the kernel refuses this kind of fault for this kind of memory.
        """
        mode = missing * _MISSING | protect * _WRITE_PROTECT
        if not mode:
            raise InvalidValueError("missing, protect", False, "one of them must be asked for")
        for region, offset, count in self._pieces(address, length):
            if isinstance(region, _Foreign):
                raise InvalidValueError("userfault", self, "is another process's to register")
            # What is not there may be anything but zeros from now on.
            region.mapping.overlaid = True
            if missing and region not in self._missing:
                region.mapping.watch(each=True)  # pages may be given up
                self._missing.add(region)
            self._done(
                "UFFDIO_REGISTER",
                lib.vmm_userfault_register(
                    self.fileno(), region.host_address + offset, count, mode
                ),
            )

    def unregister(self, address: GuestAddress, length: int) -> None:
        """Report faults of a range no more: pages still missing there are zeros from now on.

        Raises:
            MemoryAccessError, InvalidValueError, MappingError: as for `register`.
        """
        for region, offset, count in self._pieces(address, length):
            host = region.host_address + offset
            self._done(
                "UFFDIO_UNREGISTER", lib.vmm_userfault_unregister(self.fileno(), host, count)
            )

    def copy(
        self,
        address: GuestAddress,
        data: bytes | bytearray | memoryview,
        *,
        wake: bool = True,
        protect: bool = False,
    ) -> None:
        """Supply missing pages (UFFDIO_COPY), each in one step, and wake who waits for them.

        Args:
            address: of the first.
            data: whole pages.
            wake: False leaves that to `wake`.
            protect: write-protect them at once.

        Raises:
            MemoryAccessError, InvalidValueError: as for `register`.
            MappingError: EEXIST: a page is there already, which is as it was; the pages before
                it are supplied.
        """
        source = ffi.from_buffer(data)
        host = int(ffi.cast("uintptr_t", source))
        mode = (not wake) * _DONT_WAKE | protect * _COPY_PROTECTED
        for region, offset, count in self._pieces(address, len(data)):
            self._supply("UFFDIO_COPY", region.host_address + offset, host, count, mode)
            host += count

    def zero(self, address: GuestAddress, length: int, *, wake: bool = True) -> None:
        """Supply missing pages as zeros (UFFDIO_ZEROPAGE), which costs no memory.

        Raises:
            MemoryAccessError, InvalidValueError, MappingError: as for `copy`.
        """
        for region, offset, count in self._pieces(address, length):
            host = region.host_address + offset
            self._supply("UFFDIO_ZEROPAGE", host, 0, count, (not wake) * _DONT_WAKE)

    def poison(self, address: GuestAddress, length: int) -> None:
        """Give missing pages up (UFFDIO_POISON): they will never come, and nobody waits for them.

        Who touches one in the process whose memory it is finds zeros there, and the region is
        `lost`: transfers raise `BackingLostError`. System calls, and KVM, have no page there.

        Raises:
            MemoryAccessError, InvalidValueError: as for `register`.
            MappingError: EEXIST: a page is there; EINVAL: the kernel is older than Linux 6.6.
        """
        for region, offset, count in self._pieces(address, length):
            host = region.host_address + offset
            self._done("UFFDIO_POISON", lib.vmm_userfault_poison(self.fileno(), host, count))

    def write_protect(self, address: GuestAddress, length: int, protect: bool = True) -> None:
        """Report the next write to each page of a range, or let all writers go on.

        Raises:
            MemoryAccessError, InvalidValueError, MappingError: as for `register`.
        """
        for region, offset, count in self._pieces(address, length):
            host = region.host_address + offset
            self._done(
                "UFFDIO_WRITEPROTECT",
                lib.vmm_userfault_protect(self.fileno(), host, count, protect),
            )

    def wake(self, address: GuestAddress, length: int) -> None:
        """Let everybody who waits for a page of the range look again.

        Raises:
            MemoryAccessError, InvalidValueError, MappingError: as for `register`.
        """
        for region, offset, count in self._pieces(address, length):
            host = region.host_address + offset
            self._done("UFFDIO_WAKE", lib.vmm_userfault_wake(self.fileno(), host, count))

    def read(self, timeout: float | None = None) -> list[PageFault | Removal]:
        """What happened since, at most 16 events, after waiting for the first.

        Args:
            timeout: seconds; then the list is empty. None waits without limit.

        Raises:
            MappingError: the kernel refuses.
        """
        from vm_memory.address import GuestAddress

        poll = select.poll()
        poll.register(self.fileno(), select.POLLIN)
        if not poll.poll(None if timeout is None else timeout * 1000):
            return []
        events, error = ffi.new("struct vmm_userfault_event[]", 16), ffi.new("int *")
        count = lib.vmm_userfault_read(self.fileno(), events, 16, error)
        self._done("read of userfaultfd", error[0])
        found: list[PageFault | Removal] = []
        for number in range(count):
            event: Any = events[number]
            address = GuestAddress(self._guest(event.host))
            if event.kind == _KIND_FAULT:
                write, protected = event.flags & _FLAG_WRITE, event.flags & _FLAG_PROTECTED
                found.append(PageFault(address, bool(write), bool(protected), event.thread))
            elif event.kind == _KIND_REMOVE:
                found.append(Removal(address, event.end - event.host))
        return found

    def close(self) -> None:
        """Close the descriptor. Idempotent."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def _in_child(self) -> None:
        self.close()
        _lose(self._missing)

    def _pieces(
        self, address: GuestAddress, length: int
    ) -> Iterator[tuple[GuestRegion | _Foreign, int, int]]:
        """The range, by region; refused whole before anything is done."""
        found: list[tuple[GuestRegion | _Foreign, int, int]] = []
        start, end = int(address), address + length
        for region in self._regions:
            first = region.guest_address
            if length > 0 and first <= start < first + region.size:
                count = min(end, first + region.size) - start
                if (start - first) % region.page_size or count % region.page_size:
                    rule = f"must be whole pages of {region.page_size} bytes"
                    raise InvalidValueError("range", (address, length), rule)
                found.append((region, start - first, count))
                start += count
        if start != end or length <= 0:
            raise MemoryAccessError(address, length, "is not all memory")
        return iter(found)

    def _guest(self, host: int) -> int:
        for region in self._regions:
            if 0 <= host - region.host_address < region.size:
                return host - region.host_address + region.guest_address
        raise MemoryAccessError(host, 1, "is no memory of this, as a host address")

    def _supply(self, what: str, to: int, from_: int, length: int, mode: int) -> None:
        error = ffi.new("int *")
        lib.vmm_userfault_supply(self.fileno(), to, from_, length, mode, error)
        self._done(what, error[0])

    def _done(self, what: str, error: int) -> None:
        if error:
            raise MappingError(what, error, _HINTS.get(error, ""))


def _lose(regions: Iterable[GuestRegion]) -> None:
    """Say that pages of regions will never come."""
    for region in regions:
        region.fragile = True
        region.mapping.lose()


_HINTS = {
    errno.EEXIST: "a page is there already",
    errno.ENOENT: "the range is not registered",
    errno.EAGAIN: "read the events first",
}


def _hint(error: int) -> str:
    if error == errno.ENOSYS:
        return "the kernel was built without userfaultfd"
    if error == errno.EINVAL:
        return "the kernel is too old: what waits for a page is told since Linux 4.14"
    try:
        with open(_KNOB, encoding="ascii") as file:  # noqa: PTH123
            knob = file.read().strip()
    except OSError:
        knob = "not there"
    return (
        f"give this user access to {_DEVICE} (Linux 6.1 or later), or write 1 to {_KNOB}, which "
        f"is {knob}; faults inside KVM need one of these, or CAP_SYS_PTRACE"
    )
