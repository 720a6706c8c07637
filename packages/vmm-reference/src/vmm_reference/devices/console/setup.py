"""What a console device is configured by, and how its ports meet their other ends."""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import attrs

from virtio_queue.errors import GuestError
from vmm_reference.deviceconfig import DeviceConfig
from vmm_reference.errors import ConfigError

from .model import MAX_PORTS, Console, PortSpec, transmit_queue

if TYPE_CHECKING:
    from vmm_reference.slots import VirtioSlot
    from vmm_reference.wiring import Wiring

__all__ = ["Controls", "Ports", "build"]

# A name and an equals sign for a port, nothing for a console; where its other end is; and a path.
_PORT = re.compile(r"(?:([A-Za-z0-9._-]{1,60})=)?(file|pty|socket|tty)(?::(.+))?")


@attrs.frozen
class Ports(DeviceConfig):
    """Consoles and ports.

    Attributes:
        ports: each as `[NAME=]WHERE`, with spaces between. Without a name it is a console of the
            guest, /dev/hvc0 and so on; with one a port, /dev/virtio-ports/NAME. WHERE is
            `file:PATH`, `pty` or `pty:LINK`, `socket:PATH`, or `tty:PATH`.
    """

    kind: ClassVar[str] = "console"
    positional: ClassVar[str] = "ports"

    ports: str = "pty"

    def cloned(self, number: int) -> Ports:
        """With files, links and sockets of its own; a terminal is one machine's."""
        words = [
            word if match is None or match[2] == "tty" or not match[3] else f"{word}-{number}"
            for word in self.ports.split()
            for match in [_PORT.fullmatch(word)]
        ]
        return attrs.evolve(self, ports=" ".join(words))

    def check(self, field: str) -> None:
        """Raise `ConfigError` unless each port can be."""
        super().check(field)
        text: object = self.ports
        if not isinstance(text, str) or "\0" in text or not 1 <= len(text.split()) <= MAX_PORTS:
            raise ConfigError(f"{field}.ports", repr(text), f"must be 1 to {MAX_PORTS} ports")
        names = []
        for word in text.split():
            match = _PORT.fullmatch(word)
            if match is None or (match[2] != "pty" and not match[3]):
                rule = "must be [NAME=]file:PATH, pty[:LINK], socket:PATH or tty:PATH"
                raise ConfigError(f"{field}.ports", word, rule)
            if match[1] is not None and match[1] in names:
                raise ConfigError(f"{field}.ports", word, "has the name of another")
            names.append(match[1])


class Controls:
    """How the owner of a machine reaches its running console; from any thread.

    Attributes:
        console: the device, for its counters.
        ends: what each port is on the host, such as a `PtyPort`, whose `path` is the terminal's.
    """

    def __init__(self, console: Console, slot: VirtioSlot, ends: list[Any]) -> None:
        self.console = console
        self.ends = ends
        self._slot = slot

    def resize(self, columns: int, rows: int) -> None:
        """Tell the guest the size of the first console's terminal."""
        with self._slot.device.lock, self._slot.device.config_change():
            self.console.resize(columns, rows)


def build(config: Ports, wiring: Wiring) -> Controls:
    """A console device with the ports that the configuration names."""
    from vmm_reference.backends import ports as backends
    from vmm_reference.backends.pumps import PortPump
    from vmm_reference.devices.offload import Offload

    from .served import ServedConsole

    kinds: dict[str, Any] = {
        "file": backends.FilePort,
        "pty": backends.PtyPort,
        "socket": backends.SocketPort,
        "tty": backends.TtyPort,
    }
    found = [match for word in config.ports.split() if (match := _PORT.fullmatch(word))]
    specs = [PortSpec(console=match[1] is None, name=match[1] or "") for match in found]

    def receive(index: int, data: bytes) -> int:
        with slot.device.lock:
            if not slot.device.active:
                return 0
            try:
                taken = console.receive(index, data)
            except GuestError as error:
                slot.device.needs_reset(f"port {index}: {error}")
                return 0
            slot.device.notify_used()
            return taken

    def written(index: int, count: int) -> None:
        with slot.device.lock:
            console.transmitted(index, count)

    def opened(index: int, is_open: bool) -> None:
        # A console has no end that could be away: what is written then is kept for the next.
        if not specs[index].console:
            with slot.device.lock:
                console.set_open(index, is_open)

    ends: list[Any] = []
    pumps: dict[int, PortPump] = {}
    for index, match in enumerate(found):
        guest = backends.GuestSide(
            wiring.loop,
            match[3] or "",
            partial(receive, index),
            partial(written, index),
            partial(opened, index),
        )
        end = kinds[match[2]](guest)
        ends.append(end)
        wiring.on_close(end.close)
        if end.output is not None:
            pump = pumps[index] = PortPump(wiring.memory, end.output, lossy=specs[index].console)
            wiring.on_close(pump.close)
    offload = Offload("the pump", [(pumps[index], [transmit_queue(index)]) for index in pumps])
    console = ServedConsole(
        specs,
        lambda index, data: ends[index].send(data),
        offload,
        pumps,
        room=lambda index: ends[index].more(),
        kick=lambda queue: slot.kick(queue),
    )
    slot: VirtioSlot = wiring.virtio(console)
    offload.plug_in(slot, wiring)
    for index, end in enumerate(ends):
        # Nobody is connected yet: a port says so, a console is heard all the same.
        if not end.is_open and not specs[index].console:
            console.set_open(index, False)
    size = getattr(ends[0], "size", (0, 0))
    console.resize(*size)
    return Controls(console, slot, ends)
