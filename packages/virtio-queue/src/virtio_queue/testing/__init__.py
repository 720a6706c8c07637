"""The driver's side of virtqueues, for tests of devices.

`SplitDriver` and `PackedDriver` are correct drivers of one queue that can also be made to break
every rule. `MmioDriver` and `PciDriver` bring a whole device up through its registers; `Echo` is
a small device to try them on. `stateful.DeviceMachine` is a rule-based state machine for any
device. It and `strategies` need Hypothesis; the rest needs nothing but this package.
"""

from __future__ import annotations

from virtio_queue.testing.arena import Arena
from virtio_queue.testing.driver import DeviceRuleError, Driver, Used
from virtio_queue.testing.echo import ALL_QUEUE_FEATURES, Echo
from virtio_queue.testing.mmio import MmioDriver
from virtio_queue.testing.packed import PackedDriver
from virtio_queue.testing.pci import PciDriver
from virtio_queue.testing.split import SplitDriver

__all__ = [
    "ALL_QUEUE_FEATURES",
    "Arena",
    "DeviceRuleError",
    "Driver",
    "Echo",
    "MmioDriver",
    "PackedDriver",
    "PciDriver",
    "SplitDriver",
    "Used",
]
