"""The guest-physical map has no overlaps, whatever the machine's size."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from vmm_reference import layout
from vmm_reference.config import MAX_DEVICES
from vmm_reference.layout import MIB, e820_ranges, ram_ranges

sizes = st.one_of(
    st.integers(16, 1 << 20),
    st.integers(-2, 2).map(lambda step: (layout.MMIO_GAP_START // MIB) + step),
).map(lambda count: count * MIB)


@given(sizes)
def test_ram_is_all_there_and_outside_the_gap(size: int) -> None:
    """The ranges add up to the size and leave the gap below 4 GiB free."""
    ranges = ram_ranges(size)
    assert sum(length for _, length in ranges) == size
    for address, length in ranges:
        assert address + length <= layout.MMIO_GAP_START or address >= layout.MMIO_GAP_END


@given(sizes)
def test_the_map_is_sorted_and_disjoint(size: int) -> None:
    """E820 entries follow one another; usable ones lie in RAM; fixed windows are not usable."""
    entries = e820_ranges(size)
    for (first, length, _), (second, _, _) in pairwise(entries):
        assert first + length <= second
    ram = ram_ranges(size)
    usable = [(address, length) for address, length, good in entries if good]
    for address, length in usable:
        assert any(a <= address and address + length <= a + n for a, n in ram)
    for window in (layout.IOAPIC, layout.LOCAL_APIC, layout.TSS, layout.IDENTITY_MAP,
                   layout.ACPI_TABLES, layout.EBDA):  # fmt: skip
        assert not any(address <= window < address + length for address, length in usable)


def test_virtio_devices_have_their_own_windows_and_interrupts() -> None:
    """As many devices as a machine may have differ in window and in interrupt line."""
    count = MAX_DEVICES["mmio"]
    windows = {layout.virtio_mmio_window(index) for index in range(count)}
    lines = {layout.virtio_gsi(index) for index in range(count)}
    assert len(windows) == len(lines) == count
    assert not lines & {0, 2, layout.SERIAL_IRQ, 8, 9}
    assert max(windows) + layout.VIRTIO_MMIO_SIZE <= layout.IOAPIC
