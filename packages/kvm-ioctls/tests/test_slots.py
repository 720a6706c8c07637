"""Memory slots: checked, owned, and safe in any order of closing."""

from __future__ import annotations

import gc
import mmap

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvm_ioctls import ArgumentError, HostMemory, Kvm, KvmError, exits
from kvm_ioctls.constants import KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY
from kvm_ioctls.testing import Guest, Mode

pytestmark = pytest.mark.kvm

PAGE = 4096


def test_misuse_is_refused_without_a_trace() -> None:
    """Overlap, misalignment, emptiness and read-only buffers are refused; nothing changes."""
    memory = mmap.mmap(-1, 8 * PAGE)
    with Kvm() as kvm, kvm.create_vm() as vm:
        vm.set_user_memory_region(slot=0, guest_phys_addr=0x10000, memory=memory)
        before = vm.slots
        view = memoryview(memory)
        for slot, address, piece, rule in (
            (1, 0x10000 + 7 * PAGE, memory, "overlaps slot 0"),
            (1, 0x10001, memory, "multiples"),
            (1, 0, view[1 : PAGE + 1], "multiples"),
            (1, 0, view[: PAGE // 2], "positive multiple"),
            (1, 0, view[:0], "positive multiple"),
            (1, 1 << 52, memory, "52 bits"),
            (1, 0, view[::2], "writable, contiguous buffer"),
            (1, 0, bytes(PAGE), "writable"),
            (0, 0x10000, view[:PAGE], "delete it first"),
        ):
            with pytest.raises(ArgumentError, match=rule):
                vm.set_user_memory_region(slot=slot, guest_phys_addr=address, memory=piece)
            assert vm.slots == before
        with pytest.raises(ArgumentError, match="nothing to delete"):
            vm.set_user_memory_region(slot=7, memory=None)
        with pytest.raises(KvmError, match="KVM_SET_USER_MEMORY_REGION"):
            vm.set_user_memory_region(slot=1, guest_phys_addr=0, memory=memory, flags=1 << 20)
        assert vm.slots == before


def test_mapped_buffer_cannot_vanish() -> None:
    """A buffer that is guest memory cannot be closed; once its slot is gone it can."""
    with Kvm() as kvm, kvm.create_vm() as vm:
        memory = mmap.mmap(-1, PAGE)
        vm.set_user_memory_region(slot=3, guest_phys_addr=0, memory=memory)
        with pytest.raises(BufferError):
            memory.close()
        vm.set_user_memory_region(slot=3, memory=None)
        gc.collect()
        memory.close()


def test_memory_outlives_the_vm_object_for_its_vcpus() -> None:
    """A guest whose VM object is forgotten still finds its memory."""
    guest = Guest("mov $5, %al; mov %al, 0x7000; out %al, $0x10; hlt")
    vcpu, kvm, memory = guest.vcpu, guest.kvm, guest.memory
    del guest
    gc.collect()
    assert vcpu.run() == exits.IoOut(0x10, 1, 1, b"\x05")
    assert memory[0x7000] == 5
    vcpu.vm.close()
    kvm.close()
    memory.close()


def test_address_with_an_owner() -> None:
    """Memory can be given by address; its owner is referenced as long as the slot lives."""
    import ctypes
    import weakref

    class Owner:
        def __init__(self) -> None:
            self.map = mmap.mmap(-1, PAGE)
            self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.map))

    owner = Owner()
    watch = weakref.ref(owner)
    with Kvm() as kvm, kvm.create_vm() as vm:
        vm.set_user_memory_region(
            slot=0, guest_phys_addr=0, memory=HostMemory(owner.address, PAGE, owner)
        )
        del owner
        assert watch() is not None
        vm.set_user_memory_region(slot=0, memory=None)
        assert watch() is None


def test_slot_moves() -> None:
    """A slot set again elsewhere moves: the guest finds its bytes at the new address."""
    with Guest("mov 0x100000, %al; out %al, $0x10; hlt", Mode.PROTECTED) as guest:
        extra = mmap.mmap(-1, PAGE)
        extra[0] = 99
        guest.vm.set_user_memory_region(slot=1, guest_phys_addr=0x400000, memory=extra)
        guest.vm.set_user_memory_region(slot=1, guest_phys_addr=0x300000, memory=extra)
        guest.memory[0x1000:0x1005] = b"\xa0\x00\x00\x30\x00"  # mov 0x300000, %al
        assert guest.run() == exits.IoOut(0x10, 1, 1, b"\x63")


def test_readonly_slot_makes_writes_exits() -> None:
    """A guest's write to a read-only slot comes as MMIO and the memory keeps its content."""
    rom = mmap.mmap(-1, PAGE)
    rom[0] = 0x55
    source = "mov 0x300000, %al; mov %al, 0x300001; hlt"
    with Guest(source, Mode.PROTECTED) as guest:
        guest.vm.set_user_memory_region(
            slot=1, guest_phys_addr=0x300000, memory=rom, flags=KVM_MEM_READONLY
        )
        assert guest.run() == exits.MmioWrite(0x300001, b"\x55")
        assert rom[1] == 0


OPERATIONS = st.lists(
    st.tuples(
        st.integers(0, 4),  # slot
        st.integers(0, 12),  # guest page
        st.integers(0, 6),  # host page
        st.integers(0, 4),  # pages; 0 deletes
        st.sampled_from([0, KVM_MEM_LOG_DIRTY_PAGES]),
    ),
    max_size=25,
)


@given(OPERATIONS)
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_slots_agree_with_a_model(operations: list[tuple[int, int, int, int, int]]) -> None:
    """Any sequence of slot operations is accepted or refused as the model of the rules says."""
    model: dict[int, tuple[int, int, int]] = {}
    memory = mmap.mmap(-1, 16 * PAGE)
    with Kvm() as kvm, kvm.create_vm() as vm:
        view = memoryview(memory)
        for slot, page, host, pages, flags in operations:
            if pages == 0:
                legal = slot in model
            else:
                old = model.get(slot)
                legal = (old is None or old[1] == pages) and all(
                    other == slot or page >= p + n or p >= page + pages
                    for other, (p, n, _) in model.items()
                )
            piece = view[host * PAGE : (host + pages) * PAGE] if pages else None
            try:
                vm.set_user_memory_region(
                    slot=slot, guest_phys_addr=page * PAGE, memory=piece, flags=flags
                )
                accepted = True
            except ArgumentError:
                accepted = False
            except KvmError:
                # The kernel refuses to point a living slot at other host memory.
                assert old is not None
                assert old[2] != host
                continue
            assert accepted == legal
            if accepted and pages:
                model[slot] = (page, pages, host)
            elif accepted:
                del model[slot]
        assert {s.slot: (s.guest_phys_addr // PAGE, s.size // PAGE) for s in vm.slots} == {
            slot: (page, pages) for slot, (page, pages, _) in model.items()
        }
