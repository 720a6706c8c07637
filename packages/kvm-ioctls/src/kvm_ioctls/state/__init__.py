"""Everything that KVM can save, as values: frozen, comparable, printable, versioned.

Each class has the kernel's field names, `from_bytes()` and `to_bytes()` for the kernel's layout,
and a `version` of its own form. Modules are loaded when one of their names is first used.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvm_ioctls.state.clock import ClockData
    from kvm_ioctls.state.cpuid import CpuidEntry
    from kvm_ioctls.state.debugregs import DebugRegs
    from kvm_ioctls.state.events import VcpuEvents
    from kvm_ioctls.state.fpu import Fpu
    from kvm_ioctls.state.irqchip import IoapicState, PicState, Redirection
    from kvm_ioctls.state.lapic import LapicState
    from kvm_ioctls.state.mp import MpState
    from kvm_ioctls.state.msrs import MsrReport
    from kvm_ioctls.state.nested import NestedState
    from kvm_ioctls.state.pit import PitChannelState, PitState2
    from kvm_ioctls.state.regs import Regs
    from kvm_ioctls.state.routing import HvSintRoute, IrqchipRoute, MsiRoute, XenEvtchnRoute
    from kvm_ioctls.state.snapshot import VcpuState, VmState
    from kvm_ioctls.state.sregs import DescriptorTable, Segment, Sregs, Sregs2
    from kvm_ioctls.state.xsave import Xcrs, Xsave

_HOMES = {
    "ClockData": "clock",
    "CpuidEntry": "cpuid",
    "DebugRegs": "debugregs",
    "DescriptorTable": "sregs",
    "Fpu": "fpu",
    "HvSintRoute": "routing",
    "IoapicState": "irqchip",
    "IrqchipRoute": "routing",
    "LapicState": "lapic",
    "MpState": "mp",
    "MsiRoute": "routing",
    "MsrReport": "msrs",
    "NestedState": "nested",
    "PicState": "irqchip",
    "PitChannelState": "pit",
    "PitState2": "pit",
    "Redirection": "irqchip",
    "Regs": "regs",
    "Segment": "sregs",
    "Sregs": "sregs",
    "Sregs2": "sregs",
    "VcpuEvents": "events",
    "VcpuState": "snapshot",
    "VmState": "snapshot",
    "Xcrs": "xsave",
    "XenEvtchnRoute": "routing",
    "Xsave": "xsave",
}

__all__ = [
    "ClockData",
    "CpuidEntry",
    "DebugRegs",
    "DescriptorTable",
    "Fpu",
    "HvSintRoute",
    "IoapicState",
    "IrqchipRoute",
    "LapicState",
    "MpState",
    "MsiRoute",
    "MsrReport",
    "NestedState",
    "PicState",
    "PitChannelState",
    "PitState2",
    "Redirection",
    "Regs",
    "Segment",
    "Sregs",
    "Sregs2",
    "VcpuEvents",
    "VcpuState",
    "VmState",
    "Xcrs",
    "XenEvtchnRoute",
    "Xsave",
]


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value: object = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value
