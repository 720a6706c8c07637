"""A virtio console device: section 5.3 of the virtio specification, version 1.3.

It has one or several ports. A console port is a terminal of the guest's kernel; any other is a
pair of byte streams with a name. What the guest sends goes out at the pace of the host: a port's
driver waits for its buffers; a console's, which would spin for them, gets them back at once, and
what the host has no room for is lost and counted.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, NamedTuple

from virtio_queue.constants import DEFAULT_QUEUE_FEATURES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from virtio_queue import DescriptorChain, Queue, Reader
    from vm_memory import GuestMemory
    from vmm_reference.devices.states import ConsoleState

__all__ = ["MAX_PORTS", "WINDOW", "Console", "PortSpec", "transmit_queue"]

# Feature masks, 5.3.3
F_SIZE, F_MULTIPORT, F_EMERG_WRITE = 1 << 0, 1 << 1, 1 << 2

# struct virtio_console_config, 5.3.4: cols, rows, max_nr_ports, emerg_wr.
CONFIG = Struct("<HHII")
_EMERG_WR = 8

# struct virtio_console_control, 5.3.6.2: id, event, value.
CONTROL = Struct("<IHH")
(
    DEVICE_READY, DEVICE_ADD, DEVICE_REMOVE, PORT_READY, CONSOLE_PORT, RESIZE, PORT_OPEN, PORT_NAME,
) = range(8)  # fmt: skip
# Linux reads the rows first, whatever the specification has; so do all devices it works with.
_SIZE = Struct("<HH")

CONTROL_RX, CONTROL_TX = 2, 3
QUEUE_SIZE = 128
MAX_PORTS = 31

WINDOW = 256 << 10
"""How many bytes of a port's output may be under way to the host."""

_PIECE = 64 << 10  # bytes that are read at once
BUDGET = 1 << 20  # bytes that a call of `process` moves


class PortSpec(NamedTuple):
    """What a port is: a console, or a port with a name."""

    console: bool
    name: str = ""


class _Port:
    """A port as it is now."""

    def __init__(self, spec: PortSpec) -> None:
        self.spec = spec
        self.host_open = True
        self.outstanding = 0  # bytes that were sent and are not gone
        self.forget()

    def forget(self) -> None:
        """The driver is reset."""
        self.ready = False
        self.guest_open = False
        # What is under way of a buffer that did not fit the window.
        self.chain: DescriptorChain | None = None
        self.reader: Reader | None = None
        self.offset = 0


class Console:
    """Terminals and ports for the guest.

    Args:
        ports: what there is; the first is the one that a driver without MULTIPORT has.
        send: takes a port's number and bytes from the guest; `transmitted` follows when they are
            gone, not from within.
        room: told a port's number when `receive` may take more again.
        kick: called with a queue's number when `process` should be called for it.

    Attributes:
        sent: bytes from the guest.
        received: bytes to it.
        dropped: bytes of consoles that the host had no room for.
        refused: control messages that made no sense.
        unfinished: whether `process` left something for another call.
    """

    device_id = 3
    device_features = DEFAULT_QUEUE_FEATURES | F_SIZE | F_MULTIPORT | F_EMERG_WRITE

    def __init__(
        self,
        ports: Sequence[PortSpec],
        send: Callable[[int, bytes], None],
        *,
        room: Callable[[int], None] = lambda _: None,
        kick: Callable[[int], None] = lambda _: None,
    ) -> None:
        if not 1 <= len(ports) <= MAX_PORTS:
            raise ValueError(f"ports: {len(ports)}: must be from 1 to {MAX_PORTS}")
        self.ports = tuple(ports)
        self.queue_sizes = (QUEUE_SIZE,) * (2 * len(ports) + 2)
        self.sent = self.received = self.dropped = self.refused = 0
        self.unfinished = False
        self.columns = self.rows = 0
        self._send = send
        self._room = room
        self._kick = kick
        self._ports = [_Port(spec) for spec in ports]
        # Messages that wait for the guest, one for each port and event: the last one counts.
        self._messages: dict[tuple[int, int], bytes] = {}
        self._features = 0
        self._memory: GuestMemory | None = None
        self._queues: Sequence[Queue] = ()

    def metrics(self) -> dict[str, int]:
        """Bytes both ways, and what was lost or refused."""
        return {
            "sent_bytes": self.sent,
            "received_bytes": self.received,
            "dropped_bytes": self.dropped,
            "refused_messages": self.refused,
        }

    def read_config(self, offset: int, length: int) -> bytes:
        """The configuration space, 5.3.4."""
        config = CONFIG.pack(self.columns, self.rows, len(self._ports), 0)
        return config[offset : offset + length]

    def write_config(self, offset: int, data: bytes) -> None:
        """One character in an emergency (5.3.5): no queue has to work for it."""
        if offset == _EMERG_WR and data:
            self._output(self._ports[0], 0, data[:1])

    def activate(self, memory: GuestMemory, driver_features: int, queues: Sequence[Queue]) -> None:
        """The driver is ready."""
        self._memory, self._features, self._queues = memory, driver_features, queues
        for number, queue in enumerate(queues):
            if queue.ready and queue.in_flight:
                self.take_up(number, queue, memory)

    def take_up(self, number: int, queue: Queue, memory: GuestMemory) -> None:
        """Go on with what was under way in a device that was saved, where it was."""
        index = _port_of(number)
        chain, *others = queue.in_flight
        if number & 1 and index is not None:
            port = self._ports[index]
            port.chain, port.reader = chain, chain.reader(memory)
            port.reader.advance(min(port.offset, port.reader.available))
        else:
            others = list(queue.in_flight)
        queue.add_used_batch(memory, [(other.head, 0) for other in others])

    def reset(self) -> None:
        """Forget the driver; what was sent already is on its way."""
        self._memory, self._queues, self._features = None, (), 0
        self._messages.clear()
        for port in self._ports:
            port.forget()

    def process(self, queue_index: int) -> None:
        """Take what the guest sends, or tell it what waits for it.

        Raises:
            ChainError: the driver broke a ring.
        """
        self.unfinished = False
        memory = self._memory
        if memory is None or not self._queues[queue_index].ready:
            return
        queue = self._queues[queue_index]
        if queue_index == CONTROL_RX:
            self._tell(queue, memory)
        elif queue_index == CONTROL_TX:
            for chain in queue.chains(memory):
                reader = chain.reader(memory)
                if reader.available < CONTROL.size or not self._control(
                    *reader.read_struct(CONTROL)
                ):
                    self.refused += 1
                queue.add_used(memory, chain.head, 0)
            self.unfinished = queue.enable_notifications(memory)
        elif (index := _port_of(queue_index)) is not None and index < len(self._ports):
            if queue_index & 1:
                self._transmit(index, queue, memory)
            else:
                queue.disable_notifications(memory)
                self._room(index)

    # From the guest ---------------------------------------------------------------------

    def _transmit(self, index: int, queue: Queue, memory: GuestMemory) -> None:
        port = self._ports[index]
        queue.disable_notifications(memory)
        left = BUDGET
        while left > 0:
            if port.reader is None:
                port.chain = queue.pop(memory)
                if port.chain is None:
                    self.unfinished = queue.enable_notifications(memory)
                    return
                port.reader, port.offset = port.chain.reader(memory), 0
            reader = port.reader
            while reader.available and left > 0:
                room = WINDOW - port.outstanding
                if room <= 0:
                    if not port.spec.console:
                        return  # `transmitted` goes on
                    self.dropped += reader.available
                    reader.advance(reader.available)
                    break
                data = reader.read(min(room, _PIECE, left))
                left -= len(data)
                port.offset += len(data)
                self._output(port, index, data)
            if not reader.available and port.chain is not None:
                queue.add_used(memory, port.chain.head, 0)
                port.chain = port.reader = None
                left -= 64  # what an empty buffer costs
        self.unfinished = True

    def _output(self, port: _Port, index: int, data: bytes) -> None:
        if port.outstanding >= WINDOW or not port.host_open:
            self.dropped += len(data)
            return
        port.outstanding += len(data)
        self.sent += len(data)
        self._send(index, data)

    def transmitted(self, index: int, count: int) -> None:
        """So many bytes of a port's output are gone. Not from within `send`."""
        port = self._ports[index]
        port.outstanding -= count
        if port.reader is not None:
            self._kick(transmit_queue(index))

    # To the guest -----------------------------------------------------------------------

    def receive(self, index: int, data: bytes) -> int:
        """Give the guest input; returns how much it took. Under the device's lock.

        The caller announces used buffers. What was not taken is offered again after `room`.

        Raises:
            ChainError: the driver broke the ring.
        """
        port = self._ports[index]
        memory = self._memory
        if memory is None or not self._hears(port):
            return 0
        queue = self._queues[_receive_queue(index)]
        if not queue.ready:
            return 0
        taken = 0
        while taken < len(data):
            chain = queue.pop(memory)
            if chain is None:
                if not queue.enable_notifications(memory):
                    break
                continue
            writer = chain.writer(memory)
            taken += writer.write(data[taken:])
            queue.add_used(memory, chain.head, writer.used_length)
        self.received += taken
        return taken

    def _hears(self, port: _Port) -> bool:
        if not self._features & F_MULTIPORT:
            return port is self._ports[0]
        return port.ready and (port.spec.console or port.guest_open)

    # Control ----------------------------------------------------------------------------

    def resize(self, columns: int, rows: int) -> None:
        """The first console's terminal has another size; inside `VirtioDevice.config_change`."""
        self.columns, self.rows = columns & 0xFFFF, rows & 0xFFFF
        if self._ports[0].ready and self._ports[0].spec.console:
            self._message(0, RESIZE, 0, _SIZE.pack(self.rows, self.columns))

    def set_open(self, index: int, is_open: bool) -> None:
        """Whether there is somebody at the host's end of a port. Under the device's lock."""
        port = self._ports[index]
        if port.host_open != is_open:
            port.host_open = is_open
            if port.ready:
                self._message(index, PORT_OPEN, is_open)

    def _control(self, index: int, event: int, value: int) -> bool:
        """Take one message; whether it made sense."""
        if event == DEVICE_READY:
            if value:
                for number in range(len(self._ports)):
                    self._message(number, DEVICE_ADD, 1)
            return True
        if index >= len(self._ports) or event not in (PORT_READY, PORT_OPEN):
            return False
        port = self._ports[index]
        if event == PORT_OPEN:
            port.guest_open = bool(value)
            if value:
                self._room(index)
        elif value:
            port.ready = True
            self._introduce(index, port)
            self._room(index)
        else:  # the driver could not make one
            port.ready = False
        return True

    def _introduce(self, index: int, port: _Port) -> None:
        if port.spec.console:
            self._message(index, CONSOLE_PORT, 1)
            if index == 0 and (self.columns or self.rows):
                self._message(0, RESIZE, 0, _SIZE.pack(self.rows, self.columns))
        if port.spec.name:
            self._message(index, PORT_NAME, 1, port.spec.name.encode() + b"\0")
        if port.host_open:
            self._message(index, PORT_OPEN, 1)

    def _message(self, index: int, event: int, value: int, data: bytes = b"") -> None:
        self._messages.pop((index, event), None)
        self._messages[index, event] = CONTROL.pack(index, event, value) + data
        self._kick(CONTROL_RX)

    def _tell(self, queue: Queue, memory: GuestMemory) -> None:
        queue.disable_notifications(memory)
        while self._messages:
            chain = queue.pop(memory)
            if chain is None:
                self.unfinished = queue.enable_notifications(memory)
                return
            key = next(iter(self._messages))
            writer = chain.writer(memory)
            if writer.available >= CONTROL.size:
                writer.write(self._messages.pop(key))
            queue.add_used(memory, chain.head, writer.used_length)

    # State ------------------------------------------------------------------------------

    def save(self) -> ConsoleState:
        """What the driver knows of its ports, and what waits for it."""
        from vmm_reference.devices.states import ConsoleState

        return ConsoleState(
            ports=len(self._ports),
            ready=tuple(port.ready for port in self._ports),
            guest_open=tuple(port.guest_open for port in self._ports),
            offsets=tuple(self.offset_of(index) for index in range(len(self._ports))),
            columns=self.columns,
            rows=self.rows,
            messages=tuple(self._messages.values()),
        )

    def offset_of(self, index: int) -> int:
        """How many bytes of a port's buffer under way are taken."""
        port = self._ports[index]
        return port.offset if port.reader else 0

    def restore(self, state: ConsoleState) -> None:
        """Take up what was saved of a device with as many ports.

        Raises:
            StateError: it had another number of ports.
        """
        from vmm_reference.devices.states import StateError

        if state.ports != len(self._ports):
            rule = f"must be {len(self._ports)}"
            raise StateError("ConsoleState.ports", state.ports, rule)
        self.columns, self.rows = state.columns, state.rows
        for port, ready, guest_open, offset in zip(
            self._ports, state.ready, state.guest_open, state.offsets, strict=True
        ):
            port.ready, port.guest_open, port.offset = ready, guest_open, offset
        self._messages.clear()
        for message in state.messages:
            index, event, _ = CONTROL.unpack_from(message)
            self._messages[index, event] = message
        for index, port in enumerate(self._ports):
            if port.ready and not port.host_open:  # who was there before, is not
                self._message(index, PORT_OPEN, 0)


def _receive_queue(index: int) -> int:
    """5.3.2: the first port has the first two queues, the others come behind the control queues."""
    return 2 * index + 2 if index else 0


def transmit_queue(index: int) -> int:
    """The number of the queue of what a port sends (5.3.2)."""
    return _receive_queue(index) + 1


def _port_of(queue_index: int) -> int | None:
    if queue_index in (CONTROL_RX, CONTROL_TX):
        return None
    return queue_index // 2 - 1 if queue_index > CONTROL_TX else 0
