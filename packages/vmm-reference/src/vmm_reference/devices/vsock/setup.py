"""What a socket device is configured by, and how it meets the machine and the host's sockets."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import attrs

from vmm_reference.deviceconfig import DeviceConfig
from vmm_reference.errors import ConfigError

if TYPE_CHECKING:
    from socket import socket

    from vmm_reference.wiring import Wiring

    from .served import ServedVsock

__all__ = ["Socket", "build"]

# One of them for all queues: that packets are taken and that there is credit for more, the guest is
# told at once. Interrupts of their own for both took a fourth of the CPU of a guest that sends.
_VECTORS = 2
_LONGEST_PATH = 107 - len("_4294967295")  # of a Unix socket, less what is put behind it


@attrs.frozen
class Socket(DeviceConfig):
    """Sockets between guest and host.

    Attributes:
        path: of the Unix socket by which the host connects to the guest; with `_PORT` behind it,
            of those by which the guest connects to the host.
        cid: the guest's context identifier, 3 to 4294967294.
        vhost: in place of a path, let the host's kernel move packets: its AF_VSOCK sockets are the
            other ends then, and each guest of the host has a CID of its own.
    """

    kind: ClassVar[str] = "vsock"
    positional: ClassVar[str] = "path"
    flags: ClassVar[dict[str, str]] = {"vhost": "vhost"}

    path: str = ""
    cid: int = 3
    vhost: bool = False

    def cloned(self, number: int) -> Socket:
        """With a context identifier and a path of its own."""
        path = self.path and f"{self.path}-{number}"
        return attrs.evolve(self, cid=self.cid + number + 1, path=path)

    def check(self, field: str) -> None:
        """Raise `ConfigError` unless the path and the identifier can be."""
        super().check(field)
        path: object = self.path
        if self.vhost not in (True, False) or bool(self.vhost) == bool(path):
            raise ConfigError(f"{field}.path", repr(path), "either a path or vhost must be given")
        if not isinstance(path, str) or "\0" in path:
            raise ConfigError(f"{field}.path", repr(path), "must be the path of a socket")
        if len(path.encode()) > _LONGEST_PATH:
            raise ConfigError(f"{field}.path", path, f"must be at most {_LONGEST_PATH} bytes")
        if type(self.cid) is not int or not 3 <= self.cid < 0xFFFFFFFF:
            rule = "must be a whole number from 3 to 4294967294"
            raise ConfigError(f"{field}.cid", self.cid, rule)


def build(config: Socket, wiring: Wiring) -> ServedVsock:
    """A socket device whose packets a thread of C moves, or the kernel; for its counters."""
    return _build_vhost(config, wiring) if config.vhost else _build_pump(config, wiring)


def _build_pump(config: Socket, wiring: Wiring) -> ServedVsock:
    """A socket device whose host is Unix sockets."""
    from vmm_reference.backends.pumps import SocketPump
    from vmm_reference.backends.vsock import UnixSockets
    from vmm_reference.devices.offload import Offload

    from .served import ServedVsock

    sockets = UnixSockets(wiring.loop, config.path)
    try:
        pump = SocketPump(wiring.memory, config.cid, sockets)
    except BaseException:
        sockets.close()
        raise
    wiring.on_close(pump.close)
    wiring.on_close(sockets.close)  # before: nobody comes any more then
    offload = Offload("the pump", [(pump, range(2))])
    vsock = ServedVsock(config.cid, offload)
    slot = wiring.virtio(vsock, vectors=_VECTORS)
    offload.plug_in(slot, wiring)

    def opened(client: socket, port: int) -> bool:
        with slot.device.lock:
            is_active = slot.device.active
            taken = is_active and pump.open(client, port)
            if not taken:
                vsock.count_refused("full" if is_active else "guest")
            return taken

    sockets.opened = opened
    return vsock


def _build_vhost(config: Socket, wiring: Wiring) -> ServedVsock:
    """A socket device that the host's kernel serves."""
    from vmm_reference.backends.vhost import VhostVsock
    from vmm_reference.devices.offload import Offload

    from .served import ServedVsock

    kernel = VhostVsock(wiring.memory, config.cid)
    wiring.on_close(kernel.close)
    if not wiring.incoming:
        kernel.acquire()
    wiring.on_hand_over(kernel.release, kernel.acquire)
    offload = Offload("vhost-vsock", [(kernel, range(2))])
    vsock = ServedVsock(config.cid, offload)
    slot = wiring.virtio(vsock, vectors=_VECTORS)
    offload.plug_in(slot, wiring)
    kernel.follow(slot.device, wiring)
    return vsock
