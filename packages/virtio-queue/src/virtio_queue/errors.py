"""The one exception tree of this package.

`GuestError` and its subclasses say that the driver in the guest broke a rule: a device answers
with `VirtioDevice.needs_reset` and goes on living. `UsageError` and its subclasses say that the
program which called this library did. Every error carries its facts as fields and survives
pickling.
"""

from __future__ import annotations

import os

__all__ = [
    "ActivationError",
    "ChainError",
    "EndOfChainError",
    "GuestError",
    "PumpError",
    "QueueConfigError",
    "QueueStateError",
    "StateError",
    "UsageError",
    "VirtioQueueError",
]


class VirtioQueueError(ValueError):
    """Base of every error raised here; never raised itself."""

    _fields: tuple[str, ...] = ()

    def __reduce__(self) -> tuple[object, ...]:
        """Rebuild from the fields, so that errors cross process boundaries."""
        return (type(self), tuple(getattr(self, name) for name in self._fields))


class GuestError(VirtioQueueError):
    """The driver in the guest broke a rule of the specification."""


class UsageError(VirtioQueueError):
    """The caller of this library broke a rule of its interface.

    Attributes:
        what: the call or the argument at fault.
        rule: what it has to obey, and what to do.
    """

    _fields = ("what", "rule")

    def __init__(self, what: str, rule: str) -> None:
        super().__init__(f"{what}: {rule}")
        self.what = what
        self.rule = rule


class ChainError(GuestError):
    """A ring or a descriptor chain that the driver must not have made.

    Raised before anything of the chain has been handed to the device, so that a malformed chain
    never looks like a complete one. The ring position does not move: asking again raises again.

    Attributes:
        section: section of the virtio 1.3 specification whose rule was broken.
        descriptor: index of the descriptor at fault (within its table), or None for a fault of
            the ring itself.
        value: the offending value.
        rule: the rule in words.
    """

    _fields = ("section", "descriptor", "value", "rule")

    def __init__(self, section: str, descriptor: int | None, value: int, rule: str) -> None:
        where = "ring" if descriptor is None else f"descriptor {descriptor}"
        super().__init__(
            f"{where}: value {value:#x} breaks virtio 1.3 section {section}: {rule}; "
            "set DEVICE_NEEDS_RESET"
        )
        self.section = section
        self.descriptor = descriptor
        self.value = value
        self.rule = rule


class QueueConfigError(GuestError):
    """A queue size, alignment or ring address that cannot be used.

    Attributes:
        field: name of the field (`size`, `descriptor_area`, `driver_area`, `device_area`).
        value: the value that was refused; the field keeps its former one.
        rule: the rule in words.
    """

    _fields = ("field", "value", "rule")

    def __init__(self, field: str, value: int, rule: str) -> None:
        super().__init__(f"queue {field} {value:#x}: {rule}")
        self.field = field
        self.value = value
        self.rule = rule


class EndOfChainError(GuestError):
    """An exact read or write asks for more than the chain holds.

    Attributes:
        wanted: bytes asked for.
        available: bytes left; none of them have been consumed.
    """

    _fields = ("wanted", "available")

    def __init__(self, wanted: int, available: int) -> None:
        super().__init__(
            f"{wanted} bytes wanted, {available} left in the chain: the driver made it too short; "
            "fail the request"
        )
        self.wanted = wanted
        self.available = available


class QueueStateError(UsageError):
    """The call does not fit the queue's state (not ready, already ready, head not in flight)."""


class StateError(UsageError):
    """A saved state that `restore` refuses; the object keeps its former state."""


class ActivationError(VirtioQueueError):
    """Raised by a device model's `activate` when it cannot start; the device asks for a reset.

    Attributes:
        reason: one line for the log.
    """

    _fields = ("reason",)

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class PumpError(VirtioQueueError, OSError):
    """The host has not what a pump needs.

    Attributes:
        what: what was asked for.
        errno: the system's number.
        hint: what to do.
    """

    _fields = ("what", "errno", "hint")

    def __init__(self, what: str, errno: int, hint: str) -> None:
        OSError.__init__(self, errno, f"{what}: {os.strerror(errno)}; {hint}")
        self.what = what
        self.hint = hint
