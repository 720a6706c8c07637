"""Registers in a buffer of their own: for loops that look at one of them after every exit."""

from __future__ import annotations

from kvm_ioctls._native import ffi, lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self

    from kvm_ioctls._fd import Descriptor

__all__ = ["RawRegisters"]

_ioctl = lib.kvmi_ioctl


class RawRegisters:
    """The kernel's structure and the names of its 64-bit fields.

    Attributes:
        buffer: the structure as the kernel has it.
    """

    __slots__ = ("_get", "_held", "_owner", "_places", "_set", "_words", "buffer")

    def __init__(
        self,
        owner: Descriptor,
        requests: tuple[int, int],
        size: int,
        names: dict[str, int],
    ) -> None:
        self.buffer = bytearray(size)
        self._owner, self._places = owner, names
        self._get, self._set = requests
        self._held = ffi.from_buffer(self.buffer)
        self._words = memoryview(self.buffer).cast("Q")

    def get(self) -> Self:
        """Read all of them from the vCPU into the buffer."""
        result = _ioctl(self._owner._fd, self._get, self._held)
        if result < 0:
            self._owner._fail(self._get, -result, {})
        return self

    def set(self) -> None:
        """Write all of them from the buffer to the vCPU."""
        result = _ioctl(self._owner._fd, self._set, self._held)
        if result < 0:
            self._owner._fail(self._set, -result, {})

    def __getitem__(self, name: str) -> int:
        return self._words[self._places[name]]

    def __setitem__(self, name: str, value: int) -> None:
        self._words[self._places[name]] = value
