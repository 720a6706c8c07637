"""Devices of the host's kernel that serve a guest's queues themselves: <linux/vhost.h>.

The kernel reads and writes the guest's memory directly, woken by the guest's kicks and raising its
interrupts, without this process. While it is asked to, it tells by a bitmap which pages it has
written; when it stops, they count as written like any other.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from ctypes import addressof, c_char
from struct import pack, unpack
from typing import TYPE_CHECKING

from attrs import evolve

from vm_memory import GuestAddress
from vmm_reference.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from virtio_queue import Queue, VirtioDevice
    from vm_memory import GuestMemory
    from vmm_reference.slots import VirtioSlot
    from vmm_reference.wiring import Wiring

__all__ = ["VhostNet", "VhostQueues", "VhostVsock"]

_GET_FEATURES, _SET_FEATURES, _SET_OWNER = 0x8008AF00, 0x4008AF00, 0xAF01
_SET_MEM_TABLE, _SET_LOG_BASE = 0x4008AF03, 0x4008AF04
_SET_VRING_NUM, _SET_VRING_ADDR, _SET_VRING_BASE = 0x4008AF10, 0x4028AF11, 0x4008AF12
_GET_VRING_BASE, _SET_VRING_KICK, _SET_VRING_CALL = 0xC008AF12, 0x4008AF20, 0x4008AF21
_NET_SET_BACKEND = 0x4008AF30
_VSOCK_SET_GUEST_CID, _VSOCK_SET_RUNNING = 0x4008AF60, 0x4004AF61

_F_LOG_ALL = 1 << 26
_VRING_F_LOG = 1  # flag of an address: log writes to the used ring
_LOG_PAGE = 4096


class VhostQueues:
    """Two queues that the kernel serves.

    Args:
        path: of the kernel's device.
        memory: the guest's.

    Attributes:
        features: feature bits that the kernel works with.
        together: it has both queues or none.
        attention: it asks for none.

    Raises:
        HostError: the host has no such device, or this user may not use it.
    """

    together = True
    attention = -1

    def __init__(self, path: str, memory: GuestMemory) -> None:
        self._memory = memory
        self._path = path
        self.fd = self._open()
        (self.features,) = unpack("<Q", fcntl.ioctl(self.fd, _GET_FEATURES, bytes(8)))
        self._kicks: Sequence[int] = ()
        self._calls: Sequence[int] = ()
        self._queues: Sequence[Queue] = ()
        self._accepted = 0
        self._logging = False
        end = max(int(region.guest_address) + region.size for region in memory.regions)
        self._log = mmap.mmap(-1, -(-end // _LOG_PAGE // 64 + 1) * 8 + 8)

    def _open(self) -> int:
        path = self._path
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            hint = f"modprobe {os.path.basename(path).replace('-', '_')}; it needs access to {path}"  # noqa: PTH119
            raise HostError(path, error.strerror, hint) from None
        fcntl.ioctl(fd, _SET_OWNER)
        return fd

    def connect(self, slot: VirtioSlot, numbers: Sequence[int]) -> None:
        """Have the kicks of these queues, and send their interrupts."""
        self._kicks = [slot.take_kick(number) for number in numbers]
        self._calls = [slot.call(number) for number in numbers]

    def close(self) -> None:
        """Stop, and close the device."""
        self.stop()
        os.close(self.fd)

    def start(self, features: int, queues: Mapping[int, Queue]) -> None:
        """Serve both queues from where they are.

        Raises:
            OSError: the kernel refuses.
        """
        memory = self._memory
        self._accepted = features & self.features
        self._set_features()
        regions = [
            pack("<QQQQ", int(region.guest_address), region.size, region.host_address, 0)
            for region in memory.regions
        ]
        table = bytearray(pack("<II", len(regions), 0) + b"".join(regions))
        fcntl.ioctl(self.fd, _SET_MEM_TABLE, table)
        place = addressof(c_char.from_buffer(self._log))
        fcntl.ioctl(self.fd, _SET_LOG_BASE, pack("<Q", place))
        self._queues = tuple(queues.values())
        for index, queue in enumerate(self._queues):
            fcntl.ioctl(self.fd, _SET_VRING_NUM, pack("<II", index, queue.size))
            fcntl.ioctl(self.fd, _SET_VRING_BASE, pack("<II", index, queue.save().next_avail))
            self._set_addresses(index, queue)
            fcntl.ioctl(self.fd, _SET_VRING_CALL, pack("<Ii", index, self._calls[index]))
            fcntl.ioctl(self.fd, _SET_VRING_KICK, pack("<Ii", index, self._kicks[index]))
        self._run(on=True)
        for kick in self._kicks:  # one that came before is in no state
            os.eventfd_write(kick, 1)

    def follow(self, device: VirtioDevice, wiring: Wiring) -> None:
        """Note the pages that are written while the machine wants to know: each costs a look-up."""

        def log(on: bool) -> None:
            with device.lock:
                self._logging = on
                if self._queues:
                    self._set_features()
                    for index, queue in enumerate(self._queues):
                        self._set_addresses(index, queue)

        wiring.on_dirty_log(log)

    def _set_features(self) -> None:
        features = self._accepted | (_F_LOG_ALL if self._logging else 0)
        fcntl.ioctl(self.fd, _SET_FEATURES, pack("<Q", features))

    def _set_addresses(self, index: int, queue: Queue) -> None:
        areas = (queue.descriptor_area, queue.device_area, queue.driver_area)
        hosts = [self._host_address(area) for area in areas]
        flags = _VRING_F_LOG if self._logging else 0
        address = pack("<IIQQQQ", index, flags, *hosts, queue.device_area)
        fcntl.ioctl(self.fd, _SET_VRING_ADDR, address)

    def stop(self) -> None:
        """Touch the queues no more; each is where the kernel left it."""
        if not self._queues:
            return
        queues, self._queues = self._queues, ()
        self._run(on=False)
        for index, queue in enumerate(queues):
            state = fcntl.ioctl(self.fd, _GET_VRING_BASE, pack("<II", index, 0))
            _, base = unpack("<II", state)
            if queue.ready:
                saved = queue.save()
                queue.restore(
                    evolve(saved, next_avail=base, next_used=base, pending=0, in_flight=()),
                    self._memory,
                )
        self._harvest()

    def forget(self) -> None:
        """Nothing is kept."""

    def attend(self) -> None:
        """The kernel tells of no faults but in its log."""

    def metrics(self) -> dict[str, int]:
        """The kernel counts nothing here."""
        return {}

    def _run(self, *, on: bool) -> None:
        raise NotImplementedError

    def _harvest(self) -> None:
        """Let the pages that the kernel has written count as written."""
        for region in self._memory.regions:
            if region.dirty is None:
                continue
            first = int(region.guest_address) // _LOG_PAGE // 8
            words = -(-region.size // _LOG_PAGE // 64) * 8
            part = self._log[first : first + words]
            if any(part):
                self._memory.merge_dirty(region.guest_address, part, _LOG_PAGE)
                self._log[first : first + words] = bytes(len(part))

    def _host_address(self, area: int) -> int:
        region = self._memory.find_region(GuestAddress(area))
        if region is None:
            raise OSError(14, "a ring is not in memory")
        return region.host_address + area - int(region.guest_address)


class VhostNet(VhostQueues):
    """A pair of queues of a network device, whose frames are a tap's."""

    def __init__(self, memory: GuestMemory, tap: int) -> None:
        super().__init__("/dev/vhost-net", memory)
        self._tap = tap

    def _run(self, *, on: bool) -> None:
        for index in range(2):
            fcntl.ioctl(self.fd, _NET_SET_BACKEND, pack("<Ii", index, self._tap if on else -1))


class VhostVsock(VhostQueues):
    """The queues of a socket device, whose sockets are the host's AF_VSOCK.

    The context identifier is one guest's at a time, as a disk's lock is: see `acquire`.
    """

    def __init__(self, memory: GuestMemory, cid: int) -> None:
        super().__init__("/dev/vhost-vsock", memory)
        self._cid = cid

    def acquire(self) -> None:
        """Have the context identifier.

        Raises:
            HostError: another guest has it.
        """
        try:
            fcntl.ioctl(self.fd, _VSOCK_SET_GUEST_CID, pack("<Q", self._cid))
        except OSError as error:
            hint = "give each guest a CID of its own"
            raise HostError(f"vsock CID {self._cid}", error.strerror, hint) from None

    def release(self) -> None:
        """Let another guest have it, which takes another descriptor; stopped before."""
        os.close(self.fd)
        self.fd = self._open()

    def _run(self, *, on: bool) -> None:
        fcntl.ioctl(self.fd, _VSOCK_SET_RUNNING, pack("<i", on))
