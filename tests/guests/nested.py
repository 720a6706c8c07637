"""What only hardware virtualization shows of KVM's API: prints findings as JSON.

A hypervisor in the guest enters its own guest by VMRUN; its state is saved while the inner guest
runs and put into another VM, where the inner guest goes on. And software breakpoints at ring 0, and
hypercalls that user space answers; a level interrupt that stays in service until its handler ends
it; and a vCPU in 32-bit PAE paging, with the page-directory pointers that it has loaded; and the
counters of vCPUs, each of which takes long to restore.
"""

from __future__ import annotations

import json
from struct import pack_into, unpack
from time import sleep
from typing import TYPE_CHECKING

from attrs import evolve

from kvm_ioctls import Kvm, MsiRoute, Vcpu, Vm, exits
from kvm_ioctls.constants import KVM_CAP_EXIT_HYPERCALL, KVM_CAP_SPLIT_IRQCHIP
from kvm_ioctls.msrs import msr_index
from kvm_ioctls.testing import CODE, Guest, Mode

if TYPE_CHECKING:
    from kvm_ioctls.state import VcpuState

VMCB, SAVE_AREA, INNER = 0x20000, 0x21000, 0x1100
# The inner guest counts and makes port exits that its own hypervisor does not intercept.
OUTER = """
    mov $0x20000, %eax
    vmrun
    mov $0x99, %al
    out %al, $0x99
    hlt
    .org 0x100
1:  inc %ebx
    mov %ebx, %eax
    out %al, $0x10
    jmp 1b
"""
_COUNT = 5


def control_block(guest: Guest) -> None:
    """A VMCB (AMD APM volume 2, appendix B) for the inner guest, in the outer one's own mode."""
    memory, sregs = guest.memory, guest.vcpu.get_sregs()
    pack_into("<I", memory, VMCB + 0x010, 1)  # intercept VMRUN itself, as the processor demands
    pack_into("<I", memory, VMCB + 0x058, 1)  # ASID
    segments = (("es", 0x400), ("cs", 0x410), ("ss", 0x420), ("ds", 0x430), ("fs", 0x440),
                ("gs", 0x450), ("ldt", 0x470), ("tr", 0x490))  # fmt: skip
    for name, offset in segments:
        s = getattr(sregs, name)
        attributes = s.type | s.s << 4 | s.dpl << 5 | s.present << 7 | s.avl << 8 | s.l << 9
        attributes |= s.db << 10 | s.g << 11
        pack_into("<HHIQ", memory, VMCB + offset, s.selector, attributes, s.limit, s.base)
    for table, offset in ((sregs.gdt, 0x460), (sregs.idt, 0x480)):
        pack_into("<HHIQ", memory, VMCB + offset, 0, 0, table.limit, table.base)
    svme = sregs.efer | 1 << 12
    for value, offset in ((svme, 0x4D0), (sregs.cr4, 0x548), (sregs.cr3, 0x550), (sregs.cr0, 0x558),
                          (0x400, 0x560), (0xFFFF0FF0, 0x568), (2, 0x570), (INNER, 0x578),
                          (0x70000, 0x5D8)):  # fmt: skip
        pack_into("<Q", memory, VMCB + offset, value)


def output(guest: Guest) -> int:
    """The next byte that the inner guest writes."""
    seen = guest.run()
    if not isinstance(seen, exits.IoOut) or seen.port != 0x10:
        raise RuntimeError(f"{seen!r} at {guest.vcpu.get_regs()}")
    return seen.data[0]


def nested() -> dict[str, object]:
    """The inner guest goes on in another VM."""
    with Guest(OUTER, Mode.LONG) as guest, Guest(OUTER, Mode.LONG) as other:
        empty = guest.vcpu.get_nested_state()
        guest.vcpu.set_sregs(
            evolve(guest.vcpu.get_sregs(), efer=guest.vcpu.get_sregs().efer | 1 << 12)
        )
        guest.vcpu.set_msrs({msr_index("VM_HSAVE_PA"): SAVE_AREA}).require()
        control_block(guest)
        before = [output(guest) for _ in range(_COUNT)]
        guest.vcpu.kick()
        if not isinstance(guest.run(), exits.Interrupted):
            raise RuntimeError("the kick was lost")
        state = guest.vcpu.save()
        assert state.nested is not None
        other.memory[:] = guest.memory[:]
        other.vcpu.restore(state)
        return {
            "empty": len(empty.data),
            "flags": state.nested.flags,
            "format": state.nested.format,
            "size": len(state.nested.data),
            "same": evolve(other.vcpu.get_nested_state(), data=b"")
            == evolve(state.nested, data=b""),  # the data holds time-stamp offsets too
            "before": before,
            "there": [output(other) for _ in range(_COUNT)],
            "here": [output(guest) for _ in range(_COUNT)],
        }


def breakpoints() -> dict[str, object]:
    """An INT3 of the debugger comes as an exit at ring 0; one of the guest's own is given back."""
    with Guest("nop; int3; mov $7, %al; out %al, $0x10; hlt", Mode.LONG) as guest:
        guest.vcpu.set_guest_debug(software_breakpoints=True)
        seen = guest.run()
        if not isinstance(seen, exits.Debug):
            return {"instead": repr(seen)}
        guest.memory[CODE + 1] = 0x90  # the debugger takes its breakpoint away
        after = guest.run()
        return {"exception": seen.exception, "pc": seen.pc, "after": repr(after)}


def hypercall() -> dict[str, object]:
    """KVM_HC_MAP_GPA_RANGE is answered by user space."""
    source = """
        mov $12, %eax; mov $0x100000, %ebx; mov $1, %ecx; mov $16, %edx; vmmcall
        out %eax, $0x10; hlt
    """
    with Kvm() as kvm:
        vm = kvm.create_vm()
        vm.enable_cap(KVM_CAP_EXIT_HYPERCALL, (1 << 12,))
        with Guest(source, Mode.LONG, kvm=kvm, vm=vm) as guest:
            seen = guest.run()
            assert isinstance(seen, exits.Hypercall), seen
            seen.respond(0x77)
            return {"nr": seen.nr, "args": seen.args[:3], "answer": repr(guest.run())}


def end_of_interrupt() -> dict[str, object]:
    """With the IOAPIC in user space, a level interrupt's end is an exit of its own."""
    source = """
        sti; hlt
        .org 0x20; out %al, $0x10; movl $0, 0xfee000b0; out %al, $0x11
    """
    with Kvm() as kvm:
        vm = kvm.create_vm()
        vm.enable_cap(KVM_CAP_SPLIT_IRQCHIP, (24,))
        with Guest(source, Mode.PROTECTED, kvm=kvm, vm=vm) as guest:
            gate = CODE + 0x20 | 8 << 16 | 0x8E00 << 32
            pack_into("<Q", guest.memory, guest.vcpu.get_sregs().idt.base + 8 * 0x33, gate)
            guest.vcpu.set_lapic(evolve(guest.vcpu.get_lapic(), svr=0x1FF))
            vm.set_gsi_routing([MsiRoute(5, 0xFEE00000, 0x8033)])
            vm.irq_line(5, 1)
            seen = [repr(guest.run())]
            in_service = guest.vcpu.get_lapic().vectors("isr")
            seen += [repr(guest.run()), repr(guest.run())]
            return {"in service": in_service, "seen": seen}


def page_directory_pointers() -> dict[str, object]:
    """A vCPU in PAE paging moves with the pointers that it has loaded, whatever memory has."""
    source = "1: inc %al; out %al, $0x10; jmp 1b"
    table, size = 0x7000, 32
    with Guest(source, Mode.PROTECTED) as guest, Guest(source, Mode.PROTECTED) as other:
        directories = [0x12000 + 0x1000 * number | 1 for number in range(4)]  # 2 MiB pages
        pack_into("<4Q", guest.memory, table, *directories)
        sregs = guest.vcpu.get_sregs()
        guest.vcpu.set_sregs(
            evolve(sregs, cr0=sregs.cr0 | 1 << 31, cr3=table, cr4=sregs.cr4 | 1 << 5)
        )
        before = [output(guest) for _ in range(_COUNT)]
        guest.vcpu.kick()
        guest.run()
        state = guest.vcpu.save()
        other.memory[:] = guest.memory[:]
        other.memory[table : table + size] = bytes(size)
        other.vcpu.restore(state)
        moved = other.vcpu.save()
        other.vcpu.set_sregs(state.sregs)
        without = other.vcpu.get_sregs2().pdptrs
        other.vcpu.restore(state)
        # This kind of processor looks into memory again.
        other.memory[table : table + size] = guest.memory[table : table + size]
        return {
            "expected": directories,
            "saved": state.pdptrs,
            "moved": moved.pdptrs,
            "without": without,
            "same": moved.sregs == state.sregs,
            "before": before,
            "after": [output(other) for _ in range(_COUNT)],
        }


def counters() -> dict[str, object]:
    """How far counters are apart: where saved, where restored, where restored one by one."""

    def apart(vm: Vm) -> list[int]:
        offsets = [unpack("<q", vcpu.get_device_attr(0, 0))[0] for vcpu in vm.vcpus]
        return [offset - offsets[0] for offset in offsets]

    def slowly(self: Vcpu, state: VcpuState) -> None:
        sleep(1.5)
        at_once(self, state)

    at_once = Vcpu.restore
    with Kvm() as kvm:
        vms = [kvm.create_vm() for _ in range(3)]
        for vm in vms:
            vm.create_irqchip()
            for number in range(3):
                vm.create_vcpu(number)
        here, there, without = vms
        here.vcpus[2].set_msrs({msr_index("TSC"): 1 << 50})
        sleep(0.2)
        states = here.save_vcpus()
        Vcpu.restore = slowly  # type: ignore[method-assign]
        there.restore_vcpus(states)
        for vcpu, state in zip(without.vcpus, states, strict=True):
            vcpu.restore(state)
        Vcpu.restore = at_once  # type: ignore[method-assign]
        found = {"here": apart(here), "there": apart(there), "without": apart(without)}
        for vm in vms:
            vm.close()
        return {**found, "second": 1000 * states[0].tsc_khz}


if __name__ == "__main__":
    found = {
        "nested": nested(), "breakpoint": breakpoints(), "hypercall": hypercall(),
        "end of interrupt": end_of_interrupt(), "pae": page_directory_pointers(),
        "counters": counters(),
    }  # fmt: skip
    print(json.dumps(found))
