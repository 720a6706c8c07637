"""Packing a value's fields, and saying which one does not fit."""

from __future__ import annotations

import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

__all__ = ["pack_fields", "refuse_field"]

_WIDTHS = {"B": 8, "H": 16, "I": 32, "Q": 64}


def pack_fields(owner: object, codec: struct.Struct, values: tuple[object, ...]) -> bytes:
    """The bytes of `values`; ArgumentError naming the owner's fields if one does not fit."""
    try:
        return codec.pack(*values)
    except struct.error as error:
        refuse_field(owner, str(error))


def refuse_field(owner: object, why: str) -> NoReturn:
    """Raise the ArgumentError for a field of `owner`."""
    from kvm_ioctls.errors import ArgumentError

    name = type(owner).__name__
    raise ArgumentError(name, 22, {"value": owner}, f"a field does not fit its place: {why}")
