"""QEMU's isa-debug-exit: a guest under test writes a value to a port, and that ends the machine.

The process's exit status is the value doubled, plus one, as with QEMU: never 0, which a power-off
has.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import attrs

from vmm_reference.deviceconfig import DeviceConfig
from vmm_reference.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm_reference.wiring import Wiring

__all__ = ["PORT", "SIZE", "DebugExit", "ExitPort", "build"]

PORT, SIZE = 0x501, 4


class DebugExit:
    r"""Ports that read as zeros and end the machine when they are written; no state.

    Args:
        ended: is given the value.

    Attributes:
        exits: how often a guest asked for the end; the first time counts.
        reads: of a port that has nothing to tell.

    Example:
        >>> device = DebugExit(print)
        >>> device.write(0, b"\x10")
        16
    """

    def __init__(self, ended: Callable[[int], None]) -> None:
        self._ended = ended
        self.exits = self.reads = 0

    def read(self, _offset: int, length: int) -> bytes:
        """Zeros."""
        self.reads += 1
        return bytes(length)

    def write(self, _offset: int, data: bytes) -> None:
        """The end."""
        self.exits += 1
        self._ended(int.from_bytes(data, "little"))

    def metrics(self) -> dict[str, int]:
        """Accesses."""
        return {"exits": self.exits, "reads": self.reads}


@attrs.frozen
class ExitPort(DeviceConfig):
    """A way for a guest under test to end the machine with a status.

    Attributes:
        port: the first of four, 0x501 unless a guest looks elsewhere, such as at 0xF4.
    """

    kind: ClassVar[str] = "debug-exit"

    port: int = PORT

    def check(self, field: str) -> None:
        """Raise `ConfigError` unless the port is one."""
        super().check(field)
        if type(self.port) is not int or not 0 <= self.port <= 0x10000 - SIZE:
            raise ConfigError(f"{field}.port", self.port, "must be a whole number below 65533")


def build(config: ExitPort, wiring: Wiring) -> None:
    """The port, which ends this machine."""
    from vmm_reference.outcome import Outcome

    device = DebugExit(lambda value: wiring.end(Outcome.DEBUG_EXIT, str(value)))
    wiring.count(device.metrics)
    wiring.ports.add(config.port, SIZE, device)
    wiring.on_close(lambda: wiring.ports.remove(config.port))
