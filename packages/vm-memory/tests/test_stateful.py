"""Memory against a dictionary of bytes with holes, through random sequences of operations."""

from __future__ import annotations

import gc
import os

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vm_memory import (
    Anonymous,
    ClosedError,
    GuestAddress,
    GuestMemory,
    Memfd,
    MemoryAccessError,
    MemoryHolder,
    Order,
    Permissions,
    RegionError,
)
from vm_memory.testing import MemoryModel, RegionModel, addresses_near, range_lists

A = GuestAddress
PAGE = 16


class MemoryMachine(RuleBasedStateMachine):
    """One current map in a holder, old maps and slices kept alive beside it."""

    def __init__(self) -> None:
        """Begin with an empty map."""
        super().__init__()
        self.holder = MemoryHolder(GuestMemory())
        self.model = MemoryModel()
        self.regions: list[tuple[int, RegionModel]] = []
        self.old: list[tuple[GuestMemory, MemoryModel]] = []
        self.slices: list[tuple[memoryview, RegionModel, int]] = []

    @property
    def memory(self) -> GuestMemory:
        """The current map."""
        return self.holder.memory

    def ranges(self) -> list[tuple[GuestAddress, int]]:
        """Where its regions are."""
        return [(A(start), len(region.data)) for start, region in self.regions]

    @rule(data=st.data(), memfd=st.booleans())
    def start_anew(self, data: st.DataObject, memfd: bool) -> None:
        """Another map takes the place of this one, which is kept for a while."""
        ranges = data.draw(range_lists())
        backing = Memfd() if memfd else Anonymous()
        memory = GuestMemory.from_ranges(ranges, backing=backing, dirty_page_size=PAGE)
        self.old.append((self.memory, self.model))
        with self.holder.lock():
            self.holder.replace(memory)
        self.model = MemoryModel()
        self.regions = [(start, RegionModel(bytearray(size))) for start, size in ranges]
        for start, region in self.regions:
            self.model = self.model.with_region(start, region)

    @rule(data=st.data(), size=st.integers(1, 40))
    def insert(self, data: st.DataObject, size: int) -> None:
        """Add a region, if there is room for it."""
        address = A(data.draw(addresses_near(self.ranges())) & ~7)
        free = 0 <= address <= (1 << 64) - size
        if not free:
            return
        (region,) = GuestMemory.from_ranges([(address, size)], dirty_page_size=PAGE).regions
        free = not any(address + i in self.model.bytes_at for i in range(size))
        if not free:
            with pytest.raises(RegionError):
                self.memory.insert(region)
            return
        self.old.append((self.memory, self.model))
        with self.holder.lock():
            self.holder.replace(self.memory.insert(region))
        model = RegionModel(bytearray(size))
        self.regions = sorted([*self.regions, (address, model)], key=lambda entry: entry[0])
        self.model = self.model.with_region(address, model)

    @precondition(lambda self: self.regions)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        """Take a region out."""
        index = data.draw(st.integers(0, len(self.regions) - 1))
        start, model = self.regions[index]
        smaller, region = self.memory.remove(A(start), len(model.data))
        assert bytes(region.buffer) == bytes(model.data)
        self.old.append((self.memory, self.model))
        with self.holder.lock():
            self.holder.replace(smaller)
        self.regions = [entry for entry in self.regions if entry[1] is not model]
        self.model = self.model.without(model)

    @rule(data=st.data(), length=st.integers(0, 80))
    def read(self, data: st.DataObject, length: int) -> None:
        """Read exactly, partly, and ask beforehand."""
        address = data.draw(addresses_near(self.ranges()))
        expected = self.model.read(address, length)
        assert self.memory.check_range(address, length) == (expected is not None)
        if expected is None:
            with pytest.raises(MemoryAccessError):
                self.memory.read(address, length)
        else:
            assert self.memory.read(address, length) == expected
            target = bytearray(length)
            self.memory.read_into(address, target)
            assert target == expected
        available = self.model.available(address, length)
        if available or not length:
            assert self.memory.read_partial(address, length) == self.model.read(address, available)

    @rule(data=st.data(), content=st.binary(max_size=80), partial=st.booleans())
    def write(self, data: st.DataObject, content: bytes, partial: bool) -> None:
        """Write exactly or partly."""
        address = data.draw(addresses_near(self.ranges()))
        if partial:
            available = self.model.available(address, len(content))
            if available or not content:
                assert self.memory.write_partial(address, content) == available
                assert self.model.write(address, content[:available])
                return
        if self.model.write(address, content):
            self.memory.write(address, content)
        else:
            with pytest.raises(MemoryAccessError):
                self.memory.write(address, content)

    @rule(data=st.data(), size=st.sampled_from([1, 2, 4, 8]), value=st.integers(0, (1 << 64) - 1))
    def scalars(self, data: st.DataObject, size: int, value: int) -> None:
        """Read a scalar in every way, write another, read that."""
        address = data.draw(addresses_near(self.ranges()))
        value &= (1 << 8 * size) - 1
        before = self.model.read(address, size)
        read = getattr(self.memory, f"read_u{8 * size}")
        write = getattr(self.memory, f"write_u{8 * size}")
        if before is None:
            with pytest.raises(MemoryAccessError):
                read(address)
            with pytest.raises(MemoryAccessError):
                write(address, value)
            return
        assert read(address) == int.from_bytes(before, "little")
        write(address, value)
        self.model.write(address, value.to_bytes(size, "little"))
        if size > 1:
            swapped = int.from_bytes(value.to_bytes(size, "little"), "big")
            assert getattr(self.memory, f"read_u{8 * size}_be")(address) == swapped

    @rule(data=st.data(), size=st.sampled_from([1, 2, 4, 8]), value=st.integers(0, 255))
    def atomics(self, data: st.DataObject, size: int, value: int) -> None:
        """Atomics work where they are aligned and lie in one region, and nowhere else."""
        address = data.draw(addresses_near(self.ranges()))
        before = self.model.read(address, size)
        places = [self.model.bytes_at.get(address + i, (None, 0))[0] for i in range(size)]
        if before is None or address % size or any(p is not places[0] for p in places):
            with pytest.raises(MemoryAccessError):
                self.memory.atomic_fetch_add(address, size, value)
            return
        old = int.from_bytes(before, "little")
        assert self.memory.atomic_load(address, size, Order.SEQ_CST) == old
        assert self.memory.atomic_fetch_add(address, size, value) == old
        new = (old + value) & ((1 << 8 * size) - 1)
        self.model.write(address, new.to_bytes(size, "little"))

    @rule(data=st.data(), length=st.integers(0, 40), value=st.integers(0, 255))
    def fill_and_copy(self, data: st.DataObject, length: int, value: int) -> None:
        """Fill a range, then copy it elsewhere."""
        source, target = (data.draw(addresses_near(self.ranges())) for _ in range(2))
        if self.model.write(source, bytes([value]) * length):
            self.memory.fill(source, length, value)
        content = self.model.read(source, length + 3)
        if content is not None and self.model.available(target, length + 3) == length + 3:
            self.model.write(target, content)
            self.memory.copy(target, source, length + 3)
        else:
            with pytest.raises(MemoryAccessError):
                self.memory.copy(target, source, length + 3)

    @rule(data=st.data(), length=st.integers(1, 40))
    def slice(self, data: st.DataObject, length: int) -> None:
        """Take slices, which are kept whatever happens to the map."""
        address = data.draw(addresses_near(self.ranges()))
        if self.model.available(address, length) != length:
            return
        at = int(address)
        for piece in self.memory.slices(address, length, Permissions.READ):
            region, offset = self.model.bytes_at[at]
            self.slices.append((piece, region, offset))
            at += len(piece)

    @precondition(lambda self: self.slices)
    @rule(data=st.data(), value=st.integers(0, 255))
    def write_through_a_slice(self, data: st.DataObject, value: int) -> None:
        """A slice is the memory, in every map that has the region."""
        piece, region, offset = self.slices[data.draw(st.integers(0, len(self.slices) - 1))]
        piece[0] = value
        region.data[offset] = value

    @rule(clear=st.booleans())
    def harvest(self, clear: bool) -> None:
        """The dirty ranges are exactly those of the model, in order and coalesced."""
        found = list(self.memory.harvest_dirty(clear=clear))
        marked = {at + i for at, length in found for i in range(length)}
        assert marked == self.model.dirty(PAGE)
        ends = [at + length for at, length in found]
        assert all(end < at for end, (at, _) in zip(ends, found[1:], strict=False))
        if clear:
            self.model.clean()

    @precondition(lambda self: self.old)
    @rule(data=st.data(), collect=st.booleans())
    def close_an_old_map(self, data: st.DataObject, collect: bool) -> None:
        """An old map still has its bytes; once closed it refuses, and the others live on."""
        memory, model = self.old.pop(data.draw(st.integers(0, len(self.old) - 1)))
        assert model.agrees_with(memory)
        memory.close()
        with pytest.raises(ClosedError):
            memory.read(A(8), 1)
        if collect:
            del memory
            gc.collect()

    @precondition(lambda self: self.regions)
    @rule()
    def fork(self) -> None:
        """A forked child finds the same bytes."""
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                status = 0 if self.model.agrees_with(self.memory) else 2
            finally:
                os._exit(status)
        assert os.waitpid(pid, 0)[1] == 0

    @invariant()
    def slices_show_their_bytes(self) -> None:
        """Every slice ever taken shows what its region contains now."""
        for piece, region, offset in self.slices:
            assert bytes(piece) == bytes(region.data[offset : offset + len(piece)])

    @invariant()
    def regions_are_sorted(self) -> None:
        """Regions are sorted, not empty, and do not overlap."""
        end = 0
        for region in self.memory.regions:
            assert region.size > 0
            assert region.guest_address >= end
            end = region.guest_address + region.size

    def teardown(self) -> None:
        """In the end the current map has exactly the model's bytes."""
        assert self.model.agrees_with(self.memory)


TestMemory = MemoryMachine.TestCase
TestMemory.settings = settings(max_examples=settings().max_examples // 2, stateful_step_count=40)
