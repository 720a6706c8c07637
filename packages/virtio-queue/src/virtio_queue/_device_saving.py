"""Saving and restoring devices and register files, apart because a boot does neither."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from virtio_queue._native import lib
from virtio_queue.constants import (
    CONFIG_INTERRUPT,
    F_RING_RESET,
    STATUS_ACKNOWLEDGE,
    STATUS_DEVICE_NEEDS_RESET,
    STATUS_DRIVER,
    STATUS_DRIVER_OK,
    STATUS_FAILED,
    STATUS_FEATURES_OK,
    USED_BUFFER_INTERRUPT,
)
from virtio_queue.errors import QueueConfigError, StateError
from virtio_queue.queue import Queue
from virtio_queue.state import DeviceState
from virtio_queue.status import check_features

if TYPE_CHECKING:
    from collections.abc import Callable

    from virtio_queue.device import QueueField, VirtioDevice

_SETTERS: dict[str, Callable[[Queue, int], None]] = {
    "size": Queue.set_size,
    "descriptor_area": Queue.set_descriptor_area,
    "driver_area": Queue.set_driver_area,
    "device_area": Queue.set_device_area,
}
_LADDER = STATUS_ACKNOWLEDGE, STATUS_DRIVER, STATUS_FEATURES_OK, STATUS_DRIVER_OK


def save_device(device: VirtioDevice) -> DeviceState:
    """Return the device's state; see `VirtioDevice.save`."""
    with device.lock, device.config_lock:
        return DeviceState(
            device_id=device.model.device_id,
            device_features=device.device_features,
            driver_features=device.driver_features,
            status=device.status,
            interrupt_status=device.interrupt_status,
            config_generation=device.config_generation + device._config_unseen & 0xFFFFFFFF,
            queues=tuple(queue.save() for queue in device.queues),
            queue_resets=tuple(sorted(device._queue_resets)),
            misconfigured=tuple(
                (index, field, value)
                for (index, field), (value, _) in sorted(device._misconfigured.items())
            ),
        )


def restore_device(device: VirtioDevice, state: DeviceState) -> None:
    """Check all of a state, then take it over; see `VirtioDevice.restore`."""
    with device.lock:
        expect(device.status == 0, "status", "restore needs a device that was reset")
        _check(device, state)
        queues = []
        for queue, saved in zip(device.queues, state.queues, strict=True):
            fresh = Queue(queue.max_size)
            fresh.restore(saved, device.memory)
            queues.append(fresh)
        misconfigured = {
            (index, cast("QueueField", field)): (value, _refusal(queues[index], field, value))
            for index, field, value in state.misconfigured
        }
        device._misconfigured = misconfigured
        device.queues = tuple(queues)
        device.driver_features = state.driver_features
        device._config_unseen = False
        device.config_generation = state.config_generation
        device._queue_resets = set(state.queue_resets)
        device.take_interrupt_status()
        lib.vq_set_bits(device.interrupt_word, state.interrupt_status)
        device.status = state.status
        stopped = STATUS_DEVICE_NEEDS_RESET | STATUS_FAILED
        if state.status & STATUS_DRIVER_OK and not state.status & stopped:
            device._activate(state.status)
        if state.interrupt_status & USED_BUFFER_INTERRUPT:
            device._raise(USED_BUFFER_INTERRUPT, list(range(len(device.queues))))
        if state.interrupt_status & CONFIG_INTERRUPT:
            device._raise(CONFIG_INTERRUPT, [-1])


def _check(device: VirtioDevice, state: DeviceState) -> None:
    expect(state.version == 1, "version", "only version 1 is known")
    expect(state.device_id == device.model.device_id, "device_id", "is another device's state")
    offered = state.device_features
    expect(offered == device.device_features, "device_features", "differ from this device's")
    expect(0 <= state.driver_features < 1 << 64, "driver_features", "must fit 64 bits")
    expect(0 <= state.interrupt_status <= 3, "interrupt_status", "has undefined bits")
    expect(0 <= state.config_generation < 1 << 32, "config_generation", "must fit 32 bits")
    expect(len(state.queues) == len(device.queues), "queues", f"must be {len(device.queues)}")
    known = sum(_LADDER) | STATUS_DEVICE_NEEDS_RESET | STATUS_FAILED
    expect(0 <= state.status <= 255 and not state.status & ~known, "status", "unknown bits")
    climbed = True
    for step in _LADDER:
        expect(climbed or not state.status & step, "status", "has a step without the one before")
        climbed = bool(state.status & step)
    if state.status & STATUS_FEATURES_OK:
        why = check_features(offered, state.driver_features)
        expect(not why, "driver_features", why)
    for index, queue in enumerate(state.queues):
        if not state.status & STATUS_FEATURES_OK:
            expect(not queue.ready, f"queues[{index}].ready", "needs FEATURES_OK")
    resets = state.queue_resets
    expect(not resets or bool(state.driver_features & F_RING_RESET), "queue_resets", "RING_RESET")
    expect(all(0 <= index < len(state.queues) for index in resets), "queue_resets", "no such queue")
    for index, field, _ in state.misconfigured:
        known = 0 <= index < len(state.queues) and field in _SETTERS
        expect(known, "misconfigured", "no such queue or field")
        expect(not state.queues[index].ready, "misconfigured", "the queue is ready")


def _refusal(queue: Queue, field: str, value: int) -> str:
    """Why a queue refuses a value, which it has to."""
    try:
        _SETTERS[field](queue, value)
    except QueueConfigError as error:
        return str(error)
    raise StateError("misconfigured", f"{field} {value:#x} is not refused")


def expect(condition: bool, what: str, rule: str) -> None:
    """Raise a `StateError` unless `condition` holds."""
    if not condition:
        raise StateError(what, rule)
