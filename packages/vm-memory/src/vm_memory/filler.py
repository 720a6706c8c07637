"""Memory that comes in from a file: at once what somebody waits for, the rest in the background.

Pages are supplied by threads of C: a thread of Python that touches a missing page stands still with
the interpreter's lock in its hands.

>>> import os, tempfile
>>> from vm_memory import GuestAddress, GuestMemory
>>> from vm_memory.filler import Filler
>>> memory = GuestMemory.from_ranges([(GuestAddress(0), 1 << 20)])
>>> with tempfile.TemporaryFile() as file:
...     _ = os.pwrite(file.fileno(), b"content", 0x7000)
...     os.truncate(file.fileno(), 1 << 20)
...     with Filler(memory, file.fileno()) as filler:
...         filler.start()
...         memory.read(GuestAddress(0x7000), 7)
...         filler.wait(timeout=10)
b'content'
True
"""

from __future__ import annotations

import errno
import os
import select
import threading

import attrs

from vm_memory._fork import tell_in_children
from vm_memory._mapping import ANONYMOUS, MAP_HUGETLB, PAGE
from vm_memory._native import ffi, lib
from vm_memory.errors import InvalidValueError, MappingError
from vm_memory.userfault import Userfault, _lose

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self

    from vm_memory._native import CData
    from vm_memory.memory import GuestMemory
    from vm_memory.transfer import File

__all__ = ["Filler", "FillerStatus"]


@attrs.frozen
class FillerStatus:
    """How far a filler is.

    Attributes:
        faults: how often somebody had to wait for a page.
        filled: pages supplied.
        pages: pages in all; those that the file has a hole for are never supplied.
        complete: everything is there, and nothing is served any more.
        error: the errno that keeps pages missing, 0 if none; ENODATA if the file ends too early.
        error_offset: where in the file.
    """

    faults: int
    filled: int
    pages: int
    complete: bool
    error: int
    error_offset: int


class Filler:
    """Brings memory in from a file: at once what somebody waits for, the rest in the background.

    What cannot be read from the file stays missing: who needs it waits, nobody sees anything
    invented. `status` tells, `fileno` becomes readable, and `retry` goes on when the file can be
    read again. Pages that are thrown away meanwhile become zeros; `GuestMemory.discard` clears them
    without giving them back until `status` or `wait` has told that all is there.

    A child of fork does not take part: memory that is not complete is lost there.

    Args:
        memory: new anonymous memory of whole pages. What somebody has touched is there and stays:
            without `Options(transparent_hugepages=False)` that may be more than was touched.
        file: what to fill it with, laid out as `looking.export_sparse` does; it stays the
            caller's and must not be changed before the filler is complete.
        offset: where in the file the first region begins.

    Raises:
        InvalidValueError: memory of another kind, or of different page sizes; an offset below 0.
        MappingError: no userfaultfd; the hint says what to do.
    """

    def __init__(self, memory: GuestMemory, file: File, *, offset: int = 0) -> None:
        self._handle: CData | None = None
        self._lock = threading.RLock()  # a finalizer may come while it is held
        self._regions = memory.regions
        pages = {region.page_size for region in self._regions}
        kinds = {region.mapping.flags & ~MAP_HUGETLB & 0xFFFFF for region in self._regions}
        if kinds != {ANONYMOUS} or len(pages) != 1:
            rule = "must be anonymous, with pages of one size"
            raise InvalidValueError("memory", self._regions, rule)
        if not 0 <= offset < 1 << 62:
            raise InvalidValueError("offset", offset, "must be 0 to 2**62")
        (page,) = pages
        self._file = os.dup(file if isinstance(file, int) else file.fileno())
        try:
            self._userfault = Userfault(memory)
            rows: list[int] = []
            for region in self._regions:
                length = -(-region.size // page) * page
                rows += region.host_address, length, offset
                offset += -(-region.size // PAGE) * PAGE
                self._userfault.register(region.guest_address, length)
            error = ffi.new("int *")
            handle = lib.vmm_filler_new(
                self._userfault.fileno(), self._file, page, len(rows) // 3,
                ffi.new("uint64_t[]", rows), error,
            )  # fmt: skip
            if not handle:
                raise MappingError("threads that fill memory", error[0])
            self._handle = handle
            self._userfault._missing.clear()  # from here on this tells what is lost
            tell_in_children(self)
        except BaseException:
            self._release()
            raise

    def start(self, *, background: bool = True) -> None:
        """Begin. Without `background`, pages come only when somebody waits for them.

        Raises:
            InvalidValueError: it was started already, or closed.
            MappingError: the host gives no thread.
        """
        with self._lock:
            error = lib.vmm_filler_start(self._open(), background)
        if error == errno.EALREADY:
            raise InvalidValueError("filler", self, "was started already")
        if error:
            raise MappingError("starting threads that fill memory", error)

    @property
    def status(self) -> FillerStatus:
        """How far it is; after `close`, how far it came."""
        with self._lock:
            return self._look()

    def _look(self) -> FillerStatus:
        """With the lock held, or where there is no other thread."""
        if self._handle is not None:
            look = lib.vmm_filler_look(self._handle)
            self._last = FillerStatus(
                look.faults, look.filled, look.pages, bool(look.complete), look.error,
                look.error_offset,
            )  # fmt: skip
            if look.complete:  # what is not there now is zeros, as it ever is
                for region in self._regions:
                    region.mapping.overlaid = False
        return self._last

    def fileno(self) -> int:
        """An eventfd that becomes readable when all is there, or when something fails."""
        with self._lock:
            return lib.vmm_filler_notify(self._open())

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until everything is there; False if that takes longer.

        Args:
            timeout: seconds, or None without limit.

        Raises:
            MappingError: what the file could not give, `status` says where.
        """
        poll = select.poll()
        poll.register(self.fileno(), select.POLLIN)
        poll.poll(None if timeout is None else timeout * 1000)
        status = self.status
        if status.error:
            where = f"reading the memory's file at {status.error_offset:#x}"
            hint = "what needs the page waits; mend the file and call retry()"
            raise MappingError(where, status.error, hint)
        return status.complete

    def retry(self) -> None:
        """After a failure: try again whatever is still missing.

        Raises:
            MappingError: the host gives no thread.
        """
        with self._lock:
            error = lib.vmm_filler_retry(self._open())
        if error:
            raise MappingError("starting threads that fill memory", error)

    def close(self) -> None:
        """End serving. Idempotent.

        Memory that is not complete then is lost: what is still missing reads as zeros, and
        `GuestMemory.lost_regions` and transfers say so. No vCPU may run on it any more.
        """
        with self._lock:
            if self._handle is None:
                return
            complete = self._look().complete
            handle, self._handle = self._handle, None
        lib.vmm_filler_free(handle)
        if not complete:
            for region in self._regions:
                region.mapping.lose()
        self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def _in_child(self) -> None:
        """The threads are the parent's, and so is all that they share with it."""
        self._lock = threading.RLock()  # another thread may have had it
        if self._handle is not None:
            if not self._look().complete:
                _lose(self._regions)
            self._handle = None
            self._release()

    def _open(self) -> CData:
        if self._handle is None:
            raise InvalidValueError("filler", self, "was closed")
        return self._handle

    def _release(self) -> None:
        if hasattr(self, "_userfault"):
            self._userfault.close()
        os.close(self._file)
