"""Ownership of what C made."""

from __future__ import annotations

from vm_memory._native import lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vm_memory._native import CData, Owner

# enum vmm_own
MAPPING, BITMAP, TABLE = range(3)


def own(thing: CData, kind: int, length: int = 0) -> Owner:
    """An object that owns a reference to a C structure and releases it when it is gone itself.

    Unlike a `ffi.gc` object it does so after all finalizers have run, in a cycle of garbage too.
    That of a mapping shows its memory as a buffer, and moves bytes to and from it.

    Raises:
        MemoryError: when Python is out of memory.
    """
    made: list[Owner] = []
    if lib.vmm_own(id(made), thing, kind, length):
        raise MemoryError("no memory for an object of Python")
    return made[0]
