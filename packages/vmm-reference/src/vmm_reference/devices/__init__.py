"""The devices of the machine, one file each, all sans I/O.

A device is a state machine: register accesses, queue kicks and backend completions go in, interrupt
levels, used buffers and bytes come out through callables handed to it. It knows no thread, no file
descriptor and no clock, so it runs in a property test as it runs in a machine. It is entered by one
thread at a time: whoever wires it holds its lock (`vmm_reference.bus.Bus.lock`).

Nothing that a guest does can make a device raise. Every device with state has `save`, which gives
a value of `vmm_reference.devices.states`, and `restore`, which checks one and takes it.
"""

from __future__ import annotations

__all__: list[str] = []
