"""Typed access to Linux KVM: /dev/kvm, virtual machines, vCPUs and their exits.

Names are loaded when first used: importing the package costs next to nothing.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvm_ioctls import constants, exits, state
    from kvm_ioctls.errors import ArgumentError, ClosedError, KvmError
    from kvm_ioctls.kvm import Kvm
    from kvm_ioctls.state import (
        ClockData,
        CpuidEntry,
        DebugRegs,
        DescriptorTable,
        Fpu,
        IoapicState,
        IrqchipRoute,
        LapicState,
        MpState,
        MsiRoute,
        PicState,
        PitState2,
        Regs,
        Segment,
        Sregs,
        VcpuEvents,
        Xcrs,
        Xsave,
    )
    from kvm_ioctls.vcpu import Vcpu
    from kvm_ioctls.vm import Vm
    from kvm_ioctls.vm.memory import HostMemory

_HOMES = {
    "ArgumentError": "errors",
    "ClockData": "state.clock",
    "ClosedError": "errors",
    "CpuidEntry": "state.cpuid",
    "DebugRegs": "state.debugregs",
    "DescriptorTable": "state.sregs",
    "Fpu": "state.fpu",
    "HostMemory": "vm.memory",
    "IoapicState": "state.irqchip",
    "IrqchipRoute": "state.routing",
    "Kvm": "kvm",
    "KvmError": "errors",
    "LapicState": "state.lapic",
    "MpState": "state.mp",
    "MsiRoute": "state.routing",
    "PicState": "state.irqchip",
    "PitState2": "state.pit",
    "Regs": "state.regs",
    "Segment": "state.sregs",
    "Sregs": "state.sregs",
    "Vcpu": "vcpu",
    "VcpuEvents": "state.events",
    "Vm": "vm",
    "Xcrs": "state.xsave",
    "Xsave": "state.xsave",
}
_MODULES = ("constants", "errors", "exits", "state", "table", "testing")

__all__ = [
    "ArgumentError", "ClockData", "ClosedError", "CpuidEntry", "DebugRegs", "DescriptorTable",
    "Fpu", "HostMemory", "IoapicState", "IrqchipRoute", "Kvm", "KvmError", "LapicState", "MpState",
    "MsiRoute", "PicState", "PitState2", "Regs", "Segment", "Sregs", "Vcpu", "VcpuEvents", "Vm",
    "Xcrs", "Xsave", "constants", "exits", "state",
]  # fmt: skip


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return __import__(f"{__name__}.{name}", fromlist=["__name__"])
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(__import__(f"{__name__}.{home}", fromlist=[name]), name)
    globals()[name] = value
    return value
