"""The debug console of Bochs and QEMU: a port that takes one character after another.

SeaBIOS and OVMF write their log to port 0x402, Bochs has the port at 0xE9; a read answers 0xE9, by
which firmware knows that somebody listens.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, ClassVar

import attrs

from vmm_reference.deviceconfig import DeviceConfig
from vmm_reference.errors import ConfigError, HostError

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm_reference.wiring import Wiring

__all__ = ["LIMIT", "PORTS", "READBACK", "WINDOW", "DebugConsole", "DebugLog", "build"]

PORTS = (0x402, 0xE9)
READBACK = 0xE9
WINDOW = 64 << 10
"""Bytes that may be under way to a slow reader; a guest that is faster loses what is more."""
LIMIT = 16 << 20
"""Bytes that a guest may write from power-on to power-off, so that it can't fill a disk."""


class DebugConsole:
    r"""One register; it has no state that a guest could see.

    Args:
        transmit: takes the output; each byte comes back through `transmitted`.
        limit: how many bytes it takes in all.

    Attributes:
        dropped: bytes that were written past `WINDOW` or `limit`.

    Example:
        >>> console = DebugConsole(print)
        >>> console.write(0, b"S")
        b'S'
        >>> console.read(0, 1)
        b'\xe9'
    """

    def __init__(self, transmit: Callable[[bytes], None], *, limit: int = LIMIT) -> None:
        self._transmit = transmit
        self._left = limit
        self._under_way = 0
        self.dropped = 0

    def read(self, _offset: int, length: int) -> bytes:
        """The sign that there is a debug console."""
        return bytes([READBACK]) * length

    def write(self, _offset: int, data: bytes) -> None:
        """Pass characters on, or count those that nobody can be given."""
        count = len(data)
        if count > self._left or self._under_way + count > WINDOW:
            self.dropped += count
            return
        self._left -= count
        self._under_way += count
        self._transmit(data)

    def metrics(self) -> dict[str, int]:
        """Bytes that nobody could be given, and those that may still come."""
        return {"dropped": self.dropped, "left_bytes": self._left}

    def transmitted(self, count: int) -> None:
        """So many bytes have left. Not from within `transmit`."""
        self._under_way -= count


@attrs.frozen
class DebugLog(DeviceConfig):
    """The debug ports, and a file for what is written there.

    Attributes:
        path: a file that is appended to and made where it is missing, or a pipe.
    """

    kind: ClassVar[str] = "debug-console"
    positional: ClassVar[str] = "path"

    path: str

    def cloned(self, number: int) -> DebugLog:
        """With a file of its own."""
        return attrs.evolve(self, path=f"{self.path}-{number}")

    def check(self, field: str) -> None:
        """Raise `ConfigError` unless there is a path."""
        super().check(field)
        path: object = self.path
        if not isinstance(path, str) or not path or "\0" in path:
            raise ConfigError(f"{field}.path", repr(path), "must be the path of a file")


def build(config: DebugLog, wiring: Wiring) -> DebugConsole:
    """A debug console whose output goes to the file.

    Raises:
        HostError: the file can't be written.
    """
    from vmm_reference.backends.stream import StreamOutput

    # A FIFO without a reader is refused, not waited for.
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        fd = os.open(config.path, flags, 0o644)
    except OSError as error:
        raise HostError(
            f"debug console {config.path}", error.strerror, "name a file that can be written"
        ) from None
    wiring.on_close(lambda: os.close(fd))

    def written(count: int) -> None:
        with wiring.ports.lock(console):
            console.transmitted(count)

    output = StreamOutput(wiring.loop, fd, written)
    wiring.on_close(output.close)
    console = DebugConsole(output.send)
    wiring.count(console.metrics)
    for port in PORTS:
        wiring.ports.add(port, 1, console)
    return console
