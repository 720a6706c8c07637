"""Features of CPUs that a guest would miss on another host."""

import attrs
import pytest

from kvm_ioctls import CpuidEntry, Kvm
from vmm_reference.cpu import compat
from vmm_reference.errors import HostError


def entry(function: int, index: int = 0, **registers: int) -> CpuidEntry:
    values = {"flags": 0, "eax": 0, "ebx": 0, "ecx": 0, "edx": 0} | registers
    return CpuidEntry(function=function, index=index, **values)


def test_features_are_named() -> None:
    """By the kernel's name, or by their place."""
    wanted = [entry(1, ecx=1 << 28 | 1 << 0), entry(7, ebx=1 << 5 | 1 << 6)]
    offered = [entry(1, ecx=1)]
    assert compat.missing_features(wanted, offered) == ["avx", "avx2", "cpuid 0x7.0 ebx bit 6"]
    assert compat.missing_features(wanted, wanted) == []
    assert compat.missing_features(offered, wanted) == []


def test_what_is_no_feature_does_not_count() -> None:
    """The hypervisor bit, what mirrors CR4, the topology; leaves that are not known."""
    wanted = [
        entry(1, ecx=1 << 31 | 1 << 27 | 1 << 21 | 1 << 24, edx=1 << 28 | 1 << 9),
        entry(7, ecx=1 << 4),
        entry(0x80000001, ecx=1 << 1 | 1 << 22),
        entry(0x40000000, eax=0xFFFFFFFF),
        entry(0xB, ebx=7),
    ]
    assert compat.missing_features(wanted, []) == []


@pytest.mark.kvm
def test_this_host_continues_its_own_guests_and_no_others() -> None:
    """What a vCPU here has is there; one bit more is refused, and named."""
    with Kvm() as kvm, kvm.create_vm() as vm, vm.create_vcpu(0) as vcpu:
        vcpu.set_cpuid2(kvm.get_supported_cpuid())
        mine = vcpu.get_cpuid2()
        compat.refuse_other_cpu(mine)
        more = [attrs.evolve(e, ebx=e.ebx | 1 << 31) if e.function == 0x80000008 else e
                for e in mine]  # fmt: skip
        with pytest.raises(HostError, match="0x80000008"):
            compat.refuse_other_cpu(more)
