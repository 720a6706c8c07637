"""A base for the values inside the boot path, where attrs would cost more than the work itself.

attrs writes and compiles the methods of each class at import: half a millisecond a class, and some
25 times that in an emulated machine. What users build and compare are attrs classes; what only the
loader's own parts hand to each other is this.
"""

from __future__ import annotations

from typing import dataclass_transform

__all__ = ["Value"]


@dataclass_transform(kw_only_default=True, frozen_default=True)
class Value:
    """Keyword arguments become fields, as annotated in the class body; all of them are required."""

    def __init__(self, **fields: object) -> None:
        if fields.keys() != type(self).__annotations__.keys():
            raise TypeError(f"{type(self).__name__} takes {', '.join(type(self).__annotations__)}")
        self.__dict__.update(fields)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__} is a value: {name} cannot be set")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{type(self).__name__} is a value: {name} cannot be deleted")

    def __eq__(self, other: object) -> bool:
        """Equal where class and all fields are."""
        if type(other) is not type(self):
            return NotImplemented
        return self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        """As equality."""
        return hash(tuple(self.__dict__.items()))

    def __repr__(self) -> str:
        """The call that makes it."""
        fields = ", ".join([f"{name}={value!r}" for name, value in self.__dict__.items()])
        return f"{type(self).__name__}({fields})"
