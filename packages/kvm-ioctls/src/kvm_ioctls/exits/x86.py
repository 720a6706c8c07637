"""Exits that only x86 has: MSRs, debugging, hypercalls, interrupt controllers."""

from __future__ import annotations

from struct import pack_into, unpack_from

import attrs

from kvm_ioctls.exits.base import Exit

__all__ = ["Debug", "Hypercall", "IoapicEoi", "Rdmsr", "SystemEvent", "TprAccess", "Wrmsr"]


@attrs.define
class Hypercall(Exit):
    """KVM_EXIT_HYPERCALL: a hypercall that user space is to serve.

    Attributes:
        nr: its number.
        args: six arguments.
        flags: bit 0: made in 64-bit mode.
        result: a view of the run page, 8 bytes; see respond().
    """

    reason = 3
    nr: int
    args: tuple[int, ...]
    flags: int
    result: memoryview

    def respond(self, value: int) -> None:
        """The result that the guest finds in RAX when it runs again."""
        pack_into("<Q", self.result, 0, value & 0xFFFFFFFFFFFFFFFF)


@attrs.frozen
class Debug(Exit):
    """KVM_EXIT_DEBUG: a breakpoint or single step that set_guest_debug() asked for.

    Attributes:
        exception: 1 (#DB) or 3 (#BP).
        pc: linear address of the instruction.
        dr6: which condition it was: bit 14 single step, bits 0 to 3 the hardware breakpoint.
        dr7: debug control at that time.
    """

    reason = 4
    exception: int
    pc: int
    dr6: int
    dr7: int


@attrs.frozen
class TprAccess(Exit):
    """KVM_EXIT_TPR_ACCESS: the guest touched the task-priority register.

    Attributes:
        rip: of the instruction.
        is_write: whether it wrote.
    """

    reason = 12
    rip: int
    is_write: bool


@attrs.frozen
class SystemEvent(Exit):
    """KVM_EXIT_SYSTEM_EVENT: the guest asks for shutdown, reset and the like.

    Attributes:
        type: KVM_SYSTEM_EVENT_*.
        data: words that explain it; the first is what older kernels call flags.
    """

    reason = 24
    type: int
    data: tuple[int, ...]


@attrs.frozen
class IoapicEoi(Exit):
    """KVM_EXIT_IOAPIC_EOI: with a split irqchip, the guest ended a level-triggered interrupt.

    Attributes:
        vector: the interrupt's vector.
    """

    reason = 26
    vector: int


@attrs.define
class Rdmsr(Exit):
    """KVM_EXIT_X86_RDMSR: the guest reads an MSR that user space serves.

    Attributes:
        index: the MSR.
        cause: KVM_MSR_EXIT_REASON_*: why it came here.
        view: of the run page; see respond() and refuse(). Unanswered, the guest reads 0.
    """

    reason = 29
    index: int
    cause: int
    view: memoryview

    def respond(self, value: int) -> None:
        """The value that the guest reads."""
        self.view[0] = 0
        pack_into("<Q", self.view, 16, value)

    def refuse(self) -> None:
        """Inject a general-protection fault."""
        self.view[0] = 1


@attrs.define
class Wrmsr(Exit):
    """KVM_EXIT_X86_WRMSR: the guest writes an MSR that user space serves.

    Attributes:
        index: the MSR.
        cause: KVM_MSR_EXIT_REASON_*: why it came here.
        data: what it wrote.
        view: of the run page; see refuse(). Unanswered, the write succeeds.
    """

    reason = 30
    index: int
    cause: int
    data: int
    view: memoryview

    def refuse(self) -> None:
        """Inject a general-protection fault."""
        self.view[0] = 1


def decode_hypercall(page: memoryview) -> Exit:
    """From a run page whose exit reason is KVM_EXIT_HYPERCALL."""
    nr, *args, _, flags = unpack_from("<9Q", page, 32)
    return Hypercall(nr, tuple(args), flags, page[88:96])


def decode_debug(page: memoryview) -> Exit:
    """From a run page whose exit reason is KVM_EXIT_DEBUG."""
    return Debug(*unpack_from("<I4xQQQ", page, 32))


def decode_tpr_access(page: memoryview) -> Exit:
    """From a run page whose exit reason is KVM_EXIT_TPR_ACCESS."""
    rip, is_write = unpack_from("<QI", page, 32)
    return TprAccess(rip, bool(is_write))


def decode_system_event(page: memoryview) -> Exit:
    """From a run page whose exit reason is KVM_EXIT_SYSTEM_EVENT."""
    kind, ndata = unpack_from("<II", page, 32)
    return SystemEvent(kind, unpack_from(f"<{min(ndata, 16)}Q", page, 40))


def decode_ioapic_eoi(page: memoryview) -> Exit:
    """From a run page whose exit reason is KVM_EXIT_IOAPIC_EOI."""
    return IoapicEoi(page[32])


def decode_rdmsr(page: memoryview) -> Exit:
    """From a run page whose exit reason is KVM_EXIT_X86_RDMSR."""
    cause, index = unpack_from("<II", page, 40)
    view = page[32:56]
    view[0] = 0
    view[16:24] = bytes(8)
    return Rdmsr(index, cause, view)


def decode_wrmsr(page: memoryview) -> Exit:
    """From a run page whose exit reason is KVM_EXIT_X86_WRMSR."""
    cause, index, data = unpack_from("<IIQ", page, 40)
    view = page[32:56]
    view[0] = 0
    return Wrmsr(index, cause, data, view)
