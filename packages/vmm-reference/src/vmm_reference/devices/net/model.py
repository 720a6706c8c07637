"""A virtio network device: section 5.1 of the virtio specification, version 1.3.

Frames go to a link and come from it. A link that carries `struct virtio_net_hdr` in front of each
frame (a tap) lets checksums and segmentation be somebody else's work; any other carries Ethernet
frames alone, and the guest is offered no such thing.

What the guest sends is read once: the header is copied, checked against what was negotiated, and
only the copy is used. A frame that breaks a rule is dropped, counted by name, and its buffer given
back. A frame that finds no buffers waits, one a queue; those behind it wait in the link.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, Protocol

from virtio_queue.constants import DEFAULT_QUEUE_FEATURES
from virtio_queue.errors import ActivationError

from . import control
from .control import Control
from .features import (
    BEFORE_COUNT,
    COUNT,
    ETHERNET_HEADER,
    F_CTRL_GUEST_OFFLOADS,
    F_CTRL_MAC_ADDR,
    F_CTRL_RX,
    F_CTRL_RX_EXTRA,
    F_CTRL_VLAN,
    F_CTRL_VQ,
    F_GUEST_ANNOUNCE,
    F_MAC,
    F_MQ,
    F_MRG_RXBUF,
    F_MTU,
    F_STATUS,
    GUEST_OFFLOADS,
    HEADER,
    HOST_OFFLOADS,
    NEEDS,
    fault_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from virtio_queue import DescriptorChain, Queue, Reader
    from vm_memory import GuestMemory
    from vmm_reference.devices.limiter import Limiter
    from vmm_reference.devices.states import NetState

__all__ = ["Link", "Net", "PlainLink"]

# struct virtio_net_config, 5.1.4: mac, status, max_virtqueue_pairs, mtu.
CONFIG = Struct("<6sHHH")
S_LINK_UP, S_ANNOUNCE = 1, 2

QUEUE_SIZE, CONTROL_QUEUE_SIZE = 256, 64
MIN_MTU, MAX_MTU = 68, 65535
MAX_PAIRS = 256

# How many frames a call of `process` moves before the other devices have their turn.
BUDGET = 256


class PlainLink(Protocol):
    """What a network device sets up of the host's end; see `vmm_reference.backends`.

    A link has one or several queues, one for each pair of the device's.

    Attributes:
        vnet_header: whether frames have a `struct virtio_net_hdr` of 12 bytes in front, both ways.
        offloads: which of the feature bits `HOST_OFFLOADS` and `GUEST_OFFLOADS` it carries out.
        queues: how many queues it has.
    """

    vnet_header: bool
    offloads: int
    queues: int

    def set_offloads(self, offloads: int) -> None:
        """Deliver frames in a form that a driver understands that accepted these `GUEST_` bits."""

    def set_queues(self, pairs: int) -> None:
        """Use that many queues, from the first."""


class Link(PlainLink, Protocol):
    """A link whose frames go through Python; it is non-blocking."""

    def send(self, queue: int, pieces: Sequence[bytes | memoryview]) -> bool:
        """Send one frame; False if there is no room, and `writable` is called when there is."""

    def receive(self, queue: int) -> bytes | bytearray | memoryview | None:
        """The next frame, good until the next call; None: `readable` is called when there is one.

        Raises:
            OSError: the link is broken.
        """


class Net:
    """A network interface for the guest.

    Args:
        link: the other end of the cable.
        mac: six bytes, of a unicast address.
        keeps_mac: whether `mac` is the address after a reset even in a machine whose state had
            another: a driver uses the one that it has read until it resets the device.
        mtu: what the guest is told, 68 to 65535, or None.
        pairs: queue pairs, 1 to the link's.
        kick: called with a queue's number when `process` should be called for it.
        rx_limiter: limits what the guest receives, or None.
        tx_limiter: limits what the guest sends, or None.

    Attributes:
        sent: frames that passed from the guest.
        received: frames that passed to it.
        sent_bytes: bytes from the guest, without headers of virtio.
        received_bytes: bytes to it, likewise.
        dropped: frames that did not, by reason: `no header`, `header` (malformed), `offload` (not
            negotiated), `short`, `long`, `no room` (no driver's buffers can hold it), `filtered`,
            `link` (broken).
        spoofed: frames sent with a source address that is not the device's; they pass.
        unfinished: whether `process` left something for another call.
        link_up: what the guest is told; change it inside `VirtioDevice.config_change`.
    """

    device_id = 1

    def __init__(
        self,
        link: Link,
        mac: bytes,
        *,
        keeps_mac: bool = False,
        mtu: int | None = None,
        pairs: int = 1,
        kick: Callable[[int], None] = lambda _: None,
        rx_limiter: Limiter | None = None,
        tx_limiter: Limiter | None = None,
    ) -> None:
        if len(mac) != 6 or mac[0] & 1 or not any(mac):
            raise ValueError(f"mac: {mac.hex(':')}: must be six bytes of a unicast address")
        if mtu is not None and not MIN_MTU <= mtu <= MAX_MTU:
            raise ValueError(f"mtu: {mtu}: must be from {MIN_MTU} to {MAX_MTU}")
        if not 1 <= pairs <= min(link.queues, MAX_PAIRS):
            raise ValueError(f"pairs: {pairs}: must be from 1 to {link.queues}, the link's queues")
        self.link_up = True
        self.sent = self.received = self.sent_bytes = self.received_bytes = self.spoofed = 0
        self.dropped: dict[str, int] = {}
        self.unfinished = False
        self.rx_limiter, self.tx_limiter = rx_limiter, tx_limiter
        self.pairs = pairs
        self.queue_sizes = (*(QUEUE_SIZE,) * (2 * pairs), CONTROL_QUEUE_SIZE)
        self.device_features = (
            DEFAULT_QUEUE_FEATURES | F_MAC | F_STATUS | F_MRG_RXBUF | F_CTRL_VQ | F_CTRL_RX
            | F_CTRL_VLAN | F_CTRL_RX_EXTRA | F_GUEST_ANNOUNCE | F_CTRL_MAC_ADDR
            | (F_MTU if mtu is not None else 0) | (F_MQ if pairs > 1 else 0)
            | (link.offloads & (HOST_OFFLOADS | GUEST_OFFLOADS) if link.vnet_header else 0)
        )  # fmt: skip
        if self.device_features & GUEST_OFFLOADS:
            self.device_features |= F_CTRL_GUEST_OFFLOADS
        self.control = Control(mac, keeps_permanent=keeps_mac)
        self._link = link
        self._mtu = mtu or 0
        self._kick = kick
        self._features = 0
        self._memory: GuestMemory | None = None
        self._queues: Sequence[Queue] = ()
        self._active_pairs = 1
        self._announce = False
        # A frame for which there are no buffers yet, a pair each; the link's own is gone by then.
        self._waiting: list[bytes | None] = [None] * pairs
        # Buffers that were taken for it, until there are enough.
        self._collected: list[list[DescriptorChain]] = [[] for _ in range(pairs)]

    @property
    def mac(self) -> bytes:
        """The address, as the driver set it last."""
        return self.control.mac

    def metrics(self) -> dict[str, int]:
        """Frames and bytes that passed, and what was lost, by reason."""
        lost = {f"dropped_{reason.replace(' ', '_')}": n for reason, n in self.dropped.items()}
        throttled = [each.throttled for each in (self.rx_limiter, self.tx_limiter) if each]
        return {
            "sent_frames": self.sent,
            "sent_bytes": self.sent_bytes,
            "received_frames": self.received,
            "received_bytes": self.received_bytes,
            "spoofed_frames": self.spoofed,
            "throttled": sum(throttled),
            **lost,
        }

    def read_config(self, offset: int, length: int) -> bytes:
        """The configuration space, 5.1.4."""
        status = self.link_up * S_LINK_UP | self._announce * S_ANNOUNCE
        return CONFIG.pack(self.mac, status, self.pairs, self._mtu)[offset : offset + length]

    def write_config(self, offset: int, data: bytes) -> None:
        """A driver of version 1 sets its address by the control queue; nothing is writable."""

    def announce(self) -> None:
        """Ask the guest to tell its neighbours where it is; inside `VirtioDevice.config_change`.

        For after a migration. Without effect on a driver that can't.
        """
        self._announce = bool(self._features & F_GUEST_ANNOUNCE)

    def activate(self, memory: GuestMemory, driver_features: int, queues: Sequence[Queue]) -> None:
        """The driver is ready.

        Raises:
            ActivationError: the link can't be set up for what the driver accepted.
        """
        for feature, needed in NEEDS.items():
            if not driver_features & needed:
                driver_features &= ~feature
        self._features = driver_features
        try:
            self._link.set_offloads(self.control.offloads_of(driver_features & GUEST_OFFLOADS))
            self._link.set_queues(self._active_pairs)
        except OSError as error:
            self._features = 0
            raise ActivationError(f"the link refuses: {error.strerror}") from error
        self._memory, self._queues = memory, queues
        self.take_up(memory, queues)

    def take_up(self, memory: GuestMemory, queues: Sequence[Queue]) -> None:
        """Go on with chains that were in flight in a device that was saved."""
        for number, queue in enumerate(queues):
            if queue.ready and queue.in_flight:
                if number < 2 * self.pairs and not number & 1:
                    self._collected[number >> 1] = list(queue.in_flight)
                else:
                    queue.add_used_batch(memory, [(chain.head, 0) for chain in queue.in_flight])

    def reset(self) -> None:
        """Forget the driver and what it set, and a frame that waited for it."""
        self._memory, self._queues, self._features = None, (), 0
        self._waiting = [None] * self.pairs
        self._collected = [[] for _ in range(self.pairs)]
        self._active_pairs, self._announce = 1, False
        self.control.reset()

    def process(self, queue_index: int) -> None:
        """Move frames between a queue and the link; also when the link has become ready.

        Raises:
            ChainError: the driver broke the ring.
        """
        self.unfinished = False
        memory = self._memory
        if memory is None or not self._queues[queue_index].ready:
            return
        if queue_index == self._control_queue():
            self._serve_control(self._queues[queue_index], memory)
        elif queue_index >= 2 * self.pairs:
            return
        elif queue_index & 1:
            self._transmit(queue_index >> 1, self._queues[queue_index], memory)
        elif queue_index >> 1 < self._active_pairs:
            self._receive(queue_index >> 1, self._queues[queue_index], memory)

    def readable(self, pair: int) -> None:
        """The link has a frame again."""
        self._kick(2 * pair)

    def writable(self, pair: int) -> None:
        """The link has room again."""
        self._kick(2 * pair + 1)

    # From the guest ---------------------------------------------------------------------

    def _transmit(self, pair: int, queue: Queue, memory: GuestMemory) -> None:
        queue.disable_notifications(memory)
        for _ in range(BUDGET):
            chain = queue.pop(memory)
            if chain is None:
                break
            if not self._send(pair, chain, memory):
                queue.undo_pop(chain)
                return  # `writable` or the limiter calls
            queue.add_used(memory, chain.head, 0)
        self.unfinished = queue.enable_notifications(memory)

    def _send(self, pair: int, chain: DescriptorChain, memory: GuestMemory) -> bool:
        """Send or drop one frame; False if it has to wait."""
        size = chain.readable_length - HEADER.size
        reader = chain.reader(memory)
        header = reader.read(HEADER.size)
        fault = fault_of(header, size, self._features) if size >= 0 else "no header"
        if fault:
            self._drop(fault)
            return True
        start = reader.read(ETHERNET_HEADER)
        if start[6:12] != self.mac:
            self.spoofed += 1
        pieces: list[bytes | memoryview] = [start, *reader.slices()]
        if self._link.vnet_header:
            pieces.insert(0, header)
        if self._refused(self.tx_limiter, size, 2 * pair + 1):
            return False
        try:
            sent = self._link.send(pair, pieces)
        except OSError:
            self._drop("link")
            return True
        # What is sent again for lack of room is counted by the limiter again: links have room.
        if sent:
            self.sent += 1
            self.sent_bytes += size
        return sent

    def _refused(self, limiter: Limiter | None, size: int, queue_index: int) -> bool:
        def resume() -> None:
            for pair in range(self._active_pairs):  # all of them share the limit
                self._kick(2 * pair + (queue_index & 1))

        return limiter is not None and not limiter.admit(size, resume)

    # To the guest -----------------------------------------------------------------------

    def _receive(self, pair: int, queue: Queue, memory: GuestMemory) -> None:
        queue.disable_notifications(memory)
        for _ in range(BUDGET):
            frame = self._next_frame(pair)
            if frame is None:
                return  # `readable` calls; the driver's buffers can wait
            collected = self._collect(pair, queue, memory, len(frame))
            if collected is None:
                self._waiting[pair] = bytes(frame)
                self.unfinished = queue.enable_notifications(memory)
                return
            if not collected:
                self._drop("no room")
                continue
            if self._refused(self.rx_limiter, len(frame) - HEADER.size, 2 * pair):
                self._waiting[pair] = bytes(frame)
                return
            self._collected[pair] = []
            self._deliver(queue, memory, frame, collected)
        self.unfinished = True

    def _next_frame(self, pair: int) -> bytes | bytearray | memoryview | None:
        """What is next, with a header in front; a frame that the driver does not want is passed."""
        if (frame := self._waiting[pair]) is not None:
            self._waiting[pair] = None
            return frame
        at = HEADER.size if self._link.vnet_header else 0
        for _ in range(BUDGET):
            try:
                got = self._link.receive(pair)
            except OSError:
                self._drop("link")
                return None
            if got is None:
                return None
            if len(got) < at + ETHERNET_HEADER:
                self._drop("short")
            elif self._features & F_CTRL_RX and not self.control.wants(got[at : at + 18]):
                self._drop("filtered")
            else:
                return got if at else bytes(HEADER.size) + got
        self._kick(2 * pair)
        return None

    def _collect(
        self, pair: int, queue: Queue, memory: GuestMemory, size: int
    ) -> list[DescriptorChain] | None:
        """Buffers for so many bytes; None if they are too few as yet, empty if they always will be.

        Those that were taken stay taken, so that the driver's next one notifies.
        """
        chains = self._collected[pair]
        room = sum(chain.writable_length for chain in chains)
        while room < size:
            chain = queue.pop(memory)
            if chain is None and sum(held.slots for held in chains) < queue.size:
                return None
            if chain is not None:
                chains.append(chain)
                room += chain.writable_length
            first = chains[0].writable_length
            if (
                chain is None
                or first < HEADER.size
                or not chain.writable_length
                or (room < size and not self._features & F_MRG_RXBUF)
            ):
                # 5.1.6.3.1: the driver makes buffers that are large enough. This one lost a frame.
                queue.add_used_batch(memory, [(held.head, 0) for held in chains])
                self._collected[pair] = []
                return []
        return chains

    def _deliver(
        self,
        queue: Queue,
        memory: GuestMemory,
        frame: bytes | bytearray | memoryview,
        chains: list[DescriptorChain],
    ) -> None:
        view = memoryview(frame)
        used = []
        at = 0
        for number, chain in enumerate(chains):
            writer = chain.writer(memory)
            if number == 0:
                writer.write(view[:BEFORE_COUNT])
                writer.write(COUNT.pack(len(chains)))
                at = HEADER.size
            at += writer.write(view[at : at + writer.available])
            used.append((chain.head, writer.bytes_written))
        queue.add_used_batch(memory, used)
        self.received += 1
        self.received_bytes += len(frame) - HEADER.size

    # Control ----------------------------------------------------------------------------

    def _control_queue(self) -> int:
        """5.1.2: behind all pairs if several were negotiated, else behind the first."""
        if not self._features & F_CTRL_VQ:
            return -1
        return 2 * self.pairs if self._features & F_MQ else 2

    def _serve_control(self, queue: Queue, memory: GuestMemory) -> None:
        for chain in queue.chains(memory):
            reader, writer = chain.reader(memory), chain.writer(memory)
            done = self._execute(reader)
            writer.write(control.OK if done else control.ERR)
            queue.add_used(memory, chain.head, writer.used_length)
        self.unfinished = queue.enable_notifications(memory)

    def _execute(self, reader: Reader) -> bool:
        command = self.control.parse(reader, self._features)
        if command is None:
            return False
        kind, value = command
        try:
            if kind == "pairs":
                if not 1 <= value <= self.pairs:
                    return False
                self._link.set_queues(value)
                self._active_pairs = value
                for pair in range(value):
                    self._kick(2 * pair)
            elif kind == "offloads":
                if value & ~(self._features & GUEST_OFFLOADS):
                    return False
                self._link.set_offloads(value)
                self.control.offloads = value
            elif kind == "announced":
                self._announce = False
        except OSError:
            return False
        return True

    # State ------------------------------------------------------------------------------

    def save(self) -> NetState:
        """What a driver set, and frames that wait for buffers."""
        from vmm_reference.devices.states import NetState

        wishes = self.control
        return NetState(
            mac=wishes.mac,
            permanent_mac=wishes.permanent,
            mode=wishes.mode,
            unicast=tuple(wishes.unicast),
            multicast=tuple(wishes.multicast),
            vlans=tuple(sorted(wishes.vlans)),
            offloads=wishes.offloads,
            pairs=self.pairs,
            active_pairs=self._active_pairs,
            announce=self._announce,
            waiting=tuple(frame or b"" for frame in self._waiting),
            features=self._features,
            rx_limiter=self.rx_limiter.save() if self.rx_limiter is not None else None,
            tx_limiter=self.tx_limiter.save() if self.tx_limiter is not None else None,
        )

    def restore(self, state: NetState) -> None:
        """Take up what was saved from a device with as many pairs.

        Raises:
            StateError: it had another number of queue pairs.
        """
        from vmm_reference.devices.states import StateError

        if state.pairs != self.pairs:
            raise StateError("NetState.pairs", state.pairs, f"must be {self.pairs}")
        self.control.restore(state)
        self._active_pairs, self._announce = state.active_pairs, state.announce
        self._waiting = [frame or None for frame in state.waiting]
        self._features = state.features
        for limiter, saved in (
            (self.rx_limiter, state.rx_limiter),
            (self.tx_limiter, state.tx_limiter),
        ):
            if limiter is not None and saved is not None:
                limiter.restore(saved)

    def _drop(self, reason: str) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
