"""Post-copy on the side of the source: pages that the other side waits for first, then the rest."""

from __future__ import annotations

import select
import threading
from typing import TYPE_CHECKING

from .ranges import Ranges
from .stream import LIMIT, PAGE, Pace, Pages, batches, compressor, read_table, send_pages
from .wire import Kind, Link, LinkLost, ProtocolError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["FaultServer"]

# What is sent unasked goes in pieces this small, since who asks waits behind one.
_PIECE = 64 << 10


class FaultServer:
    """Serves one link for faults on a thread of its own, until all is there or the link ends.

    The other side begins: it says what it has not, and SYNC. So a new link takes up where an old
    one was cut.

    Args:
        link: joined.
        pages: of the machine, which stands still.
        pace: the limit for what is sent unasked.
        compress: whether to try.

    Attributes:
        left: bytes that were not sent yet.
    """

    def __init__(self, link: Link, pages: Pages, pace: Pace, *, compress: bool) -> None:
        self.left = 0
        self._link, self._pages, self._pace = link, pages, pace
        self._compressor = compressor() if compress else None
        self._ended = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="faults", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def wait(self, seconds: float) -> bool:
        """Whether it has ended, after at most so many seconds: all is there, or the link is gone.

        Raises:
            ProtocolError: the other side said what it must not.
        """
        ended = self._ended.wait(seconds)
        if isinstance(self._error, ProtocolError):
            raise self._error
        return ended

    @property
    def cut(self) -> bool:
        """Whether it ended before all was there."""
        return self._error is not None

    def stop(self) -> None:
        """End the link, and wait for the thread."""
        self._link.close()
        self._thread.join()

    def _run(self) -> None:
        try:
            self._serve(batches(self._missing(), _PIECE))
        except (LinkLost, ProtocolError) as error:
            self._error = error
            self._link.close()
        finally:
            self._ended.set()

    def _missing(self) -> Ranges:
        found: Ranges = []
        self._link.socket.settimeout(None)  # it speaks once the machine is handed over
        while True:
            frame = self._link.receive(LIMIT)
            if frame.kind is Kind.SYNC:
                self.left = sum(length for _, length in found)
                return found
            if frame.kind is not Kind.MISSING:
                raise ProtocolError("frame", frame.kind.name, "must be MISSING or SYNC")
            found += read_table(self._link.payload(frame))
            if len(found) > 1 << 24:
                raise ProtocolError("MISSING", len(found), "ranges are too many")

    def _serve(self, rest: Iterator[Ranges]) -> None:
        batch = next(rest, None)
        while True:
            if self._asked(wait=batch is None):
                frame = self._link.receive(0)
                if frame.kind is Kind.DONE:
                    self.left = 0
                    return
                if frame.kind is not Kind.REQUEST:
                    raise ProtocolError("frame", frame.kind.name, "must be REQUEST or DONE")
                send_pages(self._link, self._pages, [(frame.argument, PAGE)])
            elif batch is not None:
                count = sum(length for _, length in batch)
                self._pace.wait(count)
                send_pages(self._link, self._pages, batch, self._compressor)
                self.left = max(self.left - count, 0)
                batch = next(rest, None)

    def _asked(self, *, wait: bool) -> bool:
        if self._link.pending:
            return True
        try:
            return bool(select.select([self._link.socket], [], [], 0.5 if wait else 0)[0])
        except (OSError, ValueError) as error:  # it was closed
            raise LinkLost("migration link", error) from error
