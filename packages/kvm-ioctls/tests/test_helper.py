"""The helper that makes guests: what it says when it cannot."""

from __future__ import annotations

import pytest

from kvm_ioctls import KvmError, exits
from kvm_ioctls.testing import AssemblyError, Guest, Mode, assemble

pytestmark = pytest.mark.kvm


def test_a_source_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The assembler's own words, with the line; and what to install if there is none."""
    with pytest.raises(AssemblyError, match=r"guest\.s:\d+: .*no such instruction"):
        assemble("nop; frobnicate %al", 32, 0)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(AssemblyError, match="install binutils"):
        assemble("nop", 32, 0)


def test_a_guest_that_cannot_be_made_is_closed() -> None:
    """A failure in the middle leaves nothing open, and its reason is told."""
    with pytest.raises(KvmError, match="already"), Guest("hlt", irqchip=True) as guest:
        Guest("hlt", vm=guest.vm, kvm=guest.kvm, irqchip=True)
    assert guest.vm.closed


def test_run_until() -> None:
    """All exits up to the one that is waited for; a guest that fails first is told of."""
    with Guest("out %al, $1; out %al, $2; hlt") as guest:
        seen = guest.run_until(exits.Hlt)
        assert [type(each) for each in seen] == [exits.IoOut, exits.IoOut, exits.Hlt]
    with (
        Guest("lidt empty; ud2; empty: .word 0; .long 0", Mode.PROTECTED) as guest,
        pytest.raises(AssertionError, match=r"ended with Shutdown\(\) at Regs"),
    ):
        guest.run_until(exits.Hlt)
    with (
        Guest("1: out %al, $1; jmp 1b") as guest,
        pytest.raises(AssertionError, match="within 5 exits"),
    ):
        guest.run_until(exits.Hlt, limit=5)
