"""What can go wrong, as one tree of exceptions with fields.

`VmMemoryError` is the root. Each leaf subclasses the builtin that fits, carries what it names in
its message as attributes, and can be pickled.
"""

from __future__ import annotations

__all__ = [
    "AddressError",
    "ClosedError",
    "InvalidValueError",
    "MappingError",
    "MemoryAccessError",
    "RegionError",
    "VmMemoryError",
]


class VmMemoryError(Exception):
    """The root of every exception that this package raises."""


class AddressError(VmMemoryError, LookupError):
    """A range of addresses does not satisfy a rule.

    Attributes:
        address: the first address of the range.
        length: its length in bytes.
        rule: what it had to satisfy.
    """

    def __init__(self, address: int, length: int, rule: str) -> None:
        super().__init__(address, length, rule)
        self.address = address
        self.length = length
        self.rule = rule

    def __str__(self) -> str:
        return f"{self.length} bytes at guest address {self.address:#x}: {self.rule}"


class MemoryAccessError(AddressError):
    """An access touches addresses without memory behind them, or is misaligned.

    Nothing was read or written, unless the method's documentation says otherwise.
    """


class RegionError(VmMemoryError, ValueError):
    """A region cannot be part of a map: empty, overlapping, out of order, misaligned.

    Attributes:
        guest_address: where the region starts.
        size: its size in bytes.
        rule: what it had to satisfy, with the nearest legal value where there is one.
    """

    def __init__(self, guest_address: int, size: int, rule: str) -> None:
        super().__init__(guest_address, size, rule)
        self.guest_address = guest_address
        self.size = size
        self.rule = rule

    def __str__(self) -> str:
        return f"region of {self.size:#x} bytes at {self.guest_address:#x}: {self.rule}"


class InvalidValueError(VmMemoryError, ValueError):
    """An argument has a value that it cannot have.

    Attributes:
        field: the argument's name.
        value: what was given.
        rule: what it had to satisfy.
    """

    def __init__(self, field: str, value: object, rule: str) -> None:
        super().__init__(field, value, rule)
        self.field = field
        self.value = value
        self.rule = rule

    def __str__(self) -> str:
        return f"{self.field} is {self.value!r}: {self.rule}"


class ClosedError(VmMemoryError, ValueError):
    """The memory was closed; regions and slices taken before are valid still."""

    def __init__(self) -> None:
        super().__init__("this guest memory was closed")

    def __reduce__(self) -> tuple[type[ClosedError], tuple[()]]:
        return ClosedError, ()


class MappingError(VmMemoryError, OSError):
    """The host refused memory.

    Attributes:
        operation: the system call that failed, and for what.
        errno: its error number.
        hint: the host's numbers, and what to do.
    """

    def __init__(self, operation: str, errno: int, hint: str = "") -> None:
        import os

        OSError.__init__(self, errno, os.strerror(errno))
        self.operation = operation
        self.hint = hint

    def __reduce__(self) -> tuple[type[MappingError], tuple[str, int, str]]:
        return MappingError, (self.operation, self.errno or 0, self.hint)

    def __str__(self) -> str:
        text = f"{self.operation}: {self.strerror} (errno {self.errno})"
        return f"{text}; {self.hint}" if self.hint else text
