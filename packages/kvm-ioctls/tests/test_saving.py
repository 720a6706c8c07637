"""All of a vCPU and of a VM as values, put into new ones: the guest goes on where it was."""

from __future__ import annotations

import pytest

from kvm_ioctls import Vcpu, exits
from kvm_ioctls.testing import Guest, Mode

pytestmark = pytest.mark.kvm

COUNT = "1: add $3, %al; rol $1, %bl; xor %bl, %al; out %al, $0x61; jmp 1b"


def next_output(guest: Guest) -> bytes:
    match guest.run():
        case exits.IoOut(port=0x61, data=data):
            return bytes(data)
        case other:
            raise AssertionError(other)


def settle(vcpu: Vcpu) -> None:
    """Let KVM complete the instruction that made the last exit."""
    vcpu.kick()
    assert isinstance(vcpu.run(), exits.Interrupted)


@pytest.mark.parametrize(
    ("mode", "cpl"), [(Mode.REAL, 0), (Mode.PROTECTED, 0), (Mode.LONG, 0), (Mode.LONG, 3)]
)
@pytest.mark.parametrize("irqchip", [False, True])
def test_a_restored_guest_goes_on_as_its_twin(mode: Mode, cpl: int, irqchip: bool) -> None:
    """In every mode: the same output from there on, and the same state of everything but time."""
    with (
        Guest(COUNT, mode, cpl=cpl, irqchip=irqchip) as guest,
        Guest(COUNT, mode, cpl=cpl, irqchip=irqchip) as other,
    ):
        for _ in range(10):
            next_output(guest)
        settle(guest.vcpu)
        vcpu, vm = guest.vcpu.save(), guest.vm.save()
        other.memory[:] = guest.memory[:]
        other.vcpu.restore(vcpu)
        other.vm.restore(vm)
        again = other.vcpu.save()
        for name in ("regs", "sregs", "xcrs", "xsave", "debugregs", "events", "mp_state", "cpuid"):
            assert getattr(again, name) == getattr(vcpu, name), name
        twin = other.vm.save()
        assert (twin.pic_master, twin.pic_slave) == (vm.pic_master, vm.pic_slave)
        assert twin.ioapic == vm.ioapic
        assert (vm.ioapic is not None) == irqchip
        assert (vcpu.lapic is not None) == irqchip
        expected = [next_output(guest) for _ in range(20)]
        assert [next_output(other) for _ in range(20)] == expected
        assert len(set(expected)) > 5


def test_time_goes_on_from_where_it_was() -> None:
    """Neither the kvmclock nor the TSC is behind what was saved."""
    with Guest(COUNT, Mode.LONG, irqchip=True) as guest:
        next_output(guest)
        settle(guest.vcpu)
        vcpu, vm = guest.vcpu.save(), guest.vm.save()
    with Guest(COUNT, Mode.LONG, irqchip=True) as other:
        other.vcpu.restore(vcpu)
        other.vm.restore(vm)
        assert other.vm.get_clock().clock >= vm.clock.clock
        tsc = 0x10
        assert other.vcpu.get_msrs([tsc])[tsc] >= dict(vcpu.msrs)[tsc]
