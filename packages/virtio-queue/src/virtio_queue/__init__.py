"""The device side of virtio: virtqueues, the device status machine, transports.

Names are loaded when they are first used, so that a program pays only for what it needs.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from virtio_queue.batch import ChainBatch
    from virtio_queue.chain import DescriptorChain
    from virtio_queue.device import VirtioDevice
    from virtio_queue.errors import (
        ActivationError,
        ChainError,
        EndOfChainError,
        GuestError,
        PumpError,
        QueueConfigError,
        QueueStateError,
        StateError,
        UsageError,
        VirtioQueueError,
    )
    from virtio_queue.mmio import MmioTransport
    from virtio_queue.model import DeviceModel, QueueResetModel
    from virtio_queue.pci import PciTransport
    from virtio_queue.pump_block import BlockPump
    from virtio_queue.pump_limit import Limiter, TokenBucket
    from virtio_queue.pump_net import NetPump
    from virtio_queue.pump_output import OutputPump
    from virtio_queue.pump_vsock import VsockPump
    from virtio_queue.queue import Queue
    from virtio_queue.reader import Reader
    from virtio_queue.state import ChainState, DeviceState, MmioState, PciState, QueueState
    from virtio_queue.writer import Writer

__all__ = [
    "ActivationError",
    "BlockPump",
    "ChainBatch",
    "ChainError",
    "ChainState",
    "DescriptorChain",
    "DeviceModel",
    "DeviceState",
    "EndOfChainError",
    "GuestError",
    "Limiter",
    "MmioState",
    "MmioTransport",
    "NetPump",
    "OutputPump",
    "PciState",
    "PciTransport",
    "PumpError",
    "Queue",
    "QueueConfigError",
    "QueueResetModel",
    "QueueState",
    "QueueStateError",
    "Reader",
    "StateError",
    "TokenBucket",
    "UsageError",
    "VirtioDevice",
    "VirtioQueueError",
    "VsockPump",
    "Writer",
]

_MODULES = {
    "BlockPump": "pump_block",
    "ChainBatch": "batch",
    "ChainState": "state",
    "DescriptorChain": "chain",
    "DeviceModel": "model",
    "DeviceState": "state",
    "Limiter": "pump_limit",
    "MmioState": "state",
    "MmioTransport": "mmio",
    "NetPump": "pump_net",
    "OutputPump": "pump_output",
    "PciState": "state",
    "PciTransport": "pci",
    "Queue": "queue",
    "QueueResetModel": "model",
    "QueueState": "state",
    "Reader": "reader",
    "TokenBucket": "pump_limit",
    "VirtioDevice": "device",
    "VsockPump": "pump_vsock",
    "Writer": "writer",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _MODULES.get(name, "errors")
    value = getattr(__import__(f"{__name__}.{module}", fromlist=[name]), name)
    globals()[name] = value
    return value
