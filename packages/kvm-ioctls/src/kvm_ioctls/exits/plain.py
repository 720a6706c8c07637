"""Exits that end or pause a vCPU."""

from __future__ import annotations

from kvm_ioctls._values import frozen
from kvm_ioctls.exits.base import Exit

__all__ = ["Hlt", "Interrupted", "IrqWindowOpen", "Shutdown"]


@frozen
class Hlt(Exit):
    """KVM_EXIT_HLT: the guest halted, and no interrupt controller in the kernel can wake it."""

    reason = 5


@frozen
class IrqWindowOpen(Exit):
    """KVM_EXIT_IRQ_WINDOW_OPEN: the interrupt window that was asked for is open."""

    reason = 7


@frozen
class Shutdown(Exit):
    """KVM_EXIT_SHUTDOWN: triple fault."""

    reason = 8


@frozen
class Interrupted(Exit):
    """KVM_EXIT_INTR: a kick or a signal ended the run; nothing happened in the guest.

    Attributes:
        kicked: True for a kick; False for another signal, or a kick's late signal.
    """

    reason = 10
    kicked: bool = False


HLT = Hlt()
IRQ_WINDOW_OPEN = IrqWindowOpen()
SHUTDOWN = Shutdown()
KICKED = Interrupted(kicked=True)
SIGNALLED = Interrupted(kicked=False)
