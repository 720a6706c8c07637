"""The local APIC's registers by name."""

from __future__ import annotations

from struct import Struct, error
from typing import TYPE_CHECKING

import attrs

from kvm_ioctls.state._codec import refuse_field

if TYPE_CHECKING:
    from typing import Any, Self

__all__ = ["LapicState", "LvtEntry"]

_WORDS = Struct("<256I")

# Offset of each register in the page (Intel SDM volume 3, table 11-1).
_PLACES = {
    "id": 0x20, "apic_version": 0x30, "tpr": 0x80, "apr": 0x90, "ppr": 0xA0, "rrd": 0xC0,
    "ldr": 0xD0, "dfr": 0xE0, "svr": 0xF0, "esr": 0x280, "lvt_cmci": 0x2F0, "icr_low": 0x300,
    "icr_high": 0x310, "lvt_timer": 0x320, "lvt_thermal": 0x330, "lvt_perf": 0x340,
    "lvt_lint0": 0x350, "lvt_lint1": 0x360, "lvt_error": 0x370, "initial_count": 0x380,
    "current_count": 0x390, "divide": 0x3E0,
}  # fmt: skip
_BITMAPS = {"isr": 0x100, "tmr": 0x180, "irr": 0x200}


@attrs.frozen
class LvtEntry:
    """An entry of the local vector table (Intel SDM volume 3, 11.5.1).

    Attributes:
        vector: 0 to 255.
        delivery_mode: 0 fixed, 2 SMI, 4 NMI, 5 INIT, 7 ExtINT.
        delivery_status: 1 while the interrupt waits.
        polarity: 1 for active low (LINT0 and LINT1).
        remote_irr: 1 from a level interrupt's acceptance to its end (LINT0 and LINT1).
        trigger_mode: 1 for level (LINT0 and LINT1).
        mask: 1 to hold it back.
        timer_mode: 0 one-shot, 1 periodic, 2 TSC deadline (timer).
    """

    vector: int = 0
    delivery_mode: int = 0
    delivery_status: int = 0
    polarity: int = 0
    remote_irr: int = 0
    trigger_mode: int = 0
    mask: int = 1
    timer_mode: int = 0

    @classmethod
    def from_bits(cls, bits: int) -> Self:
        """From the 32-bit register."""
        return cls(
            bits & 0xFF, bits >> 8 & 7, bits >> 12 & 1, bits >> 13 & 1, bits >> 14 & 1,
            bits >> 15 & 1, bits >> 16 & 1, bits >> 17 & 3,
        )  # fmt: skip

    def to_bits(self) -> int:
        """The 32-bit register; ArgumentError if a field does not fit its bits."""
        bits = 0
        for value, shift, width in (
            (self.vector, 0, 8), (self.delivery_mode, 8, 3), (self.delivery_status, 12, 1),
            (self.polarity, 13, 1), (self.remote_irr, 14, 1), (self.trigger_mode, 15, 1),
            (self.mask, 16, 1), (self.timer_mode, 17, 2),
        ):  # fmt: skip
            if not 0 <= value < 1 << width:
                refuse_field(self, f"{value} at bit {shift} needs more than {width} bits")
            bits |= value << shift
        return bits


@attrs.frozen
class LapicState:
    """struct kvm_lapic_state: the local APIC's register page (Intel SDM volume 3, 11.4.1).

    Attributes:
        id: local APIC id: in bits 24 to 31, or all 32 bits in x2APIC mode.
        apic_version: version and number of LVT entries.
        tpr: task priority; apr and ppr: arbitration and processor priority.
        rrd: remote read.
        ldr: logical destination; dfr: its format.
        svr: spurious vector; bit 8 enables the APIC.
        isr: vectors in service, irr: requested, tmr: level-triggered; eight words of 32 bits.
        esr: error status.
        lvt_cmci: local vector table: also timer, thermal, perf, lint0, lint1 and error.
        icr_low: interrupt command, with icr_high.
        initial_count: of the timer, with current_count and divide.
        others: pairs of offset and value for words that are not zero and have no name here.
        version: of this form; 1.
    """

    id: int = 0
    apic_version: int = 0x50014
    tpr: int = 0
    apr: int = 0
    ppr: int = 0
    rrd: int = 0
    ldr: int = 0
    dfr: int = 0xFFFFFFFF
    svr: int = 0xFF
    isr: tuple[int, ...] = (0,) * 8
    tmr: tuple[int, ...] = (0,) * 8
    irr: tuple[int, ...] = (0,) * 8
    esr: int = 0
    lvt_cmci: int = 0x10000
    icr_low: int = 0
    icr_high: int = 0
    lvt_timer: int = 0x10000
    lvt_thermal: int = 0x10000
    lvt_perf: int = 0x10000
    lvt_lint0: int = 0x10000
    lvt_lint1: int = 0x10000
    lvt_error: int = 0x10000
    initial_count: int = 0
    current_count: int = 0
    divide: int = 0
    others: tuple[tuple[int, int], ...] = ()
    version: int = attrs.field(default=1, kw_only=True)

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview) -> Self:
        """From the kernel's 1024 bytes."""
        words = list(_WORDS.unpack_from(data))
        fields: dict[str, object] = {}
        for name, offset in _PLACES.items():
            fields[name] = words[offset // 4]
            words[offset // 4] = 0
        for name, offset in _BITMAPS.items():
            at = range(offset // 4, offset // 4 + 32, 4)
            fields[name] = tuple(words[i] for i in at)
            for i in at:
                words[i] = 0
        others = tuple((4 * i, word) for i, word in enumerate(words) if word)
        return cls(**fields, others=others)  # type: ignore[arg-type]

    def to_bytes(self) -> bytes:
        """The kernel's 1024 bytes; ArgumentError if a field is no 32-bit value."""
        words = [0] * 256
        for offset, value in self.others:
            if offset not in range(0, 1024, 4):
                refuse_field(self, f"{value:#x} at offset {offset:#x}")
            words[offset // 4] = value
        for name, offset in _PLACES.items():
            words[offset // 4] = getattr(self, name)
        for name, offset in _BITMAPS.items():
            bitmap = getattr(self, name)
            if len(bitmap) != 8:
                refuse_field(self, f"{name} has eight words")
            words[offset // 4 : offset // 4 + 32 : 4] = bitmap
        try:
            return _WORDS.pack(*words)
        except error:
            at = next(i for i, word in enumerate(words) if not 0 <= word < 1 << 32)
            refuse_field(self, f"{words[at]:#x} at offset {4 * at:#x}")

    def lvt(self, name: str) -> LvtEntry:
        """An entry of the local vector table: `timer`, `lint0`, `lint1`, `error`, ... ."""
        return LvtEntry.from_bits(getattr(self, f"lvt_{name}"))

    def with_lvt(self, name: str, entry: LvtEntry) -> LapicState:
        """With another entry in the local vector table."""
        changes: dict[str, Any] = {f"lvt_{name}": entry.to_bits()}
        return attrs.evolve(self, **changes)

    def vectors(self, bitmap: str) -> tuple[int, ...]:
        """The vectors that are set in `irr` (requested), `isr` (in service) or `tmr` (level)."""
        words = getattr(self, bitmap)
        return tuple(32 * i + bit for i in range(8) for bit in range(32) if words[i] >> bit & 1)

    @property
    def enabled(self) -> bool:
        """Whether software has enabled it (bit 8 of the spurious vector register)."""
        return bool(self.svr & 0x100)

    @property
    def timer_divisor(self) -> int:
        """What the timer's clock is divided by: 1 to 128 (Intel SDM volume 3, figure 11-10)."""
        return 1 << ((self.divide & 3 | self.divide >> 1 & 4) + 1 & 7)
