"""The time-stamp counters of a VM's vCPUs, which its operating system expects to be in step.

KVM takes two counters for one if they are written within a second of each other and the values fit
that (kvm_synchronize_tsc). On a busy host, or where a page of the guest has to come first, saving
and restoring several vCPUs takes longer, and they would be apart from then on by as much. What is
added to the host's counter, KVM_VCPU_TSC_OFFSET (Documentation/virt/kvm/devices/vcpu.rst, 4.1),
does not depend on when it is asked for.
"""

from __future__ import annotations

from struct import pack, unpack
from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvm_ioctls.state.snapshot import VcpuState
    from kvm_ioctls.vcpu import Vcpu

__all__: list[str] = []

_TSC, _TSC_DEADLINE = 0x10, 0x6E0
_ALL = (1 << 64) - 1
_KVM_VCPU_TSC_CTRL = _KVM_VCPU_TSC_OFFSET = 0


def at_one_moment(vcpus: Sequence[Vcpu], states: Sequence[VcpuState]) -> tuple[VcpuState, ...]:
    """The same states with counters as they were when the first one was saved.

    Unchanged where KVM does not tell the offsets, or a counter is not among the MSRs.
    """
    found, saved = _offsets(vcpus), [dict(state.msrs).get(_TSC) for state in states]
    if found is None or None in saved:
        return tuple(states)
    moments = [(saved[0] or 0) + offset - found[0] & _ALL for offset in found]
    return tuple(
        attrs.evolve(
            state, msrs=tuple((n, moment if n == _TSC else value) for n, value in state.msrs)
        )
        for state, moment in zip(states, moments, strict=True)
    )


def synchronize(vcpus: Sequence[Vcpu], states: Sequence[VcpuState]) -> None:
    """Put counters that were restored one after the other as far apart as they were saved.

    Less than a second is as nothing, as it is for KVM. All are written if one has to be, for only
    then does KVM see that they agree; the deadlines too, as timers were set by the counters before.
    """
    found, saved = _offsets(vcpus), [dict(state.msrs).get(_TSC) for state in states]
    if found is None or None in saved:
        return
    first = saved[0] or 0
    wanted = [
        _signed(found[0] + _apart((value or 0) - first, state.tsc_khz))
        for value, state in zip(saved, states, strict=True)
    ]
    if wanted == found:
        return
    for vcpu, state, offset in zip(vcpus, states, wanted, strict=True):
        vcpu.set_device_attr(_KVM_VCPU_TSC_CTRL, _KVM_VCPU_TSC_OFFSET, pack("<q", offset))
        if deadline := dict(state.msrs).get(_TSC_DEADLINE):
            vcpu.set_msrs({_TSC_DEADLINE: deadline})


def _offsets(vcpus: Sequence[Vcpu]) -> list[int] | None:
    group, attr = _KVM_VCPU_TSC_CTRL, _KVM_VCPU_TSC_OFFSET
    if len(vcpus) < 2 or not vcpus[0].has_device_attr(group, attr):
        return None
    return [unpack("<q", vcpu.get_device_attr(group, attr))[0] for vcpu in vcpus]


def _apart(difference: int, khz: int) -> int:
    difference = _signed(difference)
    return difference if abs(difference) >= 1000 * khz else 0


def _signed(value: int) -> int:
    return (value + (1 << 63) & _ALL) - (1 << 63)
