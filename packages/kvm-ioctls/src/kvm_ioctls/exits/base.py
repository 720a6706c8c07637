"""What all exits have in common."""

from __future__ import annotations

from typing import ClassVar

__all__ = ["Exit"]


class Exit:
    """Base of every value that Vcpu.run() returns.

    Attributes:
        reason: the KVM_EXIT_* number.
    """

    __slots__ = ()
    reason: ClassVar[int] = -1
