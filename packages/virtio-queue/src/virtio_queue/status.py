"""The device status field as pure functions (2.1 and 3.1.1 of virtio 1.3).

Nothing here touches a device: `decide` takes what is and what the driver wrote, and returns what
is to be. `virtio_queue.device.VirtioDevice` carries it out, for every transport alike.

Example:
    >>> from virtio_queue.status import decide
    >>> decide(0, 1, offered=0, accepted=0)
    (1, 'none', '')
    >>> decide(1, 5, offered=0, accepted=0)
    (1, 'none', 'DRIVER_OK needs FEATURES_OK (3.1.1)')
"""

from __future__ import annotations

from virtio_queue.constants import (
    F_RING_RESET,
    F_VERSION_1,
    STATUS_ACKNOWLEDGE,
    STATUS_DEVICE_NEEDS_RESET,
    STATUS_DRIVER,
    STATUS_DRIVER_OK,
    STATUS_FAILED,
    STATUS_FEATURES_OK,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Literal, TypeAlias

    Action: TypeAlias = Literal["none", "reset", "activate"]

__all__ = ["check_features", "decide", "queue_configurable", "status_names"]

_KNOWN = STATUS_ACKNOWLEDGE | STATUS_DRIVER | STATUS_DRIVER_OK | STATUS_FEATURES_OK | STATUS_FAILED
_NAMES = (
    (STATUS_ACKNOWLEDGE, "ACKNOWLEDGE"),
    (STATUS_DRIVER, "DRIVER"),
    (STATUS_FEATURES_OK, "FEATURES_OK"),
    (STATUS_DRIVER_OK, "DRIVER_OK"),
    (STATUS_DEVICE_NEEDS_RESET, "DEVICE_NEEDS_RESET"),
    (STATUS_FAILED, "FAILED"),
)


def status_names(status: int) -> str:
    """Spell a status byte, for messages.

    >>> status_names(11)
    'ACKNOWLEDGE|DRIVER|FEATURES_OK'
    """
    return "|".join(name for bit, name in _NAMES if status & bit) or "0"


def check_features(offered: int, accepted: int) -> str:
    """Return why a set of accepted features cannot be worked with, or an empty string.

    The device refuses FEATURES_OK then (2.2.2): features it did not offer, and no VERSION_1
    (6.1; there is no legacy interface here).
    """
    stray = accepted & ~offered
    if stray:
        return f"features {stray:#x} were not offered (2.2.1)"
    if not accepted & F_VERSION_1:
        return "VIRTIO_F_VERSION_1 was not accepted (6.1)"
    return ""


def decide(status: int, written: int, *, offered: int, accepted: int) -> tuple[int, Action, str]:
    """Decide on one write to the device status field.

    Bits the driver does not own (DEVICE_NEEDS_RESET, reserved ones) are ignored. A write that
    clears a bit, skips a step or comes after FAILED or DEVICE_NEEDS_RESET changes nothing, except
    that FAILED is always taken. Several steps in one write are taken as one, but DRIVER_OK needs
    an earlier FEATURES_OK, which the driver has to read back in between (3.1.1, step 6).

    Args:
        status: the current value.
        written: what the driver wrote, any integer from 0.
        offered: the device's feature bits.
        accepted: the feature bits the driver has written.

    Returns:
        The new status, what to do, and why something was refused (empty if nothing was). With
        "activate" the new status holds DRIVER_OK already. With "reset" it is 0.
    """
    if written == 0:
        return 0, "reset", ""
    wanted = written & _KNOWN
    if wanted & STATUS_FAILED:
        return status | STATUS_FAILED, "none", ""
    if status & (STATUS_FAILED | STATUS_DEVICE_NEEDS_RESET):
        return status, "none", f"only a reset leaves {status_names(status)} (2.1.1)"
    cleared = status & ~wanted
    if cleared:
        return status, "none", f"a driver must not clear {status_names(cleared)} (2.1.1)"
    return _steps(status, wanted & ~status, offered, accepted)


def _steps(status: int, new: int, offered: int, accepted: int) -> tuple[int, Action, str]:
    before = status
    if new & STATUS_ACKNOWLEDGE:
        status |= STATUS_ACKNOWLEDGE
    if new & STATUS_DRIVER:
        if not status & STATUS_ACKNOWLEDGE:
            return before, "none", "DRIVER needs ACKNOWLEDGE (3.1.1)"
        status |= STATUS_DRIVER
    if new & STATUS_DRIVER_OK and not before & STATUS_FEATURES_OK:
        return before, "none", "DRIVER_OK needs FEATURES_OK (3.1.1)"
    if new & STATUS_FEATURES_OK:
        if not status & STATUS_DRIVER:
            return before, "none", "FEATURES_OK needs DRIVER (3.1.1)"
        why = check_features(offered, accepted)
        if why:
            return status, "none", why
        status |= STATUS_FEATURES_OK
    if new & STATUS_DRIVER_OK:
        return status | STATUS_DRIVER_OK, "activate", ""
    return status, "none", ""


def queue_configurable(status: int, features: int, *, was_reset: bool) -> bool:
    """Whether size and addresses of a queue may be set now.

    Between FEATURES_OK and DRIVER_OK; afterwards only for a queue that was reset under
    VIRTIO_F_RING_RESET (2.6.1). The queue itself refuses while it is ready.
    """
    if status & (STATUS_FAILED | STATUS_DEVICE_NEEDS_RESET) or not status & STATUS_FEATURES_OK:
        return False
    if status & STATUS_DRIVER_OK:
        return was_reset and bool(features & F_RING_RESET)
    return True
