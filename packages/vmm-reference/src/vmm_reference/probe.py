"""Whether this host's KVM can run an unmodified kernel, found out by a guest that tries.

A KVM without hardware behind it may emulate ring 0 and leave out what every kernel executes while
it starts. Module names do not tell; a guest of forty bytes does: a breakpoint through its own IDT,
a 16-byte compare-exchange and a restore of extended state.
"""

from __future__ import annotations

import struct
import threading
from typing import TYPE_CHECKING

from attrs import evolve, frozen

from kvm_ioctls import exits
from vm_memory import GuestAddress, GuestMemory

if TYPE_CHECKING:
    from kvm_ioctls import Kvm

__all__ = ["Probe", "probe"]

_PML4, _PDPT, _PD = 0x1000, 0x2000, 0x3000
_GDT, _IDT, _SCRATCH, _STACK, _CODE, _HANDLER = 0x4000, 0x5000, 0x6000, 0x7FF0, 0x8000, 0x8100
_PORT, _ALIVE = 0xF4, 0x2A

# Each step reports itself, so that the last report says which instruction did not come back.
_STEPS = (
    ("int3", b"\xcc"),
    ("lock cmpxchg16b", b"\xbf" + struct.pack("<I", _SCRATCH) + b"\xf0\x48\x0f\xc7\x0f"),
    (
        "xrstor",
        b"\xbf"
        + struct.pack("<I", _SCRATCH + 0x40)
        + b"\xb8\x01\x00\x00\x00\x31\xd2\x48\x0f\xae\x2f",
    ),
)
_IRETQ = b"\x48\xcf"
_FLAT_CODE, _FLAT_DATA = 0x00AF9B000000FFFF, 0x00CF93000000FFFF


@frozen
class Probe:
    """What the probe guest did.

    Attributes:
        passed: the instructions that ran as on hardware.
        failed: the one that did not, or an empty string.
        reason: what KVM said of it.
    """

    passed: tuple[str, ...]
    failed: str = ""
    reason: str = ""

    @property
    def runs_linux(self) -> bool:
        """Whether an unmodified kernel may be expected to boot."""
        return not self.failed


def probe(kvm: Kvm, seconds: float = 5.0) -> Probe:
    """Run the probe guest, for at most `seconds`.

    Raises:
        KvmError: the host could not set up the guest at all.
    """
    passed: list[str] = []
    with (
        GuestMemory.from_ranges([(GuestAddress(0), 0x10000)]) as memory,
        kvm.create_vm() as vm,
    ):
        _write_guest(memory)
        region = memory.regions[0].buffer
        vm.set_user_memory_region(slot=0, guest_phys_addr=0, memory=region)
        with vm.create_vcpu(0) as vcpu:
            vcpu.set_cpuid2(kvm.get_supported_cpuid())
            sregs = vcpu.get_sregs()
            code = evolve(
                sregs.cs, base=0, limit=0xFFFFFFFF, selector=8, type=11, present=1, dpl=0, db=0,
                s=1, l=1, g=1,
            )  # fmt: skip
            data = evolve(code, selector=16, type=3, db=1, l=0)
            vcpu.set_sregs(
                evolve(
                    sregs, cs=code, ds=data, es=data, fs=data, gs=data, ss=data,
                    gdt=evolve(sregs.gdt, base=_GDT, limit=23),
                    idt=evolve(sregs.idt, base=_IDT, limit=4 * 16 - 1),
                    cr0=0x80000033, cr3=_PML4, cr4=0x40620, efer=0x500,
                )
            )  # fmt: skip
            vcpu.set_regs(evolve(vcpu.get_regs(), rip=_CODE, rsp=_STACK, rflags=2))
            watchdog = threading.Timer(seconds, vcpu.kick)
            watchdog.start()
            try:
                for name, _ in _STEPS:
                    match vcpu.run():
                        case exits.IoOut(port=0xF4, data=answer) if answer[0] == _ALIVE:
                            passed.append(name)
                        case exits.Interrupted():
                            return Probe(tuple(passed), name, f"no answer within {seconds:g} s")
                        case other:
                            return Probe(tuple(passed), name, type(other).__name__)
            finally:
                watchdog.cancel()
                watchdog.join()
    return Probe(tuple(passed))


def _write_guest(memory: GuestMemory) -> None:
    code = b"".join(step + b"\xb0" + bytes([_ALIVE, 0xE6, _PORT]) for _, step in _STEPS) + b"\xf4"
    gate = struct.pack("<HHHHII", _HANDLER, 8, 0x8E00, 0, 0, 0)
    for address, content in (
        (_PML4, struct.pack("<Q", _PDPT | 3)),
        (_PDPT, struct.pack("<Q", _PD | 3)),
        (_PD, struct.pack("<Q", 0x83)),
        (_GDT, struct.pack("<3Q", 0, _FLAT_CODE, _FLAT_DATA)),
        (_IDT + 3 * 16, gate),
        (_CODE, code),
        (_HANDLER, _IRETQ),
    ):
        memory.write(GuestAddress(address), content)
