"""A virtio socket device: section 5.10 of the virtio specification, version 1.3; streams only.

The guest connects to ports of the host, the host to ports of the guest. Each connection has a
stream of the host behind it, which a backend gives. What the guest sends and the host does not take
is kept up to the credit that the guest was given; what the host sends and the guest has no room for
stays in the host's stream. A guest that asks for answers faster than it takes them is not heard
until it has.

Connections do not move with a saved machine: a restored guest is told that its transport was reset.

In a machine, packets are moved by a thread of C (`served`); this is its twin in Python, for streams
that are written in Python.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from virtio_queue.constants import DEFAULT_QUEUE_FEATURES

from . import packet as wire
from .connection import BUFFER, Connection
from .packet import EVENT, HEADER, HOST_CID, TYPE_STREAM, Packet

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from virtio_queue import DescriptorChain, Queue
    from vm_memory import GuestMemory
    from vmm_reference.devices.states import VsockState

    from .connection import Stream

__all__ = ["MAX_CONNECTIONS", "Vsock"]

RX, TX, EVENTS = 0, 1, 2
QUEUE_SIZE = 128

MAX_CONNECTIONS = 1023
MAX_REPLIES = 256  # answers that wait for the guest to take them
MAX_PAYLOAD = 64 << 10  # of a packet to the guest
FIRST_HOST_PORT = 1 << 30  # of connections that the host makes
BUDGET = 128  # packets that a call of `process` moves, each way


class Vsock:
    """A socket device for the guest.

    Args:
        cid: the guest's context identifier, 3 to 2**32 - 2.
        connect: is given a port that the guest wants to connect to; returns the host's end of a
            new stream, or None if nobody listens there.
        kick: called with a queue's number when `process` should be called for it.

    Attributes:
        connections: those there are, by port of the guest and port of the host.
        dropped: packets that were ignored, by reason: `header` (too short), `length` (more than
            was there), `cid` (not from the guest or not for the host).
        refused: connections that were, by reason: `nobody` (listens), `full` (too many),
            `guest` (its answer).
        resets: connections that were broken off, by reason: `credit` (the guest sent more than it
            might), `host` (its end broke), `protocol` (a packet that does not fit).
        short_buffers: buffers that had no room for a packet.
        unfinished: whether `process` left something for another call.
    """

    device_id = 19
    device_features = DEFAULT_QUEUE_FEATURES
    queue_sizes = (QUEUE_SIZE, QUEUE_SIZE, 8)

    def __init__(
        self,
        cid: int,
        connect: Callable[[int], Stream | None],
        kick: Callable[[int], None] = lambda _: None,
    ) -> None:
        if not 3 <= cid < 0xFFFFFFFF:
            raise ValueError(f"cid: {cid}: must be from 3 to 4294967294")
        self.cid = cid
        self.connections: dict[tuple[int, int], Connection] = {}
        self.dropped: dict[str, int] = {}
        self.refused: dict[str, int] = {}
        self.resets: dict[str, int] = {}
        self.short_buffers = 0
        self.unfinished = False
        self._connect = connect
        self._kick = kick
        self._replies: deque[Packet] = deque()
        # Connections whose host has something for the guest, or room for what it sent; in turns.
        self._ready: dict[Connection, None] = {}
        self._next_port = FIRST_HOST_PORT
        self._transport_reset = False
        self._memory: GuestMemory | None = None
        self._queues: Sequence[Queue] = ()

    def metrics(self) -> dict[str, int]:
        """Connections there are, and what was refused, broken off and ignored, by reason."""
        counters = {"dropped": self.dropped, "refused": self.refused, "reset": self.resets}
        named = {
            f"{what}_{reason}": n
            for what, counts in counters.items()
            for reason, n in counts.items()
        }
        return {"connections": len(self.connections), "short_buffers": self.short_buffers, **named}

    def read_config(self, offset: int, length: int) -> bytes:
        """The configuration space, 5.10.4: guest_cid."""
        return self.cid.to_bytes(8, "little")[offset : offset + length]

    def write_config(self, offset: int, data: bytes) -> None:
        """Nothing is writable."""

    def activate(self, memory: GuestMemory, driver_features: int, queues: Sequence[Queue]) -> None:
        """The driver is ready."""
        self._memory, self._queues = memory, queues
        for queue in queues:
            if queue.ready and queue.in_flight:  # of a restored device of another's making
                queue.add_used_batch(memory, [(chain.head, 0) for chain in queue.in_flight])

    def reset(self) -> None:
        """Forget the driver and break off all connections."""
        self._memory, self._queues = None, ()
        for connection in self.connections.values():
            connection.stream.close()
        self.connections.clear()
        self._ready.clear()
        self._replies.clear()
        self._transport_reset = False

    def process(self, queue_index: int) -> None:
        """Move packets; also when a stream has become ready.

        Raises:
            ChainError: the driver broke a ring.
        """
        self.unfinished = False
        memory = self._memory
        if memory is None or not all(queue.ready for queue in self._queues):
            return
        if queue_index == EVENTS:
            self._send_events(self._queues[EVENTS], memory)
            return
        if queue_index == TX:
            self._transmit(self._queues[TX], memory)
        had_to_wait = len(self._replies) >= MAX_REPLIES
        self._receive(self._queues[RX], memory)
        if had_to_wait and len(self._replies) < MAX_REPLIES:
            self._kick(TX)

    def open(self, stream: Stream, port: int) -> bool:
        """Connect a stream of the host to a port of the guest; under the device's lock.

        Its `established` is called when the guest agrees, `close` when it does not. False if it
        can't be tried: the guest has no driver, or there are too many connections.
        """
        if self._memory is None or len(self.connections) >= MAX_CONNECTIONS:
            self._count(self.refused, "full" if self._memory is not None else "guest")
            return False
        while (port, self._next_port) in self.connections:
            self._next_port += 1
        connection = Connection(port, self._next_port, stream, is_open=False)
        self._next_port = (self._next_port + 1) & wire.MASK32 | FIRST_HOST_PORT
        self._add(connection)
        self._reply(connection, wire.REQUEST)
        self._kick(RX)
        return True

    def _add(self, connection: Connection) -> None:
        self.connections[connection.guest_port, connection.host_port] = connection

        def ready() -> None:
            if self.connections.get((connection.guest_port, connection.host_port)) is connection:
                self._ready[connection] = None
                self._kick(RX)

        connection.stream.readable = connection.stream.writable = ready

    # From the guest ---------------------------------------------------------------------

    def _transmit(self, queue: Queue, memory: GuestMemory) -> None:
        queue.disable_notifications(memory)
        for _ in range(BUDGET):
            if len(self._replies) >= MAX_REPLIES:
                return  # until the guest has taken some
            chain = queue.pop(memory)
            if chain is None:
                break
            self._take(chain, memory)
            queue.add_used(memory, chain.head, 0)
        self.unfinished = queue.enable_notifications(memory)

    def _take(self, chain: DescriptorChain, memory: GuestMemory) -> None:
        reader = chain.reader(memory)
        if reader.available < HEADER.size:
            self._count(self.dropped, "header")
            return
        packet = Packet(*reader.read_struct(HEADER))
        if packet.len > reader.available:
            self._count(self.dropped, "length")
            return
        if packet.src_cid != self.cid or packet.dst_cid != HOST_CID:
            self._count(self.dropped, "cid")
            return
        connection = self.connections.get((packet.src_port, packet.dst_port))
        if packet.kind != TYPE_STREAM:
            self._refuse(packet, connection)
        elif connection is None:
            self._begin(packet)
        else:
            if connection.note(packet):
                self._ready[connection] = None
            # More than a connection keeps is too much whatever was there before: not even read.
            data = b"" if packet.len > BUFFER else reader.read(packet.len)
            try:
                self._go_on(connection, packet, data)
            except OSError:
                self._break(connection, "host")

    def _begin(self, packet: Packet) -> None:
        if packet.op != wire.REQUEST:
            self._refuse(packet, None)
            return
        if len(self.connections) >= MAX_CONNECTIONS:
            self._count(self.refused, "full")
            self._refuse(packet, None)
            return
        stream = self._connect(packet.dst_port)
        if stream is None:
            self._count(self.refused, "nobody")
            self._refuse(packet, None)
            return
        connection = Connection(packet.src_port, packet.dst_port, stream, is_open=True)
        connection.note(packet)
        self._add(connection)
        self._reply(connection, wire.RESPONSE)
        self._ready[connection] = None

    def _go_on(self, connection: Connection, packet: Packet, data: bytes) -> None:
        op = packet.op
        if op == wire.RST:
            if not connection.open:
                self._count(self.refused, "guest")
            self._close(connection)
        elif op == wire.RESPONSE and not connection.open:
            connection.open = True
            connection.stream.established(connection.host_port)
            self._ready[connection] = None
        elif not connection.open:
            self._break(connection, "protocol")
        elif op == wire.RW:
            if packet.len != len(data) or not connection.guest_sends or not connection.accept(data):
                self._break(connection, "credit" if connection.guest_sends else "protocol")
            elif connection.untold:
                self._reply(connection, wire.CREDIT_UPDATE)
        elif op == wire.SHUTDOWN:
            connection.shut(packet.flags)
            connection.flush()
            if not connection.guest_sends and not connection.guest_receives:
                self._reply(connection, wire.RST)
                self._close(connection)
        elif op == wire.CREDIT_REQUEST:
            self._reply(connection, wire.CREDIT_UPDATE)
        elif op != wire.CREDIT_UPDATE:
            self._break(connection, "protocol")

    def _refuse(self, packet: Packet, connection: Connection | None) -> None:
        """Answer a packet that fits nothing; one that resets needs no answer."""
        if connection is not None:
            self._break(connection, "protocol", packet.kind)
        elif packet.op != wire.RST:
            self._replies.append(
                Packet(
                    HOST_CID, self.cid, packet.dst_port, packet.src_port, 0, packet.kind, wire.RST
                )
            )

    def _break(self, connection: Connection, reason: str, kind: int = TYPE_STREAM) -> None:
        """Reset a connection from this side."""
        self._count(self.resets, reason)
        self._reply(connection, wire.RST, kind=kind)
        connection.pending.clear()
        self._close(connection)

    def _close(self, connection: Connection) -> None:
        """The guest is through with a connection; what it has sent is still given to the host."""
        if connection.pending:
            connection.closing = True
            return
        del self.connections[connection.guest_port, connection.host_port]
        self._ready.pop(connection, None)
        connection.stream.close()

    # To the guest -----------------------------------------------------------------------

    def _reply(
        self, connection: Connection, op: int, flags: int = 0, kind: int = TYPE_STREAM
    ) -> None:
        self._replies.append(self._packet(connection, op, flags=flags)._replace(kind=kind))

    def _packet(self, connection: Connection, op: int, size: int = 0, flags: int = 0) -> Packet:
        return Packet(
            HOST_CID, self.cid, connection.host_port, connection.guest_port, size, TYPE_STREAM,
            op, flags, *connection.tell(),
        )  # fmt: skip

    def _receive(self, queue: Queue, memory: GuestMemory) -> None:
        """Send what waits for the guest, as far as it has buffers."""
        queue.disable_notifications(memory)
        for _ in range(BUDGET):
            if not self._replies and not self._ready:
                return
            chain = queue.pop(memory)
            if chain is None:
                if queue.enable_notifications(memory):
                    self._kick(RX)
                return
            if chain.writable_length <= HEADER.size:
                self.short_buffers += 1
                queue.add_used(memory, chain.head, 0)
                continue
            packet, data = self._next(min(chain.writable_length - HEADER.size, MAX_PAYLOAD))
            if packet is None:
                queue.undo_pop(chain)
                return
            writer = chain.writer(memory)
            writer.write(HEADER.pack(*packet))
            writer.write(data)
            queue.add_used(memory, chain.head, writer.used_length)
        self._kick(RX)

    def _next(self, room: int) -> tuple[Packet | None, bytes]:
        """The next packet and its data; connections take turns."""
        while True:
            if self._replies:
                return self._replies.popleft(), b""
            if not self._ready:
                return None, b""
            connection = next(iter(self._ready))
            del self._ready[connection]
            try:
                data = self._advance(connection, room)
            except OSError:
                self._break(connection, "host")
                continue
            if data:
                self._ready[connection] = None  # behind the others
                return self._packet(connection, wire.RW, len(data)), data

    def _advance(self, connection: Connection, room: int) -> bytes:
        """Move what can be moved; returns data for the guest, or nothing.

        Raises:
            OSError: the host's end broke.
        """
        connection.flush()
        if connection.closing:
            self._close(connection)
            return b""
        if not connection.open:
            if connection.stream.hung_up():
                self._break(connection, "host")
            return b""
        if connection.untold:
            self._reply(connection, wire.CREDIT_UPDATE)
        if connection.ended or not connection.guest_receives:
            # Nothing more goes to the guest, but the host may still go away altogether.
            if connection.ended and connection.stream.hung_up():
                self._end(connection, wire.SHUTDOWN_BOTH)
            return b""
        limit = min(room, connection.credit)
        if limit == 0:
            if connection.ask_for_credit():
                self._reply(connection, wire.CREDIT_REQUEST)
            return b""
        data = connection.stream.receive(limit)
        if data is None:
            return b""
        if not data:
            connection.ended = True
            gone = connection.stream.hung_up()
            self._end(connection, wire.SHUTDOWN_BOTH if gone else wire.SHUTDOWN_SEND)
        connection.sent(len(data))
        return data

    def _end(self, connection: Connection, flags: int) -> None:
        self._reply(connection, wire.SHUTDOWN, flags)
        if flags == wire.SHUTDOWN_BOTH:
            connection.pending.clear()
            self._close(connection)

    def _send_events(self, queue: Queue, memory: GuestMemory) -> None:
        while self._transport_reset:
            chain = queue.pop(memory)
            if chain is None:
                self.unfinished = queue.enable_notifications(memory)
                return
            writer = chain.writer(memory)
            if writer.available >= EVENT.size:
                writer.write(EVENT.pack(wire.TRANSPORT_RESET))
                self._transport_reset = False
            queue.add_used(memory, chain.head, writer.used_length)

    # State ------------------------------------------------------------------------------

    def save(self) -> VsockState:
        """The guest's address, and whether it has connections that will be gone."""
        from vmm_reference.devices.states import VsockState

        lost = self._transport_reset or self._memory is not None
        return VsockState(cid=self.cid, transport_reset=lost)

    def restore(self, state: VsockState) -> None:
        """Tell the guest that its connections are gone; it then reads its address anew.

        The address is not the state's: a copy of the machine has another.
        """
        self._transport_reset = state.transport_reset

    @staticmethod
    def _count(counters: dict[str, int], reason: str) -> None:
        counters[reason] = counters.get(reason, 0) + 1
