"""Exits of other architectures. They can be decoded and matched anywhere."""

from __future__ import annotations

from struct import pack_into, unpack_from

import attrs

from kvm_ioctls.exits.base import Exit

__all__ = [
    "ArmDebug", "ArmLdst64b", "ArmNisv", "ArmSea", "Dcr", "Epr", "LoongarchIocsrRead",
    "LoongarchIocsrWrite", "Osi", "PaprHcall", "RiscvCsr", "RiscvSbi", "S390Reset", "S390Sieic",
    "S390Stsi", "S390Tsch", "S390Ucontrol", "Watchdog",
]  # fmt: skip


@attrs.frozen
class ArmNisv(Exit):
    """KVM_EXIT_ARM_NISV: a data abort without a decoded instruction.

    Attributes:
        esr_iss: the syndrome.
        fault_ipa: the guest-physical address.
    """

    reason = 28
    esr_iss: int
    fault_ipa: int


@attrs.frozen
class ArmDebug(Exit):
    """KVM_EXIT_DEBUG on arm64: a breakpoint, watchpoint or single step.

    Attributes:
        esr: the syndrome (ESR_EL2).
        far: the address that a watchpoint watched.
    """

    reason = 4
    esr: int
    far: int


@attrs.frozen
class ArmLdst64b(Exit):
    """KVM_EXIT_ARM_LDST64B: a 64-byte load or store to an address without memory.

    Attributes:
        esr_iss: the syndrome.
        fault_ipa: the guest-physical address.
    """

    reason = 42
    esr_iss: int
    fault_ipa: int


@attrs.frozen
class ArmSea(Exit):
    """KVM_EXIT_ARM_SEA: a synchronous external abort.

    Attributes:
        flags: bit 0: `gpa` counts.
        esr: the syndrome.
        gva: guest-virtual address.
        gpa: guest-physical address.
    """

    reason = 41
    flags: int
    esr: int
    gva: int
    gpa: int


@attrs.define
class RiscvSbi(Exit):
    """KVM_EXIT_RISCV_SBI: an SBI call for user space.

    Attributes:
        extension_id: EID.
        function_id: FID.
        args: a0 to a5.
        view: of the run page, 16 bytes; see respond().
    """

    reason = 35
    extension_id: int
    function_id: int
    args: tuple[int, ...]
    view: memoryview

    def respond(self, error: int, value: int = 0) -> None:
        """What the guest finds in a0 (an SBI error, 0 or below) and a1."""
        pack_into("<qQ", self.view, 0, error, value)


@attrs.define
class RiscvCsr(Exit):
    """KVM_EXIT_RISCV_CSR: a control register for user space.

    Attributes:
        csr_num: which one.
        new_value: what the guest writes.
        write_mask: which bits of it.
        view: of the run page, 8 bytes; see respond().
    """

    reason = 36
    csr_num: int
    new_value: int
    write_mask: int
    view: memoryview

    def respond(self, value: int) -> None:
        """The value that the guest reads."""
        pack_into("<Q", self.view, 0, value)


@attrs.define
class LoongarchIocsrRead(Exit):
    """KVM_EXIT_LOONGARCH_IOCSR, read.

    Attributes:
        phys_addr: the register's address.
        data: a view of the run page: write the answer there.
    """

    reason = 38
    phys_addr: int
    data: memoryview


@attrs.define
class LoongarchIocsrWrite(Exit):
    """KVM_EXIT_LOONGARCH_IOCSR, write.

    Attributes:
        phys_addr: the register's address.
        data: what the guest wrote.
    """

    reason = 38
    phys_addr: int
    data: bytes


@attrs.frozen
class S390Sieic(Exit):
    """KVM_EXIT_S390_SIEIC: an interception.

    Attributes:
        icptcode: interception code; ipa and ipb: the instruction.
    """

    reason = 13
    icptcode: int
    ipa: int
    ipb: int


@attrs.frozen
class S390Reset(Exit):
    """KVM_EXIT_S390_RESET.

    Attributes:
        s390_reset_flags: which reset.
    """

    reason = 14
    s390_reset_flags: int


@attrs.frozen
class S390Ucontrol(Exit):
    """KVM_EXIT_S390_UCONTROL.

    Attributes:
        trans_exc_code: translation exception; pgm_code: program interruption.
    """

    reason = 20
    trans_exc_code: int
    pgm_code: int


@attrs.frozen
class S390Tsch(Exit):
    """KVM_EXIT_S390_TSCH.

    Attributes:
        subchannel_id: and subchannel_nr, io_int_parm, io_int_word, ipb, dequeued: as named there.
    """

    reason = 22
    subchannel_id: int
    subchannel_nr: int
    io_int_parm: int
    io_int_word: int
    ipb: int
    dequeued: int


@attrs.frozen
class S390Stsi(Exit):
    """KVM_EXIT_S390_STSI.

    Attributes:
        addr: and ar, fc, sel1, sel2: the operands of STSI.
    """

    reason = 25
    addr: int
    ar: int
    fc: int
    sel1: int
    sel2: int


@attrs.frozen
class Dcr(Exit):
    """KVM_EXIT_DCR (PowerPC, long gone).

    Attributes:
        dcrn: register; data: value; is_write: direction.
    """

    reason = 15
    dcrn: int
    data: int
    is_write: int


@attrs.frozen
class Osi(Exit):
    """KVM_EXIT_OSI (PowerPC).

    Attributes:
        gprs: 32 general registers.
    """

    reason = 18
    gprs: tuple[int, ...]


@attrs.define
class PaprHcall(Exit):
    """KVM_EXIT_PAPR_HCALL (PowerPC).

    Attributes:
        nr: the call; args: nine arguments.
        view: of the run page, 8 bytes; see respond().
    """

    reason = 19
    nr: int
    args: tuple[int, ...]
    view: memoryview

    def respond(self, value: int) -> None:
        """The result that the guest gets."""
        pack_into("<Q", self.view, 0, value & 0xFFFFFFFFFFFFFFFF)


@attrs.frozen
class Watchdog(Exit):
    """KVM_EXIT_WATCHDOG (PowerPC): the watchdog expired."""

    reason = 21


@attrs.define
class Epr(Exit):
    """KVM_EXIT_EPR (PowerPC): the guest acknowledges an external interrupt.

    Attributes:
        view: of the run page, 4 bytes; see respond().
    """

    reason = 23
    view: memoryview

    def respond(self, vector: int) -> None:
        """The vector that the guest reads."""
        pack_into("<I", self.view, 0, vector)


WATCHDOG = Watchdog()


def decode_arm_nisv(page: memoryview) -> Exit:
    """From a run page whose exit reason is KVM_EXIT_ARM_NISV."""
    return ArmNisv(*unpack_from("<QQ", page, 32))


def decode_arm_ldst64b(page: memoryview) -> Exit:
    """From a run page whose exit reason is KVM_EXIT_ARM_LDST64B."""
    return ArmLdst64b(*unpack_from("<QQ", page, 32))


def decode_arm_sea(page: memoryview) -> Exit:
    """From a run page whose exit reason is KVM_EXIT_ARM_SEA."""
    return ArmSea(*unpack_from("<4Q", page, 32))


def decode_riscv_sbi(page: memoryview) -> Exit:
    """From a run page whose exit reason is KVM_EXIT_RISCV_SBI."""
    extension, function, *args = unpack_from("<8Q", page, 32)
    return RiscvSbi(extension, function, tuple(args), page[96:112])


def decode_riscv_csr(page: memoryview) -> Exit:
    """From a run page whose exit reason is KVM_EXIT_RISCV_CSR."""
    number, value, mask = unpack_from("<QQQ", page, 32)
    return RiscvCsr(number, value, mask, page[56:64])


def decode_loongarch_iocsr(page: memoryview) -> Exit:
    """From a run page whose exit reason is KVM_EXIT_LOONGARCH_IOCSR."""
    address, length, is_write = unpack_from("<Q8xIB", page, 32)
    data = page[40 : 40 + min(length, 8)]
    if is_write:
        return LoongarchIocsrWrite(address, data.tobytes())
    return LoongarchIocsrRead(address, data)


def decode_s390_sieic(page: memoryview) -> Exit:
    """From a run page whose exit reason is KVM_EXIT_S390_SIEIC."""
    return S390Sieic(*unpack_from("<BxHI", page, 32))


def decode_s390_reset(page: memoryview) -> Exit:
    """From a run page whose exit reason is KVM_EXIT_S390_RESET."""
    return S390Reset(*unpack_from("<Q", page, 32))


def decode_s390_ucontrol(page: memoryview) -> Exit:
    """From a run page whose exit reason is KVM_EXIT_S390_UCONTROL."""
    return S390Ucontrol(*unpack_from("<QI", page, 32))


def decode_s390_tsch(page: memoryview) -> Exit:
    """From a run page whose exit reason is KVM_EXIT_S390_TSCH."""
    return S390Tsch(*unpack_from("<HHIIIB", page, 32))


def decode_s390_stsi(page: memoryview) -> Exit:
    """From a run page whose exit reason is KVM_EXIT_S390_STSI."""
    return S390Stsi(*unpack_from("<QBxBBH", page, 32))


def decode_dcr(page: memoryview) -> Exit:
    """From a run page whose exit reason is KVM_EXIT_DCR."""
    return Dcr(*unpack_from("<IIB", page, 32))


def decode_osi(page: memoryview) -> Exit:
    """From a run page whose exit reason is KVM_EXIT_OSI."""
    return Osi(unpack_from("<32Q", page, 32))


def decode_papr_hcall(page: memoryview) -> Exit:
    """From a run page whose exit reason is KVM_EXIT_PAPR_HCALL."""
    nr, _, *args = unpack_from("<11Q", page, 32)
    return PaprHcall(nr, tuple(args), page[40:48])


def decode_epr(page: memoryview) -> Exit:
    """From a run page whose exit reason is KVM_EXIT_EPR."""
    return Epr(page[32:36])


def decode_arm_debug(page: memoryview) -> Exit:
    """From an arm64 run page whose exit reason is KVM_EXIT_DEBUG."""
    low, high, far = unpack_from("<IIQ", page, 32)
    return ArmDebug(high << 32 | low, far)
