"""All of a vCPU and of a VM as values, put into new ones: the guest goes on where it was."""

from __future__ import annotations

import threading
from struct import pack_into

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvm_ioctls import KvmError, MpState, MsiRoute, Vcpu, exits
from kvm_ioctls.msrs import msr_index
from kvm_ioctls.state.lapic import LvtEntry
from kvm_ioctls.testing import Guest, Mode, assemble

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


def test_leaves_that_were_set_before_need_not_be_in_a_state() -> None:
    """They are what takes longest, and no guest changes them."""
    with Guest(COUNT, Mode.LONG) as guest, Guest(COUNT, Mode.LONG) as other:
        leaves = [leaf for leaf in guest.vcpu.get_cpuid2() if leaf.function != 0x80000004]
        for vcpu in (guest.vcpu, other.vcpu):
            vcpu.set_cpuid2(leaves)
        next_output(guest)
        settle(guest.vcpu)
        whole, (state,) = guest.vcpu.save(), guest.vm.save_vcpus(cpuid=False)
        assert state.cpuid == ()
        assert state.regs == whole.regs
        assert whole.cpuid
        other.memory[:] = guest.memory[:]
        other.vm.restore_vcpus([state])
        assert other.vcpu.get_cpuid2() == whole.cpuid
        assert next_output(other) == next_output(guest)


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


def test_the_deadline_of_the_timer_moves() -> None:
    """The TSC deadline is put back once the local APIC is in the mode that has one."""
    deadline, index = 1 << 60, msr_index("TSC_DEADLINE")
    with Guest(COUNT, irqchip=True) as guest, Guest(COUNT, irqchip=True) as other:
        entry = LvtEntry(vector=0x40, timer_mode=2)
        guest.vcpu.set_lapic(guest.vcpu.get_lapic().with_lvt("timer", entry))
        guest.vcpu.set_msrs({index: deadline}).require()
        state = guest.vcpu.save()
        assert dict(state.msrs)[index] == deadline
        other.vcpu.restore(state)
        assert other.vcpu.get_msrs([index])[index] == deadline


def test_a_host_that_cannot_go_on() -> None:
    """An MSR that this host lacks is refused by name; one it only states may be the same."""
    with Guest(COUNT) as guest, Guest(COUNT) as other:
        state = guest.vcpu.save()
        strange = attrs.evolve(state, msrs=(*state.msrs, (0x12345, 1)))
        with pytest.raises(KvmError, match=r"index=0x12345.*it differs from the one that saved"):
            other.vcpu.restore(strange)
        faster = attrs.evolve(state, tsc_khz=2 * state.tsc_khz)
        other.vcpu.restore(faster)
        assert other.vcpu.get_tsc_khz() == faster.tsc_khz


# The first vCPU and the second count, at ports of their own, and the third waits to be started.
# When they are told to, the second takes an interrupt that was pending all the time, and the first
# starts the third.
PROCESSORS = """
    mov %edi, %edx
    add $0x60, %edx
1:  add $3, %al
    rol $1, %bl
    xor %bl, %al
    out %al, %dx
    cmpb $0, 0x5000(%edi)
    je 1b
    movb $0, 0x5000(%edi)
    test %edi, %edi
    jz 2f
    sti
    hlt
2:  movl $0x02000000, 0xfee00310
    movl $0x4500, 0xfee00300
    movl $0x4602, 0xfee00300
    xor %eax, %eax
    jmp 1b
.balign 32
taken: mov $0x33, %al
    out %al, $0x71
    hlt
"""


def processors() -> Guest:
    guest = Guest(PROCESSORS, Mode.PROTECTED, cpus=3, irqchip=True)
    for vcpu in guest.vcpus:
        vcpu.set_lapic(attrs.evolve(vcpu.get_lapic(), svr=0x1FF))
    return guest


def outputs(vcpu: Vcpu, count: int) -> list[exits.Exit]:
    return [vcpu.run() for _ in range(count)]


@settings(max_examples=10)
@given(st.integers(1, 60), st.integers(1, 60))
def test_a_guest_of_several_processors_moves(first: int, second: int) -> None:
    """Each goes on as its twin: running, with an interrupt pending, and waiting to be started."""
    with processors() as guest, processors() as other:
        entry = guest.memory.find(b"\xb0\x33\xe6\x71")
        gate = entry & 0xFFFF | 8 << 16 | 0x8E00 << 32
        pack_into("<Q", guest.memory, 0x9000 + 8 * 0x33, gate)
        third = assemble("mov $0x62, %al; out %al, $0x62; hlt", 16, 0)
        guest.memory[0x2000 : 0x2000 + len(third)] = third
        guest.vcpus[2].set_mp_state(MpState.UNINITIALIZED)
        guest.vm.set_gsi_routing([MsiRoute(24, 0xFEE01000, 0x33)])
        guest.vm.irq_line(24, 1)
        runners = [threading.Thread(target=outputs, args=pair)
                   for pair in zip(guest.vcpus, (first, second), strict=False)]  # fmt: skip
        for runner in runners:
            runner.start()
        for runner in runners:
            runner.join(30)
        for vcpu in guest.vcpus:
            settle(vcpu)
        states, vm = [vcpu.save() for vcpu in guest.vcpus], guest.vm.save()
        other.memory[:] = guest.memory[:]
        for vcpu, state in zip(other.vcpus, states, strict=True):
            vcpu.restore(state)
        other.vm.restore(vm)
        assert [state.mp_state for state in states] == [0, 0, MpState.UNINITIALIZED]
        assert states[1].lapic is not None
        assert states[1].lapic.vectors("irr") == (0x33,)
        seen = []
        for each in (guest, other):
            found = [outputs(vcpu, 20) for vcpu in each.vcpus[:2]]
            each.memory[0x5000:0x5002] = b"\1\1"
            found.append([each.vcpus[1].run()])
            found.append([each.vcpus[0].run(), each.vcpus[2].run()])
            seen.append(found)
        assert seen[0] == seen[1]
        assert seen[1][2] == [exits.IoOut(0x71, 1, 1, b"\x33")]
        assert seen[1][3][1] == exits.IoOut(0x62, 1, 1, b"\x62")
