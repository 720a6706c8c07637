"""What a device author writes: protocols that a device model fulfils.

A model does no I/O of its own and knows no transport. Imported for types only; a boot does not
pay for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from virtio_queue.queue import Queue
    from vm_memory import GuestMemory

__all__ = ["DeviceModel", "QueueResetModel"]


class DeviceModel(Protocol):
    """A virtio device without its transport.

    Every method is called by `VirtioDevice` under `VirtioDevice.lock`, except `read_config`,
    which is called under `VirtioDevice.config_lock` alone.
    """

    @property
    def device_id(self) -> int:
        """Device type, chapter 5 of the specification; not 0."""

    @property
    def device_features(self) -> int:
        """Feature bits offered, as a mask; `F_VERSION_1` is added by `VirtioDevice`."""

    @property
    def queue_sizes(self) -> Sequence[int]:
        """Largest size of each virtqueue, a power of two each."""

    def read_config(self, offset: int, length: int) -> bytes:
        """Return device configuration bytes.

        Called with anything the guest asks for: 0 <= `offset` < 4096 (mmio), any small `length`.
        Bytes past the structure are left out; the caller returns zeros for them.
        """

    def write_config(self, offset: int, data: bytes) -> None:
        """Take a write to the device configuration; what is not writable is ignored."""

    def activate(self, memory: GuestMemory, driver_features: int, queues: Sequence[Queue]) -> None:
        """Start: the driver set DRIVER_OK. Queues the driver does not use are not `ready`.

        After a restore `Queue.in_flight` lists chains that were taken and not finished.

        Raises:
            ActivationError: cannot start; the device asks the driver for a reset.
        """

    def process(self, queue_index: int) -> object:
        """Take what the driver made available in one ready queue; called after a kick.

        May raise `GuestError`, most of all `ChainError`: the device then asks for a reset.
        What it returns is ignored.
        """

    def reset(self) -> None:
        """Forget everything the driver did, and return when nothing touches its buffers any more.

        Raises:
            ActivationError: cannot; the device stays in need of a reset.
        """


@runtime_checkable
class QueueResetModel(Protocol):
    """The two methods a model adds when it offers VIRTIO_F_RING_RESET (2.6.1)."""

    def reset_queue(self, queue_index: int) -> None:
        """Forget the chains of one queue; return when nothing touches its buffers any more."""

    def enable_queue(self, queue_index: int) -> None:
        """The queue was configured and enabled anew; start taking from it."""
