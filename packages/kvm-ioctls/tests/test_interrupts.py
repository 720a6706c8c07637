"""Interrupts and events: every way to raise one, and every way to be told of a guest's access."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import attrs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvm_ioctls import ArgumentError, IrqchipRoute, Kvm, KvmError, MpState, MsiRoute, exits
from kvm_ioctls.constants import (
    KVM_CAP_SPLIT_IRQCHIP,
    KVM_IRQCHIP_IOAPIC,
    KVM_IRQCHIP_PIC_MASTER,
)
from kvm_ioctls.state.irqchip import IoapicState, PicState, Redirection
from kvm_ioctls.state.lapic import LapicState, LvtEntry
from kvm_ioctls.testing import Guest, Mode, assemble

pytestmark = pytest.mark.kvm

APIC = 0xFEE00000


@contextmanager
def eventfds(count: int) -> Iterator[list[int]]:
    made = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(count)]
    try:
        yield made
    finally:
        for fd in made:
            os.close(fd)


def signals(fd: int) -> int:
    """How often an eventfd was signalled since it was last asked."""
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


# Every vector from 0x20 to 0x3f has a handler of 32 bytes that writes its number to port 0x10,
# ends the interrupt at the local APIC, and waits on, without IRET, which not every KVM emulates.
HANDLERS = "idle: sti; hlt; jmp idle;" + "".join(
    f".balign 32; mov ${n}, %al; out %al, $0x10; movl $0, {APIC + 0xB0:#x}; add $12, %esp;"
    " jmp idle;"
    for n in range(0x20, 0x40)
)
FIRST = 0x1020


def waiting(vm_guest: Guest) -> Guest:
    """Let a guest of HANDLERS wait, with its gates set and its local APIC enabled."""
    for vector in range(0x20, 0x40):
        entry = FIRST + 32 * (vector - 0x20)
        gate = entry & 0xFFFF | 8 << 16 | 0x8E00 << 32
        vm_guest.memory[0x9000 + 8 * vector : 0x9008 + 8 * vector] = gate.to_bytes(8, "little")
    for vcpu in vm_guest.vcpus:
        vcpu.set_lapic(attrs.evolve(vcpu.get_lapic(), svr=0x1FF))
    return vm_guest


def guest_of_handlers() -> Guest:
    guest = waiting(Guest(HANDLERS, Mode.PROTECTED, irqchip=True))
    pins = [IrqchipRoute(pin, KVM_IRQCHIP_IOAPIC, pin) for pin in range(24)]
    guest.vm.set_gsi_routing(pins)  # and not to the PICs too
    return guest


def vector_of(seen: exits.Exit) -> int:
    assert isinstance(seen, exits.IoOut), seen
    assert seen.port == 0x10
    return seen.data[0]


def delivered(guest: Guest) -> set[int]:
    """The vectors that the guest handles until it waits again."""
    found: set[int] = set()
    while guest.vcpu.get_lapic().vectors("irr"):
        found.add(vector_of(guest.run()))
        guest.vcpu.kick()
        guest.run()
    return found


def test_irqfd_raises_an_interrupt() -> None:
    """A signal of the eventfd runs the guest's handler; after deassigning it does not."""
    with guest_of_handlers() as guest, eventfds(1) as (event,):
        guest.vm.set_gsi_routing([MsiRoute(24, APIC, 0x31)])
        guest.vm.irqfd(event, 24)
        for _ in range(3):
            os.eventfd_write(event, 1)
            assert vector_of(guest.run()) == 0x31
        with pytest.raises(KvmError, match="raises an interrupt already"):
            guest.vm.irqfd(event, 24)
        guest.vm.irqfd_deassign(event, 24)
        guest.vm.irqfd_deassign(event, 24)
        os.eventfd_write(event, 1)
        guest.vcpu.kick()
        while not isinstance(seen := guest.run(), exits.Interrupted):
            raise AssertionError(seen)


def test_a_level_line_is_resampled() -> None:
    """The guest's end of interrupt lowers the line and signals the second eventfd."""
    with guest_of_handlers() as guest, eventfds(2) as (event, resample):
        ioapic = guest.vm.get_irqchip(KVM_IRQCHIP_IOAPIC)
        assert isinstance(ioapic, IoapicState)
        table = list(ioapic.redirtbl)
        table[10] = Redirection(vector=0x35, trig_mode=1, mask=0)
        guest.vm.set_irqchip(KVM_IRQCHIP_IOAPIC, attrs.evolve(ioapic, redirtbl=tuple(table)))
        guest.vm.irqfd(event, 10, resample)
        for _ in range(3):
            os.eventfd_write(event, 1)
            assert vector_of(guest.run()) == 0x35
            guest.vcpu.kick()
            assert isinstance(guest.run(), exits.Interrupted)
            while not signals(resample):  # the guest has yet to end it
                guest.vcpu.kick()
                guest.run()


def test_lines_messages_and_the_apic() -> None:
    """IRQ_LINE, IRQ_LINE_STATUS, SIGNAL_MSI; what is requested shows in the local APIC's state."""
    with guest_of_handlers() as guest:
        vm = guest.vm
        ioapic = vm.get_irqchip(KVM_IRQCHIP_IOAPIC)
        assert isinstance(ioapic, IoapicState)
        table = (Redirection(vector=0x22, mask=0),) * 24
        vm.set_irqchip(KVM_IRQCHIP_IOAPIC, attrs.evolve(ioapic, redirtbl=table))
        assert vm.get_irqchip(KVM_IRQCHIP_IOAPIC) == attrs.evolve(ioapic, redirtbl=table)
        vm.irq_line(11, 1)
        assert guest.vcpu.get_lapic().vectors("irr") == (0x22,)
        assert vector_of(guest.run()) == 0x22
        vm.irq_line(11, 0)
        assert vm.irq_line_status(11, 1) == 1
        assert vm.signal_msi(APIC, 0x3F) == 1
        assert guest.vcpu.get_lapic().vectors("irr") == (0x22, 0x3F)


def test_the_timer_of_the_apic_by_its_registers() -> None:
    """A local vector table entry that is set by name fires; a masked one does not."""
    with guest_of_handlers() as guest:
        lapic = guest.vcpu.get_lapic()
        assert lapic.enabled
        armed = attrs.evolve(
            lapic.with_lvt("timer", LvtEntry(vector=0x2A, mask=0)), divide=0xB, initial_count=1000,
            current_count=1000,
        )  # fmt: skip
        assert armed.timer_divisor == 1
        guest.vcpu.set_lapic(armed)
        assert vector_of(guest.run()) == 0x2A
        assert guest.vcpu.get_lapic().lvt("timer") == LvtEntry(vector=0x2A, mask=0)
        assert guest.vcpu.get_lapic().lvt("lint1").mask in (0, 1)


@given(bits=st.integers(0, (1 << 32) - 1))
def test_local_vector_table_entries_are_bits(bits: int) -> None:
    """An entry has every bit that the register defines, and refuses what does not fit."""
    entry = LvtEntry.from_bits(bits)
    assert entry.to_bits() == bits & 0x7F7FF
    with pytest.raises(ArgumentError, match="more than 8 bits"):
        attrs.evolve(entry, vector=256).to_bits()


@given(st.binary(min_size=1024, max_size=1024))
def test_any_apic_page_is_a_value(page: bytes) -> None:
    """From bytes and back, whatever they are (each register's own 16 bytes have 4 that count)."""
    state = LapicState.from_bytes(page)
    assert state.to_bytes() == page
    for name in ("irr", "isr", "tmr"):
        assert len(state.vectors(name)) == sum(w.bit_count() for w in getattr(state, name))


ROUTES = st.dictionaries(st.integers(24, 60), st.integers(0x20, 0x3F), max_size=8)


@settings(max_examples=20, suppress_health_check=[HealthCheck.too_slow])
@given(tables=st.lists(ROUTES, min_size=1, max_size=3), raised=st.sets(st.integers(24, 60)))
def test_any_routing_delivers_what_it_says(tables: list[dict[int, int]], raised: set[int]) -> None:
    """Each GSI of the table in force reaches its vector, and the others nobody."""
    with guest_of_handlers() as guest:
        for table in tables:
            guest.vm.set_gsi_routing([MsiRoute(gsi, APIC, vector) for gsi, vector in table.items()])
            for gsi in raised:
                guest.vm.irq_line(gsi, 1)
                guest.vm.irq_line(gsi, 0)
            expected = {table[gsi] for gsi in raised if gsi in table}
            assert set(guest.vcpu.get_lapic().vectors("irr")) == expected
            assert delivered(guest) == expected


def test_routing_of_pins() -> None:
    """A GSI can go to a pin of the PIC, whose interrupt the guest is given by its vector."""
    with Guest("1: sti; hlt; jmp 1b; .org 0x30; out %al, $0x77; hlt", irqchip=True) as guest:
        vm = guest.vm
        vm.set_gsi_routing([IrqchipRoute(40, KVM_IRQCHIP_PIC_MASTER, 3)])
        pic = vm.get_irqchip(KVM_IRQCHIP_PIC_MASTER)
        assert isinstance(pic, PicState)
        vm.set_irqchip(KVM_IRQCHIP_PIC_MASTER, attrs.evolve(pic, irq_base=0x60, imr=0))
        guest.memory[4 * 0x63 : 4 * 0x63 + 4] = bytes([0x30, 0x10, 0, 0])
        lapic = guest.vcpu.get_lapic()
        through = LvtEntry(delivery_mode=7, mask=0)
        guest.vcpu.set_lapic(attrs.evolve(lapic.with_lvt("lint0", through), svr=0x1FF))
        vm.irq_line(40, 1)
        assert guest.run() == exits.IoOut(0x77, 1, 1, b"\0")


def test_a_split_irqchip_tells_of_ends() -> None:
    """With the IOAPIC in user space, the end of a level interrupt it routes comes as an exit."""
    kvm = Kvm()
    vm = kvm.create_vm()
    vm.enable_cap(KVM_CAP_SPLIT_IRQCHIP, (24,))
    with kvm, Guest(HANDLERS, Mode.PROTECTED, kvm=kvm, vm=vm) as guest:
        waiting(guest)
        vm.set_gsi_routing([MsiRoute(5, APIC, 0x8033)])
        vm.irq_line(5, 1)
        end, seen = exits.IoapicEoi(0x33), [guest.run()]
        in_service = guest.vcpu.get_lapic().vectors("isr")
        seen.append(guest.run())
        # A software KVM may end an interrupt by itself when the guest takes it, and tell of that
        # before the handler's first exit or after it; where it is in service, the guest ends it.
        if seen[0] == end:
            assert in_service == ()
            seen.reverse()
        assert vector_of(seen[0]) == 0x33
        assert seen[1] == end
        with pytest.raises(KvmError, match="create_irqchip"):
            vm.get_irqchip(KVM_IRQCHIP_IOAPIC)
        guest.vcpu.interrupt(0x21)
        with pytest.raises(KvmError, match="queued already"):
            guest.vcpu.interrupt(0x22)


def test_interrupts_without_a_controller() -> None:
    """KVM_INTERRUPT once the guest can take it, which the interrupt window tells."""
    source = "sti; 1: nop; jmp 1b; .org 0x40; out %al, $0x55; hlt"
    with Guest(source) as guest:
        guest.memory[4 * 0x21 : 4 * 0x21 + 4] = bytes([0x40, 0x10, 0, 0])
        vcpu = guest.vcpu
        assert not vcpu.request_interrupt_window
        vcpu.request_interrupt_window = True
        assert guest.run() == exits.IrqWindowOpen()
        taken = [vcpu.if_flag]
        assert vcpu.ready_for_interrupt_injection
        vcpu.request_interrupt_window = False
        vcpu.interrupt(0x21)
        assert guest.run() == exits.IoOut(0x55, 1, 1, b"\0")
        assert [*taken, vcpu.if_flag] == [True, False]
        assert vcpu.run_flags == 0
        assert vcpu.apic_base == vcpu.get_sregs().apic_base
        vcpu.cr8 = 5
        assert isinstance(guest.run(), exits.Hlt)
        assert vcpu.get_sregs().cr8 == vcpu.cr8 == 5
        vcpu.apic_base = vcpu.apic_base


def test_nmi() -> None:
    """KVM_NMI runs the handler of vector 2, whatever IF says."""
    with Guest("cli; 1: jmp 1b; .org 0x40; out %al, $0x56; hlt", irqchip=True) as guest:
        guest.memory[8:12] = bytes([0x40, 0x10, 0, 0])
        guest.vcpu.nmi()
        assert guest.run() == exits.IoOut(0x56, 1, 1, b"\0")


REGISTER = {1: "%al", 2: "%ax", 4: "%eax", 8: "%rax"}


@pytest.mark.parametrize("length", [0, 1, 2, 4, 8])
@pytest.mark.parametrize("match", [None, 0x42])
@pytest.mark.parametrize("pio", [False, True])
def test_ioeventfd_fires_for_what_it_names(length: int, match: int | None, pio: bool) -> None:
    """Each width and value of a write signals it or makes an exit, as it was asked for."""
    if length == 0 and match is not None:
        with (
            Guest("hlt") as guest,
            eventfds(1) as (event,),
            pytest.raises(KvmError, match="EINVAL"),
        ):
            guest.vm.ioeventfd(event, 0x60, 0, datamatch=match, pio=pio)
        return
    sizes = (1, 2, 4) if pio else (1, 2, 4, 8)
    writes = [(size, value) for size in sizes for value in (0x42, 0x43)]
    source = "mov $0xd0000000, %ebx;" + "".join(
        f"mov ${value}, %eax;"
        + (f"out {REGISTER[size]}, $0x60;" if pio else f"mov {REGISTER[size]}, (%rbx);")
        for size, value in writes
    )
    with Guest(source + "hlt", Mode.LONG) as guest, eventfds(1) as (event,):
        address = 0x60 if pio else 0xD0000000
        guest.vm.ioeventfd(event, address, length, datamatch=match, pio=pio)
        expected = [(size, value) for size, value in writes
                    if length not in (0, size) or match not in (None, value)]  # fmt: skip
        found = []
        while not isinstance(seen := guest.run(), exits.Hlt):
            assert isinstance(seen, exits.IoOut | exits.MmioWrite)
            found.append((len(seen.data), int.from_bytes(seen.data, "little")))
        assert found == expected
        assert signals(event) == len(writes) - len(expected)
        with pytest.raises(KvmError, match="exists already"):
            guest.vm.ioeventfd(event, address, length, datamatch=match, pio=pio)
        guest.vm.ioeventfd_deassign(event, address, length, datamatch=match, pio=pio)
        with pytest.raises(KvmError, match="no ioeventfd with this"):
            guest.vm.ioeventfd_deassign(event, address, length, datamatch=match, pio=pio)


def test_an_impossible_match_is_refused() -> None:
    """A value that no write of this length has is refused before the kernel is asked."""
    with Guest("hlt") as guest, eventfds(1) as (event,):
        with pytest.raises(ArgumentError, match="no write of this length"):
            guest.vm.ioeventfd(event, 0x60, 1, datamatch=256)
        with pytest.raises(KvmError, match="length is 0, 1, 2, 4 or 8"):
            guest.vm.ioeventfd(event, 0x60, 3)


@pytest.mark.parametrize("pio", [False, True])
def test_coalesced_writes(pio: bool) -> None:
    """Writes wait in the ring in order; a full ring and what lies outside make exits."""
    store = "out %al, $0x60" if pio else "mov %al, 0x60(%rbx)"
    source = f"mov $0xd0000000, %ebx; xor %eax, %eax; 1: {store}; inc %eax; cmp $200, %eax; jb 1b;"
    with Guest(source + "out %al, $0x61; hlt", Mode.LONG) as guest:
        base = 0 if pio else 0xD0000000
        guest.vm.register_coalesced_mmio(base + 0x60, 1, pio=pio)
        seen = guest.run()
        assert isinstance(seen, exits.IoOut | exits.MmioWrite)
        first = guest.vcpu.coalesced_writes()
        values = [write.data[0] for write in first] + [seen.data[0]]
        assert all((w.address, w.pio, len(w.data)) == (base + 0x60, pio, 1) for w in first)
        assert len(first) == 169
        assert guest.run() == exits.IoOut(0x61, 1, 1, bytes([200]))
        some = guest.vcpu.coalesced_writes(limit=7)
        assert len(some) == 7
        values += [write.data[0] for write in (*some, *guest.vcpu.coalesced_writes())]
        assert values == list(range(200))
        assert guest.vcpu.coalesced_writes() == []
        guest.vm.unregister_coalesced_mmio(base + 0x60, 1, pio=pio)
        guest.vcpu.set_regs(attrs.evolve(guest.vcpu.get_regs(), rip=0x1000))
        assert isinstance(guest.run(), exits.IoOut | exits.MmioWrite)
        assert guest.vcpu.coalesced_writes() == []


def test_processors_start_each_other() -> None:
    """INIT and SIPI from one vCPU start another, and both run at the same time."""
    source = f"""
        mov ${APIC:#x}, %ebx
        movl $0x1ff, 0xf0(%ebx)
        movl $0x01000000, 0x310(%ebx)
        movl $0x4500, 0x300(%ebx)
        movl $0x4602, 0x300(%ebx)
    1:  cmpb $1, 0x5000
        jne 1b
        movb $2, 0x5001
        out %al, $0x11
        hlt
    """
    with Guest(source, Mode.PROTECTED, cpus=2, irqchip=True) as guest:
        second = "movb $1, %cs:0x3000; 1: cmpb $2, %cs:0x3001; jne 1b; out %al, $0x12; hlt"
        code = assemble(second, 16, 0)
        guest.memory[0x2000 : 0x2000 + len(code)] = code
        guest.vcpus[1].set_mp_state(MpState.UNINITIALIZED)
        other: list[exits.Exit] = []
        runner = threading.Thread(target=lambda: other.append(guest.vcpus[1].run()))
        runner.start()
        assert guest.run() == exits.IoOut(0x11, 1, 1, b"\0")
        runner.join(30)
        assert other == [exits.IoOut(0x12, 1, 1, b"\0")]
