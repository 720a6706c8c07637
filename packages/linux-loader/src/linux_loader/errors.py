"""What goes wrong while an image is read, checked and placed."""

from __future__ import annotations

__all__ = ["CmdlineError", "ImageError", "LoaderError", "PlacementError"]

_SHOWN = 64


def _show(value: object) -> str:
    """Write a value as a message shows it: integers in hexadecimal, long bytes cut short."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:#x}"
    text = repr(value)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


class LoaderError(ValueError):
    """An image, a command line or a placement that cannot be used; base of this package's errors.

    Attributes:
        field: the specification's name of the field, or of the thing that was being done.
        offset: where the field lies in its file, in bytes; None where it lies in no file.
        value: what was found.
        rule: what it must be, and what to do about it.

    >>> print(LoaderError("e_machine", 18, 183, "must be EM_X86_64 (62)"))
    e_machine at offset 0x12 is 0xb7: must be EM_X86_64 (62)
    """

    def __init__(self, field: str, offset: int | None, value: object, rule: str) -> None:
        super().__init__(field, offset, value, rule)
        self.field = field
        self.offset = offset
        self.value = value
        self.rule = rule

    def __str__(self) -> str:
        """One line: field, place, value, rule."""
        place = "" if self.offset is None else f" at offset {self.offset:#x}"
        return f"{self.field}{place} is {_show(self.value)}: {self.rule}"


class ImageError(LoaderError):
    """The file is at fault: truncated, malformed, or of a kind that is not supported."""


class PlacementError(LoaderError):
    """The pieces do not fit the guest's memory map, or would overlap."""


class CmdlineError(LoaderError):
    """The kernel command line is at fault; `offset` counts characters."""
