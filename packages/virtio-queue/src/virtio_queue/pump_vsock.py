"""The pump of socket devices (5.10): streams between two queues and sockets of the host.

Example:
    >>> import os, select, socket, struct
    >>> from vm_memory import GuestAddress, GuestMemory
    >>> from virtio_queue import Queue, VsockPump
    >>> from virtio_queue.testing import Arena, SplitDriver
    >>> memory = GuestMemory.from_ranges([(GuestAddress(0), 1 << 20)])
    >>> queues = Queue(16), Queue(16)
    >>> arena = Arena(0x1000, 0xF_0000)
    >>> receiver, sender = (SplitDriver(memory, 16, arena=arena) for _ in queues)
    >>> receiver.configure(queues[0]); sender.configure(queues[1])
    >>> kicks = [os.eventfd(0) for _ in queues]
    >>> interrupt = os.eventfd(0)
    >>> pump = VsockPump(3)
    >>> pump.wire(kicks, [interrupt] * 2)
    >>> pump.start(memory, queues)
    >>> def tell(op, data=b""):
    ...     header = struct.pack("<QQIIIHHIII", 3, 2, 1000, 80, len(data), 1, op, 0, 4096, 0)
    ...     _ = sender.add([header, data], [])
    ...     os.eventfd_write(kicks[1], 1)
    >>> tell(1)  # VIRTIO_VSOCK_OP_REQUEST
    >>> _ = select.select([pump.attention], [], [])
    >>> pump.take()
    []
    >>> pump.asked()
    [(1000, 80)]
    >>> ours, theirs = socket.socketpair()
    >>> pump.accept(1000, 80, ours.detach())
    >>> tell(5, b"GET /")  # VIRTIO_VSOCK_OP_RW
    >>> theirs.recv(100)
    b'GET /'
    >>> pump.stop()
    >>> pump.forget(); theirs.close(); memory.close()
    >>> for fd in (*kicks, interrupt):
    ...     os.close(fd)
"""

from __future__ import annotations

import os

from virtio_queue._native import ffi, lib
from virtio_queue.errors import PumpError, QueueStateError, UsageError
from virtio_queue.pump import Pump

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from virtio_queue.queue import Queue
    from vm_memory import GuestMemory

__all__ = ["VsockPump"]

_LONGEST_GREETING = 32


class VsockPump(Pump):
    """Serves the receive queue and the transmit queue of one socket device; streams only.

    Python finds the host's ends of connections; all else is done by the thread: packets both ways,
    credit, halves that are closed, resets. The guest may send 384 KiB that the host does not take:
    give sockets a send buffer of as much, or the thread keeps it. What the guest has no room for
    stays in the host's socket. Connections outlast a stop. There are 1023 at most.

    What breaks a rule is counted by name. Packets: `dropped_header` (too short), `dropped_length`
    (more than was there), `dropped_cid` (not from the guest or not for the host), `dropped_unknown`
    (of no connection, which is reset, but for a SHUTDOWN: it may come late). Connections:
    `refused_full`, `refused_nobody` (by `refuse`), `refused_guest` (by its answer), `reset_credit`
    (the guest sent more than it might), `reset_host` (its end broke), `reset_protocol` (a packet
    that does not fit). Buffers that have no room for a packet: `short_buffers`.

    Args:
        cid: the guest's context identifier, 3 to 2**32 - 2.

    Raises:
        PumpError: the host has no more descriptors.
        UsageError: `cid` is out of range.
    """

    _counted = (
        "received_bytes", "sent_bytes", "short_buffers", "dropped_header", "dropped_length",
        "dropped_cid", "dropped_unknown", "refused_nobody", "refused_full", "refused_guest",
        "reset_credit", "reset_host", "reset_protocol",
    )  # fmt: skip

    def __init__(self, cid: int) -> None:
        if not 3 <= cid < 0xFFFFFFFF:
            raise UsageError("cid", f"{cid} is not from 3 to 4294967294")
        super().__init__("sockets", uring=False)
        if error := lib.vp_vsock_new(self.handle, cid):
            raise PumpError("sockets", error, "raise the limit of open files")

    def start(self, memory: GuestMemory, queues: Sequence[Queue]) -> None:
        """Lend the queues, chains in flight included, and serve them.

        Args:
            memory: the guest's memory.
            queues: the receive queue and the transmit queue, ready.

        Raises:
            QueueStateError: the pump runs, a queue is not ready, or another pump has it.
            UsageError: there are not two queues, `wire` did not tell of as many, or chains in
                flight are not in `memory`.
            PumpError: the host can't start a thread.
        """
        self._start_pair(memory, queues)

    @property
    def connections(self) -> int:
        """How many there are, those included that are asked for; at any time."""
        return lib.vp_vsock_count(self.handle)

    def asked(self) -> list[tuple[int, int]]:
        """Connections that the guest asks for: the guest's port and the host's of each.

        `attention` is readable when there are some; after `take`, which clears it. Each is to be
        answered by `accept` or `refuse`; the guest is not heard while 256 wait to be returned here.
        """
        ports = ffi.new("uint32_t[2]")
        found = []
        while lib.vp_vsock_asked(self.handle, ports, ports + 1):
            found.append((ports[0], ports[1]))
        return found

    def accept(self, guest_port: int, host_port: int, fd: int) -> None:
        """Connect the guest, if it still asks for that, to the other end of a stream socket.

        The descriptor is the pump's from now on.
        """
        self._order(guest_port, host_port, fd, calls=False)

    def refuse(self, guest_port: int, host_port: int) -> None:
        """Reset what the guest asks for."""
        self._order(guest_port, host_port, -1, calls=False)

    def connect(self, guest_port: int, host_port: int, fd: int, greeting: bytes = b"") -> bool:
        """Ask the guest for a connection, to the other end of a stream socket.

        The descriptor is the pump's from now on; it closes it when the guest refuses, when there is
        a connection of these ports already, and when there are too many.

        Args:
            guest_port: where somebody listens in the guest.
            host_port: what the guest sees as the other's.
            fd: the socket.
            greeting: what the other end is sent when the guest agrees, up to 32 bytes.

        Returns:
            False if 512 are to be asked for already; the descriptor is the caller's still.

        Raises:
            UsageError: `greeting` is too long.
        """
        if len(greeting) > _LONGEST_GREETING:
            raise UsageError("greeting", f"has {len(greeting)} bytes; {_LONGEST_GREETING} are most")
        return self._order(guest_port, host_port, fd, calls=True, greeting=greeting)

    def _order(
        self, guest_port: int, host_port: int, fd: int, *, calls: bool, greeting: bytes = b""
    ) -> bool:
        args = (guest_port, host_port, fd, calls, greeting, len(greeting))
        taken = not lib.vp_vsock_order(self.handle, *args)
        if not taken and not calls and fd >= 0:
            os.close(fd)
        return taken

    def forget(self) -> None:
        """Break off all connections, as for a reset; the guest is not told.

        Raises:
            QueueStateError: the pump runs.
        """
        if self.running:
            raise QueueStateError("forget", "the pump runs; stop it first")
        lib.vp_vsock_forget(self.handle)

    def _open(self) -> None:
        if lib.vp_vsock_open(self.handle):
            raise MemoryError("buffers of a socket pump")
