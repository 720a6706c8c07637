"""What can go wrong, as one tree of exceptions with fields.

`VmMemoryError` is the root. Each leaf subclasses the builtin that fits, carries what it names in
its message as attributes, and can be pickled.
"""

from __future__ import annotations

__all__ = [
    "AddressError",
    "BackingLostError",
    "ClosedError",
    "InvalidValueError",
    "MappingError",
    "MemoryAccessError",
    "RegionError",
    "ShortTransferError",
    "TransferError",
    "TranslationError",
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


class BackingLostError(AddressError):
    """Pages are gone, since their file was truncated or the hardware lost them.

    What was read is not the guest's data, and what was written is nowhere. Stop the guest.
    """


class TransferError(VmMemoryError, OSError):
    """A transfer between guest memory and a file failed.

    Attributes:
        address: the first address of the transfer.
        length: the bytes that were asked for.
        completed: the bytes that were transferred before.
        errno: the error number of the system call.
    """

    def __init__(self, address: int, length: int, completed: int, errno: int) -> None:
        import os

        OSError.__init__(self, errno, os.strerror(errno))
        self.address = address
        self.length = length
        self.completed = completed

    def __reduce__(self) -> tuple[type[TransferError], tuple[int, int, int, int]]:
        return TransferError, (self.address, self.length, self.completed, self.errno or 0)

    def __str__(self) -> str:
        return (
            f"transfer of {self.length} bytes at guest address {self.address:#x}: "
            f"{self.strerror} (errno {self.errno}) after {self.completed}"
        )


class ShortTransferError(VmMemoryError, EOFError):
    """A file ended before a transfer was complete.

    Attributes:
        address: the first address of the transfer.
        length: the bytes that were asked for.
        completed: the bytes that were transferred.
    """

    def __init__(self, address: int, length: int, completed: int) -> None:
        super().__init__(address, length, completed)
        self.address = address
        self.length = length
        self.completed = completed

    def __str__(self) -> str:
        return (
            f"transfer of {self.length} bytes at guest address {self.address:#x}: "
            f"the file ended after {self.completed}"
        )


class TranslationError(AddressError):
    """An IOMMU does not map all of a range for the access.

    Attributes:
        misses: parts that are not mapped at all, as address and length.
        denied: parts that are mapped without the permission, as address and length.
    """

    def __init__(
        self,
        address: int,
        length: int,
        misses: tuple[tuple[int, int], ...],
        denied: tuple[tuple[int, int], ...],
    ) -> None:
        parts = [f"{start:#x}+{size:#x} is not mapped" for start, size in misses]
        parts += [f"{start:#x}+{size:#x} does not permit it" for start, size in denied]
        super().__init__(address, length, ", ".join(parts))
        self.misses = misses
        self.denied = denied

    def __reduce__(
        self,
    ) -> tuple[
        type[TranslationError],
        tuple[int, int, tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]],
    ]:
        return TranslationError, (self.address, self.length, self.misses, self.denied)
