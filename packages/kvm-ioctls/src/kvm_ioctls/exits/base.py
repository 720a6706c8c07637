"""What all exits have in common."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import ClassVar

__all__ = ["Exit"]


class Exit:
    """Base of every value that Vcpu.run() returns.

    Attributes:
        reason: the KVM_EXIT_* number.
    """

    __slots__ = ()
    reason: ClassVar[int] = -1
