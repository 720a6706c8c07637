"""Port and memory-mapped I/O: the exits that a machine's devices live on."""

from __future__ import annotations

from struct import Struct

from kvm_ioctls._values import define
from kvm_ioctls.exits.base import Exit

__all__ = ["IoIn", "IoOut", "MmioRead", "MmioWrite"]


@define
class IoIn(Exit):
    """KVM_EXIT_IO, in: the guest reads a port.

    Attributes:
        port: 0 to 65535.
        size: bytes of one access: 1, 2 or 4.
        count: how many accesses: above 1 for string instructions.
        data: a view of the run page, size * count bytes: write the answer there, then run.
    """

    __slots__ = ("count", "data", "port", "size")

    reason = 2
    port: int
    size: int
    count: int
    data: memoryview

    def __init__(self, port: int, size: int, count: int, data: memoryview) -> None:
        self.port = port
        self.size = size
        self.count = count
        self.data = data


@define
class IoOut(Exit):
    """KVM_EXIT_IO, out: the guest writes a port.

    Attributes:
        port: 0 to 65535.
        size: bytes of one access: 1, 2 or 4.
        count: how many accesses: above 1 for string instructions.
        data: what it wrote, size * count bytes.
    """

    __slots__ = ("count", "data", "port", "size")

    reason = 2
    port: int
    size: int
    count: int
    data: bytes

    def __init__(self, port: int, size: int, count: int, data: bytes) -> None:
        self.port = port
        self.size = size
        self.count = count
        self.data = data


@define
class MmioRead(Exit):
    """KVM_EXIT_MMIO, read: the guest reads an address without memory.

    Attributes:
        address: guest-physical.
        data: a view of the run page, 1 to 8 bytes: write the answer there, then run.
    """

    __slots__ = ("address", "data")

    reason = 6
    address: int
    data: memoryview

    def __init__(self, address: int, data: memoryview) -> None:
        self.address = address
        self.data = data


@define
class MmioWrite(Exit):
    """KVM_EXIT_MMIO, write: the guest writes an address without memory.

    Attributes:
        address: guest-physical.
        data: what it wrote, 1 to 8 bytes.
    """

    __slots__ = ("address", "data")

    reason = 6
    address: int
    data: bytes

    def __init__(self, address: int, data: bytes) -> None:
        self.address = address
        self.data = data


unpack_io = Struct("<BBHIQ").unpack_from
unpack_mmio = Struct("<QQIB").unpack_from


def decode_io(page: memoryview) -> Exit:
    """From a run page whose exit reason is KVM_EXIT_IO."""
    direction, size, port, count, offset = unpack_io(page, 32)
    data = page[offset : offset + size * count]
    if direction:
        return IoOut(port, size, count, data.tobytes())
    return IoIn(port, size, count, data)


def decode_mmio(page: memoryview) -> Exit:
    """From a run page whose exit reason is KVM_EXIT_MMIO."""
    address, _, length, is_write = unpack_mmio(page, 32)
    data = page[40 : 40 + (length if length < 8 else 8)]
    if is_write:
        return MmioWrite(address, data.tobytes())
    return MmioRead(address, data)
