"""Devices in the kernel, made by Vm.create_device()."""

from __future__ import annotations

from kvm_ioctls._attributes import Attributes

__all__ = ["Device"]


class Device(Attributes):
    """A device of KVM, such as VFIO's; it is asked through its attributes.

    Attributes:
        type: KVM_DEV_TYPE_*.
    """

    _kind = "device"

    def __init__(self, fd: int, type: int) -> None:  # noqa: A002 - the kernel's name
        super().__init__(fd)
        self.type = type
