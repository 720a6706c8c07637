"""The pump of network devices (5.1): frames between a pair of queues and a tap, or a socket.

Example:
    >>> import os, socket
    >>> from vm_memory import GuestAddress, GuestMemory
    >>> from virtio_queue import NetPump, Queue
    >>> from virtio_queue.testing import Arena, SplitDriver
    >>> memory = GuestMemory.from_ranges([(GuestAddress(0), 1 << 20)])
    >>> queues = Queue(16), Queue(16)
    >>> arena = Arena(0x1000, 0xF_0000)
    >>> receiver, sender = (SplitDriver(memory, 16, arena=arena) for _ in queues)
    >>> receiver.configure(queues[0]); sender.configure(queues[1])
    >>> ours, wire = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    >>> ours.setblocking(False)
    >>> kicks = [os.eventfd(0) for _ in queues]
    >>> interrupt = os.eventfd(0)
    >>> pump = NetPump(ours.fileno())
    >>> pump.wire(kicks, [interrupt] * 2)
    >>> pump.start(memory, queues, 0)
    >>> _ = sender.add([bytes(12) + b"a frame of 20 bytes."], [])
    >>> os.eventfd_write(kicks[1], 1)
    >>> wire.recv(100)[12:]
    b'a frame of 20 bytes.'
    >>> pump.stop()
    >>> ours.close(); wire.close(); memory.close()
    >>> for fd in (*kicks, interrupt):
    ...     os.close(fd)
"""

from __future__ import annotations

import os

from virtio_queue._native import ffi, lib
from virtio_queue.errors import UsageError
from virtio_queue.pump import Pump

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Literal

    from virtio_queue.pump_limit import Limiter
    from virtio_queue.queue import Queue
    from vm_memory import GuestMemory

__all__ = ["NetPump"]

_LINKS = ("tap", "datagrams", "stream")
_MOST_ADDRESSES = 64
_AF_UNIX = 1


class NetPump(Pump):
    """Serves a receive queue and a transmit queue of one network device.

    A frame that breaks a rule, that no buffers can hold, or that the host refuses is dropped and
    counted by name. A frame that finds too few buffers waits, also over a stop; those behind it
    wait in the descriptor.

    Args:
        fd: non-blocking. The caller keeps it open while the pump runs.
        link: `tap`: each frame has a `struct virtio_net_hdr` of 12 bytes in front, both ways, and
            one `read` or `writev` moves one frame. `datagrams`: a socket, one frame each, without
            that header; while nobody is at the other end, frames are lost and counted. `stream`: a
            connected socket, frames behind their lengths in four bytes, big-endian, as passt and
            QEMU's `-netdev stream` have them.
        peer: path of the Unix socket at the other end of datagrams, if it is not connected.

    Raises:
        PumpError: the host has no more descriptors.
        UsageError: `fd` blocks, there is no such link, or `peer` is too long.
        OSError: `fd` is not open.
    """

    _counted = (
        "throttled", "received_frames", "received_bytes", "sent_frames", "sent_bytes",
        "dropped_no_header", "dropped_header", "dropped_offload", "dropped_short", "dropped_long",
        "dropped_no_room", "dropped_link", "dropped_filtered", "dropped_away",
    )  # fmt: skip

    def __init__(
        self, fd: int, link: Literal["tap", "datagrams", "stream"] = "tap", peer: str = ""
    ) -> None:
        if os.get_blocking(fd):
            raise UsageError("fd", f"{fd} blocks: make it non-blocking")
        if link not in _LINKS:
            raise UsageError("link", f"{link!r} is none of {', '.join(_LINKS)}")
        address = os.fsencode(peer)
        if len(address) > 107:
            raise UsageError("peer", f"has {len(address)} bytes; 107 are the most")
        super().__init__("network", uring=False)
        self._fd, self._link = fd, _LINKS.index(link)
        if peer:
            raw = _AF_UNIX.to_bytes(2, "little") + address + b"\0"
            ffi.buffer(self.handle.net.peer)[: len(raw)] = raw
            self.handle.net.peer_length = len(raw)
        self._limiters: list[Limiter] = []  # all there were: the thread may be using one

    def start(self, memory: GuestMemory, queues: Sequence[Queue], driver_features: int) -> None:
        """Lend the queues, chains in flight included, and serve them.

        Args:
            memory: the guest's memory.
            queues: the receive queue and the transmit queue, ready.
            driver_features: what was negotiated: MRG_RXBUF, CSUM and `HOST_*` count.

        Raises:
            QueueStateError: the pump runs, a queue is not ready, or another pump has it.
            UsageError: there are not two queues, `wire` did not tell of as many, or chains in
                flight are not in `memory`.
            PumpError: the host can't start a thread.
        """
        self._features = driver_features
        self._start_pair(memory, queues)

    def limit(self, receive: Limiter | None, send: Limiter | None) -> None:
        """Have these limits from now on; several pumps may have the same. At any time."""
        for number, limiter in enumerate((receive, send)):
            if limiter is not None:
                self._limiters.append(limiter)
            self.handle.net.limiters[number] = ffi.NULL if limiter is None else limiter.handle
        self.nudge()

    def set_filter(
        self,
        mac: bytes,
        *,
        modes: int = 0,
        unicast: Sequence[bytes] = (),
        multicast: Sequence[bytes] = (),
        vlans: Iterable[int] = (),
    ) -> None:
        """Give the guest only frames that it wants, from now on (5.1.6.5.1 to 5.1.6.5.3).

        Args:
            mac: the device's address.
            modes: bit n for the command n of the class VIRTIO_NET_CTRL_RX: promiscuous first.
            unicast: further addresses of stations that pass, up to 64.
            multicast: addresses of groups that pass, up to 64.
            vlans: VLANs whose tagged frames pass, 0 to 4095.

        Raises:
            UsageError: a value is out of range; the filter stays as it was.
        """
        tables = {"mac": [mac], "unicast": list(unicast), "multicast": list(multicast)}
        for name, table in tables.items():
            if len(table) > _MOST_ADDRESSES:
                raise UsageError(name, f"{len(table)} addresses; {_MOST_ADDRESSES} are the most")
            if any(len(address) != 6 for address in table):
                raise UsageError(name, "an address has six bytes")
        filtered = ffi.new("struct vp_filter *", {"active": 1, "modes": modes, "mac": mac})
        for name in ("unicast", "multicast"):
            data = b"".join(tables[name])
            ffi.buffer(getattr(filtered, name))[: len(data)] = data
            setattr(filtered, f"{name}_count", len(tables[name]))
        bits = ffi.buffer(filtered.vlans)
        for vlan in vlans:
            if not 0 <= vlan < 4096:
                raise UsageError("vlans", f"{vlan} is not from 0 to 4095")
            bits[vlan >> 3] = bytes([bits[vlan >> 3][0] | 1 << (vlan & 7)])
        lib.vp_net_set_filter(self.handle, filtered)

    def clear_filter(self) -> None:
        """Give the guest all frames, as from the beginning."""
        lib.vp_net_set_filter(self.handle, ffi.new("struct vp_filter *"))

    def _open(self) -> None:
        if lib.vp_net_open(self.handle, self._fd, self._link, self._features):
            raise MemoryError("frames of a network pump")

    def forget(self) -> None:
        """Drop a frame that waits for buffers, as for a reset. The pump must not run."""
        if not self.running:
            self.handle.net.length = 0
