"""How a machine's run ended, and the exit status of `vmm run` that tells it."""

from __future__ import annotations

import enum

__all__ = ["Outcome"]


class Outcome(enum.Enum):
    """Why the machine stopped. The value is a word; `status` is the process's exit status."""

    POWER_OFF = "power-off"
    QUIT = "quit"
    HOST_FAILURE = "host failure"
    GUEST_PANIC = "guest panic"
    RESET = "guest reset"
    TRIPLE_FAULT = "triple fault"
    KVM_INTERNAL_ERROR = "KVM internal error"
    STOPPED = "stopped"
    MIGRATED = "migrated"
    DEBUG_EXIT = "debug exit"

    @property
    def status(self) -> int:
        """The exit status of `vmm run`; 2 is kept for a mistake in the configuration."""
        return _STATUS[self]


_STATUS = {
    Outcome.POWER_OFF: 0,
    Outcome.QUIT: 0,
    Outcome.MIGRATED: 0,
    Outcome.HOST_FAILURE: 1,
    Outcome.GUEST_PANIC: 3,
    Outcome.RESET: 4,
    Outcome.TRIPLE_FAULT: 5,
    Outcome.KVM_INTERNAL_ERROR: 6,
    Outcome.STOPPED: 128 + 15,
    Outcome.DEBUG_EXIT: 1,  # and twice the value that the guest gave, see `Machine.status`
}
