"""Device attributes: the same four calls on the system, a VM, a vCPU and a device."""

from __future__ import annotations

import errno
from struct import pack

from kvm_ioctls._fd import Descriptor
from kvm_ioctls._native import ffi, lib

__all__ = ["Attributes"]


class Attributes(Descriptor):
    """The part of an object that has attributes, in groups, each a small structure or number."""

    def set_device_attr(self, group: int, attr: int, value: bytes = b"") -> None:
        """KVM_SET_DEVICE_ATTR: set an attribute.

        Args:
            group: which kind of attribute.
            attr: which one of it.
            value: its content, as long as the attribute's documentation says.
        """
        held = ffi.from_buffer(value)
        self._attr(lib.KVM_SET_DEVICE_ATTR, group, attr, int(ffi.cast("uintptr_t", held)))

    def get_device_attr(self, group: int, attr: int, size: int = 8) -> bytes:
        """KVM_GET_DEVICE_ATTR: read an attribute.

        Args:
            group: which kind of attribute.
            attr: which one of it.
            size: how many bytes it has, as its documentation says. The kernel writes that many,
                whatever is said here, so at least a page is set aside for it.
        """
        value = bytearray(max(size, 4096))
        held = ffi.from_buffer(value)
        self._attr(lib.KVM_GET_DEVICE_ATTR, group, attr, int(ffi.cast("uintptr_t", held)))
        return bytes(value[:size])

    def has_device_attr(self, group: int, attr: int) -> bool:
        """KVM_HAS_DEVICE_ATTR: whether there is such an attribute."""
        result = self._try(lib.KVM_HAS_DEVICE_ATTR, pack("<IIQQ", 0, group, attr, 0))
        if result in (-errno.ENXIO, -errno.ENOTTY, -errno.EINVAL):
            return False
        if result < 0:
            self._fail(lib.KVM_HAS_DEVICE_ATTR, -result, {"group": group, "attr": attr})
        return True

    def _attr(self, request: int, group: int, attr: int, address: int) -> None:
        self._write(request, pack("<IIQQ", 0, group, attr, address), group=group, attr=attr)
