"""The guest's console as a Python object: what it printed, what it is told, what to wait for."""

from __future__ import annotations

import re
import threading
import time

from vmm_reference.errors import VmmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm_reference.loop import Loop

__all__ = ["Console", "ConsoleTimeout"]

# What a console keeps for `output` and `expect`; a guest that prints more loses the oldest.
_KEEP = 1 << 20


class ConsoleTimeout(VmmError, TimeoutError):
    """What was waited for did not come. `output` holds the end of what came instead."""

    def __init__(self, pattern: str, seconds: float, output: str) -> None:
        super().__init__(pattern, seconds, output)
        self.pattern = pattern
        self.seconds = seconds
        self.output = output

    def __str__(self) -> str:
        return f"no {self.pattern!r} within {self.seconds:g} s; the console ends in {self.output!r}"


class Console:
    """A console in memory, usable from any thread.

    Args:
        loop: where typed bytes are handed over.
        receive: hands typed bytes to the device, which says how many it took.

    Attributes:
        ended: whether the machine has ended, so that no more output will come.
    """

    def __init__(self, loop: Loop, receive: Callable[[bytes], int]) -> None:
        self._loop = loop
        self._receive = receive
        self._changed = threading.Condition()
        self._output = bytearray()
        self._seen = 0  # up to where `expect` has consumed the output
        self._typed = b""
        self.ended = False

    @property
    def output(self) -> str:
        """What the guest has printed, at most the last mebibyte; undecodable bytes are replaced."""
        with self._changed:
            return self._output.decode(errors="replace")

    def expect(self, pattern: str, timeout: float = 60.0) -> re.Match[str]:
        """Wait until the output after the last match matches a regular expression.

        Args:
            pattern: as `re.search` takes it.
            timeout: seconds to wait at most.

        Raises:
            ConsoleTimeout: it did not come in time, or the machine ended before.
        """
        wanted = re.compile(pattern)
        deadline = time.monotonic() + timeout
        with self._changed:
            while True:
                text = self._output[self._seen :].decode(errors="replace")
                if match := wanted.search(text):
                    self._seen += len(text[: match.end()].encode(errors="replace"))
                    return match
                left = deadline - time.monotonic()
                if left <= 0 or self.ended:
                    raise ConsoleTimeout(pattern, timeout, text[-200:])
                self._changed.wait(left)

    def send(self, text: str | bytes) -> None:
        """Type text at the guest; what its UART has no room for follows as it makes room."""
        with self._changed:
            self._typed += text.encode() if isinstance(text, str) else text
        self._loop.call_soon(self._offer)

    def more(self) -> None:
        """The device has room again for what was typed; from any thread."""
        self._loop.call_soon(self._offer)

    def transmit(self, data: bytes) -> None:
        """The device's output; it is taken at once."""
        with self._changed:
            self._output += data
            if len(self._output) > _KEEP:
                gone = len(self._output) - _KEEP
                del self._output[:gone]
                self._seen = max(0, self._seen - gone)
            self._changed.notify_all()

    def _offer(self) -> None:
        # The device is entered without the lock: it may be sending to `transmit` at this moment.
        taken = self._receive(self._typed) if self._typed else 0
        with self._changed:
            self._typed = self._typed[taken:]

    def end(self) -> None:
        """The machine has ended: nobody waits for output any more."""
        with self._changed:
            self.ended = True
            self._changed.notify_all()
