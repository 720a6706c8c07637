"""Addresses of guest memory and their checked arithmetic.

A guest address and an offset into a region are both integers, and mixing them up is a classic
error, so the type checker tells them apart. At run time both are plain `int`, free of charge;
what is checked lives in the named functions below.
"""

from __future__ import annotations

from vm_memory.errors import InvalidValueError

__all__ = [
    "ADDRESS_LIMIT",
    "GuestAddress",
    "RegionOffset",
    "align_down",
    "align_up",
    "checked_add",
    "checked_sub",
    "is_aligned",
    "offset_from",
]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NewType

    GuestAddress = NewType("GuestAddress", int)
    RegionOffset = NewType("RegionOffset", int)
else:
    GuestAddress = int
    """A position in an address space: guest-physical, or an I/O virtual address behind an IOMMU."""

    RegionOffset = int
    """A distance in bytes from the start of a region."""

ADDRESS_LIMIT = 1 << 64
"""The first integer that is no address any more."""


def checked_add(address: GuestAddress, count: int) -> GuestAddress:
    """The address `count` bytes further on.

    Raises:
        InvalidValueError: when the sum leaves 0 to 2**64 - 1.

    >>> hex(checked_add(GuestAddress(0x1000), 0x234))
    '0x1234'
    """
    result = address + count
    if not 0 <= result < ADDRESS_LIMIT:
        raise InvalidValueError(
            "count", count, f"{address:#x} plus it must stay within 0 to 2**64 - 1"
        )
    return GuestAddress(result)


def checked_sub(address: GuestAddress, count: int) -> GuestAddress:
    """The address `count` bytes before.

    Raises:
        InvalidValueError: when the difference leaves 0 to 2**64 - 1.

    >>> hex(checked_sub(GuestAddress(0x1234), 0x234))
    '0x1000'
    """
    return checked_add(address, -count)


def offset_from(address: GuestAddress, base: GuestAddress) -> RegionOffset:
    """How many bytes `address` lies after `base`.

    Raises:
        InvalidValueError: when it lies before.

    >>> offset_from(GuestAddress(0x1010), GuestAddress(0x1000))
    16
    """
    if address < base:
        raise InvalidValueError("address", address, f"must not lie below the base {base:#x}")
    return RegionOffset(address - base)


def align_up(address: GuestAddress, alignment: int) -> GuestAddress:
    """The first multiple of `alignment`, a power of two, that is not below `address`.

    Raises:
        InvalidValueError: when `alignment` is no power of two, or the result is past 2**64 - 1.

    >>> hex(align_up(GuestAddress(0x1001), 0x1000))
    '0x2000'
    """
    return checked_add(address, -address & (_power_of_two(alignment) - 1))


def align_down(address: GuestAddress, alignment: int) -> GuestAddress:
    """The last multiple of `alignment`, a power of two, that is not above `address`.

    Raises:
        InvalidValueError: when `alignment` is no power of two.

    >>> hex(align_down(GuestAddress(0x1FFF), 0x1000))
    '0x1000'
    """
    return GuestAddress(address & -_power_of_two(alignment))


def is_aligned(address: int, alignment: int) -> bool:
    """Whether `address` is a multiple of `alignment`, a power of two.

    Raises:
        InvalidValueError: when `alignment` is no power of two.

    >>> is_aligned(0x1004, 8)
    False
    """
    return address & (_power_of_two(alignment) - 1) == 0


def _power_of_two(alignment: int) -> int:
    if alignment <= 0 or alignment & (alignment - 1):
        raise InvalidValueError("alignment", alignment, "must be a power of two")
    return alignment
