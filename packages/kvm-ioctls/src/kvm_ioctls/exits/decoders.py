"""From an exit reason to the function that reads the run page. Loads what a guest's exits need."""

from __future__ import annotations

from os import uname

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from kvm_ioctls.exits.base import Exit

__all__ = ["HOMES", "OTHERS", "Decoders", "decoders", "interrupted"]

# Reason: module of kvm_ioctls.exits, and its function or constant.
HOMES: dict[int, tuple[str, str]] = {
    1: ("rare", "decode_exception"),
    2: ("io", "decode_io"),
    3: ("x86", "decode_hypercall"),
    4: ("x86", "decode_debug"),
    5: ("plain", "HLT"),
    6: ("io", "decode_mmio"),
    7: ("plain", "IRQ_WINDOW_OPEN"),
    8: ("plain", "SHUTDOWN"),
    9: ("failures", "decode_fail_entry"),
    10: ("plain", "SIGNALLED"),
    11: ("rare", "SET_TPR"),
    12: ("x86", "decode_tpr_access"),
    13: ("foreign", "decode_s390_sieic"),
    14: ("foreign", "decode_s390_reset"),
    15: ("foreign", "decode_dcr"),
    16: ("rare", "NMI"),
    17: ("failures", "decode_internal_error"),
    18: ("foreign", "decode_osi"),
    19: ("foreign", "decode_papr_hcall"),
    20: ("foreign", "decode_s390_ucontrol"),
    21: ("foreign", "WATCHDOG"),
    22: ("foreign", "decode_s390_tsch"),
    23: ("foreign", "decode_epr"),
    24: ("x86", "decode_system_event"),
    25: ("foreign", "decode_s390_stsi"),
    26: ("x86", "decode_ioapic_eoi"),
    27: ("rare", "decode_hyperv"),
    28: ("foreign", "decode_arm_nisv"),
    29: ("x86", "decode_rdmsr"),
    30: ("x86", "decode_wrmsr"),
    31: ("rare", "DIRTY_RING_FULL"),
    32: ("rare", "AP_RESET_HOLD"),
    33: ("rare", "X86_BUS_LOCK"),
    34: ("rare", "decode_xen"),
    35: ("foreign", "decode_riscv_sbi"),
    36: ("foreign", "decode_riscv_csr"),
    37: ("rare", "decode_notify"),
    38: ("foreign", "decode_loongarch_iocsr"),
    39: ("failures", "decode_memory_fault"),
    40: ("rare", "decode_tdx"),
    41: ("foreign", "decode_arm_sea"),
    42: ("foreign", "decode_arm_ldst64b"),
    43: ("rare", "decode_snp_req_certs"),
}

# Where an architecture lays out an exit's data in its own way.
OTHERS: dict[str, dict[int, tuple[str, str]]] = {
    "aarch64": {4: ("foreign", "decode_arm_debug")},
}


def _constant(value: Exit) -> Callable[[memoryview], Exit]:
    def decode(page: memoryview) -> Exit:
        return value

    return decode


class Decoders(dict[int, "Callable[[memoryview], Exit]"]):
    """Reason to decoder, filled as reasons occur, for run pages of one machine."""

    def __init__(self, machine: str = "x86_64") -> None:
        self._homes = HOMES | OTHERS.get(machine, {})

    def __missing__(self, reason: int) -> Callable[[memoryview], Exit]:
        module, name = self._homes.get(reason, ("failures", "decode_unknown"))
        found: Any = getattr(__import__(f"kvm_ioctls.exits.{module}", fromlist=[name]), name)
        decoder: Callable[[memoryview], Exit] = found if callable(found) else _constant(found)
        self[reason] = decoder
        return decoder


decoders = Decoders(uname().machine)


def interrupted(kicked: bool) -> Exit:
    """The exit for a run that a kick, or another signal, has ended."""
    from kvm_ioctls.exits.plain import KICKED, SIGNALLED

    return KICKED if kicked else SIGNALLED
