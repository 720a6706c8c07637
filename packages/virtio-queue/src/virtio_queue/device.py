"""The device of every transport: status, features, queues, interrupts, configuration.

`VirtioDevice` holds the checks that would otherwise exist once per transport; `mmio` and `pci`
are register files over it.

Threads and locks. Two locks, always taken in this order:

1. `VirtioDevice.lock` (re-entrant) guards the status, the features, the queues and the model.
   The I/O thread holds it while it works on queues (`process` takes it by itself; completions of
   asynchronous backends take it around `Queue.add_used` and `notify_used`). A vCPU thread takes
   it to write the status, to configure queues and to write the configuration space, so these
   wait for a piece of work in progress: that is what makes a reset a real one.
2. `VirtioDevice.config_lock` (re-entrant) guards the configuration space and its generation.
   Reads by vCPU threads take it alone; a device changes its configuration inside
   `config_change`. Never do I/O under it.

Reading the status, the features, the queue registers and the interrupt status takes no lock, nor
does acknowledging interrupts, whose bits change in single steps: neither ever waits for I/O in
progress. The `interrupt` callable may be called with the first lock held: it must not block and
must not call back.
"""

from __future__ import annotations

import threading

from virtio_queue._native import ffi, lib
from virtio_queue.constants import (
    CONFIG_INTERRUPT,
    F_RING_RESET,
    F_VERSION_1,
    STATUS_DEVICE_NEEDS_RESET,
    STATUS_DRIVER,
    STATUS_DRIVER_OK,
    STATUS_FAILED,
    STATUS_FEATURES_OK,
    USED_BUFFER_INTERRUPT,
)
from virtio_queue.errors import (
    ActivationError,
    GuestError,
    QueueConfigError,
    UsageError,
)
from virtio_queue.queue import Queue
from virtio_queue.status import decide, queue_configurable, status_names

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any, Literal, TypeAlias

    from virtio_queue._native import CData
    from virtio_queue.model import DeviceModel, QueueResetModel
    from virtio_queue.state import DeviceState
    from vm_memory import GuestMemory

    QueueField: TypeAlias = Literal["size", "descriptor_area", "driver_area", "device_area"]

__all__ = ["CONFIG_SOURCE", "DeviceModel", "QueueResetModel", "VirtioDevice"]

CONFIG_SOURCE = -1
"""Passed to `VirtioDevice.route` in place of a queue index for a configuration change."""

_MASK32 = 0xFFFFFFFF


def __getattr__(name: str) -> Any:
    if name in ("DeviceModel", "QueueResetModel"):
        from virtio_queue import model

        return getattr(model, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class VirtioDevice:
    """One device model made into a virtio device, ready for a transport.

    The module's docstring says which lock protects what.

    Args:
        model: the device.
        memory: the guest's memory.
        interrupt: told that `interrupt_status` has gained a bit.
        shared_memory: guest address and length of each shared memory region, by its id (2.10).

    Raises:
        UsageError: the model offers VIRTIO_F_RING_RESET without the methods of
            `QueueResetModel`, or a queue size that is not a power of two from 1 to 32768.

    Attributes:
        lock: see the module's docstring.
        config_lock: likewise.
        device_features: the offered feature bits.
        driver_features: the feature bits the driver wrote.
        status: the device status field (2.1).
        interrupt_word: where the interrupt bits are, for a pump, which sets them without Python.
        config_generation: changes with the configuration space, 0 to 2**32 - 1.
        queues: one for each of the model's `queue_sizes`.
        active: whether the model is started and healthy: the driver set DRIVER_OK and nothing
            asked for a reset since.
        reset_reason: why DEVICE_NEEDS_RESET was set last, or an empty string.
        refused: how many of the driver's writes were refused.
        last_refusal: why the last one was.
        route: when not None, called with a queue index or `CONFIG_SOURCE` instead of
            `interrupt`; for transports with more than one interrupt.
    """

    def __init__(
        self,
        model: DeviceModel,
        memory: GuestMemory,
        interrupt: Callable[[], None],
        *,
        shared_memory: Mapping[int, tuple[int, int]] | None = None,
    ) -> None:
        self.model = model
        self.memory = memory
        self.lock = threading.RLock()
        self.config_lock = threading.RLock()
        self.device_features = model.device_features | F_VERSION_1
        self.driver_features = 0
        self.status = 0
        self.interrupt_word: CData = ffi.new("uint32_t *")
        self.config_generation = 0
        self.queues = tuple(Queue(size) for size in model.queue_sizes)
        self.active = False
        self.reset_reason = ""
        self.refused = 0
        self.last_refusal = ""
        self.route: Callable[[int], None] | None = None
        self.shared_memory: Mapping[int, tuple[int, int]] = dict(shared_memory or {})
        self._interrupt = interrupt
        # The configuration has changed since the driver last looked.
        self._config_unseen = False
        # Queues that were reset under VIRTIO_F_RING_RESET and not enabled again.
        self._queue_resets: set[int] = set()
        # What the driver wrote last where that was refused: it believes a value that is not there.
        self._misconfigured: dict[tuple[int, QueueField], tuple[int, str]] = {}
        if self.device_features & F_RING_RESET and not hasattr(model, "reset_queue"):
            raise UsageError("device_features", "RING_RESET needs a model with reset_queue")

    # Status and features ------------------------------------------------------------------

    def write_status(self, value: int) -> None:
        """Take a driver's write to the device status field (2.1.1, 3.1.1).

        Writing 0 resets everything, and returns when nothing touches the driver's buffers any
        more. What the driver must not write changes nothing.
        """
        with self.lock:
            status, action, why = decide(
                self.status, value, offered=self.device_features, accepted=self.driver_features
            )
            if why:
                self.refuse(why)
            if action == "reset":
                self._reset()
            elif action == "activate":
                self._activate(status)
            else:
                gained = status & ~self.status
                self.status = status
                if gained & STATUS_FAILED:
                    self.active = False
                if gained & STATUS_FEATURES_OK:
                    for queue in self.queues:
                        queue.set_features(self.driver_features)

    def write_driver_features(self, page: int, value: int) -> None:
        """Take 32 accepted feature bits (`page` 0: bits 0 to 31, `page` 1: bits 32 to 63).

        Possible between DRIVER and FEATURES_OK only; whether the set is acceptable is decided
        when the driver sets FEATURES_OK.
        """
        with self.lock:
            done = STATUS_FEATURES_OK | STATUS_FAILED | STATUS_DEVICE_NEEDS_RESET
            if self.status & done or not self.status & STATUS_DRIVER:
                self.refuse(f"features written in status {status_names(self.status)} (3.1.1)")
            elif page > 1:
                if value:
                    self.refuse(f"feature bits {value:#x} in page {page}: none exist there")
            else:
                kept = self.driver_features & (_MASK32 << 32 * (1 - page))
                self.driver_features = kept | (value & _MASK32) << 32 * page

    def read_device_features(self, page: int) -> int:
        """Return 32 offered feature bits; pages past the second hold none."""
        return self.device_features >> 32 * page & _MASK32 if 0 <= page <= 1 else 0

    def _activate(self, status: int) -> None:
        why = "; ".join(fault for _, fault in self._misconfigured.values())
        if not why:
            try:
                self.model.activate(self.memory, self.driver_features, self.queues)
            except (ActivationError, GuestError) as error:
                why = f"activation failed: {error}"
        self.status = status
        self.active = not why
        if why:
            self.needs_reset(why)

    def _reset(self) -> None:
        self.active = False
        failure = ""
        try:
            self.model.reset()
        except ActivationError as error:
            failure = f"reset failed: {error}"
        for queue in self.queues:
            queue.reset()
        self._queue_resets.clear()
        self._misconfigured.clear()
        self.driver_features = 0
        self.take_interrupt_status()
        self.reset_reason = failure
        self.status = STATUS_DEVICE_NEEDS_RESET if failure else 0

    def needs_reset(self, reason: str) -> None:
        """Give up until the driver resets the device (2.1.2). Queues are not served any more.

        Args:
            reason: one line for the log, kept in `reset_reason`.
        """
        with self.lock:
            if self.status & STATUS_DEVICE_NEEDS_RESET:
                return
            self.active = False
            self.reset_reason = reason
            self.status |= STATUS_DEVICE_NEEDS_RESET
            if self.status & STATUS_DRIVER_OK:
                self._raise(CONFIG_INTERRUPT, (CONFIG_SOURCE,))

    def refuse(self, why: str) -> None:
        """Count something the driver must not do and that has no effect."""
        self.refused += 1
        self.last_refusal = why

    # Queues -------------------------------------------------------------------------------

    def configure_queue(self, index: int, field: QueueField, value: int) -> None:
        """Take a driver's write to the size or an address of a queue.

        Refused before FEATURES_OK, after DRIVER_OK, and while the queue is ready. A value that
        cannot be used keeps the former one and makes the device ask for a reset when the driver
        enables the queue without correcting it.
        """
        with self.lock:
            queue = self._configurable(index)
            if queue is None:
                return
            try:
                if field == "size":
                    queue.set_size(value)
                elif field == "descriptor_area":
                    queue.set_descriptor_area(value)
                elif field == "driver_area":
                    queue.set_driver_area(value)
                else:
                    queue.set_device_area(value)
            except QueueConfigError as error:
                self._misconfigured[index, field] = value, str(error)
                self.refuse(str(error))
            else:
                self._misconfigured.pop((index, field), None)

    def configure_queue_half(
        self, index: int, field: QueueField, value: int, *, high: bool
    ) -> None:
        """Take one 32-bit half of a queue's address, as `configure_queue` takes the whole."""
        with self.lock:
            if not 0 <= index < len(self.queues):
                self.refuse(f"queue {index} does not exist")
                return
            now: int = getattr(self.queues[index], field)
            # The other half as the driver wrote it, even if both together were refused.
            now, _ = self._misconfigured.get((index, field), (now, ""))
            merged = now & _MASK32 | value << 32 if high else now & ~_MASK32 | value
            self.configure_queue(index, field, merged)

    def enable_queue(self, index: int) -> None:
        """Make a queue ready; a configuration that cannot work makes the device ask for a reset."""
        with self.lock:
            queue = self._configurable(index)
            if queue is None:
                return
            faults = [why for (at, _), (_, why) in self._misconfigured.items() if at == index]
            try:
                if not faults:
                    queue.enable(self.memory)
            except QueueConfigError as error:
                faults = [str(error)]
            if faults:
                self.refuse(faults[0])
                self.needs_reset(f"queue {index} enabled: {faults[0]}")
                return
            self._queue_resets.discard(index)
            if self.active:
                self._queue_model().enable_queue(index)

    def disable_queue(self, index: int) -> None:
        """Stop using a queue (4.2.2.2).

        An active device does it only if its model can stop a single queue; otherwise the queue
        stays ready, as the driver reads back.
        """
        with self.lock:
            if not 0 <= index < len(self.queues):
                self.refuse(f"queue {index} does not exist")
            elif self.queues[index].ready:
                if self.active:
                    if not hasattr(self.model, "reset_queue"):
                        self.refuse(f"queue {index} disabled while the device is active")
                        return
                    self._queue_model().reset_queue(index)
                self.queues[index].disable()

    def reset_queue(self, index: int) -> None:
        """Reset one queue (2.6.1); needs VIRTIO_F_RING_RESET."""
        with self.lock:
            if not 0 <= index < len(self.queues):
                self.refuse(f"queue {index} does not exist")
            elif not (
                self.status & STATUS_FEATURES_OK and self.driver_features & F_RING_RESET
            ) or self.status & (STATUS_FAILED | STATUS_DEVICE_NEEDS_RESET):
                self.refuse(f"queue {index} reset without VIRTIO_F_RING_RESET")
            else:
                queue = self.queues[index]
                if self.active and queue.ready:
                    self._queue_model().reset_queue(index)
                queue.reset()
                queue.set_features(self.driver_features)
                self._queue_resets.add(index)
                for at, field in list(self._misconfigured):
                    if at == index:
                        del self._misconfigured[at, field]

    def _configurable(self, index: int) -> Queue | None:
        if not 0 <= index < len(self.queues):
            self.refuse(f"queue {index} does not exist")
            return None
        was_reset = index in self._queue_resets
        if not queue_configurable(self.status, self.driver_features, was_reset=was_reset):
            names = status_names(self.status)
            self.refuse(f"queue {index} configured in status {names}")
            return None
        queue = self.queues[index]
        if queue.ready:
            self.refuse(f"queue {index} configured while it is ready")
            return None
        return queue

    def _queue_model(self) -> QueueResetModel:
        model: Any = self.model
        return model  # type: ignore[no-any-return]

    def process(self, queue_index: int) -> bool:
        """Let the model take what is available in a queue; the I/O thread's answer to a kick.

        What the driver did wrong turns into DEVICE_NEEDS_RESET; used buffers are announced.
        Kicks for a device or a queue that is not running are ignored.

        Returns:
            Whether the model was called and is still healthy.
        """
        with self.lock:
            known = 0 <= queue_index < len(self.queues)
            if not self.active or not known or not self.queues[queue_index].ready:
                return False
            try:
                self.model.process(queue_index)
            except GuestError as error:
                self.needs_reset(f"queue {queue_index}: {error}")
            self.notify_used()
            return self.active

    # Interrupts ---------------------------------------------------------------------------

    def notify_used(self) -> None:
        """Announce used buffers of all queues whose driver wants to hear of them.

        A pump announces those of the queues it serves.
        """
        with self.lock:
            told = [
                index
                for index, queue in enumerate(self.queues)
                if queue.ready and not queue.lent and queue.needs_notification(self.memory)
            ]
            if told:
                self._raise(USED_BUFFER_INTERRUPT, told)

    def used_buffer_notification(self, queue_index: int = 0) -> None:
        """Send a used buffer notification (2.3), for a caller that has decided to.

        A device that is not running sends none (2.1.2): completions may come late.
        """
        if self.status & STATUS_DRIVER_OK:
            self._raise(USED_BUFFER_INTERRUPT, (queue_index,))

    def config_changed(self) -> None:
        """Change the generation and tell the driver; see `config_change` for the atomic form."""
        with self.config_change():
            pass

    def config_change(self) -> ConfigChange:
        """Return a context in which to change the configuration, atomically for the driver.

        The generation changes with it (2.5.1); the driver is told when the body is done, if it
        has got as far as DRIVER_OK.
        """
        return ConfigChange(self)

    @property
    def interrupt_status(self) -> int:
        """The pending interrupt bits."""
        status: int = self.interrupt_word[0]
        return status

    def acknowledge_interrupt(self, mask: int) -> None:
        """Clear interrupt bits the driver has handled. Waits for nothing."""
        lib.vq_clear_bits(self.interrupt_word, mask & _MASK32)

    def take_interrupt_status(self) -> int:
        """Return the interrupt bits and clear them, as reading the PCI ISR does (4.1.4.5.1)."""
        return lib.vq_clear_bits(self.interrupt_word, _MASK32)

    def _raise(self, bit: int, sources: tuple[int, ...] | list[int]) -> None:
        lib.vq_set_bits(self.interrupt_word, bit)
        if self.route is None:
            self._interrupt()
        else:
            for source in sources:
                self.route(source)

    # Configuration space ------------------------------------------------------------------

    def read_config(self, offset: int, length: int) -> bytes:
        """Read the device configuration; what the model does not have reads as zeros."""
        if offset < 0 or length <= 0:
            return bytes(max(length, 0))
        with self.config_lock:
            self._see_config()
            data = self.model.read_config(offset, length)
        return bytes(data[:length]).ljust(length, b"\0")

    def read_config_generation(self) -> int:
        """Return the generation, not in the middle of a change."""
        with self.config_lock:
            self._see_config()
            return self.config_generation

    def _see_config(self) -> None:
        """Move the generation at most once a read, so that 8 bits of it never come around."""
        if self._config_unseen:
            self._config_unseen = False
            self.config_generation = (self.config_generation + 1) & _MASK32

    def write_config(self, offset: int, data: bytes) -> None:
        """Take a driver's write to the device configuration; needs DRIVER (3.1.1)."""
        with self.lock:
            if not self.status & STATUS_DRIVER or self.status & STATUS_FAILED or offset < 0:
                self.refuse(f"configuration written in status {status_names(self.status)}")
                return
            with self.config_lock:
                self.model.write_config(offset, data)

    # State --------------------------------------------------------------------------------

    def save(self) -> DeviceState:
        """Return the device's state as a value; the model's own state is saved apart."""
        from virtio_queue import _device_saving

        return _device_saving.save_device(self)

    def restore(self, state: DeviceState) -> None:
        """Take over a saved state in a device that no driver has touched yet.

        The model's own state has to be restored before: an active device calls its `activate`
        with queues that may have chains in flight. Pending interrupts are sent again. Call
        `process` for each queue afterwards: a kick that was on its way is in no state.

        Raises:
            StateError: the state does not fit this device or is not one that `save` returns.
        """
        from virtio_queue import _device_saving

        _device_saving.restore_device(self, state)


class ConfigChange:
    """The context that `VirtioDevice.config_change` returns."""

    __slots__ = ("_device",)

    def __init__(self, device: VirtioDevice) -> None:
        self._device = device

    def __enter__(self) -> None:
        self._device.config_lock.acquire()

    def __exit__(self, *_: object) -> None:
        device = self._device
        # Also after an exception: a part may have been changed.
        device._config_unseen = True
        device.config_lock.release()
        if device.status & STATUS_DRIVER_OK:
            device._raise(CONFIG_INTERRUPT, (CONFIG_SOURCE,))
