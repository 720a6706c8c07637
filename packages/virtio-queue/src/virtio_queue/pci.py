"""The structures of virtio over PCI (section 4.1.4 of virtio 1.3), as registers in one window.

PCI configuration space, BARs, the MSI-X table and eventfds belong to the VMM: it maps
`PciTransport.read` and `.write` somewhere and puts `capabilities` into the capability list.
"""

from __future__ import annotations

from virtio_queue.constants import F_NOTIF_CONFIG_DATA, F_RING_RESET
from virtio_queue.device import CONFIG_SOURCE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from virtio_queue.device import QueueField, VirtioDevice
    from virtio_queue.queue import Queue
    from virtio_queue.state import PciState

__all__ = [
    "COMMON_OFFSET",
    "DEVICE_OFFSET",
    "ISR_OFFSET",
    "NOTIFY_MULTIPLIER",
    "NOTIFY_OFFSET",
    "NO_VECTOR",
    "WINDOW_SIZE",
    "PciTransport",
]

COMMON_OFFSET = 0x0000
"""Offset of the common configuration structure in the window."""

ISR_OFFSET = 0x1000
"""Offset of the ISR status."""

DEVICE_OFFSET = 0x2000
"""Offset of the device-specific configuration."""

NOTIFY_OFFSET = 0x3000
"""Offset of the notification structure; queue n is kicked at `n * NOTIFY_MULTIPLIER` in it."""

NOTIFY_MULTIPLIER = 4
"""Bytes between the notification addresses of two queues."""

WINDOW_SIZE = 0x4000
"""Size of the window, enough for 1024 queues."""

NO_VECTOR = 0xFFFF
"""VIRTIO_MSI_NO_VECTOR: no interrupt for this source."""

_COMMON_LENGTH = 0x40
_DEVICE_LENGTH = 0x1000
_MASK32 = 0xFFFFFFFF

# Offset in the common configuration and width of each field (4.1.4.3).
_WIDTHS = {
    0x00: 4,  # device_feature_select
    0x04: 4,  # device_feature
    0x08: 4,  # driver_feature_select
    0x0C: 4,  # driver_feature
    0x10: 2,  # config_msix_vector
    0x12: 2,  # num_queues
    0x14: 1,  # device_status
    0x15: 1,  # config_generation
    0x16: 2,  # queue_select
    0x18: 2,  # queue_size
    0x1A: 2,  # queue_msix_vector
    0x1C: 2,  # queue_enable
    0x1E: 2,  # queue_notify_off
    0x20: 4,  # queue_desc, in halves
    0x24: 4,
    0x28: 4,  # queue_driver
    0x2C: 4,
    0x30: 4,  # queue_device
    0x34: 4,
    0x38: 2,  # queue_notif_config_data
    0x3A: 2,  # queue_reset
    0x3C: 2,  # admin_queue_index
    0x3E: 2,  # admin_queue_num
}
_AREAS: dict[int, QueueField] = {
    0x20: "descriptor_area",
    0x28: "driver_area",
    0x30: "device_area",
}


class PciTransport:
    """Register reads and writes in, calls to a `VirtioDevice` and interrupts out.

    Fields take accesses of their own width only, 64-bit ones in halves (4.1.3.1); any other
    access reads zeros, writes nothing and is counted in `VirtioDevice.refused`. Nothing the
    guest does raises. Threads: as for `MmioTransport`.

    Args:
        device: the device behind the registers; its `route` is taken over.
        notify: told the index of an existing queue that was kicked; what it returns is ignored.
        vectors: size of the MSI-X table; vectors from there on are refused (4.1.5.1.2).
        msix_enabled: whether the driver enabled MSI-X.
        signal: sends the message of one MSI-X vector; masking is its business.
        intx: sets the level of the INTx line; used while MSI-X is disabled.
        bind: told a queue index or `CONFIG_SOURCE`, and the vector that it has from now on, for
            who raises its interrupt without coming here.
    """

    def __init__(
        self,
        device: VirtioDevice,
        notify: Callable[[int], object],
        *,
        vectors: int,
        msix_enabled: Callable[[], bool],
        signal: Callable[[int], object],
        intx: Callable[[bool], object],
        bind: Callable[[int, int], object] = lambda _source, _vector: None,
    ) -> None:
        self.device = device
        self.vectors = vectors
        self._notify = notify
        self._msix_enabled = msix_enabled
        self._signal = signal
        self._intx = intx
        self._bind = bind
        self._forget()
        device.route = self._route

    def _forget(self) -> None:
        """Set the selectors and vectors a reset leaves."""
        self._device_feature_select = 0
        self._driver_feature_select = 0
        self._queue_select = 0
        self._config_vector = NO_VECTOR
        self._queue_vectors = [NO_VECTOR] * len(self.device.queues)
        self._bind_all()

    def _bind_all(self) -> None:
        self._bind(CONFIG_SOURCE, self._config_vector)
        for queue, vector in enumerate(self._queue_vectors):
            self._bind(queue, vector)

    def vector(self, source: int) -> int:
        """The MSI-X vector of a queue or of `CONFIG_SOURCE`, or `NO_VECTOR`."""
        return self._config_vector if source == CONFIG_SOURCE else self._queue_vectors[source]

    def capabilities(
        self, bar: int, shared_memory: Mapping[int, tuple[int, int, int]] | None = None
    ) -> tuple[bytes, ...]:
        """Return the vendor capabilities that point into the window and to shared memory (4.1.4).

        Args:
            bar: number of the BAR whose start is the window's, 0 to 5.
            shared_memory: BAR, offset in it and length in bytes of each shared memory region, by
                its id (4.1.4.7).

        Returns:
            Each capability with its own length, `cap_next` left 0 for the VMM to fill. The one
            that reaches BARs through configuration space (4.1.4.9) is the VMM's.
        """

        def capability(kind: int, offset: int, length: int, more: bytes = b"") -> bytes:
            head = bytes((0x09, 0, 16 + len(more), kind, bar, 0, 0, 0))
            return head + offset.to_bytes(4, "little") + length.to_bytes(4, "little") + more

        def region(identity: int, where: int, offset: int, length: int) -> bytes:
            head = bytes((0x09, 0, 24, 8, where, identity, 0, 0))
            low, high = _MASK32, 32
            words = (offset & low, length & low, offset >> high, length >> high)
            return head + b"".join(word.to_bytes(4, "little") for word in words)

        notify_length = NOTIFY_MULTIPLIER * max(len(self.device.queues), 1)
        multiplier = NOTIFY_MULTIPLIER.to_bytes(4, "little")
        return (
            capability(1, COMMON_OFFSET, _COMMON_LENGTH),
            capability(2, NOTIFY_OFFSET, notify_length, multiplier),
            capability(3, ISR_OFFSET, 1),
            capability(4, DEVICE_OFFSET, _DEVICE_LENGTH),
            *(region(identity, *place) for identity, place in (shared_memory or {}).items()),
        )

    # Interrupts ---------------------------------------------------------------------------

    def _route(self, source: int) -> None:
        if not self._msix_enabled():
            self._intx(True)
            return
        vector = self.vector(source)
        if vector != NO_VECTOR:
            self._signal(vector)

    # Registers ----------------------------------------------------------------------------

    def read(self, offset: int, length: int) -> bytes:
        """Read `length` bytes at `offset` from the window's start; always that many."""
        device = self.device
        if DEVICE_OFFSET <= offset < NOTIFY_OFFSET:
            return device.read_config(offset - DEVICE_OFFSET, length)
        if offset == ISR_OFFSET and length > 0:
            status = device.take_interrupt_status()
            self._intx(False)
            # Raised by another thread in between: its bit was set before its level.
            if device.interrupt_status and not self._msix_enabled():
                self._intx(True)
            return bytes((status,)).ljust(length, b"\0")
        if _WIDTHS.get(offset) != length:
            device.refuse(f"{length}-byte read at {offset:#x} of the virtio-pci window (4.1.3.1)")
            return bytes(max(length, 0))
        mask = (1 << 8 * length) - 1
        return (self._read_common(offset) & mask).to_bytes(length, "little")

    def write(self, offset: int, data: bytes) -> None:
        """Write `data` at `offset` from the window's start."""
        if DEVICE_OFFSET <= offset < NOTIFY_OFFSET:
            self.device.write_config(offset - DEVICE_OFFSET, bytes(data))
        elif NOTIFY_OFFSET <= offset < WINDOW_SIZE:
            self._kick(offset - NOTIFY_OFFSET, data)
        elif _WIDTHS.get(offset) == len(data):
            self._write_common(offset, int.from_bytes(data, "little"))
        else:
            self.device.refuse(
                f"{len(data)}-byte write at {offset:#x} of the virtio-pci window (4.1.3.1)"
            )

    def _selected(self) -> Queue | None:
        queues = self.device.queues
        return queues[self._queue_select] if self._queue_select < len(queues) else None

    def _read_common(self, offset: int) -> int:
        device = self.device
        if offset >= 0x18:
            queue = self._selected()
            return self._read_queue(offset, queue) if queue is not None else self._no_queue(offset)
        if offset == 0x14:
            return device.status
        if offset == 0x15:
            return device.read_config_generation()
        if offset == 0x04:
            return device.read_device_features(self._device_feature_select)
        if offset == 0x0C:
            page = self._driver_feature_select
            return device.driver_features >> 32 * page if page <= 1 else 0
        return {
            0x00: self._device_feature_select,
            0x08: self._driver_feature_select,
            0x10: self._config_vector,
            0x12: len(device.queues),
            0x16: self._queue_select,
        }[offset]

    def _no_queue(self, offset: int) -> int:
        return NO_VECTOR if offset == 0x1A else 0

    def _read_queue(self, offset: int, queue: Queue) -> int:
        index = self._queue_select
        if offset & ~4 in _AREAS:
            address: int = getattr(queue, _AREAS[offset & ~4])
            return address >> 32 if offset & 4 else address
        if offset == 0x18:
            return queue.size
        if offset == 0x1A:
            return self._queue_vectors[index]
        if offset == 0x1C:
            return int(queue.ready)
        if offset == 0x1E:
            return index
        if offset == 0x38 and self.device.driver_features & F_NOTIF_CONFIG_DATA:
            return index
        # queue_reset: complete when the write returns. No administration queues.
        return 0

    def _write_common(self, offset: int, value: int) -> None:
        device = self.device
        index = self._queue_select
        if offset == 0x14:
            device.write_status(value)
            if value == 0:
                self._forget()
                self._intx(False)
        elif offset == 0x00:
            self._device_feature_select = value
        elif offset == 0x08:
            self._driver_feature_select = value
        elif offset == 0x0C:
            device.write_driver_features(self._driver_feature_select, value)
        elif offset == 0x10:
            self._config_vector = self._vector(value)
            self._bind(CONFIG_SOURCE, self._config_vector)
        elif offset == 0x16:
            self._queue_select = value
        elif offset == 0x1A and index < len(device.queues):
            self._queue_vectors[index] = self._vector(value)
            self._bind(index, self._queue_vectors[index])
        elif offset == 0x18:
            device.configure_queue(index, "size", value)
        elif offset == 0x1C and value == 1:
            device.enable_queue(index)
        elif offset == 0x3A and value == 1 and device.driver_features & F_RING_RESET:
            device.reset_queue(index)
        elif offset & ~4 in _AREAS:
            device.configure_queue_half(index, _AREAS[offset & ~4], value, high=bool(offset & 4))
        else:
            device.refuse(f"{value:#x} written to field {offset:#x}, which does not take it")

    def _vector(self, value: int) -> int:
        """Keep a vector of the table; anything else reads back as NO_VECTOR (4.1.5.1.2)."""
        return value if value < self.vectors else NO_VECTOR

    def _kick(self, offset: int, data: bytes) -> None:
        # Place and value both name the queue, whatever of it the driver was told to write; with
        # NOTIFICATION_DATA the value's upper half tells what the ring says too.
        index, rest = divmod(offset, NOTIFY_MULTIPLIER)
        named = int.from_bytes(data[:2], "little")
        if rest or len(data) not in (2, 4) or index >= len(self.device.queues) or named != index:
            self.device.refuse(f"kick with {data[:8].hex()} at offset {offset:#x}")
        else:
            self._notify(index)

    # State --------------------------------------------------------------------------------

    def save(self) -> PciState:
        """Return selectors and vectors; the device is saved apart."""
        from virtio_queue.state import PciState

        return PciState(
            device_feature_select=self._device_feature_select,
            driver_feature_select=self._driver_feature_select,
            queue_select=self._queue_select,
            config_msix_vector=self._config_vector,
            queue_msix_vectors=tuple(self._queue_vectors),
        )

    def restore(self, state: PciState) -> None:
        """Take over saved selectors and vectors. Restore this before the device.

        Raises:
            StateError: a selector does not fit its field, or a vector is not in the table.
        """
        from virtio_queue._device_saving import expect

        expect(state.version == 1, "version", "only version 1 is known")
        for name, value in (
            ("device_feature_select", state.device_feature_select),
            ("driver_feature_select", state.driver_feature_select),
        ):
            expect(0 <= value <= _MASK32, name, "must fit 32 bits")
        expect(0 <= state.queue_select <= 0xFFFF, "queue_select", "must fit 16 bits")
        count = len(self.device.queues)
        expect(len(state.queue_msix_vectors) == count, "queue_msix_vectors", f"must be {count}")
        for vector in (state.config_msix_vector, *state.queue_msix_vectors):
            known = vector == NO_VECTOR or 0 <= vector < self.vectors
            expect(known, "msix_vector", "must be in the table or NO_VECTOR")
        self._device_feature_select = state.device_feature_select
        self._driver_feature_select = state.driver_feature_select
        self._queue_select = state.queue_select
        self._config_vector = state.config_msix_vector
        self._queue_vectors = list(state.queue_msix_vectors)
        self._bind_all()
