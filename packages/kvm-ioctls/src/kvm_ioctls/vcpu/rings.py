"""What a vCPU's shared rings hold: writes that the kernel put off, pages that the guest wrote."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["CoalescedWrite", "DirtyPage"]


class CoalescedWrite(NamedTuple):
    """A write that waited in the ring.

    Attributes:
        address: guest-physical address, or port with `pio`.
        data: what was written.
        pio: whether it is a port.
    """

    address: int
    data: bytes
    pio: bool


class DirtyPage(NamedTuple):
    """A page that the guest has written.

    Attributes:
        slot: the memory slot.
        page: its number within the slot.
    """

    slot: int
    page: int
