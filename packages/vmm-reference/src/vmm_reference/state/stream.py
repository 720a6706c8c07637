"""Memory over links: many pieces in one frame, zeros as ranges alone, compression by choice.

Sending and receiving need no copy in Python: a frame's pieces go from guest memory to the socket
and from there to guest memory in one system call each, outside the interpreter's lock. Compression
happens outside of it too.
"""

from __future__ import annotations

import ssl
import struct
import threading
import time
from bisect import bisect_right
from typing import TYPE_CHECKING

import zstandard

from .ranges import Ranges
from .wire import MAX_PAGES, Kind, Link, LinkLost, ProtocolError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from vm_memory import GuestMemory

    from .wire import Frame

__all__ = ["PAGE", "Pace", "Pages", "Sender", "batches", "receive_pages"]

PAGE = 4096
_RANGE = struct.Struct("<QQ")
_MOST_RANGES = 512  # with each header well within the 1024 buffers of a system call
LIMIT = MAX_PAGES + _MOST_RANGES * _RANGE.size


class Pages:
    """Guest memory as buffers, by address."""

    def __init__(self, memory: GuestMemory) -> None:
        self._starts = [int(region.guest_address) for region in memory.regions]
        self._views = [memoryview(region.buffer).cast("B") for region in memory.regions]

    def view(self, address: int, length: int) -> memoryview:
        """A piece that lies in one region.

        Raises:
            ProtocolError: it does not, or is not whole pages.
        """
        number = bisect_right(self._starts, address) - 1
        if number >= 0 and not (address | length) % PAGE and length:
            offset = address - self._starts[number]
            view = self._views[number]
            if offset + length <= len(view):
                return view[offset : offset + length]
        raise ProtocolError("pages", (address, length), "are no pages of the machine's memory")

    def close(self) -> None:
        """Let go of the memory."""
        for view in self._views:
            view.release()


def table(ranges: Ranges) -> bytes:
    """Ranges as they are sent."""
    return b"".join(_RANGE.pack(*piece) for piece in ranges)


def read_table(data: bytes | bytearray) -> Ranges:
    """Ranges as they were sent.

    Raises:
        ProtocolError: they are cut.
    """
    if len(data) % _RANGE.size:
        raise ProtocolError("ranges", len(data), f"bytes are no multiple of {_RANGE.size}")
    return list(_RANGE.iter_unpack(data))


def batches(ranges: Iterable[tuple[int, int]], most: int = MAX_PAGES) -> Iterator[Ranges]:
    """The same ranges, cut and gathered so that each batch fits one frame.

    Example:
        >>> list(batches([(0, 8192), (16384, 4096)], most=8192))
        [[(0, 8192)], [(16384, 4096)]]
    """
    batch: Ranges = []
    room = most
    for start, length in ranges:
        address, left = start, length
        while left:
            count = min(left, room)
            batch.append((address, count))
            address, left, room = address + count, left - count, room - count
            if not room or len(batch) == _MOST_RANGES:
                yield batch
                batch, room = [], most
    if batch:
        yield batch


class Pace:
    """A limit to what all streams together send, in bytes a second; None is none."""

    def __init__(self, bandwidth: int | None) -> None:
        self._bandwidth = bandwidth
        self._lock = threading.Lock()
        self._free = 0.0

    def wait(self, count: int) -> None:
        """Wait until so many more bytes may go."""
        if self._bandwidth is None:
            return
        with self._lock:
            now = time.monotonic()
            start = max(self._free, now)
            self._free = start + count / self._bandwidth
        time.sleep(start - now)


class Sender:
    """Sends memory over several links at once.

    Args:
        pages: the memory.
        links: one for each stream.
        compress: whether to try.
        pace: the limit.
    """

    def __init__(self, pages: Pages, links: list[Link], *, compress: bool, pace: Pace) -> None:
        self._pages, self._links, self._pace = pages, links, pace
        self._compressors = [compressor() if compress else None for _ in links]
        self._round = 0
        self.stopped = False  # another thread wants it to end early

    @property
    def sent(self) -> int:
        """Bytes that went over the links."""
        return sum(link.sent for link in self._links)

    def send(self, data: Iterable[tuple[int, int]], zeros: Iterable[tuple[int, int]] = ()) -> None:
        """Send pieces of memory; unless it was stopped, all of it has arrived when this returns.

        Args:
            data: what to send.
            zeros: what is zero there by now.

        Raises:
            LinkLost, ProtocolError: the first that happened in a stream.
        """
        self._round += 1
        waiting = batches(data)
        lock = threading.Lock()
        errors: list[BaseException] = []

        def work(number: int) -> None:
            try:
                while not errors and not self.stopped:
                    with lock:
                        batch = next(waiting, None)
                    if batch is None:
                        break
                    count = sum(length for _, length in batch)
                    self._pace.wait(count)
                    send_pages(self._links[number], self._pages, batch, self._compressors[number])
                self._sync(self._links[number])
            except BaseException as error:
                errors.append(error)

        for batch in batches(zeros, 1 << 62):
            self._links[0].send(Kind.ZERO, table(batch), extra=len(batch))
        threads = [
            threading.Thread(target=work, args=(number,), name=f"stream{number}")
            for number in range(1, len(self._links))
        ]
        for thread in threads:
            thread.start()
        work(0)
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]

    def _sync(self, link: Link) -> None:
        link.send(Kind.SYNC, argument=self._round)
        frame = link.receive(0)
        if frame.kind is not Kind.SYNC or frame.argument != self._round:
            raise ProtocolError(frame.kind.name, frame.argument, f"is no SYNC {self._round}")


def compressor() -> zstandard.ZstdCompressor:
    return zstandard.ZstdCompressor(level=1, write_content_size=True)


def send_pages(
    link: Link, pages: Pages, batch: Ranges, compressor: zstandard.ZstdCompressor | None = None
) -> None:
    """Send one batch as a frame.

    Raises:
        LinkLost: it can't be.
    """
    views = [pages.view(address, length) for address, length in batch]
    head = table(batch)
    if compressor is not None:
        plain = b"".join(views)
        packed = compressor.compress(plain)
        if len(packed) < len(plain):
            link.send(Kind.ZSTD, head + packed, extra=len(batch))
            return
    link.send_parts(Kind.DATA, [head, *views], extra=len(batch))


def receive_pages(link: Link, pages: Pages) -> None:
    """Put what comes into memory, until the link ends.

    Raises:
        LinkLost: it does, always.
        ProtocolError: something comes that is no memory of this machine.
    """
    while True:
        frame = link.receive(LIMIT)
        if frame.kind is Kind.SYNC:
            link.send(Kind.SYNC, argument=frame.argument)
            continue
        for views in pieces(link, frame, pages):
            _fill(link, views)


def pieces(link: Link, frame: Frame, pages: Pages) -> Iterator[list[memoryview]]:
    """Where the memory of a frame is to go, if it is still to be received; zeros are put there."""
    ranges, rest = read_head(link, frame)
    views = [pages.view(address, length) for address, length in ranges]
    if frame.kind is Kind.ZERO:
        for view in views:
            _clear(view)
    elif frame.kind is Kind.DATA:
        yield views
    else:
        plain = unpack(link, rest, sum(map(len, views)))
        start = 0
        for view in views:
            view[:] = plain[start : start + len(view)]
            start += len(view)


def read_head(link: Link, frame: Frame) -> tuple[Ranges, int]:
    """The ranges of a frame with memory, and how many bytes of it follow.

    Raises:
        ProtocolError: the frame is another, or its sizes do not fit.
    """
    head = frame.extra * _RANGE.size
    if frame.kind not in (Kind.DATA, Kind.ZSTD, Kind.ZERO):
        raise ProtocolError("frame", frame.kind.name, "has no place on a link for pages")
    if not 0 < frame.extra <= _MOST_RANGES or head > frame.size:
        raise ProtocolError(f"{frame.kind.name}.ranges", frame.extra, "are too many, or none")
    data = bytearray(head)
    link.receive_into(memoryview(data))
    ranges, rest = read_table(data), frame.size - head
    total = sum(length for _, length in ranges)
    if frame.kind is Kind.ZERO:
        fits = rest == 0
    else:
        fits = total <= MAX_PAGES and (frame.kind is Kind.ZSTD or rest == total)
    if not fits:
        raise ProtocolError(f"{frame.kind.name}.size", frame.size, f"does not fit {total} bytes")
    return ranges, rest


def unpack(link: Link, size: int, total: int) -> memoryview:
    """Memory that was compressed.

    Raises:
        ProtocolError: it is anything but `total` bytes compressed.
    """
    packed = bytearray(size)
    link.receive_into(memoryview(packed))
    try:
        if zstandard.get_frame_parameters(packed).content_size != total:
            raise ProtocolError("ZSTD", size, f"bytes do not unpack to {total}")
        return memoryview(zstandard.ZstdDecompressor().decompress(packed))
    except zstandard.ZstdError as error:
        raise ProtocolError("ZSTD", size, f"bytes can't be unpacked: {error}") from None


_ZEROS = bytes(MAX_PAGES)


def _clear(view: memoryview) -> None:
    """Make a piece zero, without touching pages that are."""
    for start in range(0, len(view), PAGE):
        piece = view[start : start + PAGE]
        if piece != _ZEROS[:PAGE]:
            piece[:] = _ZEROS[:PAGE]


def _fill(link: Link, views: list[memoryview]) -> None:
    """Receive into many buffers."""
    if isinstance(link.socket, ssl.SSLSocket):
        for view in views:
            link.receive_into(view)
        return
    while views:
        try:
            count = link.socket.recvmsg_into(views)[0]
        except (OSError, ValueError) as error:
            raise LinkLost("migration link", error) from error
        if not count:
            raise LinkLost("migration link", "the other side closed it")
        link.received += count
        while views and count >= len(views[0]):
            count -= len(views.pop(0))
        if count:
            views[0] = views[0][count:]
