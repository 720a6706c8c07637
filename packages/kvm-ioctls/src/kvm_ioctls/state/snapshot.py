"""All that must be saved of a vCPU and of a VM, and the order in which KVM wants it back."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import attrs

from kvm_ioctls.errors import KvmError
from kvm_ioctls.state.clock import ClockData
from kvm_ioctls.state.cpuid import CpuidEntry
from kvm_ioctls.state.debugregs import DebugRegs
from kvm_ioctls.state.events import VcpuEvents
from kvm_ioctls.state.irqchip import IoapicState, PicState
from kvm_ioctls.state.lapic import LapicState
from kvm_ioctls.state.mp import MpState
from kvm_ioctls.state.nested import NestedState
from kvm_ioctls.state.pit import PitState2
from kvm_ioctls.state.regs import Regs
from kvm_ioctls.state.routing import RoutingEntry
from kvm_ioctls.state.sregs import Sregs, Sregs2
from kvm_ioctls.state.xsave import Xcrs, Xsave

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvm_ioctls.vcpu import Vcpu
    from kvm_ioctls.vm import Vm

__all__ = ["VcpuState", "VmState"]

_ENXIO, _EINVAL = 6, 22
_TSC_DEADLINE = 0x6E0
_REALTIME = 4
_CAP_SREGS2, _PDPTRS_VALID = 200, 1
_CR0_PG, _CR4_PAE, _EFER_LMA = 1 << 31, 1 << 5, 1 << 10


@attrs.frozen
class VcpuState:
    """A vCPU between two runs.

    Attributes:
        cpuid: the leaves the guest sees; none if they are known elsewhere, and set there.
        tsc_khz: its TSC's rate.
        sregs: and regs, xcrs, xsave, debugregs, events, mp_state: as the ioctls give them.
        msrs: the MSRs that KVM saves, by index.
        lapic: None without a controller in the kernel.
        nested: None where KVM runs no nested guests.
        pdptrs: the page-directory pointers that the processor has loaded, which may differ from
            those in memory; None outside of 32-bit PAE paging, and where KVM cannot tell
            (KVM_CAP_SREGS2).
        version: of this form; 2, which has `pdptrs`.
    """

    cpuid: tuple[CpuidEntry, ...]
    tsc_khz: int
    sregs: Sregs
    regs: Regs
    xcrs: Xcrs
    xsave: Xsave
    debugregs: DebugRegs
    msrs: tuple[tuple[int, int], ...]
    events: VcpuEvents
    mp_state: MpState
    lapic: LapicState | None = None
    nested: NestedState | None = None
    pdptrs: tuple[int, int, int, int] | None = None
    version: int = attrs.field(default=2, kw_only=True)


@attrs.frozen
class VmState:
    """A VM whose vCPUs all stand still, without its memory and without the vCPUs.

    Attributes:
        clock: the guest's kvmclock.
        pic_master: and pic_slave, ioapic: None without controllers in the kernel.
        pit: None without a timer in the kernel.
        routing: the interrupt routing table, or None if it was never set.
        version: of this form; 1.
    """

    clock: ClockData
    pic_master: PicState | None = None
    pic_slave: PicState | None = None
    ioapic: IoapicState | None = None
    pit: PitState2 | None = None
    routing: tuple[RoutingEntry, ...] | None = None
    version: int = attrs.field(default=1, kw_only=True)


def chosen_msrs(indices: Iterable[int] | None) -> tuple[int, ...]:
    """The MSRs to save: those given, or for None all that KVM saves."""
    return _all_msrs() if indices is None else tuple(indices)


@cache
def _all_msrs() -> tuple[int, ...]:
    from kvm_ioctls.kvm import Kvm

    with Kvm() as kvm:
        return tuple(kvm.get_msr_index_list())


def save_vcpu(vcpu: Vcpu, msr_indices: tuple[int, ...], *, cpuid: bool = True) -> VcpuState:
    """Read everything. The run state comes first, because asking for it settles INIT and SIPI."""
    mp_state = vcpu.get_mp_state()
    nested = None
    if vcpu.vm.check_extension(157):
        nested = vcpu.get_nested_state()
    try:
        lapic = vcpu.get_lapic()
    except KvmError as error:
        if error.errno != _EINVAL:
            raise
        lapic = None
    sregs = vcpu.get_sregs()
    return VcpuState(
        cpuid=vcpu.get_cpuid2() if cpuid else (),
        tsc_khz=vcpu.get_tsc_khz(),
        regs=vcpu.get_regs(),
        sregs=sregs,
        xcrs=vcpu.get_xcrs(),
        xsave=vcpu.get_xsave2(),
        debugregs=vcpu.get_debugregs(),
        lapic=lapic,
        msrs=tuple(vcpu.get_msrs(msr_indices).values.items()),
        nested=nested,
        events=vcpu.get_vcpu_events(),
        mp_state=mp_state,
        pdptrs=_pdptrs(vcpu, sregs),
    )


def _pdptrs(vcpu: Vcpu, sregs: Sregs) -> tuple[int, int, int, int] | None:
    pae = sregs.cr0 & _CR0_PG and sregs.cr4 & _CR4_PAE and not sregs.efer & _EFER_LMA
    if not pae or not vcpu.vm.check_extension(_CAP_SREGS2):
        return None
    loaded = vcpu.get_sregs2()
    return loaded.pdptrs if loaded.flags & _PDPTRS_VALID else None


def restore_vcpu(vcpu: Vcpu, state: VcpuState) -> None:
    """Write everything, in the order in which each part is legal.

    CPUID decides which bits the others may have. The special registers carry the APIC's base, which
    the local APIC wants; the APIC's timer mode, which the TSC deadline wants. Events and the run
    state come last, because the others would wake or change them.
    """
    if state.cpuid:
        vcpu.set_cpuid2(state.cpuid)
    if state.tsc_khz and vcpu.get_tsc_khz() != state.tsc_khz:
        vcpu.set_tsc_khz(state.tsc_khz)
    if state.pdptrs is None:
        vcpu.set_sregs(state.sregs)
    else:  # set_sregs() would load them from memory
        values = attrs.asdict(state.sregs, recurse=False)
        del values["interrupt_bitmap"], values["version"]  # the events have the interrupt too
        vcpu.set_sregs2(Sregs2(**values, flags=_PDPTRS_VALID, pdptrs=state.pdptrs))
    vcpu.set_regs(state.regs)
    vcpu.set_xcrs(state.xcrs)
    vcpu.set_xsave(state.xsave)
    vcpu.set_debugregs(state.debugregs)
    if state.lapic is not None:
        vcpu.set_lapic(state.lapic)
    _restore_msrs(vcpu, dict(state.msrs))
    if state.nested is not None and state.nested.data:
        vcpu.set_nested_state(state.nested)
    vcpu.set_vcpu_events(state.events)
    if state.mp_state != vcpu.get_mp_state():
        vcpu.set_mp_state(state.mp_state)


def _restore_msrs(vcpu: Vcpu, msrs: dict[int, int]) -> None:
    deadline = msrs.pop(_TSC_DEADLINE, 0)
    refused = vcpu.set_msrs(msrs).refused
    # Some MSRs only state what the host is: refusing these is fine if it states the same.
    now = vcpu.get_msrs(refused).values
    wrong = [index for index in refused if now.get(index) != msrs[index]]
    if wrong:
        raise KvmError(
            "KVM_SET_MSRS",
            _EINVAL,
            {"index": wrong[0], "value": msrs[wrong[0]]},
            f"this host refuses {len(wrong)} of the saved MSRs: it differs from the one that saved",
        )
    if deadline:
        vcpu.set_msrs({_TSC_DEADLINE: deadline})


def save_vm(vm: Vm) -> VmState:
    """Read what belongs to the VM as a whole."""
    chips: list[PicState | IoapicState | None] = []
    for chip in range(3):
        try:
            chips.append(vm.get_irqchip(chip))
        except KvmError as error:
            if error.errno != _ENXIO:
                raise
            chips.append(None)
    try:
        pit = vm.get_pit2()
    except KvmError as error:
        if error.errno != _ENXIO:
            raise
        pit = None
    master, slave, ioapic = chips
    assert not isinstance(master, IoapicState)
    assert not isinstance(slave, IoapicState)
    assert not isinstance(ioapic, PicState)
    return VmState(
        clock=vm.get_clock(),
        pic_master=master,
        pic_slave=slave,
        ioapic=ioapic,
        pit=pit,
        routing=vm.gsi_routing,
    )


def restore_vm(vm: Vm, state: VmState) -> None:
    """Write it to a VM that was made alike; the clock last, since it goes on at once."""
    if state.routing is not None:
        vm.set_gsi_routing(state.routing)
    for chip, saved in enumerate((state.pic_master, state.pic_slave, state.ioapic)):
        if saved is not None:
            vm.set_irqchip(chip, saved)
    if state.pit is not None:
        vm.set_pit2(state.pit)
    vm.set_clock(attrs.evolve(state.clock, flags=state.clock.flags & _REALTIME))
