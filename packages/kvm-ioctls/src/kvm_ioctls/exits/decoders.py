"""From an exit reason to the function that reads the run page. Loads what a guest's exits need."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from kvm_ioctls.exits.base import Exit

__all__ = ["HOMES", "Decoders", "decoders", "interrupted"]

# Reason: module of kvm_ioctls.exits, and its function or constant.
HOMES: dict[int, tuple[str, str]] = {
    2: ("io", "decode_io"),
    3: ("x86", "decode_hypercall"),
    4: ("x86", "decode_debug"),
    5: ("plain", "HLT"),
    6: ("io", "decode_mmio"),
    7: ("plain", "IRQ_WINDOW_OPEN"),
    8: ("plain", "SHUTDOWN"),
    9: ("failures", "decode_fail_entry"),
    10: ("plain", "SIGNALLED"),
    12: ("x86", "decode_tpr_access"),
    17: ("failures", "decode_internal_error"),
    24: ("x86", "decode_system_event"),
    26: ("x86", "decode_ioapic_eoi"),
    29: ("x86", "decode_rdmsr"),
    30: ("x86", "decode_wrmsr"),
    39: ("failures", "decode_memory_fault"),
}


def _constant(value: Exit) -> Callable[[memoryview], Exit]:
    def decode(page: memoryview) -> Exit:
        return value

    return decode


class Decoders(dict[int, "Callable[[memoryview], Exit]"]):
    """Reason to decoder, filled as reasons occur."""

    def __missing__(self, reason: int) -> Callable[[memoryview], Exit]:
        module, name = HOMES.get(reason, ("failures", "decode_unknown"))
        found: Any = getattr(_load(module), name)
        decoder: Callable[[memoryview], Exit] = found if callable(found) else _constant(found)
        self[reason] = decoder
        return decoder


def _load(module: str) -> Any:
    from importlib import import_module

    return import_module(f"kvm_ioctls.exits.{module}")


decoders = Decoders()


def interrupted(kicked: bool) -> Exit:
    """The exit for a run that a kick, or another signal, has ended."""
    from kvm_ioctls.exits.plain import KICKED, SIGNALLED

    return KICKED if kicked else SIGNALLED
