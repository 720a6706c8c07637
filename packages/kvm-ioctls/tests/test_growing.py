"""Answers that a kernel gives in more than one call, from a stand-in that keeps to api.rst.

The machines at hand give each of them at once, or not at all.
"""

from __future__ import annotations

from collections.abc import Callable
from errno import E2BIG, EFAULT, EINTR
from struct import pack, pack_into, unpack_from

import pytest

from kvm_ioctls import CpuidEntry, Kvm, KvmError, exits
from kvm_ioctls._fd import Descriptor
from kvm_ioctls.exits.decoders import Decoders
from kvm_ioctls.state import NestedState
from kvm_ioctls.testing import Guest

pytestmark = pytest.mark.kvm

Answer = Callable[[bytearray], int]


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Callable[[Answer], list[int]]:
    """Let a function answer ioctls; what it says is recorded."""

    def install(kernel: Answer) -> list[int]:
        said: list[int] = []

        def stand_in(self: Descriptor, request: int, data: bytearray) -> int:
            said.append(kernel(data))
            return said[-1]

        monkeypatch.setattr(Descriptor, "_try", stand_in)
        return said

    return install


def test_a_longer_cpuid(answer: Callable[[Answer], list[int]]) -> None:
    """KVM_GET_SUPPORTED_CPUID says E2BIG without saying how many; there is an end to asking."""
    entries = [CpuidEntry(n, 0, 0, n, 0, 0, 0) for n in range(600)]

    def kernel(data: bytearray) -> int:
        if unpack_from("<I", data)[0] < len(entries):
            return -E2BIG
        pack_into("<I", data, 0, len(entries))
        for n, e in enumerate(entries):
            pack_into("<3I4I12x", data, 8 + 40 * n, e.function, e.index, e.flags, e.eax, e.ebx,
                      e.ecx, e.edx)  # fmt: skip
        return 0

    with Kvm() as kvm:
        said = answer(kernel)
        assert kvm.get_supported_cpuid() == tuple(entries)
        assert said == [-E2BIG, -E2BIG, 0]
        said = answer(lambda data: -E2BIG)
        with pytest.raises(KvmError, match="E2BIG"):
            kvm.get_supported_cpuid()
        assert len(said) == 9


def test_a_longer_list_of_msrs(answer: Callable[[Answer], list[int]]) -> None:
    """KVM_GET_MSR_INDEX_LIST says how many there are when there is no room for them."""

    def kernel(data: bytearray) -> int:
        room = unpack_from("<I", data)[0]
        pack_into("<I", data, 0, 300)
        if room < 300:
            return -E2BIG
        pack_into("<300I", data, 4, *range(300))
        return 0

    with Kvm() as kvm:
        said = answer(kernel)
        assert kvm.get_msr_index_list() == tuple(range(300))
        assert said == [-E2BIG, 0]


def test_the_list_of_single_registers(answer: Callable[[Answer], list[int]]) -> None:
    """KVM_GET_REG_LIST is asked with no room first."""

    def kernel(data: bytearray) -> int:
        room = unpack_from("<Q", data)[0]
        pack_into("<Q", data, 0, 3)
        if room < 3:
            return -E2BIG
        pack_into("<3Q", data, 8, 7, 8, 9)
        return 0

    with Guest("hlt") as guest:
        said = answer(kernel)
        assert guest.vcpu.get_reg_list() == (7, 8, 9)
        assert said == [-E2BIG, 0]


def test_a_larger_nested_state(answer: Callable[[Answer], list[int]]) -> None:
    """KVM_GET_NESTED_STATE writes the size that it needs."""
    state = NestedState(1, 1, bytes(range(120)), bytes(0x3000))

    def kernel(data: bytearray) -> int:
        written = state.to_bytes()
        room = unpack_from("<I", data, 4)[0]
        data[:] = written[: len(data)].ljust(len(data), b"\0")
        return 0 if room >= len(written) else -E2BIG

    with Guest("hlt") as guest:
        said = answer(kernel)
        assert guest.vcpu.get_nested_state() == state
        assert said == [-E2BIG, 0]


def test_memory_is_faulted_in_piece_by_piece(answer: Callable[[Answer], list[int]]) -> None:
    """KVM_PRE_FAULT_MEMORY goes on where a signal, or it by itself, has stopped; errors end it."""
    answers = iter([-EINTR, 0, 0, -EFAULT])

    def kernel(data: bytearray) -> int:
        gpa, size = unpack_from("<QQ", data)
        data[:16] = pack("<QQ", gpa + 0x1000, size - 0x1000)
        return next(answers)

    with Guest("hlt") as guest:
        said = answer(kernel)
        guest.vcpu.pre_fault_memory(0, 0x3000)
        assert said == [-EINTR, 0, 0]
        with pytest.raises(KvmError, match=r"KVM_PRE_FAULT_MEMORY\(gpa=0, size=12288\).*EFAULT"):
            guest.vcpu.pre_fault_memory(0, 0x3000)


def test_pages_of_other_machines() -> None:
    """A debug exit of arm64, and an emulation failure without data, are decoded as they are."""
    page = bytearray(4096)
    page[32:48] = pack("<IIQ", 1, 2, 3)
    assert Decoders("aarch64")[4](memoryview(page)) == exits.ArmDebug(2 << 32 | 1, 3)
    page[32:48] = pack("<IIQ", 1, 0, 0)
    failure = Decoders()[17](memoryview(page))
    assert isinstance(failure, exits.EmulationFailure)
    assert (failure.suberror, failure.data, failure.instruction) == (1, (), b"")
