"""The driver's side of virtqueues, for tests of devices.

`SplitDriver` and `PackedDriver` are correct drivers of one queue that can also be made to break
every rule; `MmioDriver` brings a whole device up through its registers. `strategies` and
`stateful` need Hypothesis; the rest needs nothing but this package.
"""

from __future__ import annotations

from virtio_queue.testing.arena import Arena
from virtio_queue.testing.driver import DeviceRuleError, Driver, Used
from virtio_queue.testing.mmio import MmioDriver
from virtio_queue.testing.packed import PackedDriver
from virtio_queue.testing.split import SplitDriver

__all__ = [
    "Arena",
    "DeviceRuleError",
    "Driver",
    "MmioDriver",
    "PackedDriver",
    "SplitDriver",
    "Used",
]
