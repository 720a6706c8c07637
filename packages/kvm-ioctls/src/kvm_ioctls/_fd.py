"""A descriptor of KVM that is owned: closed once, passed on by fileno(), and asked by ioctl."""

from __future__ import annotations

import os

from kvm_ioctls._native import ffi, lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Any, NoReturn, Self

_from_buffer = ffi.from_buffer
_ioctl = lib.kvmi_ioctl
_ioctl_value = lib.kvmi_ioctl_value


class Descriptor:
    """Base of everything that owns a descriptor.

    It is a context manager. Left to the garbage collector it is closed too, with a ResourceWarning.
    """

    _kind = "descriptor"

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        """The descriptor's number, for select and for passing on.

        Raises:
            ClosedError: if it has been closed.
        """
        if self._fd < 0:
            self._fail("fileno", 9, {})
        return self._fd

    @property
    def closed(self) -> bool:
        """Whether close() has been called."""
        return self._fd < 0

    def close(self) -> None:
        """Close the descriptor; further calls do nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            import warnings

            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
            self.close()

    def __repr__(self) -> str:
        state = "closed" if self._fd < 0 else f"fd={self._fd}"
        return f"<{type(self).__name__} {state}>"

    # The four ways to ask. Keyword arguments are what an error message will show.

    def _value(self, request: int, value: int = 0, /, **arguments: Any) -> int:
        """An ioctl whose argument is a plain value."""
        result = _ioctl_value(self._fd, request, value)
        if result < 0:
            self._fail(request, -result, arguments or ({"value": value} if value else {}))
        return result

    def _read(self, request: int, size: int, /, **arguments: Any) -> bytearray:
        """An ioctl that fills a structure of `size` bytes."""
        data = bytearray(size)
        result = _ioctl(self._fd, request, _from_buffer(data))
        if result < 0:
            self._fail(request, -result, arguments)
        return data

    def _write(self, request: int, data: bytes | bytearray, /, **arguments: Any) -> int:
        """An ioctl that takes a structure, and may change it if it is a bytearray."""
        result = _ioctl(self._fd, request, _from_buffer(data))
        if result < 0:
            self._fail(request, -result, arguments)
        return result

    def _try(self, request: int, data: bytes | bytearray) -> int:
        """The same, but a failure is the result, as -errno."""
        return _ioctl(self._fd, request, _from_buffer(data))

    def _fail(self, request: int | str, errno: int, arguments: dict[str, Any]) -> NoReturn:
        from kvm_ioctls._hints import error

        raise error(self, request, errno, arguments)
