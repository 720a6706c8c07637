"""States as plain values: from the kernel's bytes and back, and what they refuse to become."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvm_ioctls import (
    ArgumentError,
    DebugRegs,
    Fpu,
    IoapicState,
    LapicState,
    PitState2,
    Regs,
    Sregs,
    VcpuEvents,
    Xcrs,
    Xsave,
)
from kvm_ioctls.arm64 import KVM_ARM_IRQ_TYPE_PPI, irq_number
from kvm_ioctls.state import ClockData, NestedState, PicState, Segment, Sregs2
from kvm_ioctls.state.arm64 import ArmBreakpoints, ArmVcpuEvents, ArmVcpuInit
from kvm_ioctls.state.irqchip import Redirection
from kvm_ioctls.state.routing import HvSintRoute, XenEvtchnRoute

# Each state that the kernel gives, and how many bytes of it.
SIZES: list[tuple[Any, int]] = [
    (Regs, 144), (Sregs, 312), (Sregs2, 320), (Fpu, 416), (DebugRegs, 128), (VcpuEvents, 64),
    (LapicState, 1024), (PicState, 16), (IoapicState, 216), (PitState2, 112), (ClockData, 48),
    (Xsave, 4096), (Xcrs, 392), (NestedState, 4224), (ArmVcpuInit, 32), (ArmVcpuEvents, 64),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "size"), SIZES, ids=[kind.__name__ for kind, _ in SIZES])
@given(seed=st.binary(min_size=16, max_size=512))
def test_any_bytes_are_a_value(kind: Any, size: int, seed: bytes) -> None:
    """Whatever the kernel gives is a value, whose own bytes are that value again."""
    value = kind.from_bytes((seed * (size // len(seed) + 1))[:size])
    written = value.to_bytes()
    assert len(written) == size
    assert kind.from_bytes(written) == value


@pytest.mark.parametrize(
    ("value", "rule"),
    [
        (Regs(rax=1 << 64), "does not fit"),
        (Sregs(cs=Segment(dpl=256)), "does not fit"),
        (Fpu(fpr=(b"short",) * 8), "16 bytes each"),
        (Redirection(vector=256), "more than 8 bits"),
        (IoapicState(redirtbl=()), "24 redirection entries"),
        (LapicState(irr=(0,)), "irr has eight words"),
        (LapicState(others=((2, 1),)), "at offset 0x2"),
        (NestedState(header=b""), "120 bytes"),
        (PitState2(channels=()), "three channels"),
        (Xsave(b""), "4096 bytes or more"),
        (Xcrs(((0, 1),) * 17), "at most 16"),
        (ArmVcpuInit(features=(224,)), "0 to 223"),
        (ArmBreakpoints(breakpoints=((0, 0),) * 17), "at most 16 pairs"),
    ],
    ids=lambda part: type(part).__name__,
)
def test_what_cannot_be_written_is_refused(value: Any, rule: str) -> None:
    """A value that its structure has no place for is refused by name, before any ioctl."""
    with pytest.raises(ArgumentError, match=rule) as caught:
        (value.to_bits if isinstance(value, Redirection) else value.to_bytes)()
    assert type(value).__name__ in str(caught.value)


def test_routes_that_only_some_hosts_take() -> None:
    """Routes to Hyper-V's and Xen's controllers lie as struct kvm_irq_routing_entry says."""
    words = [int.from_bytes(HvSintRoute(7, 2, 3).to_bytes()[n : n + 4], "little")
             for n in range(0, 24, 4)]  # fmt: skip
    assert words == [7, 4, 0, 0, 2, 3]
    raw = XenEvtchnRoute(9, 5, 1).to_bytes()
    assert [int.from_bytes(raw[n : n + 4], "little") for n in (0, 4, 16, 20, 24)] == [
        9, 5, 5, 1, 0xFFFFFFFF
    ]  # fmt: skip


def test_arm64s_interrupt_numbers() -> None:
    """vcpu2_index, type, vcpu_index and number, from bit 28, 24, 16 and 0 (api.rst, 4.25)."""
    assert irq_number(KVM_ARM_IRQ_TYPE_PPI, 27, vcpu=0x123) == 0x1223001B
