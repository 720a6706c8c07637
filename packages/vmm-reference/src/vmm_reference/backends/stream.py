"""A console's bytes to and from file descriptors, on the loop's thread.

Output is written only where the descriptor has room, so that a pipe nobody reads holds up neither
the loop nor a vCPU: the bytes stay where they are, and the device that sent them keeps its
transmitter busy until `written` says that they are gone.
"""

from __future__ import annotations

import os
import select
import threading

from vmm_reference.loop import READ, WRITE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm_reference.loop import Loop

__all__ = ["StreamInput", "StreamOutput"]

# A pipe that polls writable takes this much without blocking (PIPE_BUF).
_CHUNK = 4096
# A guest sends one character at a time; those of this many seconds go out in one write.
_GATHER = 0.004


class StreamOutput:
    """Sends bytes to a descriptor in order, as fast as it takes them.

    Args:
        loop: where the writing happens.
        fd: the descriptor; it stays open and its flags stay as they are.
        written: called on the loop's thread with the number of bytes that left, written or dropped.

    Attributes:
        fd: the descriptor.
        dropped: bytes that could not be written because the other end is gone.
        broken: why that is, or None.
    """

    def __init__(self, loop: Loop, fd: int, written: Callable[[int], None]) -> None:
        self._loop = loop
        self.fd = fd
        self._written = written
        self._lock = threading.Lock()
        self._pending = bytearray()
        self._scheduled = False
        self._waiting = False
        self._poll = select.poll()
        self._poll.register(fd, select.POLLOUT)
        self.dropped = 0
        self.broken: OSError | None = None

    def send(self, data: bytes) -> None:
        """Queue bytes; from any thread. What bounds the queue is the sender's own window."""
        with self._lock:
            self._pending += data
            if self._scheduled:
                return
            self._scheduled = True
        self._loop.call_within(_GATHER, self._flush)

    def take(self, most: int) -> bytes:
        """Have bytes that are queued: who writes to the descriptor now sends them first."""
        with self._lock:
            data = bytes(self._pending[:most])
            del self._pending[:most]
        if data:
            self._written(len(data))
        return data

    def drain(self, seconds: float) -> None:
        """Write what is left, waiting at most `seconds` for room. After the loop has stopped."""
        while self._pending and self.broken is None and self._poll.poll(seconds * 1000):
            self._write()
        self.dropped += len(self._pending)
        self._pending.clear()

    def close(self) -> None:
        """Write what the descriptor takes at once, and drop the rest. On the loop's thread."""
        if self._waiting:
            self._loop.remove(self.fd)
            self._waiting = False
        self.drain(0)

    def abandon(self) -> None:
        """Write nothing more: what is pending is dropped. On the loop's thread."""
        self.broken = self.broken or BrokenPipeError()
        if self._waiting:
            self._loop.remove(self.fd)
            self._waiting = False
        with self._lock:
            count = len(self._pending)
            self._pending.clear()
        self.dropped += count
        if count:
            self._written(count)

    def _flush(self) -> None:
        while True:
            with self._lock:
                if not self._pending:
                    self._scheduled = False
                    return
            if self.broken is None and not self._poll.poll(0):
                self._wait()
                return
            self._write()

    def _wait(self) -> None:
        self._waiting = True
        self._loop.add(self.fd, WRITE, self._ready)

    def _ready(self, _events: int) -> None:
        self._loop.remove(self.fd)
        self._waiting = False
        self._flush()

    def _write(self) -> None:
        with self._lock:  # which the descriptor does not hold: it has room
            data = bytes(self._pending[:_CHUNK])
            count = len(data)
            if self.broken is None:
                try:
                    count = os.write(self.fd, data)
                except BlockingIOError:
                    return
                except OSError as error:  # nobody reads any more; the guest runs on regardless
                    self.broken = error
            if self.broken is not None:
                self.dropped += count
            del self._pending[:count]
        self._written(count)


class StreamInput:
    """Reads bytes from a descriptor and hands them to a device that says how many it takes.

    Args:
        loop: where the reading happens.
        fd: the descriptor; it stays open and its flags stay as they are.
        receive: takes bytes, returns how many it accepted; the rest is offered again after `more`.
        ended: called once at the end of the input.

    Attributes:
        keys: what was read passes through this first, such as a search for an escape sequence.
    """

    def __init__(
        self,
        loop: Loop,
        fd: int,
        receive: Callable[[bytes], int],
        ended: Callable[[], None] = lambda: None,
    ) -> None:
        self._loop = loop
        self._fd = fd
        self._receive = receive
        self._ended = ended
        self._left = b""
        self._listening = False
        self.keys: Callable[[bytes], bytes] = bytes

    def start(self) -> None:
        """Begin to read. A regular file, which epoll does not take, is read as it is taken."""
        self._listen()

    def stop(self) -> None:
        """Read no more. On the loop's thread."""
        self._left = b""
        self._forget()

    def more(self) -> None:
        """The device has room again; from any thread."""
        if self._left:
            self._loop.call_soon(self._offer)

    def _listen(self) -> None:
        if self._listening:
            return
        try:
            self._loop.add(self._fd, READ, self._ready)
            self._listening = True
        except PermissionError:
            self._loop.call_soon(lambda: self._ready(READ))

    def _ready(self, _events: int) -> None:
        try:
            data = os.read(self._fd, 256)
        except BlockingIOError:
            return
        except OSError:  # a terminal that hung up
            data = b""
        if not data:
            self._forget()
            self._ended()
            return
        self._left += self.keys(data)
        self._offer()

    def _forget(self) -> None:
        if self._listening:
            self._loop.remove(self._fd)
            self._listening = False

    def _offer(self) -> None:
        taken = self._receive(self._left)
        self._left = self._left[taken:]
        if self._left:
            self._forget()  # read no further than the guest does
        else:
            self._listen()
