"""The guest: a VM with memory, vCPUs and code, entered in the mode that is asked for."""

from __future__ import annotations

import enum
import mmap
from struct import pack_into
from typing import TYPE_CHECKING

import attrs

from kvm_ioctls.kvm import Kvm
from kvm_ioctls.state.mp import MpState
from kvm_ioctls.state.regs import Regs
from kvm_ioctls.state.sregs import DescriptorTable, Segment
from kvm_ioctls.testing.assembler import assemble

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from kvm_ioctls.exits import Exit
    from kvm_ioctls.state.sregs import Sregs
    from kvm_ioctls.vcpu import Vcpu
    from kvm_ioctls.vm import Vm

__all__ = ["CODE", "GDT", "IDT", "STACK", "Guest", "Mode"]

CODE = 0x1000
"""Where the code lies, unless it is asked elsewhere."""
GDT = 0x8000
IDT = 0x9000
_TSS = 0xA000
_TABLES = 0x10000  # PML4, then the PDPT, then four page directories of 2 MiB pages
STACK = 0x80000
"""Top of the first vCPU's stack; each further one begins 4 KiB lower."""

_CR0_PE, _CR0_ET, _CR0_NE, _CR0_PG = 1, 1 << 4, 1 << 5, 1 << 31
_CR4_PAE, _CR4_OSFXSR, _CR4_OSXMMEXCPT = 1 << 5, 1 << 9, 1 << 10
_EFER_SCE, _EFER_LME, _EFER_LMA = 1, 1 << 8, 1 << 10


class Mode(enum.Enum):
    """The processor mode in which a guest's code begins."""

    REAL = 16
    PROTECTED = 32
    LONG = 64


class Guest:
    """A bare-metal guest, ready to run.

    Attributes:
        kvm: the Kvm it was made from.
        vm: its VM.
        vcpus: its vCPUs; all begin at `entry` with their number in EDI.
        vcpu: the first of them.
        memory: its memory, from guest-physical 0: an mmap, which can be read and written.
    """

    def __init__(
        self,
        source: str | bytes,
        mode: Mode = Mode.REAL,
        *,
        cpl: int = 0,
        memory: int = 2 << 20,
        cpus: int = 1,
        irqchip: bool = False,
        flags: int = 0,
        origin: int = CODE,
        kvm: Kvm | None = None,
        vm: Vm | None = None,
    ) -> None:
        """Assemble, load, and set the registers.

        Args:
            source: for the GNU assembler, or machine code as bytes.
            mode: the mode in which it begins.
            cpl: 0 or 3; 3 needs Mode.LONG and comes with I/O privilege.
            memory: bytes, a multiple of 4096, at least 1 MiB.
            cpus: how many vCPUs.
            irqchip: whether interrupt controllers are in the kernel; HLT then makes no exit.
            flags: KVM_MEM_* of the one memory slot.
            origin: where the code is loaded and entered.
            kvm: an open Kvm to use; else one is opened and closed with the guest.
            vm: a VM to use, without memory and vCPUs; closed with the guest.
        """
        code = source if isinstance(source, bytes) else assemble(source, mode.value, origin)
        self._own_kvm = kvm is None
        self.kvm = kvm or Kvm()
        self.memory = mmap.mmap(-1, memory)
        try:
            self.vm = vm or self.kvm.create_vm()
            if irqchip:
                self.vm.create_irqchip()
            self.vm.set_user_memory_region(
                slot=0, guest_phys_addr=0, memory=self.memory, flags=flags
            )
            self.memory[origin : origin + len(code)] = code
            self._write_tables()
            self.vcpus: list[Vcpu] = []
            for number in range(cpus):
                self.vcpus.append(self._make_vcpu(number, mode, cpl, origin, irqchip))
        except BaseException:
            self.close()
            raise

    @property
    def vcpu(self) -> Vcpu:
        """The first vCPU."""
        return self.vcpus[0]

    def _write_tables(self) -> None:
        pack_into("<Q", self.memory, _TABLES, _TABLES + 0x1007)
        for giga in range(4):
            directory = _TABLES + 0x2000 + 0x1000 * giga
            pack_into("<Q", self.memory, _TABLES + 0x1000 + 8 * giga, directory + 7)
            for entry in range(512):
                pack_into("<Q", self.memory, directory + 8 * entry, giga << 30 | entry << 21 | 0x87)
        # null, code 32, data, code 64, user data, user code 64
        descriptors = (0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF, 0x00AF9B000000FFFF,
                       0x00CFF3000000FFFF, 0x00AFFB000000FFFF)  # fmt: skip
        pack_into("<6Q", self.memory, GDT, *descriptors)
        # The task's I/O bitmap, all zero: not every KVM lets IOPL alone decide.
        pack_into("<H", self.memory, _TSS + 0x66, 0x68)

    def _make_vcpu(self, number: int, mode: Mode, cpl: int, origin: int, irqchip: bool) -> Vcpu:
        vcpu = self.vm.create_vcpu(number)
        vcpu.set_cpuid2(self.kvm.get_supported_cpuid())
        vcpu.set_sregs(_sregs(vcpu.get_sregs(), mode, cpl))
        stack = STACK - 0x1000 * number
        rflags = 0x3002 if cpl else 2
        vcpu.set_regs(
            Regs(rip=origin, rsp=stack & 0xFFFF or 0xF000, rdi=number, rflags=rflags)
            if mode is Mode.REAL
            else Regs(rip=origin, rsp=stack, rdi=number, rflags=rflags)
        )
        if irqchip:
            vcpu.set_mp_state(MpState.RUNNABLE)
        return vcpu

    def run(self) -> Exit:
        """Run the first vCPU to its next exit."""
        return self.vcpu.run()

    def run_until(
        self, kind: type[Exit] | tuple[type[Exit], ...], limit: int = 10000
    ) -> list[Exit]:
        """Run the first vCPU until an exit of that kind, and give all exits up to it.

        Raises:
            AssertionError: the guest failed, or the exit did not come within `limit` exits.
        """
        from kvm_ioctls import exits

        seen: list[Exit] = []
        for _ in range(limit):
            seen.append(self.vcpu.run())
            if isinstance(seen[-1], kind):
                return seen
            if isinstance(seen[-1], exits.Shutdown | exits.InternalError | exits.FailEntry):
                raise AssertionError(f"the guest ended with {seen[-1]} at {self.vcpu.get_regs()}")
        raise AssertionError(f"no {kind} within {limit} exits; the last was {seen[-1]}")

    def close(self) -> None:
        """Close the VM with its vCPUs, and free the memory."""
        vm = getattr(self, "vm", None)
        if vm is not None:
            vm.close()
        if self._own_kvm:
            self.kvm.close()
        self.memory.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _sregs(sregs: Sregs, mode: Mode, cpl: int) -> Sregs:
    """The segment and control registers in which `mode` begins."""
    if mode is Mode.REAL:
        flat = Segment(limit=0xFFFF, type=3, present=1, s=1)
        code = attrs.evolve(flat, type=11)
        return attrs.evolve(
            sregs, cs=code, ds=flat, es=flat, fs=flat, gs=flat, ss=flat,
            idt=DescriptorTable(limit=0x3FF),
        )  # fmt: skip
    long = mode is Mode.LONG
    code = Segment(limit=0xFFFFFFFF, selector=0x2B if cpl else 0x18 if long else 8, type=11,
                   present=1, dpl=cpl, s=1, g=1, l=int(long), db=int(not long))  # fmt: skip
    data = Segment(limit=0xFFFFFFFF, selector=0x23 if cpl else 0x10, type=3, present=1, dpl=cpl,
                   s=1, g=1, db=1)  # fmt: skip
    task = Segment(base=_TSS, limit=0x67 + 0x2001, selector=0x30, type=11, present=1)
    sregs = attrs.evolve(
        sregs, cs=code, ds=data, es=data, fs=data, gs=data, ss=data, tr=task,
        gdt=DescriptorTable(GDT, 0x2F), idt=DescriptorTable(IDT, 0xFFF),
        cr0=_CR0_PE | _CR0_ET | _CR0_NE, cr4=_CR4_OSFXSR | _CR4_OSXMMEXCPT,
    )  # fmt: skip
    if not long:
        return sregs
    return attrs.evolve(
        sregs, cr0=sregs.cr0 | _CR0_PG, cr3=_TABLES, cr4=sregs.cr4 | _CR4_PAE,
        efer=_EFER_SCE | _EFER_LME | _EFER_LMA,
    )  # fmt: skip
