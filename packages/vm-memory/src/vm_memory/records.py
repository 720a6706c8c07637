"""Records: structures in memory as tuples, or as instances of attrs classes.

A class says with each field how it lies in memory, in the codes of the `struct` module. Fields
follow one another without padding, little-endian unless the class attribute `BYTE_ORDER` is `">"`.

>>> import attrs
>>> from vm_memory import GuestAddress, GuestMemory
>>> @attrs.frozen
... class Descriptor:
...     address: int = field("Q")
...     length: int = field("I")
...     flags: int = field("H")
...     next: int = field("H")
>>> memory = GuestMemory.from_ranges([(GuestAddress(0), 4096)])
>>> memory.write_record(GuestAddress(0x100), Descriptor(0x8000, 512, 2, 0))
>>> memory.read_record(GuestAddress(0x100), Descriptor)
Descriptor(address=32768, length=512, flags=2, next=0)
>>> layout_of(Descriptor).size
16
"""

from __future__ import annotations

import struct

import attrs

from vm_memory.errors import InvalidValueError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

__all__ = ["compiled", "field", "layout_of", "packed", "values_of"]

_KEY = "vm_memory.struct"
_layouts: dict[type, struct.Struct] = {}


def field(code: str, **options: Any) -> Any:
    """An attrs field that lies in memory as one value of the `struct` format `code`.

    Raises:
        InvalidValueError: when the code is not one value's, such as `"I"` or `"16s"`.
    """
    try:
        values = len(struct.unpack(f"<{code}", bytes(struct.calcsize(f"<{code}"))))
    except struct.error as error:
        raise InvalidValueError("code", code, f"struct says: {error}") from error
    if values != 1:
        raise InvalidValueError("code", code, "must be the format of exactly one value")
    metadata = {**options.pop("metadata", {}), _KEY: code}
    return attrs.field(metadata=metadata, **options)


def layout_of(kind: type) -> struct.Struct:
    """How instances of an attrs class lie in memory.

    Raises:
        InvalidValueError: when it is no such class, or a field has no format.
    """
    layout = _layouts.get(kind)
    if layout is None:
        if not attrs.has(kind):
            raise InvalidValueError("kind", kind, "must be an attrs class")
        codes = []
        for attribute in attrs.fields(kind):
            if _KEY not in attribute.metadata:
                raise InvalidValueError(
                    "kind", kind, f"its field {attribute.name} must be made with records.field"
                )
            codes.append(attribute.metadata[_KEY])
        layout = compiled(getattr(kind, "BYTE_ORDER", "<") + "".join(codes))
        _layouts[kind] = layout
    return layout


def values_of(record: object) -> tuple[Any, ...]:
    """The values of a record's fields, in order.

    Raises:
        InvalidValueError: when it is no instance of an attrs class.
    """
    kind = type(record)
    if not attrs.has(kind):
        raise InvalidValueError("record", record, "must be an instance of an attrs class")
    return tuple([getattr(record, attribute.name) for attribute in attrs.fields(kind)])


def compiled(layout: str | struct.Struct) -> struct.Struct:
    """A format, compiled.

    Raises:
        InvalidValueError: when it is none.
    """
    if isinstance(layout, struct.Struct):
        return layout
    try:
        return struct.Struct(layout)
    except struct.error as error:
        raise InvalidValueError("layout", layout, f"struct says: {error}") from error


def packed(layout: struct.Struct, values: Sequence[object]) -> bytes:
    """Values in a format.

    Raises:
        InvalidValueError: when they do not fit it.
    """
    try:
        return layout.pack(*values)
    except struct.error as error:
        raise InvalidValueError("values", tuple(values), f"struct says: {error}") from error
