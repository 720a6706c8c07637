"""What can go wrong: one tree, with the ioctl, its arguments, the errno and a likely cure."""

from __future__ import annotations

import errno as _errno
import os
from typing import Any

__all__ = ["ArgumentError", "ClosedError", "KvmError"]


class KvmError(OSError):
    """An ioctl of KVM failed.

    Attributes:
        ioctl: the ioctl's name, such as `KVM_CREATE_IRQCHIP`, or `open` or `mmap`.
        errno: the error number.
        arguments: what was asked for, by name.
        hint: the likely cause and what to do about it; empty if nothing is known.
    """

    ioctl: str
    arguments: dict[str, Any]
    hint: str

    def __init__(
        self, ioctl: str, errno: int, arguments: dict[str, Any] | None = None, hint: str = ""
    ) -> None:
        self.ioctl = ioctl
        self.arguments = dict(arguments or {})
        self.hint = hint
        super().__init__(errno, os.strerror(errno))

    def __str__(self) -> str:
        shown = ", ".join(f"{name}={_show(value)}" for name, value in self.arguments.items())
        number = _errno.errorcode.get(self.errno or 0, str(self.errno))
        text = f"{self.ioctl}({shown}): {self.strerror} ({number})"
        return f"{text}; {self.hint}" if self.hint else text

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.ioctl, self.errno, self.arguments, self.hint)


class ArgumentError(KvmError, ValueError):
    """The caller asked for something that no kernel would do; it was not asked, nothing changed."""


class ClosedError(KvmError, ValueError):
    """The object has been closed."""


def _show(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int):
        text = repr(value)
        return text if len(text) <= 80 else text[:77] + "..."
    return hex(value) if value > 0xFFFF else str(value)
