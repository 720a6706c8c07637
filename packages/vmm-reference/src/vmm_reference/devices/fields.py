"""Fields of saved states: each refuses what no device can have had, and says which it is."""

from __future__ import annotations

from typing import Any

import attrs

from vmm_reference.errors import RuleError

__all__ = [
    "StateError", "flag", "levels", "many", "maybe", "numbers", "octets", "require", "tuples",
    "version", "whole",
]  # fmt: skip


class StateError(RuleError):
    """A saved state that no device can have had: nothing was restored.

    Attributes:
        field: class and name of the field, such as `SerialState.ier`.
        value: what it holds.
        rule: what it must hold.
    """

    def __str__(self) -> str:
        return f"{self.field}: {self.value!r} {self.rule}"


def require(
    state: object, field: attrs.Attribute[Any], good: bool, value: object, rule: str
) -> None:
    """Raise `StateError` with the field's class and name unless it is good."""
    if not good:
        raise StateError(f"{type(state).__name__}.{field.name}", value, rule)


def whole(low: int, high: int) -> Any:
    """A field that is an int from `low` to `high`."""

    def check(state: object, field: attrs.Attribute[int], value: object) -> None:
        good = type(value) is int and low <= value <= high
        require(state, field, good, value, f"must be a whole number from {low} to {high}")

    return attrs.field(validator=check)


def flag() -> Any:
    """A field that is a bool."""

    def check(state: object, field: attrs.Attribute[bool], value: object) -> None:
        require(state, field, isinstance(value, bool), value, "must be true or false")

    return attrs.field(validator=check)


def octets(low: int, high: int) -> Any:
    """A field of `low` to `high` bytes."""

    def check(state: object, field: attrs.Attribute[bytes], value: object) -> None:
        good = isinstance(value, bytes) and low <= len(value) <= high
        size = f"{low} to {high}" if low < high else f"{low}"
        require(state, field, good, value, f"must be {size} bytes")

    return attrs.field(validator=check)


def levels() -> Any:
    """A field of two whole numbers or none: a bucket's level and what is left of its burst."""

    def check(state: object, field: attrs.Attribute[Any], value: Any) -> None:
        good = isinstance(value, tuple) and len(value) in (0, 2)
        good = good and all(type(item) is int and abs(item) < 1 << 127 for item in value)
        good = good and (not value or value[1] >= 0)
        require(state, field, good, value, "must be a level and a burst, or empty")

    return attrs.field(kw_only=True, validator=check)


def many(item: Any, most: int) -> Any:
    """A field of a tuple of at most `most` items, each as the field `item`."""

    def check(state: object, field: attrs.Attribute[Any], value: object) -> None:
        good = isinstance(value, tuple) and len(value) <= most
        require(state, field, good, value, f"must be a tuple of at most {most} items")
        for each in value:  # type: ignore[attr-defined]
            item._validator(state, field, each)

    return attrs.field(validator=check)


def maybe(item: Any) -> Any:
    """A field as `item`, or None."""

    def check(state: object, field: attrs.Attribute[Any], value: object) -> None:
        if value is not None:
            item._validator(state, field, value)

    return attrs.field(validator=check)


def version() -> Any:
    """A field that tells the form of the state."""

    def check(state: object, field: attrs.Attribute[int], value: object) -> None:
        require(state, field, value == 1, value, "must be 1, the only version there is")

    return attrs.field(default=1, validator=check, kw_only=True)


def numbers() -> Any:
    """A field of different whole numbers that fit into a byte."""

    def check(state: object, field: attrs.Attribute[tuple[int, ...]], value: object) -> None:
        good = (
            isinstance(value, tuple)
            and all(type(number) is int and 0 <= number <= 255 for number in value)
            and len(set(value)) == len(value)
        )
        require(state, field, good, value, "must be different whole numbers from 0 to 255")

    return attrs.field(validator=check)


def tuples(length: int, most: int) -> Any:
    """A field of a tuple of at most `most` tuples, each of so many whole numbers from 0."""

    def check(state: object, field: attrs.Attribute[Any], value: Any) -> None:
        good = isinstance(value, tuple) and len(value) <= most
        good = good and all(isinstance(item, tuple) and len(item) == length for item in value)
        good = good and all(type(n) is int and 0 <= n < 1 << 63 for item in value for n in item)
        rule = f"must be at most {most} tuples of {length} whole numbers"
        require(state, field, good, value, rule)

    return attrs.field(validator=check)
