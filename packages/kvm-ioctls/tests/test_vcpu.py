"""A vCPU's registers, exits that guests make, and the debugger's view of it."""

from __future__ import annotations

import gc
import mmap
import tracemalloc
from typing import Any

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvm_ioctls import ArgumentError, DebugRegs, Kvm, KvmError, Regs, exits
from kvm_ioctls.constants import (
    GUEST_MEMFD_FLAG_INIT_SHARED,
    GUEST_MEMFD_FLAG_MMAP,
    KVM_CAP_EXIT_ON_EMULATION_FAILURE,
    KVM_CAP_GUEST_MEMFD_FLAGS,
    KVM_CAP_X86_USER_SPACE_MSR,
    KVM_MSR_EXIT_REASON_FILTER,
    KVM_MSR_EXIT_REASON_UNKNOWN,
    KVM_MSR_FILTER_READ,
    KVM_MSR_FILTER_WRITE,
)
from kvm_ioctls.msrs import msr_index, msr_name
from kvm_ioctls.state import Fpu, Segment, Sregs
from kvm_ioctls.testing import CODE, Guest, Mode
from kvm_ioctls.vcpu.debug import HardwareBreakpoint
from kvm_ioctls.vm.guests import MsrFilterRange

pytestmark = pytest.mark.kvm

PAGE = 4096
U64 = st.integers(0, (1 << 64) - 1)
REGS = st.builds(
    Regs,
    **{field.name: U64 for field in attrs.fields(Regs) if field.name not in ("version", "rflags")},
    # Bits that the processor defines, but those of single step and of virtual 8086 mode.
    rflags=st.integers(0, 0x3FFFFF).map(lambda bits: bits & 0x3D7ED5 | 2),
)
SEGMENT = st.builds(
    Segment,
    base=st.integers(0, (1 << 32) - 1), limit=st.integers(0, (1 << 32) - 1),
    selector=st.integers(0, 0xFFFF), type=st.integers(0, 15), present=st.just(1),
    dpl=st.integers(0, 3), db=st.integers(0, 1), s=st.just(1), l=st.just(0), g=st.integers(0, 1),
    avl=st.integers(0, 1), unusable=st.just(0),
)  # fmt: skip


def test_registers_come_back() -> None:
    """General registers over their whole space, whole and through the raw buffer."""
    with Guest("hlt") as guest:
        vcpu, raw = guest.vcpu, guest.vcpu.raw_regs()

        @given(REGS)
        def check(regs: Regs) -> None:
            vcpu.set_regs(regs)
            assert vcpu.get_regs() == regs
            assert Regs.from_bytes(raw.get().buffer) == regs
            raw["rbx"], raw["rip"] = regs.rip, regs.rbx
            raw.set()
            assert vcpu.get_regs() == attrs.evolve(regs, rbx=regs.rip, rip=regs.rbx)

        check()


def test_segments_come_back() -> None:
    """Data segments and tables over their whole space, by SREGS and by SREGS2."""
    with Guest("hlt", Mode.PROTECTED) as guest:
        vcpu = guest.vcpu
        before = vcpu.get_sregs()

        @given(ds=SEGMENT, es=SEGMENT, gs=SEGMENT, cr2=U64, cr8=st.integers(0, 15))
        def check(ds: Segment, es: Segment, gs: Segment, cr2: int, cr8: int) -> None:
            wanted = attrs.evolve(before, ds=ds, es=es, gs=gs, cr2=cr2, cr8=cr8)
            vcpu.set_sregs(wanted)
            assert vcpu.get_sregs() == wanted
            assert vcpu.raw_sregs().get()["cr2"] == cr2
            second = vcpu.get_sregs2()
            assert (second.ds, second.es, second.gs, second.cr2) == (ds, es, gs, cr2)
            vcpu.set_sregs(before)
            vcpu.set_sregs2(second)
            assert vcpu.get_sregs() == wanted

        check()
        with pytest.raises(KvmError, match="contradict each other"):
            vcpu.set_sregs(attrs.evolve(before, cr0=before.cr0 | 1 << 31, efer=0x500, cr4=0))


def test_debug_registers_and_fpu_come_back() -> None:
    """DR0 to DR7 within their legal bits; x87 and SSE registers."""
    with Guest("hlt") as guest:
        vcpu = guest.vcpu

        @settings(max_examples=20)
        @given(db=st.tuples(U64, U64, U64, U64), dr7=st.integers(0, 255), low=st.binary(
            min_size=416, max_size=416))  # fmt: skip
        def check(db: tuple[int, int, int, int], dr7: int, low: bytes) -> None:
            wanted = DebugRegs(db=db, dr6=0xFFFF0FF0, dr7=dr7 | 0x400)
            vcpu.set_debugregs(wanted)
            assert vcpu.get_debugregs() == wanted
            fpu = attrs.evolve(Fpu.from_bytes(low), mxcsr=0x1F80)
            vcpu.set_fpu(fpu)
            assert vcpu.get_fpu().xmm == fpu.xmm

        check()
        with pytest.raises(KvmError, match="upper halves"):
            vcpu.set_debugregs(DebugRegs(dr7=1 << 40))


@pytest.mark.parametrize(
    "value", [Regs(rax=1 << 64), Sregs(cs=Segment(dpl=256)), Sregs(interrupt_bitmap=(-1, 0, 0, 0))]
)
def test_what_fits_no_field_is_refused(value: Any) -> None:
    """A value with a field too large for its place is refused before the kernel sees it."""
    with pytest.raises(ArgumentError, match="does not fit"):
        value.to_bytes()


def test_synchronised_registers() -> None:
    """Register sets are left in the run page by each exit, and taken from it by the next run."""
    with Guest("1: inc %ax; out %al, $0x10; jmp 1b") as guest:
        vcpu = guest.vcpu
        vcpu.sync_valid = 7
        assert vcpu.sync_valid == 7
        assert guest.run() == exits.IoOut(0x10, 1, 1, b"\x01")
        assert vcpu.sync_regs() == vcpu.get_regs()
        assert vcpu.sync_sregs() == vcpu.get_sregs()
        assert vcpu.sync_events() == vcpu.get_vcpu_events()
        vcpu.set_sync(regs=attrs.evolve(vcpu.sync_regs(), rax=0x40))
        assert guest.run() == exits.IoOut(0x10, 1, 1, b"\x41")
        vcpu.set_sync(sregs=vcpu.sync_sregs(), events=vcpu.sync_events())
        assert guest.run() == exits.IoOut(0x10, 1, 1, b"\x42")


def test_msrs_for_user_space() -> None:
    """Unknown and filtered MSRs come as exits, are answered or refused, and allowed ones do not."""
    source = """
        mov $0x12345, %ecx; rdmsr; out %eax, $0x10; mov %edx, %eax; out %eax, $0x10
        mov $0xc0000102, %ecx; mov $7, %eax; mov $9, %edx; wrmsr
        mov $0xc0000101, %ecx; mov $5, %eax; xor %edx, %edx; wrmsr; rdmsr; out %eax, $0x10
        mov $0xc0000102, %ecx; rdmsr; out %eax, $0x11; hlt
    """
    with Guest(source, Mode.LONG) as guest:
        reasons = KVM_MSR_EXIT_REASON_UNKNOWN | KVM_MSR_EXIT_REASON_FILTER
        guest.vm.enable_cap(KVM_CAP_X86_USER_SPACE_MSR, (reasons,))
        guest.vm.x86_set_msr_filter(
            [MsrFilterRange(KVM_MSR_FILTER_READ | KVM_MSR_FILTER_WRITE, 0xC0000100,
                            (True, True, False, True))]
        )  # fmt: skip
        seen = guest.run()
        assert isinstance(seen, exits.Rdmsr)
        assert (seen.index, seen.cause) == (0x12345, KVM_MSR_EXIT_REASON_UNKNOWN)
        seen.respond(0x1122334455667788)
        assert guest.run() == exits.IoOut(0x10, 4, 1, b"\x88\x77\x66\x55")
        assert guest.run() == exits.IoOut(0x10, 4, 1, b"\x44\x33\x22\x11")
        seen = guest.run()
        assert isinstance(seen, exits.Wrmsr)
        assert (seen.index, seen.cause, seen.data) == (
            0xC0000102, KVM_MSR_EXIT_REASON_FILTER, 9 << 32 | 7
        )  # fmt: skip
        assert guest.run() == exits.IoOut(0x10, 4, 1, b"\x05\0\0\0")
        seen = guest.run()
        assert isinstance(seen, exits.Rdmsr)
        seen.refuse()
        assert guest.run() == exits.Shutdown()  # a general protection fault without a handler
        guest.vm.x86_set_msr_filter()


def test_misuse_of_msr_filters() -> None:
    """Too many ranges and ranges that are empty or too long are refused."""
    with Guest("hlt") as guest:
        one = MsrFilterRange(KVM_MSR_FILTER_READ, 0, (True,))
        for ranges, rule in (
            ([one] * 17, "at most 16"),
            ([attrs.evolve(one, allowed=())], "1 to 12288"),
            ([attrs.evolve(one, allowed=(True,) * 12289)], "1 to 12288"),
        ):
            with pytest.raises(ArgumentError, match=rule):
                guest.vm.x86_set_msr_filter(ranges)


def test_msr_reports_name_what_was_refused() -> None:
    """The kernel stops at the first MSR it refuses; the report has all the others, by name."""
    with Guest("hlt") as guest:
        star, unknown = msr_index("STAR"), 0x12345
        report = guest.vcpu.set_msrs({star: 0x1234, unknown: 1, msr_index("LSTAR"): 0x5678})
        assert report.refused == (unknown,)
        assert report.values == {star: 0x1234, msr_index("LSTAR"): 0x5678}
        report = guest.vcpu.get_msrs([unknown, star])
        assert report[star] == 0x1234
        assert str(report) == "STAR = 0x1234\n0x12345 refused"
        with pytest.raises(KvmError, match="refuses 0x12345"):
            report.require()
        assert guest.vcpu.get_msrs([star]).require()[star] == 0x1234
        assert msr_name(0x277) == "PAT"


def test_single_step() -> None:
    """One exit an instruction, each with the address of the next; then none any more."""
    with Guest("nop; inc %ax; nop; hlt") as guest:
        guest.vcpu.set_guest_debug(single_step=True)
        for pc in (CODE + 1, CODE + 2, CODE + 3):
            seen = guest.run()
            assert isinstance(seen, exits.Debug)
            assert (seen.exception, seen.pc) == (1, pc)
            assert seen.dr6 & 1 << 14
        guest.vcpu.set_guest_debug(enable=False)
        assert guest.run() == exits.Hlt()


def test_hardware_breakpoints() -> None:
    """An instruction is watched, and the exit says by which; what cannot be watched is refused."""
    with Guest("nop; nop; nop; movb $1, 0x7000; nop; hlt") as guest:
        guest.vcpu.set_guest_debug(hardware_breakpoints=[HardwareBreakpoint(CODE + 2)])
        seen = guest.run()
        assert isinstance(seen, exits.Debug)
        assert (seen.pc, seen.dr6 & 15) == (CODE + 2, 1)
        guest.vcpu.set_guest_debug(enable=False)
        assert guest.run() == exits.Hlt()
        for points, rule in (
            ([HardwareBreakpoint(0)] * 5, "at most four"),
            ([HardwareBreakpoint(1, 2, "write")], "divides the address"),
            ([HardwareBreakpoint(0, 2)], "1 for execute"),
            ([HardwareBreakpoint(0, 3, "write")], "1, 2, 4"),
            ([HardwareBreakpoint(0, 1, "jump")], "1, 2, 4"),
        ):
            with pytest.raises(ArgumentError, match=rule):
                guest.vcpu.set_guest_debug(hardware_breakpoints=points)


def test_a_breakpoint_of_the_guests_own_is_given_back() -> None:
    """A #BP that is injected runs the guest's handler, in place of its INT3."""
    with Guest("nop; hlt; .org 0x40; out %al, $0x33; hlt", Mode.PROTECTED) as guest:
        gate = CODE + 0x40 | 8 << 16 | 0x8E00 << 32
        at = guest.vcpu.get_sregs().idt.base + 8 * 3
        guest.memory[at : at + 8] = gate.to_bytes(8, "little")
        guest.vcpu.set_guest_debug(inject=3)
        assert guest.run() == exits.IoOut(0x33, 1, 1, b"\0")
        assert guest.run() == exits.Hlt()


def test_translate() -> None:
    """The guest's page tables are walked: what they map, and what they do not."""
    with Guest("hlt", Mode.LONG) as guest:
        found = guest.vcpu.translate(0x123456)
        assert (found.valid, found.physical_address) == (True, 0x123456)
        assert not guest.vcpu.translate(0x5000000000).valid


def test_triple_fault_and_emulation_failure() -> None:
    """A fault without a handler ends in Shutdown; an instruction that KVM lacks is told."""
    with Guest("lidt empty; ud2; empty: .word 0; .long 0", Mode.PROTECTED) as guest:
        assert guest.run() == exits.Shutdown()
    with Guest("mov $0xd0000000, %ebx; addps (%rbx), %xmm0", Mode.LONG) as guest:
        guest.vm.enable_cap(KVM_CAP_EXIT_ON_EMULATION_FAILURE, (1,))
        seen = guest.run()
        assert isinstance(seen, exits.EmulationFailure)
        assert seen.suberror == 1
        if seen.flags & 1:
            assert seen.instruction[:3] == b"\x0f\x58\x03"


def test_guest_memfd_bound_to_a_slot() -> None:
    """Private memory belongs to a slot until it is deleted; its rules are told."""
    with Kvm() as kvm, kvm.create_vm() as vm:
        if not kvm.check_extension(234):
            pytest.skip("this kernel has no KVM_CAP_GUEST_MEMFD")
        shared = mmap.mmap(-1, 1 << 20)
        with vm.create_guest_memfd(1 << 20) as private:
            assert private.size == 1 << 20
            try:
                vm.set_user_memory_region2(
                    slot=3, guest_phys_addr=0x100000, memory=shared, guest_memfd=private
                )
            except KvmError as error:
                # A kernel may offer the file to some machine types only.
                assert error.ioctl == "KVM_SET_USER_MEMORY_REGION2"  # noqa: PT017
            else:
                assert vm.slots[0].flags & 4
                vm.set_user_memory_region(slot=3, memory=None)
            assert vm.slots == ()
        for size in (0, 100):
            with pytest.raises(KvmError, match="multiple of the page size"):
                vm.create_guest_memfd(size)


def test_a_guest_runs_on_guest_memfd_until_it_is_gone() -> None:
    """What user space wrote to the file is what the guest reads; without the file it faults."""
    source = "mov $0x200000, %ebx; 1: movb (%rbx), %al; out %al, $0x10; jmp 1b"
    flags = GUEST_MEMFD_FLAG_MMAP | GUEST_MEMFD_FLAG_INIT_SHARED
    # At CPL 3, because a KVM that emulates ring 0 reads the slot's other half.
    with Guest(source, Mode.LONG, cpl=3) as guest:
        if guest.vm.check_extension(KVM_CAP_GUEST_MEMFD_FLAGS) & flags != flags:
            pytest.skip("this kernel's guest_memfd is for private memory alone")
        file = guest.vm.create_guest_memfd(PAGE, flags)
        inside, other = mmap.mmap(file.fileno(), PAGE), mmap.mmap(-1, PAGE)
        inside[0] = 41
        guest.vm.set_user_memory_region2(
            slot=3, guest_phys_addr=0x200000, memory=other, guest_memfd=file
        )
        assert guest.run() == exits.IoOut(0x10, 1, 1, b"\x29")
        inside[0] = 42
        assert guest.run() == exits.IoOut(0x10, 1, 1, b"\x2a")
        inside.close()
        file.close()
        for _ in range(2):
            assert guest.run() == exits.MemoryFault(0, 0x200000, PAGE)


def test_statistics() -> None:
    """KVM's figures of a VM and a vCPU by name; the exits of a guest are among them."""
    with Guest("1: out %al, $0x10; jmp 1b") as guest:
        with guest.vcpu.get_stats_fd() as stats:
            assert stats.id.endswith("vcpu-0")
            before = stats.read()
            for _ in range(10):
                guest.run()
            after = stats.read()
            assert after["exits"] >= before["exits"]  # type: ignore[operator]
            assert stats.descriptors["exits"].type == "cumulative"
            histograms = [d for d in stats.descriptors.values() if d.size > 1]
            assert all(isinstance(after[d.name], tuple) for d in histograms)
        with guest.vm.get_stats_fd() as stats:
            assert "remote_tlb_flush" in stats.read()


def test_capabilities() -> None:
    """Every capability by name, with the value that the kernel gives it."""
    with Kvm() as kvm:
        found = kvm.capabilities()
        assert found["USER_MEMORY"] == kvm.check_extension(3) == 1
        assert len(found) > 230
        assert kvm.get_nr_memslots() > 30
        assert kvm.get_max_vcpu_id() >= kvm.get_max_vcpus() >= kvm.get_nr_vcpus() >= 1


def test_exits_leave_nothing_behind() -> None:
    """Memory does not grow with the number of exits."""
    with Guest("1: out %al, $0x10; in $0x10, %al; jmp 1b") as guest:

        def some(count: int) -> int:
            gc.collect()
            before = tracemalloc.get_traced_memory()[0]
            for _ in range(count):
                guest.run()
            gc.collect()
            return tracemalloc.get_traced_memory()[0] - before

        some(10)
        tracemalloc.start()
        try:
            some(10)
            assert some(2000) <= some(20) + 1000
        finally:
            tracemalloc.stop()
