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

from kvm_ioctls.exits.base import Exit

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvm_ioctls.exits.failures import (
        EmulationFailure,
        FailEntry,
        InternalError,
        MemoryFault,
        Unknown,
    )
    from kvm_ioctls.exits.foreign import (
        ArmDebug,
        ArmLdst64b,
        ArmNisv,
        ArmSea,
        Dcr,
        Epr,
        LoongarchIocsrRead,
        LoongarchIocsrWrite,
        Osi,
        PaprHcall,
        RiscvCsr,
        RiscvSbi,
        S390Reset,
        S390Sieic,
        S390Stsi,
        S390Tsch,
        S390Ucontrol,
        Watchdog,
    )
    from kvm_ioctls.exits.io import (
        IoIn,
        IoOut,
        MmioRead,
        MmioWrite,
    )
    from kvm_ioctls.exits.plain import (
        Hlt,
        Interrupted,
        IrqWindowOpen,
        Shutdown,
    )
    from kvm_ioctls.exits.rare import (
        ApResetHold,
        DirtyRingFull,
        ExceptionExit,
        HypervHcall,
        HypervSyndbg,
        HypervSynic,
        Nmi,
        Notify,
        SetTpr,
        SnpReqCerts,
        Tdx,
        X86BusLock,
        XenHcall,
    )
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
    "ApResetHold": "rare",
    "ArmDebug": "foreign",
    "ArmLdst64b": "foreign",
    "ArmNisv": "foreign",
    "ArmSea": "foreign",
    "Dcr": "foreign",
    "Debug": "x86",
    "DirtyRingFull": "rare",
    "EmulationFailure": "failures",
    "Epr": "foreign",
    "ExceptionExit": "rare",
    "FailEntry": "failures",
    "Hlt": "plain",
    "Hypercall": "x86",
    "HypervHcall": "rare",
    "HypervSyndbg": "rare",
    "HypervSynic": "rare",
    "InternalError": "failures",
    "Interrupted": "plain",
    "IoIn": "io",
    "IoOut": "io",
    "IoapicEoi": "x86",
    "IrqWindowOpen": "plain",
    "LoongarchIocsrRead": "foreign",
    "LoongarchIocsrWrite": "foreign",
    "MemoryFault": "failures",
    "MmioRead": "io",
    "MmioWrite": "io",
    "Nmi": "rare",
    "Notify": "rare",
    "Osi": "foreign",
    "PaprHcall": "foreign",
    "Rdmsr": "x86",
    "RiscvCsr": "foreign",
    "RiscvSbi": "foreign",
    "S390Reset": "foreign",
    "S390Sieic": "foreign",
    "S390Stsi": "foreign",
    "S390Tsch": "foreign",
    "S390Ucontrol": "foreign",
    "SetTpr": "rare",
    "Shutdown": "plain",
    "SnpReqCerts": "rare",
    "SystemEvent": "x86",
    "Tdx": "rare",
    "TprAccess": "x86",
    "Unknown": "failures",
    "Watchdog": "foreign",
    "Wrmsr": "x86",
    "X86BusLock": "rare",
    "XenHcall": "rare",
}

__all__ = [
    "ApResetHold",
    "ArmDebug",
    "ArmLdst64b",
    "ArmNisv",
    "ArmSea",
    "Dcr",
    "Debug",
    "DirtyRingFull",
    "EmulationFailure",
    "Epr",
    "ExceptionExit",
    "Exit",
    "FailEntry",
    "Hlt",
    "Hypercall",
    "HypervHcall",
    "HypervSyndbg",
    "HypervSynic",
    "InternalError",
    "Interrupted",
    "IoIn",
    "IoOut",
    "IoapicEoi",
    "IrqWindowOpen",
    "LoongarchIocsrRead",
    "LoongarchIocsrWrite",
    "MemoryFault",
    "MmioRead",
    "MmioWrite",
    "Nmi",
    "Notify",
    "Osi",
    "PaprHcall",
    "Rdmsr",
    "RiscvCsr",
    "RiscvSbi",
    "S390Reset",
    "S390Sieic",
    "S390Stsi",
    "S390Tsch",
    "S390Ucontrol",
    "SetTpr",
    "Shutdown",
    "SnpReqCerts",
    "SystemEvent",
    "Tdx",
    "TprAccess",
    "Unknown",
    "Watchdog",
    "Wrmsr",
    "X86BusLock",
    "XenHcall",
]


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(__import__(f"{__name__}.{home}", fromlist=[name]), name)
    globals()[name] = value
    return value
