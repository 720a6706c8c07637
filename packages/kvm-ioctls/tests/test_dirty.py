"""Dirty pages: bitmap, manual protect and rings agree with what the guest was told to write."""

from __future__ import annotations

import mmap
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvm_ioctls import ArgumentError, Kvm, KvmError, exits
from kvm_ioctls.constants import (
    KVM_CAP_DIRTY_LOG_RING,
    KVM_MEM_LOG_DIRTY_PAGES,
    KVM_MEM_READONLY,
)
from kvm_ioctls.dirty import (
    BitmapTracker,
    RingTracker,
    enable_dirty_ring,
    enable_manual_protect,
    track,
)
from kvm_ioctls.testing import Guest, Mode

pytestmark = pytest.mark.kvm

PAGE = 4096
WAYS = ("bitmap", "manual", "ring")
# Writes a byte at each address of a list that ends with 0, then exits, for ever.
STORE = """
again: out %al, $0x10
    mov $0x3000, %ebx
1:  mov (%ebx), %eax
    add $4, %ebx
    test %eax, %eax
    jz again
    movb $1, (%eax)
    jmp 1b
"""


def made(way: str, **options: int) -> tuple[Kvm, Guest]:
    """A guest that stores where it is told, in a VM that tracks its pages in one of the ways."""
    kvm = Kvm()
    vm = kvm.create_vm()
    if way == "ring":
        enable_dirty_ring(vm, 1024)
    elif way == "manual":
        enable_manual_protect(vm)
    guest = Guest(STORE, Mode.PROTECTED, kvm=kvm, vm=vm, **options)  # type: ignore[arg-type]
    extra = mmap.mmap(-1, 256 * PAGE)
    vm.set_user_memory_region(slot=5, guest_phys_addr=0x40000000, memory=extra)
    assert isinstance(guest.run(), exits.IoOut)
    return kvm, guest


def store(guest: Guest, addresses: list[int]) -> None:
    """Let the guest write there, and nowhere else."""
    words = [*addresses, 0]
    guest.memory[0x3000 : 0x3000 + 4 * len(words)] = b"".join(
        w.to_bytes(4, "little") for w in words
    )
    assert isinstance(guest.run(), exits.IoOut)


def pages(found: dict[int, bytes]) -> set[tuple[int, int]]:
    """A harvest as slots and pages."""
    return {
        (slot, 8 * index + bit)
        for slot, bitmap in found.items()
        for index, byte in enumerate(bitmap)
        for bit in range(8)
        if byte >> bit & 1
    }


TARGETS = st.lists(
    st.tuples(st.sampled_from([0x100000, 0x40000000]), st.integers(0, 255), st.integers(0, 4095)),
    max_size=30,
)


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow])
@given(rounds=st.lists(TARGETS, min_size=1, max_size=4))
def test_harvests_are_what_was_written(way: str, rounds: list[list[tuple[int, int, int]]]) -> None:
    """Each harvest has exactly the pages of the stores since the last one, whichever way it is."""
    kvm, guest = made(way)
    with kvm, guest, track(guest.vm) as tracker:
        assert isinstance(tracker, RingTracker if way == "ring" else BitmapTracker)
        assert pages(tracker.harvest()) <= {(0, 2), (0, 1)}  # at most where its code and list lie
        for targets in rounds:
            addresses = [base + page * PAGE + offset for base, page, offset in targets]
            store(guest, addresses)
            expected = {
                (5, a - 0x40000000 >> 12) if a >= 0x40000000 else (0, a >> 12) for a in addresses
            }
            assert pages(tracker.harvest()) == expected
        assert tracker.harvest() == {}


def test_manual_protect_clears_a_piece_at_a_time() -> None:
    """KVM_CLEAR_DIRTY_LOG clears what it is given and no more; the log alone clears nothing."""
    kvm, guest = made("manual")
    with kvm, guest, track(guest.vm):
        vm = guest.vm
        store(guest, [0x40000000 + n * PAGE for n in range(0, 256, 2)])
        every = int.from_bytes(vm.get_dirty_log(5), "little")
        assert every == sum(1 << n for n in range(0, 256, 2))
        assert vm.get_dirty_log(5) == every.to_bytes(32, "little")
        vm.clear_dirty_log(5, 64, 64)
        vm.clear_dirty_log(5, 192, bitmap=b"\x01" + bytes(7))
        left = sum(1 << n for n in range(0, 256, 2) if not 64 <= n < 128 and n != 192)
        assert int.from_bytes(vm.get_dirty_log(5), "little") == left
        for arguments, rule in (
            ((9,), "no such slot"),
            ((5, 256), "256 pages"),
            ((5, 0, 300), "256 pages"),
            ((5, 0, 64, b"1"), "1 bytes of the 8"),
        ):
            with pytest.raises(ArgumentError, match=rule):
                vm.clear_dirty_log(*arguments)
        with pytest.raises(KvmError, match="multiples of 64"):
            vm.clear_dirty_log(5, 1, 64)


def test_a_full_ring_is_an_exit() -> None:
    """A guest that fills its ring comes out, and goes on after a harvest, losing no page.

    It stores 50 pages a run: a KVM that emulates many instructions at once looks at the ring only
    between two of its turns, and the ring counts as full while 64 entries are still free.
    """
    kvm, guest = made("ring", memory=12 << 20)
    with kvm, guest, track(guest.vm) as tracker:
        seen: set[tuple[int, int]] = set()
        full = 0
        for first in range(0x100, 0x100 + 2500, 50):
            words = [*((first + n) * PAGE for n in range(50)), 0]
            guest.memory[0x3000 : 0x3000 + 204] = b"".join(w.to_bytes(4, "little") for w in words)
            while isinstance(guest.run(), exits.DirtyRingFull):
                full += 1
                seen |= pages(tracker.harvest())
        assert full >= 2
        assert seen | pages(tracker.harvest()) == {(0, 0x100 + n) for n in range(2500)}


@pytest.mark.parametrize("way", WAYS)
def test_harvests_while_the_guest_runs_lose_nothing(way: str) -> None:
    """The union of harvests taken beside a running guest, and one after it, is all it wrote."""
    kvm, guest = made(way)
    with kvm, guest, track(guest.vm) as tracker:
        targets = [0x40000000 + n * PAGE for n in range(200)]
        words = [*targets, 0]
        guest.memory[0x3000 : 0x3000 + 4 * len(words)] = b"".join(
            word.to_bytes(4, "little") for word in words
        )
        seen: list[exits.Exit] = []
        runner = threading.Thread(target=lambda: seen.append(guest.run()))
        runner.start()
        found: set[tuple[int, int]] = set()
        while runner.is_alive():
            found |= pages(tracker.harvest())
        runner.join()
        assert isinstance(seen[0], exits.IoOut)
        assert found | pages(tracker.harvest()) == {(5, n) for n in range(200)}


def test_tracking_leaves_the_slots_as_they_were() -> None:
    """Slots have their own flags back; read-only ones are left alone, deleted ones forgotten."""
    kvm, guest = made("bitmap")
    rom, own, gone = mmap.mmap(-1, PAGE), mmap.mmap(-1, PAGE), mmap.mmap(-1, PAGE)
    with kvm, guest:
        region = guest.vm.set_user_memory_region
        region(slot=6, guest_phys_addr=0x50000000, memory=rom, flags=KVM_MEM_READONLY)
        region(slot=7, guest_phys_addr=0x51000000, memory=own, flags=KVM_MEM_LOG_DIRTY_PAGES)
        region(slot=8, guest_phys_addr=0x52000000, memory=gone)
        before = {slot.slot: slot.flags for slot in guest.vm.slots}
        with track(guest.vm):
            during = {slot.slot: slot.flags for slot in guest.vm.slots}
            assert during == {0: 1, 5: 1, 6: KVM_MEM_READONLY, 7: 1, 8: 1}
            region(slot=8, memory=None)
        del before[8]
        assert {slot.slot: slot.flags for slot in guest.vm.slots} == before
        with track(guest.vm) as tracker:
            guest.vm.close()
        assert tracker.vm.closed


def test_two_vcpus_two_rings() -> None:
    """Pages written by different vCPUs come together in one harvest."""
    kvm = Kvm()
    vm = kvm.create_vm()
    enable_dirty_ring(vm, 1024)
    source = "add $0x100, %edi; shl $12, %edi; movb $1, (%edi); out %al, $0x10; hlt"
    with kvm, Guest(source, Mode.PROTECTED, cpus=2, kvm=kvm, vm=vm) as guest, track(vm) as tracker:
        for vcpu in guest.vcpus:
            assert isinstance(vcpu.run(), exits.IoOut)
        assert pages(tracker.harvest()) == {(0, 0x100), (0, 0x101)}


def test_rings_that_are_not_there() -> None:
    """Without rings a vCPU has none to read; a size that is none is refused; a log is refused."""
    with Guest("hlt") as guest:
        with pytest.raises(ArgumentError, match="before the first vCPU"):
            guest.vcpu.dirty_pages()
        with pytest.raises(KvmError, match="EINVAL"):
            guest.vm.enable_cap(KVM_CAP_DIRTY_LOG_RING, (3000,))
        with pytest.raises(KvmError, match="no dirty rings"):
            guest.vm.reset_dirty_rings()
    kvm, guest = made("ring")
    with kvm, guest, pytest.raises(KvmError, match="in rings"):
        guest.vm.get_dirty_log(0)


@pytest.mark.parametrize("size", [None, 64 * PAGE])
def test_pages_of_slots_that_are_gone(size: int | None) -> None:
    """What a ring says of a slot that was deleted since, or made anew and smaller, is forgotten."""
    kvm, guest = made("ring")
    memory = mmap.mmap(-1, 64 * PAGE)
    with kvm, guest, track(guest.vm) as tracker:
        store(guest, [0x40000000 + n * PAGE for n in (3, 200)] + [0x100000])
        guest.vm.set_user_memory_region(slot=5, memory=None)
        if size is not None:
            guest.vm.set_user_memory_region(slot=5, guest_phys_addr=0x60000000, memory=memory)
        assert pages(tracker.harvest()) == ({(5, 3)} if size else set()) | {(0, 0x100)}
