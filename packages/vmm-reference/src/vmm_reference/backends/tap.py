"""A tap interface of the host: `Documentation/networking/tuntap.rst` of Linux.

The kernel takes and gives `struct virtio_net_hdr` with each frame, so checksums and segmentation
pass through without anybody doing them, as far as the frame stays on this host.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from contextlib import ExitStack
from struct import pack
from typing import Final

from vmm_reference.devices.net.features import (
    F_GUEST_CSUM,
    F_GUEST_ECN,
    F_GUEST_TSO4,
    F_GUEST_TSO6,
    F_GUEST_UFO,
    GUEST_OFFLOADS,
    HEADER,
    HOST_OFFLOADS,
)
from vmm_reference.errors import HostError

__all__ = ["Tap"]

# From <linux/if_tun.h>.
_TUNSETIFF, _TUNSETOFFLOAD, _TUNSETVNETHDRSZ, _TUNSETQUEUE = (
    0x400454CA, 0x400454D0, 0x400454D8, 0x400454D9,
)  # fmt: skip
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR, _IFF_MULTI_QUEUE = 0x0002, 0x1000, 0x4000, 0x0100
_IFF_ATTACH_QUEUE, _IFF_DETACH_QUEUE = 0x0200, 0x0400
_TUN_F = {
    F_GUEST_CSUM: 0x01, F_GUEST_TSO4: 0x02, F_GUEST_TSO6: 0x04, F_GUEST_ECN: 0x08,
    F_GUEST_UFO: 0x10,
}  # fmt: skip
_IFNAMSIZ = 16


class Tap:
    """One interface, with one or several queues.

    Args:
        name: of an interface that is there.
        queues: how many to use.

    Attributes:
        fds: a descriptor for each queue, non-blocking.

    Raises:
        HostError: there is no such interface, or it can't be had.
    """

    vnet_header = True
    kind: Final = "tap"
    peer = ""

    def __init__(self, name: str, queues: int = 1) -> None:
        self.queues = queues
        self.offloads = HOST_OFFLOADS | GUEST_OFFLOADS
        self._attached = queues
        many = " multi_queue" if queues > 1 else ""
        hint = f"make it with: ip tuntap add dev {name} mode tap vnet_hdr{many} user $USER"
        try:
            socket.if_nametoindex(name)
        except OSError:
            raise HostError(f"tap {name}", "there is no such interface", hint) from None
        with ExitStack() as stack:
            self.fds = []
            for _ in range(queues):
                try:
                    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
                    stack.callback(os.close, fd)
                    self.fds.append(fd)
                    self._attach(fd, name)
                except OSError as error:
                    raise HostError(f"tap {name}", error.strerror, _hint(error, hint)) from None
            try:
                self.set_offloads(GUEST_OFFLOADS)
            except OSError:  # kernels since 5.x may be without UFO
                self.offloads &= ~F_GUEST_UFO
            self._resources = stack.pop_all()

    def close(self) -> None:
        """Let go of the interface; what made it is the host's own."""
        self._resources.close()

    def set_offloads(self, offloads: int) -> None:
        """Give frames with missing checksums, or larger than the MTU, to a guest that can."""
        bits = sum(bit for feature, bit in _TUN_F.items() if offloads & feature)
        for fd in self.fds[: self._attached]:
            fcntl.ioctl(fd, _TUNSETOFFLOAD, bits)

    def set_queues(self, pairs: int) -> None:
        """Have the kernel spread frames over the first `pairs` queues."""
        if len(self.fds) == 1:
            return
        for number, fd in enumerate(self.fds):
            if (number < pairs) != (number < self._attached):
                flag = _IFF_ATTACH_QUEUE if number < pairs else _IFF_DETACH_QUEUE
                fcntl.ioctl(fd, _TUNSETQUEUE, _request("", flag))
        self._attached = pairs

    def _attach(self, fd: int, name: str) -> None:
        flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR
        if self.queues > 1:
            flags |= _IFF_MULTI_QUEUE
        fcntl.ioctl(fd, _TUNSETIFF, _request(name, flags))
        fcntl.ioctl(fd, _TUNSETVNETHDRSZ, pack("i", HEADER.size))


def _request(name: str, flags: int) -> bytes:
    """A struct ifreq."""
    return pack(f"{_IFNAMSIZ}sH22x", name.encode(), flags)


def _hint(error: OSError, make: str) -> str:
    if error.errno == errno.EBUSY:
        return "another process uses it; give each machine its own"
    if error.errno == errno.EINVAL:
        return f"it is of another kind or has another number of queues; {make}"
    if error.errno in (errno.EPERM, errno.EACCES):
        return f"it is not this user's, or /dev/net/tun is not; {make}"
    if error.errno in (errno.ENOENT, errno.ENODEV):
        return "the host has no /dev/net/tun: modprobe tun"
    return ""
