"""What is done ahead of the moment in which a guest stands still, or a process is forked.

The first state that is written or read costs many times what the second does: modules are imported,
and each class of state is looked at once.
"""

from __future__ import annotations

import importlib
from contextlib import suppress
from typing import TYPE_CHECKING

import attrs

from kvm_ioctls import Kvm
from virtio_queue import Queue, VirtioDevice
from vmm_reference.devices import factory

from .format import decode, pack, pack_parts, prepare

if TYPE_CHECKING:
    from vm_memory import GuestMemory
    from vmm_reference.board import Board
    from vmm_reference.config import MachineConfig

__all__ = ["rehearse", "rehearse_saving", "warm"]

# What a machine imports only when it is made, saved or restored.
_NEEDED = (
    "kvm_ioctls.exits.decoders", "kvm_ioctls.exits.io", "kvm_ioctls.exits.plain",
    "kvm_ioctls.state.counters", "kvm_ioctls.state.msrs", "kvm_ioctls.state.snapshot",
    "kvm_ioctls.vcpu", "kvm_ioctls.vm", "virtio_queue._device_saving", "virtio_queue._saving",
    "virtio_queue.pump", "vm_memory.dirty", "vmm_reference.backends.console",
    "vmm_reference.backends.stream", "vmm_reference.board", "vmm_reference.devices.offload",
    "vmm_reference.devices.rng",
)  # fmt: skip
_STATES = ("kvm_ioctls.state", "virtio_queue.state", "vmm_reference.devices.states")


def warm(config: MachineConfig | None = None) -> None:
    """Import what any machine needs, or a certain one, and learn to read and write its states."""
    for name in _NEEDED:
        importlib.import_module(name)
    states = [*_STATES]
    if config is not None:
        for device in config.named_devices().values():
            factory(device.kind)
        if config.transport == "pci":
            states.append("vmm_reference.pci.states")
    for module in states:
        for kind in vars(importlib.import_module(module)).values():
            if isinstance(kind, type) and attrs.has(kind):
                prepare(kind)


def rehearse_saving() -> None:
    """Write states of a vCPU and a VM, of which no guest has to stand still for it."""
    with suppress(OSError), Kvm() as kvm, kvm.create_vm() as vm:  # the real one will tell
        vm.create_irqchip()
        vm.create_pit2()
        vm.create_vcpu(0)
        vm.create_vcpu(1)
        pack_parts([("vm", vm.save()), ("vcpu", vm.save_vcpus(cpuid=False)[0])])


def rehearse(board: Board) -> dict[str, type]:
    """Write, read and restore states of a board that waits for those of another one.

    Returns:
        The classes of its devices' states, by name.
    """
    vcpu = board.vm.vcpus[0].save()  # they are alike
    devices = {name: part.save() for name, part in board.parts().items()}
    for state in (vcpu, board.vm.save(), *devices.values()):
        decode(pack(state), type(state), "rehearsal")
    for name, part in board.parts().items():
        if isinstance(part, VirtioDevice):  # has no driver yet, so that nothing comes of it
            part.restore(devices[name])
    _rehearse_rings(board.memory)
    return {name: type(state) for name, state in devices.items()}


def _rehearse_rings(memory: GuestMemory) -> None:
    """Restore a queue that is ready; nothing of the memory is touched."""
    start = memory.regions[0].guest_address
    ready, restored = Queue(4), Queue(4)
    ready.set_size(4)
    ready.set_descriptor_area(start)
    ready.set_driver_area(start + 0x1000)
    ready.set_device_area(start + 0x2000)
    ready.enable(memory)
    restored.restore(ready.save(), memory)
    for queue in (ready, restored):
        queue.disable()
