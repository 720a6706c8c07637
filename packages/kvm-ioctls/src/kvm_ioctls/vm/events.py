"""eventfds that raise interrupts, and eventfds that guest accesses signal."""

from __future__ import annotations

from struct import pack

from kvm_ioctls._fd import Descriptor
from kvm_ioctls._native import lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    class HasFileno(Protocol):
        """Anything with a descriptor, such as a socket or a file."""

        def fileno(self) -> int:
            """The descriptor's number."""


__all__ = ["VmEvents"]

_DEASSIGN, _RESAMPLE = 1, 2
_IO_DATAMATCH, _IO_PIO, _IO_DEASSIGN = 1, 2, 4


def _number(fd: int | HasFileno) -> int:
    return fd if isinstance(fd, int) else fd.fileno()


class VmEvents(Descriptor):
    """The part of a VM that connects it with eventfds.

    KVM holds its own reference to each eventfd: closing yours does not disconnect it.
    """

    def irqfd(
        self, fd: int | HasFileno, gsi: int, resample_fd: int | HasFileno | None = None
    ) -> None:
        """KVM_IRQFD (KVM_CAP_IRQFD): whenever `fd` is signalled, raise interrupt `gsi`.

        Args:
            fd: an eventfd.
            gsi: the interrupt, an index of the routing table.
            resample_fd: for a level-triggered line (KVM_CAP_IRQFD_RESAMPLE): `fd` raises it and it
                stays up; when the guest acknowledges, the line falls and this eventfd is signalled,
                so that the device can raise it again.

        Raises:
            KvmError: EBUSY if `fd` raises an interrupt already, EBADF if it is no eventfd, EINVAL
                without an interrupt controller in the kernel.
        """
        resample = -1 if resample_fd is None else _number(resample_fd)
        flags = 0 if resample_fd is None else _RESAMPLE
        self._irqfd(_number(fd), gsi, flags, max(resample, 0))

    def irqfd_deassign(self, fd: int | HasFileno, gsi: int) -> None:
        """KVM_IRQFD with KVM_IRQFD_FLAG_DEASSIGN: disconnect again; a stranger is no error."""
        self._irqfd(_number(fd), gsi, _DEASSIGN, 0)

    def _irqfd(self, fd: int, gsi: int, flags: int, resample: int) -> None:
        self._write(
            lib.KVM_IRQFD,
            pack("<iIIi16x", fd, gsi, flags, resample),
            fd=fd,
            gsi=gsi,
            flags=flags,
        )

    def ioeventfd(
        self,
        fd: int | HasFileno,
        address: int,
        length: int,
        *,
        datamatch: int | None = None,
        pio: bool = False,
    ) -> None:
        """KVM_IOEVENTFD (KVM_CAP_IOEVENTFD): signal `fd` on a guest's write instead of an exit.

        Args:
            fd: an eventfd.
            address: the guest-physical address, or the port with `pio`.
            length: the write's width, 1, 2, 4 or 8 bytes; 0 stands for any width.
            datamatch: only a write of this value, or None for any value.
            pio: a port instead of memory.

        Raises:
            KvmError: EEXIST if a registration that this one could not be told from exists.
        """
        self._ioeventfd(fd, address, length, datamatch, _IO_PIO if pio else 0)

    def ioeventfd_deassign(
        self,
        fd: int | HasFileno,
        address: int,
        length: int,
        *,
        datamatch: int | None = None,
        pio: bool = False,
    ) -> None:
        """KVM_IOEVENTFD with KVM_IOEVENTFD_FLAG_DEASSIGN: undo the same call of ioeventfd().

        Raises:
            KvmError: ENOENT if there is no such registration.
        """
        self._ioeventfd(fd, address, length, datamatch, _IO_DEASSIGN | (_IO_PIO if pio else 0))

    def _ioeventfd(
        self, fd: int | HasFileno, address: int, length: int, datamatch: int | None, flags: int
    ) -> None:
        flags |= 0 if datamatch is None else _IO_DATAMATCH
        number = _number(fd)
        # KVM compares the written value widened with zeros, so wider bits could never match.
        if datamatch is not None and length and not 0 <= datamatch < 1 << 8 * length:
            from kvm_ioctls._hints import refuse

            raise refuse("KVM_IOEVENTFD", 22, {"datamatch": datamatch, "length": length},
                         "no write of this length has this value")  # fmt: skip
        self._write(
            lib.KVM_IOEVENTFD,
            pack("<QQIiI36x", datamatch or 0, address, length, number, flags),
            fd=number,
            address=address,
            length=length,
            datamatch=datamatch,
            flags=flags,
        )
