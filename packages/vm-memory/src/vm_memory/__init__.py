"""Guest-physical memory for virtual machine monitors: regions, access, dirty tracking.

Every public name of the package can be imported from here; its module is loaded on first use.

>>> from vm_memory import GuestAddress, GuestMemory
>>> with GuestMemory.from_ranges([(GuestAddress(0), 0x10000)]) as memory:
...     memory.write(GuestAddress(0x1000), b"hello")
...     memory.read(GuestAddress(0x1000), 5)
b'hello'
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vm_memory.address import GuestAddress, RegionOffset
    from vm_memory.atomic import Order, fence
    from vm_memory.backing import (
        Adopted,
        Anonymous,
        Backing,
        FilePrivate,
        FileShared,
        Memfd,
    )
    from vm_memory.dirty import DirtyBitmap
    from vm_memory.errors import (
        AddressError,
        BackingLostError,
        ClosedError,
        InvalidValueError,
        MappingError,
        MemoryAccessError,
        RegionError,
        ShortTransferError,
        TransferError,
        TranslationError,
        VmMemoryError,
    )
    from vm_memory.guest_memfd import GuestMemfd
    from vm_memory.holder import MemoryHolder, NotLockedError
    from vm_memory.iommu import IommuMemory, Iotlb, Translation
    from vm_memory.iovec import Iovecs
    from vm_memory.memory import GuestMemory
    from vm_memory.options import Advice, Lock, NumaMode, NumaPolicy, Options
    from vm_memory.permissions import Permissions
    from vm_memory.region import GuestRegion
    from vm_memory.scalar import Scalar
    from vm_memory.sharing import MemoryDescription, RegionDescription

__all__ = [
    "AddressError",
    "Adopted",
    "Advice",
    "Anonymous",
    "Backing",
    "BackingLostError",
    "ClosedError",
    "DirtyBitmap",
    "FilePrivate",
    "FileShared",
    "GuestAddress",
    "GuestMemfd",
    "GuestMemory",
    "GuestRegion",
    "InvalidValueError",
    "IommuMemory",
    "Iotlb",
    "Iovecs",
    "Lock",
    "MappingError",
    "Memfd",
    "MemoryAccessError",
    "MemoryDescription",
    "MemoryHolder",
    "NotLockedError",
    "NumaMode",
    "NumaPolicy",
    "Options",
    "Order",
    "Permissions",
    "RegionDescription",
    "RegionError",
    "RegionOffset",
    "Scalar",
    "ShortTransferError",
    "TransferError",
    "Translation",
    "TranslationError",
    "VmMemoryError",
    "fence",
]

_MODULES = {
    "holder": (
        "MemoryHolder",
        "NotLockedError",
    ),
    "guest_memfd": ("GuestMemfd",),
    "iommu": (
        "IommuMemory",
        "Iotlb",
        "Translation",
    ),
    "sharing": (
        "MemoryDescription",
        "RegionDescription",
    ),
    "address": (
        "GuestAddress",
        "RegionOffset",
    ),
    "atomic": (
        "Order",
        "fence",
    ),
    "backing": (
        "Adopted",
        "Anonymous",
        "Backing",
        "FilePrivate",
        "FileShared",
        "Memfd",
    ),
    "dirty": ("DirtyBitmap",),
    "errors": (
        "AddressError",
        "BackingLostError",
        "ClosedError",
        "InvalidValueError",
        "MappingError",
        "MemoryAccessError",
        "RegionError",
        "ShortTransferError",
        "TransferError",
        "TranslationError",
        "VmMemoryError",
    ),
    "iovec": ("Iovecs",),
    "memory": ("GuestMemory",),
    "options": (
        "Advice",
        "Lock",
        "NumaMode",
        "NumaPolicy",
        "Options",
    ),
    "permissions": ("Permissions",),
    "region": ("GuestRegion",),
    "scalar": ("Scalar",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    module = _HOME.get(name)
    if module is None:
        raise AttributeError(f"module 'vm_memory' has no attribute {name!r}")
    value: object = getattr(__import__(f"vm_memory.{module}", fromlist=[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
