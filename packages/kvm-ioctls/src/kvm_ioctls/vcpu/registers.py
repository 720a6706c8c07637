"""The registers of an x86 vCPU."""

from __future__ import annotations

from kvm_ioctls._fd import Descriptor
from kvm_ioctls._native import lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from kvm_ioctls.state.debugregs import DebugRegs
    from kvm_ioctls.state.fpu import Fpu
    from kvm_ioctls.state.regs import Regs
    from kvm_ioctls.state.sregs import Sregs, Sregs2
    from kvm_ioctls.state.xsave import Xcrs, Xsave
    from kvm_ioctls.vcpu.raw import RawRegisters
    from kvm_ioctls.vm import Vm

__all__ = ["VcpuRegisters"]

_CAP_XSAVE2 = 208
_REGS = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp", "r8", "r9", "r10", "r11", "r12",
         "r13", "r14", "r15", "rip", "rflags")  # fmt: skip
_CONTROL = ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")


class _Decoders(dict[tuple[str, str], "Callable[[bytearray], Any]"]):
    """Module and class to `from_bytes`, loaded once: an import statement in a call costs more."""

    def __missing__(self, key: tuple[str, str]) -> Callable[[bytearray], Any]:
        module, name = key
        found = getattr(__import__(f"kvm_ioctls.state.{module}", fromlist=[name]), name)
        decode: Callable[[bytearray], Any] = found.from_bytes
        self[key] = decode
        return decode


_decode = _Decoders()


class VcpuRegisters(Descriptor):
    """The part of a vCPU that deals with its registers."""

    vm: Vm

    def get_regs(self) -> Regs:
        """KVM_GET_REGS: general registers, instruction pointer and flags."""
        value: Regs = _decode["regs", "Regs"](self._read(lib.KVM_GET_REGS, 144))
        return value

    def set_regs(self, regs: Regs) -> None:
        """KVM_SET_REGS."""
        self._write(lib.KVM_SET_REGS, regs.to_bytes())

    def raw_regs(self) -> RawRegisters:
        """General registers in a buffer of their own, to be read and written without a value.

        >>> from kvm_ioctls.testing import Guest
        >>> with Guest("hlt") as guest:
        ...     raw = guest.vcpu.raw_regs()
        ...     raw.get()["rip"]
        ...     raw["rip"] = 0x1001
        ...     raw.set()
        ...     guest.vcpu.get_regs().rip
        4096
        4097
        """
        from kvm_ioctls.vcpu.raw import RawRegisters

        names = {name: number for number, name in enumerate(_REGS)}
        return RawRegisters(self, (lib.KVM_GET_REGS, lib.KVM_SET_REGS), 144, names)

    def raw_sregs(self) -> RawRegisters:
        """The same for special registers; the names are those of the control registers."""
        from kvm_ioctls.vcpu.raw import RawRegisters

        names = {name: 28 + number for number, name in enumerate(_CONTROL)}
        return RawRegisters(self, (lib.KVM_GET_SREGS, lib.KVM_SET_SREGS), 312, names)

    def get_sregs(self) -> Sregs:
        """KVM_GET_SREGS: segment, table and control registers."""
        value: Sregs = _decode["sregs", "Sregs"](self._read(lib.KVM_GET_SREGS, 312))
        return value

    def set_sregs(self, sregs: Sregs) -> None:
        """KVM_SET_SREGS.

        Raises:
            KvmError: EINVAL if the control registers contradict each other.
        """
        self._write(lib.KVM_SET_SREGS, sregs.to_bytes(), cr0=sregs.cr0, cr4=sregs.cr4,
                    efer=sregs.efer)  # fmt: skip

    def get_sregs2(self) -> Sregs2:
        """KVM_GET_SREGS2 (KVM_CAP_SREGS2): the same with the page-directory pointers of PAE."""
        from kvm_ioctls.state.sregs import Sregs2

        return Sregs2.from_bytes(self._read(lib.KVM_GET_SREGS2, 320))

    def set_sregs2(self, sregs: Sregs2) -> None:
        """KVM_SET_SREGS2 (KVM_CAP_SREGS2)."""
        self._write(lib.KVM_SET_SREGS2, sregs.to_bytes(), cr0=sregs.cr0, cr4=sregs.cr4,
                    efer=sregs.efer)  # fmt: skip

    def get_fpu(self) -> Fpu:
        """KVM_GET_FPU: x87 and SSE registers."""
        from kvm_ioctls.state.fpu import Fpu

        return Fpu.from_bytes(self._read(lib.KVM_GET_FPU, 416))

    def set_fpu(self, fpu: Fpu) -> None:
        """KVM_SET_FPU."""
        self._write(lib.KVM_SET_FPU, fpu.to_bytes())

    def get_xsave(self) -> Xsave:
        """KVM_GET_XSAVE (KVM_CAP_XSAVE): the first 4096 bytes of the extended state."""
        from kvm_ioctls.state.xsave import Xsave

        return Xsave.from_bytes(self._read(lib.KVM_GET_XSAVE, 4096))

    def get_xsave2(self) -> Xsave:
        """KVM_GET_XSAVE2 (KVM_CAP_XSAVE2): the whole extended state, however large it is."""
        from kvm_ioctls.state.xsave import Xsave

        return Xsave.from_bytes(self._read(lib.KVM_GET_XSAVE2, self._xsave_size()))

    def set_xsave(self, xsave: Xsave) -> None:
        """KVM_SET_XSAVE (KVM_CAP_XSAVE): an area of either size, filled up with zeros.

        Raises:
            KvmError: EINVAL if it holds a component that the vCPU's CPUID does not offer.
        """
        self._write(lib.KVM_SET_XSAVE, xsave.to_bytes().ljust(self._xsave_size(), b"\0"))

    def _xsave_size(self) -> int:
        return max(4096, self.vm.check_extension(_CAP_XSAVE2))

    def get_xcrs(self) -> Xcrs:
        """KVM_GET_XCRS (KVM_CAP_XCRS): XCR0."""
        from kvm_ioctls.state.xsave import Xcrs

        return Xcrs.from_bytes(self._read(lib.KVM_GET_XCRS, 392))

    def set_xcrs(self, xcrs: Xcrs) -> None:
        """KVM_SET_XCRS (KVM_CAP_XCRS), after set_cpuid2()."""
        self._write(lib.KVM_SET_XCRS, xcrs.to_bytes())

    def get_debugregs(self) -> DebugRegs:
        """KVM_GET_DEBUGREGS (KVM_CAP_DEBUGREGS): the guest's own debug registers."""
        from kvm_ioctls.state.debugregs import DebugRegs

        return DebugRegs.from_bytes(self._read(lib.KVM_GET_DEBUGREGS, 128))

    def set_debugregs(self, debugregs: DebugRegs) -> None:
        """KVM_SET_DEBUGREGS (KVM_CAP_DEBUGREGS)."""
        self._write(lib.KVM_SET_DEBUGREGS, debugregs.to_bytes())
