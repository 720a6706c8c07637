"""What firmware looks for on a PCI bus: the bridges it knows, set up already; and its timer."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vmm_reference import layout
from vmm_reference.bus import Bus
from vmm_reference.devices import pm
from vmm_reference.devices.pm_timer import FREQUENCY, PORT, PmTimer
from vmm_reference.pci.bus import CONFIG_ADDRESS, PciBus
from vmm_reference.pci.chipset import ISA_SLOT, add_chipset

DATA = CONFIG_ADDRESS + 4


class Ports:
    """A bus with the chipset, as firmware reaches it: by 0xCF8."""

    def __init__(self) -> None:
        self.ports = Bus(0x10000)
        self.bus = PciBus(self.ports, Bus(), lambda gsi, level: None, reset=lambda: None)
        self.functions = add_chipset(self.bus)

    def select(self, slot: int, function: int, register: int) -> None:
        address = 1 << 31 | slot << 11 | function << 8 | register & 0xFC
        self.ports.write(CONFIG_ADDRESS, address.to_bytes(4, "little"))

    def read(self, slot: int, function: int, register: int, size: int = 4) -> int:
        self.select(slot, function, register)
        return int.from_bytes(self.ports.read(DATA + register % 4, size), "little")

    def write(self, slot: int, function: int, register: int, data: bytes) -> None:
        self.select(slot, function, register)
        self.ports.write(DATA + register % 4, data)


def test_firmware_recognises_the_machine() -> None:
    """The identifiers of the 440FX, PIIX3 and PIIX4; nothing at the other functions."""
    pci = Ports()
    assert pci.read(0, 0, 0) == 0x12378086
    assert pci.read(ISA_SLOT, 0, 0) == 0x70008086
    assert pci.read(ISA_SLOT, 0, 0x0E, 1) & 0x80, "more functions follow"
    assert pci.read(ISA_SLOT, 0, 0x08) >> 8 == 0x060100
    assert pci.read(ISA_SLOT, 3, 0) == 0x71138086
    for slot, function in ((0, 1), (ISA_SLOT, 1), (ISA_SLOT, 2), (2, 0), (31, 7)):
        assert pci.read(slot, function, 0) == 0xFFFFFFFF


def test_what_is_set_up_stays_so() -> None:
    """Power management has its place and is on, whatever is written there."""
    pci = Ports()
    for register in (0x40, 0x58, 0x80):
        before = pci.read(ISA_SLOT, 3, register)
        pci.write(ISA_SLOT, 3, register, bytes(4))
        assert pci.read(ISA_SLOT, 3, register) == before
    assert pci.read(ISA_SLOT, 3, 0x40) == pm.PORT | 1
    assert pci.read(ISA_SLOT, 3, 0x80) & 1
    assert pci.read(ISA_SLOT, 3, 4) & 1
    pci.write(0, 0, 0x59, b"\x33")
    assert pci.read(0, 0, 0x59, 1) == 0x33


def test_registers_are_saved_and_restored() -> None:
    """Another machine's chipset becomes this one's."""
    pci, other = Ports(), Ports()
    pci.write(0, 0, 0x5A, b"\x11\x22")
    pci.write(ISA_SLOT, 0, 0x60, b"\x0a\x0b\x0a\x0b")
    for name, function in pci.functions.items():
        other.functions[name].restore(function.save())
    assert other.read(0, 0, 0x5A, 2) == 0x2211
    assert other.read(ISA_SLOT, 0, 0x60) == 0x0B0A0B0A


@given(st.integers(16, 1 << 20).map(lambda count: count << 20))
def test_windows_for_bars_hold_nothing_else(memory: int) -> None:
    """They lie above RAM, from 2 GiB on, below the IOAPIC, and leave out ECAM."""
    windows = layout.firmware_pci_memory32(memory)
    low = min(memory, layout.MMIO_GAP_START)
    for start, size in windows:
        assert size > 0
        assert start >= max(low, 2 << 30)
        assert start + size <= layout.IOAPIC
        assert start + size <= layout.ECAM or start >= layout.ECAM + layout.ECAM_SIZE


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=8))
def test_the_timer_counts_and_wraps_at_24_bits(steps: list[float]) -> None:
    """It goes on from the value that was saved, on a machine whose clock shows something else."""
    now, other = [0.0], [1234.5]
    timer, restored = PmTimer(lambda: now[0]), PmTimer(lambda: other[0])
    assert PORT == pm.PORT + 8
    for step in steps:
        now[0] += step
        assert int.from_bytes(timer.read(0, 4), "little") == int(now[0] * FREQUENCY) % (1 << 24)
        assert timer.read(0, 2) + timer.read(2, 2) == timer.read(0, 4)
        timer.write(0, b"\xff\xff\xff\xff")
        restored.restore(timer.save())
        assert restored.read(0, 4) == timer.read(0, 4)
    count = len(steps)
    assert timer.metrics() == {"timer_reads": 5 * count, "timer_refused_writes": count}
