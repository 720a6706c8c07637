"""Why a vCPU stopped running: one small class a reason, made for `match`.

```python
match vcpu.run():
    case exits.IoOut(port=0x3F8, data=data):
        console.write(data)
    case exits.IoIn(data=view):
        view[:] = bytes(len(view))
    case exits.Hlt() | exits.Shutdown():
        ...
```

Classes are loaded when they are first named or first occur.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvm_ioctls.exits.base import Exit

if TYPE_CHECKING:
    from kvm_ioctls.exits.failures import (
        EmulationFailure,
        FailEntry,
        InternalError,
        MemoryFault,
        Unknown,
    )
    from kvm_ioctls.exits.io import IoIn, IoOut, MmioRead, MmioWrite
    from kvm_ioctls.exits.plain import Hlt, Interrupted, IrqWindowOpen, Shutdown
    from kvm_ioctls.exits.x86 import (
        Debug,
        Hypercall,
        IoapicEoi,
        Rdmsr,
        SystemEvent,
        TprAccess,
        Wrmsr,
    )

_HOMES = {
    "Debug": "x86",
    "EmulationFailure": "failures",
    "FailEntry": "failures",
    "Hlt": "plain",
    "Hypercall": "x86",
    "Interrupted": "plain",
    "InternalError": "failures",
    "IoIn": "io",
    "IoOut": "io",
    "IoapicEoi": "x86",
    "IrqWindowOpen": "plain",
    "MemoryFault": "failures",
    "MmioRead": "io",
    "MmioWrite": "io",
    "Rdmsr": "x86",
    "Shutdown": "plain",
    "SystemEvent": "x86",
    "TprAccess": "x86",
    "Unknown": "failures",
    "Wrmsr": "x86",
}

__all__ = [
    "Debug",
    "EmulationFailure",
    "Exit",
    "FailEntry",
    "Hlt",
    "Hypercall",
    "InternalError",
    "Interrupted",
    "IoIn",
    "IoOut",
    "IoapicEoi",
    "IrqWindowOpen",
    "MemoryFault",
    "MmioRead",
    "MmioWrite",
    "Rdmsr",
    "Shutdown",
    "SystemEvent",
    "TprAccess",
    "Unknown",
    "Wrmsr",
]  # fmt: skip


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value: object = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value
