"""Counters of several vCPUs stay in step, whatever saving and restoring them costs.

KVM in software has one counter for all, so a plain model of KVM stands for it here; the real one is
asked in the lab's tests.
"""

from __future__ import annotations

from struct import pack, unpack
from typing import Any, cast

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvm_ioctls import KvmError, Vcpu
from kvm_ioctls.state.counters import at_one_moment, synchronize
from kvm_ioctls.state.snapshot import VcpuState
from kvm_ioctls.testing import Guest

TSC, DEADLINE = 0x10, 0x6E0
KHZ = 1000
SECOND = 1000 * KHZ
ALL = (1 << 64) - 1


@attrs.frozen
class State:
    """As much of a vCPU's state as matters here."""

    msrs: tuple[tuple[int, int], ...]
    tsc_khz: int = KHZ


class Model:
    """A vCPU whose counter is the host's and an offset, and every call takes time."""

    now = 0

    def __init__(self, offset: int, delays: st.DataObject) -> None:
        self.offset, self._delays = offset, delays
        self.armed: int | None = None  # the host's time at which the timer rings

    def _pass(self) -> None:
        Model.now += self._delays.draw(st.integers(0, 3 * SECOND))

    def has_device_attr(self, group: int, attr: int) -> bool:
        return (group, attr) == (0, 0)

    def get_device_attr(self, group: int, attr: int) -> bytes:
        self._pass()
        return pack("<q", self.offset)

    def set_device_attr(self, group: int, attr: int, value: bytes) -> None:
        self._pass()
        (self.offset,) = unpack("<q", value)

    def set_msrs(self, msrs: dict[int, int]) -> None:
        self._pass()
        if TSC in msrs:
            self.offset = (msrs[TSC] - Model.now + (1 << 63) & ALL) - (1 << 63)
        if DEADLINE in msrs:
            self.armed = msrs[DEADLINE] - self.offset

    def save(self, deadline: int) -> State:
        self._pass()
        return State(((1, 1), (TSC, Model.now + self.offset & ALL), (DEADLINE, deadline)))


@given(
    st.lists(st.sampled_from([0, 1, SECOND - 1, SECOND, 1 << 40, -SECOND]), min_size=2, max_size=5),
    st.integers(0, 1 << 62),
    st.integers(0, 1 << 62),
    st.data(),
)
def test_counters_are_as_far_apart_as_they_were(
    differences: list[int], first: int, deadline: int, data: st.DataObject
) -> None:
    """To the tick from a second on; below, they are the same; and timers ring by them."""
    Model.now = 1 << 50
    differences[0] = 0
    here = [Model(first + difference, data) for difference in differences]
    there = [Model(0, data) for _ in here]
    saved = cast("list[VcpuState]", [vcpu.save(deadline) for vcpu in here])
    states = at_one_moment(cast("list[Vcpu]", here), saved)
    counters = [dict(state.msrs)[TSC] for state in states]
    assert [value - counters[0] for value in counters] == differences
    assert [state.msrs[0] for state in states] == [(1, 1)] * len(here)
    for vcpu, state in zip(there, states, strict=True):
        vcpu.set_msrs(dict(state.msrs))
    synchronize(cast("list[Vcpu]", there), states)
    expected = [difference if abs(difference) >= SECOND else 0 for difference in differences]
    assert [vcpu.offset - there[0].offset for vcpu in there] == expected
    if deadline:
        assert [vcpu.armed for vcpu in there] == [deadline - vcpu.offset for vcpu in there]


def test_what_kvm_does_not_tell_is_left_to_it() -> None:
    """Without offsets, or without the counter among the MSRs, nothing is changed."""
    states: Any = [State(((1, 1),)), State(((1, 1),))]

    class Old(Model):
        def has_device_attr(self, group: int, attr: int) -> bool:
            return False

    for kind in (Model, Old):
        vcpus: Any = [kind(5, cast("st.DataObject", None)) for _ in states]
        for vcpu in vcpus:
            vcpu._pass = lambda: None
        assert at_one_moment(vcpus, states) == tuple(states)
        synchronize(vcpus, states)
        assert [vcpu.offset for vcpu in vcpus] == [5, 5]


@pytest.mark.kvm
def test_all_vcpus_go_into_as_many_others() -> None:
    """Each of them; a state too few is refused before anything is written."""
    with Guest("hlt", cpus=2) as guest, Guest("hlt", cpus=2) as other:
        states = guest.vm.save_vcpus()
        assert len(states) == 2
        changed = [
            attrs.evolve(s, regs=attrs.evolve(s.regs, rbx=n + 1)) for n, s in enumerate(states)
        ]
        before = other.vm.save_vcpus()
        with pytest.raises(KvmError, match=r"states=1, vcpus=2.*each vCPU needs a state"):
            other.vm.restore_vcpus(changed[:1])
        assert [s.regs for s in other.vm.save_vcpus()] == [s.regs for s in before]
        other.vm.restore_vcpus(changed)
        assert [vcpu.get_regs().rbx for vcpu in other.vm.vcpus] == [1, 2]
