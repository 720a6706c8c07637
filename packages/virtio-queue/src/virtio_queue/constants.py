"""Numbers of the virtio 1.3 specification, under its names without the `VIRTIO_` prefix."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final


__all__ = [
    "CONFIG_INTERRUPT",
    "DEFAULT_QUEUE_FEATURES",
    "DESC_F_AVAIL",
    "DESC_F_INDIRECT",
    "DESC_F_NEXT",
    "DESC_F_USED",
    "DESC_F_WRITE",
    "F_ACCESS_PLATFORM",
    "F_EVENT_IDX",
    "F_INDIRECT_DESC",
    "F_IN_ORDER",
    "F_NOTIFICATION_DATA",
    "F_NOTIF_CONFIG_DATA",
    "F_RING_PACKED",
    "F_RING_RESET",
    "F_VERSION_1",
    "MAX_CHAIN_BYTES",
    "MAX_INDIRECT_DESCRIPTORS",
    "MAX_QUEUE_SIZE",
    "STATUS_ACKNOWLEDGE",
    "STATUS_DEVICE_NEEDS_RESET",
    "STATUS_DRIVER",
    "STATUS_DRIVER_OK",
    "STATUS_FAILED",
    "STATUS_FEATURES_OK",
    "USED_BUFFER_INTERRUPT",
]

# Device status bits, 2.1.
STATUS_ACKNOWLEDGE: Final = 1
STATUS_DRIVER: Final = 2
STATUS_DRIVER_OK: Final = 4
STATUS_FEATURES_OK: Final = 8
STATUS_DEVICE_NEEDS_RESET: Final = 64
STATUS_FAILED: Final = 128

# Feature masks (not bit numbers), chapter 6.
F_INDIRECT_DESC: Final = 1 << 28
F_EVENT_IDX: Final = 1 << 29
F_VERSION_1: Final = 1 << 32
F_ACCESS_PLATFORM: Final = 1 << 33
F_RING_PACKED: Final = 1 << 34
F_IN_ORDER: Final = 1 << 35
F_NOTIFICATION_DATA: Final = 1 << 38
F_NOTIF_CONFIG_DATA: Final = 1 << 39
F_RING_RESET: Final = 1 << 40

DEFAULT_QUEUE_FEATURES: Final = F_VERSION_1 | F_INDIRECT_DESC | F_EVENT_IDX
"""What every device may offer without doing anything for it."""

# Descriptor flags, 2.7.5 and 2.8.1.
DESC_F_NEXT: Final = 1
DESC_F_WRITE: Final = 2
DESC_F_INDIRECT: Final = 4
DESC_F_AVAIL: Final = 1 << 7
DESC_F_USED: Final = 1 << 15

# Interrupt status bits, 4.2.2 and 4.1.4.5.
USED_BUFFER_INTERRUPT: Final = 1
CONFIG_INTERRUPT: Final = 2

MAX_QUEUE_SIZE: Final = 32768
"""Largest queue, 2.7: the highest power of two that a 16-bit index tells full from empty."""

MAX_CHAIN_BYTES: Final = 1 << 32
"""Longest chain in bytes, 2.7.5.2."""

MAX_INDIRECT_DESCRIPTORS: Final = 1024
"""Longest indirect table walked where the queue itself is shorter.

2.7.5.3.1 limits a chain to the queue size, but Linux makes longer indirect ones on small queues;
2.7.4.1 lets a device choose a reasonable limit. This is the host's IOV_MAX.
"""
