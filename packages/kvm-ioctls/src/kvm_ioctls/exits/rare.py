"""x86 exits that few machines meet: Hyper-V, Xen, TDX, SEV-SNP, bus locks, dirty rings."""

from __future__ import annotations

from struct import pack_into, unpack_from

import attrs

from kvm_ioctls.exits.base import Exit

__all__ = [
    "ApResetHold",
    "DirtyRingFull",
    "ExceptionExit",
    "HypervHcall",
    "HypervSyndbg",
    "HypervSynic",
    "Nmi",
    "Notify",
    "SetTpr",
    "SnpReqCerts",
    "Tdx",
    "X86BusLock",
    "XenHcall",
]  # fmt: skip


@attrs.frozen
class ExceptionExit(Exit):
    """KVM_EXIT_EXCEPTION: an exception that KVM hands out; no current kernel does.

    Attributes:
        exception: its vector.
        error_code: what it pushes.
    """

    reason = 1
    exception: int
    error_code: int


@attrs.frozen
class SetTpr(Exit):
    """KVM_EXIT_SET_TPR: the guest lowered its task priority, and user space has the local APIC."""

    reason = 11


@attrs.frozen
class Nmi(Exit):
    """KVM_EXIT_NMI: an NMI of the host; no current kernel hands it out."""

    reason = 16


@attrs.frozen
class HypervSynic(Exit):
    """KVM_EXIT_HYPERV_SYNIC: the guest changed its synthetic interrupt controller.

    Attributes:
        msr: which MSR it wrote.
        control: SCONTROL; evt_page and msg_page: SIEFP and SIMP.
    """

    reason = 27
    msr: int
    control: int
    evt_page: int
    msg_page: int


@attrs.define
class HypervHcall(Exit):
    """KVM_EXIT_HYPERV_HCALL: a Hyper-V hypercall for user space.

    Attributes:
        input: code and flags.
        params: its two parameters.
        result: a view of the run page, 8 bytes; see respond().
    """

    reason = 27
    input: int
    params: tuple[int, ...]
    result: memoryview

    def respond(self, value: int) -> None:
        """The result that the guest gets."""
        pack_into("<Q", self.result, 0, value)


@attrs.define
class HypervSyndbg(Exit):
    """KVM_EXIT_HYPERV_SYNDBG: the guest used Hyper-V's synthetic debugger.

    Attributes:
        msr: which MSR it wrote.
        control: and send_page, recv_page, pending_page: the debugger's MSRs.
        status: a view of the run page, 8 bytes; see respond().
    """

    reason = 27
    msr: int
    control: int
    send_page: int
    recv_page: int
    pending_page: int
    status: memoryview

    def respond(self, value: int) -> None:
        """The status that the guest reads."""
        pack_into("<Q", self.status, 0, value)


@attrs.frozen
class DirtyRingFull(Exit):
    """KVM_EXIT_DIRTY_RING_FULL: harvest the dirty rings and reset them, then run again."""

    reason = 31


@attrs.frozen
class ApResetHold(Exit):
    """KVM_EXIT_AP_RESET_HOLD: an SEV-ES guest parks this processor until it is started."""

    reason = 32


@attrs.frozen
class X86BusLock(Exit):
    """KVM_EXIT_X86_BUS_LOCK: the guest made a bus lock (KVM_CAP_X86_BUS_LOCK_EXIT)."""

    reason = 33


@attrs.define
class XenHcall(Exit):
    """KVM_EXIT_XEN: a Xen hypercall for user space.

    Attributes:
        longmode: 1 if made in 64-bit mode.
        cpl: the guest's privilege level.
        input: the hypercall's number.
        params: six parameters.
        result: a view of the run page, 8 bytes; see respond().
    """

    reason = 34
    longmode: int
    cpl: int
    input: int
    params: tuple[int, ...]
    result: memoryview

    def respond(self, value: int) -> None:
        """The result that the guest gets."""
        pack_into("<Q", self.result, 0, value & 0xFFFFFFFFFFFFFFFF)


@attrs.frozen
class Notify(Exit):
    """KVM_EXIT_NOTIFY: the guest held up interrupts for too long (KVM_CAP_X86_NOTIFY_VMEXIT).

    Attributes:
        flags: KVM_NOTIFY_CONTEXT_INVALID if the guest's state is lost.
    """

    reason = 37
    flags: int


@attrs.define
class Tdx(Exit):
    """KVM_EXIT_TDX: a TDVMCALL for user space (TDX GHCI 1.5).

    Attributes:
        flags: none is defined; 0.
        nr: the TDVMCALL's leaf.
        data: five words of it, after the result.
        result: a view of the run page, 8 bytes; see respond().
    """

    reason = 40
    flags: int
    nr: int
    data: tuple[int, ...]
    result: memoryview

    def respond(self, value: int) -> None:
        """The status that the guest gets in R10."""
        pack_into("<Q", self.result, 0, value)


@attrs.define
class SnpReqCerts(Exit):
    """KVM_EXIT_SNP_REQ_CERTS: an SEV-SNP guest wants certificates with its attestation report.

    Attributes:
        gpa: where to put them.
        npages: room there, in pages.
        view: of the run page; see respond().
    """

    reason = 43
    gpa: int
    npages: int
    view: memoryview

    def respond(self, ret: int, npages: int | None = None) -> None:
        """0 or an errno; with ENOSPC, `npages` says how much room it takes."""
        if npages is not None:
            pack_into("<Q", self.view, 8, npages)
        pack_into("<Q", self.view, 16, ret)


DIRTY_RING_FULL = DirtyRingFull()
SET_TPR = SetTpr()
NMI = Nmi()
AP_RESET_HOLD = ApResetHold()
X86_BUS_LOCK = X86BusLock()


def decode_exception(page: memoryview) -> Exit:
    """From a run page whose exit reason is KVM_EXIT_EXCEPTION."""
    return ExceptionExit(*unpack_from("<II", page, 32))


def decode_hyperv(page: memoryview) -> Exit:
    """From a run page whose exit reason is KVM_EXIT_HYPERV."""
    (kind,) = unpack_from("<I", page, 32)
    if kind == 1:
        return HypervSynic(*unpack_from("<I4xQQQ", page, 40))
    if kind == 2:
        call, _, *params = unpack_from("<4Q", page, 40)
        return HypervHcall(call, tuple(params), page[48:56])
    if kind == 3:
        msr, control, _, send, recv, pending = unpack_from("<I4x5Q", page, 40)
        return HypervSyndbg(msr, control, send, recv, pending, page[56:64])
    from kvm_ioctls.exits.failures import decode_unknown

    return decode_unknown(page)


def decode_xen(page: memoryview) -> Exit:
    """From a run page whose exit reason is KVM_EXIT_XEN."""
    kind, longmode, cpl, call, _, *params = unpack_from("<I4xII8Q", page, 32)
    if kind == 1:
        return XenHcall(longmode, cpl, call, tuple(params), page[56:64])
    from kvm_ioctls.exits.failures import decode_unknown

    return decode_unknown(page)


def decode_notify(page: memoryview) -> Exit:
    """From a run page whose exit reason is KVM_EXIT_NOTIFY."""
    return Notify(*unpack_from("<I", page, 32))


def decode_tdx(page: memoryview) -> Exit:
    """From a run page whose exit reason is KVM_EXIT_TDX."""
    flags, nr, _, *data = unpack_from("<8Q", page, 32)
    return Tdx(flags, nr, tuple(data), page[48:56])


def decode_snp_req_certs(page: memoryview) -> Exit:
    """From a run page whose exit reason is KVM_EXIT_SNP_REQ_CERTS."""
    gpa, npages = unpack_from("<QQ", page, 32)
    return SnpReqCerts(gpa, npages, page[32:56])
