"""Threads of C that serve the queues of a device, for `vmm_reference.devices.offload`."""

from __future__ import annotations

from vmm_reference.devices.offload import PumpServer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from socket import socket
    from typing import Literal

    from virtio_queue import NetPump, OutputPump, Queue, VsockPump
    from vm_memory import GuestMemory
    from vmm_reference.backends.stream import StreamOutput
    from vmm_reference.backends.vsock import UnixSockets
    from vmm_reference.devices import limiter
    from vmm_reference.devices.net.control import Control

__all__ = ["Limits", "LinkPump", "PortPump", "SocketPump"]


class Limits:
    """What pumps may do, as the owner of a machine gives it.

    Attributes:
        limiter: for the pumps.
    """

    def __init__(self) -> None:
        from virtio_queue.pump_limit import Limiter

        self.limiter = Limiter()
        self._buckets: dict[str, limiter.TokenBucket | None] = {"bandwidth": None, "ops": None}

    def set(self, buckets: Mapping[str, limiter.TokenBucket | None]) -> None:
        """Have other buckets, by `bandwidth` and `ops`; None lifts a limit."""
        from virtio_queue.pump_limit import TokenBucket

        self._buckets |= buckets
        bandwidth, operations = (
            None
            if (bucket := self._buckets[name]) is None
            else TokenBucket(bucket.size, bucket.refill_time, bucket.one_time_burst)
            for name in ("bandwidth", "ops")
        )
        self.limiter.set(bandwidth, operations)


class LinkPump(PumpServer):
    """Moves frames between a pair of queues and a queue of a link.

    Args:
        memory: the guest's.
        fd: of the link's queue.
        kind: of the link.
        peer: path of the other end of datagrams.

    Raises:
        PumpError: the host has no more descriptors.
    """

    pump: NetPump

    def __init__(
        self,
        memory: GuestMemory,
        fd: int,
        kind: Literal["tap", "datagrams", "stream"] = "tap",
        peer: str = "",
    ) -> None:
        from virtio_queue import NetPump

        super().__init__(memory, NetPump(fd, kind, peer))

    def _start(self, features: int, queues: Sequence[Queue]) -> None:
        self.pump.start(self._memory, queues, features)

    def forget(self) -> None:
        """Drop a frame that waits for the driver's buffers."""
        self.pump.forget()

    def filter(self, control: Control | None) -> None:
        """Give the guest what it wants by its control queue; None for all there is."""
        if control is None:
            self.pump.clear_filter()
            return
        self.pump.set_filter(
            control.mac,
            modes=control.modes,
            unicast=control.unicast,
            multicast=control.multicast,
            vlans=control.vlans,
        )

    def limit(self, receive: Limits, send: Limits) -> None:
        """Have these limits, as they are now and after each change of them."""
        self.pump.limit(receive.limiter, send.limiter)


WINDOW = 256 << 10  # of an output pump, in bytes


class PortPump(PumpServer):
    """Writes what a guest puts into a port's queue.

    Args:
        memory: the guest's.
        output: of the port, which has what is left over whenever the pump does not run.
        lossy: drop what finds no room.

    Raises:
        PumpError: the host has no more descriptors.
    """

    pump: OutputPump

    def __init__(self, memory: GuestMemory, output: StreamOutput, *, lossy: bool) -> None:
        from virtio_queue import OutputPump

        super().__init__(memory, OutputPump(output.fd, lossy=lossy))
        self._output = output

    def _start(self, features: int, queues: Sequence[Queue]) -> None:
        self.pump.fill_window(self._output.take(WINDOW))
        self.pump.start(self._memory, queues)

    def stop(self) -> None:
        """Touch the queue no more; what is taken and not written is the port's."""
        self.pump.stop()
        if left := self.pump.take_window():
            self._output.send(left)


FIRST_HOST_PORT = 1 << 30  # of connections that the host makes


class SocketPump(PumpServer):
    """Moves packets between the queues of a socket device and sockets of the host.

    Args:
        memory: the guest's.
        cid: the guest's context identifier.
        sockets: the host's, to whom the guest's connections go.

    Attributes:
        sockets: as given.

    Raises:
        PumpError: the host has no more descriptors.
    """

    pump: VsockPump

    def __init__(self, memory: GuestMemory, cid: int, sockets: UnixSockets) -> None:
        from virtio_queue import VsockPump

        super().__init__(memory, VsockPump(cid))
        self.sockets = sockets
        self._next_port = FIRST_HOST_PORT

    def _start(self, features: int, queues: Sequence[Queue]) -> None:
        self.pump.start(self._memory, queues)

    def forget(self) -> None:
        """Break off all connections."""
        self.pump.forget()

    def attend(self) -> None:
        """Find the host's ends of connections that the guest asks for.

        Raises:
            ChainError: the driver broke a ring; the pump has stopped.
        """
        super().attend()
        for guest_port, host_port in self.pump.asked():
            stream = self.sockets.connect(host_port)
            if stream is None:
                self.pump.refuse(guest_port, host_port)
            else:
                self.pump.accept(guest_port, host_port, stream.detach())

    def open(self, client: socket, port: int) -> bool:
        """Connect a client of the host to a port of the guest, by Firecracker's convention.

        False if too many are to be connected already; else the socket is the pump's.
        """
        host_port = self._next_port
        self._next_port = (host_port + 1) & 0xFFFFFFFF | FIRST_HOST_PORT
        greeting = b"OK %d\n" % host_port
        taken = self.pump.connect(port, host_port, client.fileno(), greeting)
        if taken:
            client.detach()
        return taken

    def metrics(self) -> dict[str, int]:
        """Connections that there are, and what the pump counts."""
        refused = {"refused_clients": self.sockets.refused}
        return {"connections": self.pump.connections, **super().metrics(), **refused}
