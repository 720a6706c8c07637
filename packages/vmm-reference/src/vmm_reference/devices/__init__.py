"""The devices of the machine, one file each, all sans I/O, and the one registry of them.

A device is a state machine: register accesses, queue kicks and backend completions go in, interrupt
levels, used buffers and bytes come out through callables handed to it. It knows no thread, no file
descriptor and no clock, so it runs in a property test as it runs in a machine. It is entered by one
thread at a time: whoever wires it holds its lock (`vmm_reference.bus.Bus.lock`).

Nothing that a guest does can make a device raise. Every device with state has `save`, which gives
a value of `vmm_reference.devices.states`, and `restore`, which checks one and takes it.

A device that a configuration may ask for is a line of `REGISTRY`: where its configuration class is,
and the factory that makes the device and its backend out of one. Nothing else names it.
"""

from __future__ import annotations

from vm_memory._values import frozen

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from vmm_reference.deviceconfig import DeviceConfig
    from vmm_reference.wiring import Wiring

__all__ = ["REGISTRY", "Kind", "config_class", "factory"]


@frozen
class Kind:
    """Where a kind of device comes from: `module:name` below `vmm_reference`, loaded on use.

    Attributes:
        config: the configuration class, a `DeviceConfig` whose `kind` is the registry's key.
        build: the factory, called with the configuration and a `Wiring`; it may return what the
            owner of the machine controls the running device by.
    """

    config: str
    build: str


REGISTRY = {
    "balloon": Kind("devices.balloon:MemoryBalloon", "devices.balloon:build"),
    "console": Kind("devices.console.setup:Ports", "devices.console.setup:build"),
    "debug-console": Kind("devices.debug_console:DebugLog", "devices.debug_console:build"),
    "debug-exit": Kind("devices.debug_exit:ExitPort", "devices.debug_exit:build"),
    "drive": Kind("config:Drive", "devices.blk.setup:build"),
    "keyboard": Kind("devices.keyboard:Keys", "devices.keyboard:build"),
    "memory": Kind("devices.mem:Memory", "devices.mem:build"),
    "net": Kind("devices.net.setup:Interface", "devices.net.setup:build"),
    "pmem": Kind("devices.pmem:PersistentMemory", "devices.pmem:build"),
    "rng": Kind("devices.rng:Entropy", "devices.rng:build"),
    "vmgenid": Kind("devices.vmgenid:Generation", "devices.vmgenid:build"),
    "vsock": Kind("devices.vsock.setup:Socket", "devices.vsock.setup:build"),
    "watchdog": Kind("devices.watchdog:Timer", "devices.watchdog:build"),
}
"""Every kind of device, by the name that a configuration gives it."""


def config_class(kind: str) -> type[DeviceConfig]:
    """The class that a device of this kind is configured by."""
    found: type[DeviceConfig] = _named(REGISTRY[kind].config)
    return found


def factory(kind: str) -> Callable[[DeviceConfig, Wiring], object]:
    """What makes a device of this kind."""
    found: Callable[[DeviceConfig, Wiring], object] = _named(REGISTRY[kind].build)
    return found


def _named(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(__import__(f"vmm_reference.{module}", fromlist=[name]), name)
