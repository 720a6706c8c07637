"""Ownership of what C made."""

from __future__ import annotations

from vm_memory._native import lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vm_memory._native import CData

# enum vmm_own
MAPPING, BITMAP, TABLE = range(3)


def own(thing: CData, kind: int, length: int = 0) -> memoryview:
    """An object that owns a reference to a C structure and releases it when it is gone itself.

    Unlike a `ffi.gc` object it does so after all finalizers have run, in a cycle of garbage too.
    What is returned is typed as what it is used for: the buffer of a mapping's memory.

    Raises:
        MemoryError: when Python is out of memory.
    """
    made: list[memoryview] = []
    if lib.vmm_own(id(made), thing, kind, length):
        raise MemoryError("no memory for an object of Python")
    return made[0]
