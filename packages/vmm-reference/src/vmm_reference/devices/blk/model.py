"""A virtio block device: section 5.2 of the virtio specification, version 1.3.

The device turns descriptor chains into operations of a backend, which is synchronous here: when
`process` returns, everything it took is used. Chains may be cut into descriptors at will; what
counts is the byte stream: a header that can be read, data, one status byte that can be written.

A request that breaks a rule gets VIRTIO_BLK_S_IOERR or VIRTIO_BLK_S_UNSUPP and touches nothing.
A chain that has no room for a status can't be answered: the driver is broken, and the device asks
for a reset. What one request and one call of `process` may cost is bounded, so that a guest can't
keep the I/O thread from its other devices.
"""

from __future__ import annotations

from struct import Struct

from virtio_queue.constants import DEFAULT_QUEUE_FEATURES
from virtio_queue.errors import ChainError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Protocol

    from virtio_queue import DescriptorChain, Queue, Reader, Writer
    from vm_memory import GuestMemory
    from vmm_reference.devices.limiter import Limiter, TokenBucket
    from vmm_reference.devices.states import BlockState
else:
    Protocol = object

__all__ = ["Backend", "Block"]

SECTOR = 512

# Feature masks, 5.2.3
F_SIZE_MAX, F_SEG_MAX, F_RO, F_BLK_SIZE = 1 << 1, 1 << 2, 1 << 5, 1 << 6
F_FLUSH, F_TOPOLOGY, F_CONFIG_WCE, F_MQ = 1 << 9, 1 << 10, 1 << 11, 1 << 12
F_DISCARD, F_WRITE_ZEROES = 1 << 13, 1 << 14

# Request types and status values, 5.2.6
T_IN, T_OUT, T_FLUSH, T_GET_ID, T_DISCARD, T_WRITE_ZEROES = 0, 1, 4, 8, 11, 13
KNOWN = frozenset((T_IN, T_OUT, T_FLUSH, T_GET_ID, T_DISCARD, T_WRITE_ZEROES))
S_OK, S_IOERR, S_UNSUPP = b"\0", b"\1", b"\2"

NAMES = {
    T_IN: "read", T_OUT: "write", T_FLUSH: "flush", T_GET_ID: "id",
    T_DISCARD: "discard", T_WRITE_ZEROES: "write_zeroes",
}  # fmt: skip

HEADER = Struct("<IIQ")
SEGMENT = Struct("<QII")
UNMAP = 1  # the only flag of a segment, for write zeroes

# struct virtio_blk_config, 5.2.4: capacity, size_max, seg_max, geometry, blk_size, topology,
# writeback, num_queues, discard and write zeroes limits, write_zeroes_may_unmap.
CONFIG = Struct("<QIIHBBIBBHIBxHIIIIIB3x")
WRITEBACK_OFFSET = 32

QUEUE_SIZE = 256
SEG_MAX = QUEUE_SIZE - 2
ID_LENGTH = 20

# What one request may ask for. Writing zeros is the host's fallback where it can't do better.
SIZE_MAX = 1 << 20  # bytes of a descriptor
MAX_DATA = SEG_MAX * SIZE_MAX
MAX_DISCARD_SECTORS, MAX_DISCARD_SEGMENTS = 1 << 22, 64
MAX_ZEROES_SECTORS, MAX_ZEROES_SEGMENTS = 1 << 17, 1

# How many bytes `process` moves before the other devices have their turn.
BUDGET = 64 << 20


class Backend(Protocol):
    """What a block device needs of an image; see `vmm_reference.backends.file.FileBackend`."""

    size: int
    read_only: bool

    def read(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill the buffers."""

    def write(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Write the buffers."""

    def flush(self) -> None:
        """Make what was written durable."""

    def discard(self, offset: int, length: int) -> None:
        """Give space back."""

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        """Make a range read as zeros."""


class Refused(Exception):
    """A request that is answered with `status` and does nothing."""

    def __init__(self, status: bytes) -> None:
        super().__init__(status)
        self.status = status


class Block:
    """A disk for the guest.

    Args:
        backend: the image, of whole sectors.
        serial: up to 20 bytes of ASCII that the guest reads as the disk's identity.
        queues: how many request queues the guest may use, 1 to 64.
        physical_exponent: the physical block is 512 bytes times 2 to the power of this.
        limiter: limits bytes and requests, or None.
        kick: called with a queue's number when `process` should be called for it.

    Attributes:
        limiter: as given.
        requests: how many requests were served, by type; those of unknown types under -1.
        failures: how many of them failed because the host did.
        refused: how many were refused because of what the driver asked for.
        unfinished: whether `process` left something for another call.
    """

    device_id = 2

    def __init__(
        self,
        backend: Backend,
        *,
        serial: str = "",
        queues: int = 1,
        physical_exponent: int = 3,
        limiter: Limiter | None = None,
        kick: Callable[[int], None] = lambda _: None,
    ) -> None:
        if len(serial) > ID_LENGTH or not serial.isascii():
            raise ValueError(f"serial: {serial!r}: must be at most {ID_LENGTH} ASCII characters")
        self.requests: dict[int, int] = {}
        self.failures = 0
        self.refused = 0
        self.unfinished = False
        self.limiter = limiter
        self._kick = kick
        self.device_features = (
            DEFAULT_QUEUE_FEATURES | F_SIZE_MAX | F_SEG_MAX | F_BLK_SIZE | F_FLUSH | F_TOPOLOGY
        ) | (F_RO if backend.read_only else F_CONFIG_WCE | F_DISCARD | F_WRITE_ZEROES)
        if queues > 1:
            self.device_features |= F_MQ
        self.queue_sizes = (QUEUE_SIZE,) * queues
        self._physical_exponent = physical_exponent
        self._backend = backend
        self._sectors = backend.size // SECTOR
        self._serial = serial.encode().ljust(ID_LENGTH, b"\0")
        self._writeback = True
        self._features = 0
        self._memory: GuestMemory | None = None
        self._queues: Sequence[Queue] = ()

    def metrics(self) -> dict[str, int]:
        """Requests by their type, and what went wrong."""
        served = {f"requests_{NAMES.get(kind, 'unknown')}": n for kind, n in self.requests.items()}
        return {**served, "host_failures": self.failures, "refused_requests": self.refused}

    @property
    def backend(self) -> Backend:
        """What the requests are carried out by."""
        return self._backend

    def exchange(self, backend: Backend) -> None:
        """Go on with another image, or the same with another size; the device is locked.

        The caller changes the configuration around it, so that the guest looks at the capacity.

        Raises:
            ValueError: one can be written and the other can't.
        """
        if backend.read_only != self._backend.read_only:
            raise ValueError("the other image must be read-only if, and only if, this one is")
        self._backend = backend
        self._sectors = backend.size // SECTOR

    def limit(self, buckets: Mapping[str, TokenBucket | None]) -> None:
        """Have other limits from now on: of `bandwidth`, `ops` or both; the device is locked."""
        if self.limiter is not None:
            for name, bucket in buckets.items():
                setattr(self.limiter, name, bucket)
            self.resume()

    def read_config(self, offset: int, length: int) -> bytes:
        """The configuration space, 5.2.4."""
        config = CONFIG.pack(
            self._sectors, SIZE_MAX, SEG_MAX, 0, 0, 0, SECTOR,
            self._physical_exponent, 0, 1 << self._physical_exponent, 0,
            self._writeback, len(self.queue_sizes),
            MAX_DISCARD_SECTORS, MAX_DISCARD_SEGMENTS, 8,
            MAX_ZEROES_SECTORS, MAX_ZEROES_SEGMENTS, 1,
        )  # fmt: skip
        return config[offset : offset + length]

    def write_config(self, offset: int, data: bytes) -> None:
        """Only the cache mode can be written: 0 makes every write durable before it is used."""
        if offset == WRITEBACK_OFFSET and data and self.device_features & F_CONFIG_WCE:
            self._writeback = bool(data[0])
            self._settle_cache_mode()

    def activate(self, memory: GuestMemory, driver_features: int, queues: Sequence[Queue]) -> None:
        """The driver is ready. One without FLUSH has each write made durable (5.2.5.2)."""
        self._memory = memory
        self._features = driver_features
        self._queues = queues
        self._settle_cache_mode()

    def reset(self) -> None:
        """Forget the driver; nothing is under way between two calls."""
        self._memory, self._queues = None, ()
        self._features = 0
        self._writeback = True

    def process(self, queue_index: int) -> None:
        """Serve what the driver made available, at most a ring's worth.

        Raises:
            ChainError: a chain that can't be answered.
        """
        memory = self._memory
        if memory is None or not 0 <= queue_index < len(self._queues):
            return
        queue = self._queues[queue_index]
        for chain in queue.in_flight:  # only where a state with unfinished requests was restored
            queue.add_used(memory, chain.head, self._serve(chain, memory))
        queue.disable_notifications(memory)
        left = BUDGET
        for chain in queue.chains(memory):
            size = chain.readable_length + chain.writable_length
            if self.limiter is not None and not self.limiter.admit(size, self.resume):
                queue.undo_pop(chain)
                self.unfinished = False
                return
            queue.add_used(memory, chain.head, self._serve(chain, memory))
            left -= size
            if left < 0:
                break
        self.unfinished = queue.enable_notifications(memory)

    def resume(self) -> None:
        """The limit lets something through again; all queues share it."""
        for number in range(len(self._queues)):
            self._kick(number)

    def save(self) -> BlockState:
        """What a driver set; the image is the backend's."""
        from vmm_reference.devices.states import BlockState

        return BlockState(writeback=self._writeback, sectors=self._sectors)

    def restore(self, state: BlockState) -> None:
        """Take up what was saved from a disk of the same size.

        Raises:
            StateError: the image has another size.
        """
        from vmm_reference.devices.states import StateError

        if state.sectors != self._sectors:
            raise StateError("BlockState.sectors", state.sectors, f"must be {self._sectors}")
        self._writeback = state.writeback

    def _settle_cache_mode(self) -> None:
        """Without FLUSH a driver can't make writes durable, so each one is (5.2.6.2).

        A driver that can't set the mode has the one that FLUSH implies.
        """
        if self._features and not self._features & F_FLUSH:
            self._writeback = False
        elif self._features and not self._features & F_CONFIG_WCE:
            self._writeback = True

    def _serve(self, chain: DescriptorChain, memory: GuestMemory) -> int:
        """Carry out one request; returns how many bytes were written into the chain."""
        reader, writer = chain.reader(memory), chain.writer(memory)
        if writer.available < 1:
            raise ChainError("5.2.6", chain.head, 0, "a request has room for a status byte")
        status = writer.split_at(writer.available - 1)
        try:
            self._execute(reader, writer)
        except Refused as refusal:
            self.refused += 1
            status.write(refusal.status)
        except OSError:
            self.failures += 1
            status.write(S_IOERR)
        else:
            status.write(S_OK)
        return writer.used_length

    def _execute(self, reader: Reader, writer: Writer) -> None:
        if reader.available < HEADER.size:
            raise Refused(S_IOERR)
        kind, _, sector = reader.read_struct(HEADER)
        known = kind if kind in KNOWN else -1
        self.requests[known] = self.requests.get(known, 0) + 1
        if kind == T_IN:
            offset = self._data(sector, writer.available)
            self._backend.read(offset, writer.slices())
            writer.advance(writer.available)
        elif kind == T_OUT:
            self._writable()
            offset = self._data(sector, reader.available)
            self._backend.write(offset, reader.slices())
            self._written()
        elif kind == T_FLUSH and self._features & F_FLUSH:
            self._backend.flush()
        elif kind == T_GET_ID:
            writer.write(self._serial)
        elif kind == T_DISCARD and self._features & F_DISCARD:
            limits = MAX_DISCARD_SECTORS, MAX_DISCARD_SEGMENTS
            for offset, length, _ in self._segments(reader, *limits, flags=0):
                self._backend.discard(offset, length)
        elif kind == T_WRITE_ZEROES and self._features & F_WRITE_ZEROES:
            limits = MAX_ZEROES_SECTORS, MAX_ZEROES_SEGMENTS
            for offset, length, flags in self._segments(reader, *limits, flags=UNMAP):
                self._backend.write_zeroes(offset, length, unmap=bool(flags & UNMAP))
            self._written()
        else:
            raise Refused(S_UNSUPP)

    def _segments(
        self, reader: Reader, most_sectors: int, most_segments: int, *, flags: int
    ) -> list[tuple[int, int, int]]:
        """All segments of a request, checked before any is carried out (5.2.6.2)."""
        self._writable()
        count, rest = divmod(reader.available, SEGMENT.size)
        if rest or not 1 <= count <= most_segments:
            raise Refused(S_IOERR)
        segments = []
        for _ in range(count):
            sector, sectors, given = reader.read_struct(SEGMENT)
            if given & ~flags:
                raise Refused(S_UNSUPP)
            if sectors > most_sectors:
                raise Refused(S_IOERR)
            segments.append((self._range(sector, sectors * SECTOR), sectors * SECTOR, given))
        return segments

    def _data(self, sector: int, length: int) -> int:
        """The byte offset of what is to be read or written, or a refusal."""
        if length > MAX_DATA:
            raise Refused(S_IOERR)
        return self._range(sector, length)

    def _range(self, sector: int, length: int) -> int:
        """The byte offset of a range that lies on the disk and is whole sectors, or a refusal."""
        if length % SECTOR or not length or sector + length // SECTOR > self._sectors:
            raise Refused(S_IOERR)
        return sector * SECTOR

    def _writable(self) -> None:
        if self._backend.read_only:
            raise Refused(S_IOERR)

    def _written(self) -> None:
        if not self._writeback:
            self._backend.flush()
