"""Whether this host can continue a guest of another one: CPUID features that it would miss.

A guest has looked at CPUID once, when it booted, and uses what it saw for ever. So every feature
that it was shown must be there; what is there besides does no harm. Bits that say something else
than a feature, or that KVM sets by the vCPU's state, are left out. Names are the kernel's
(arch/x86/include/asm/cpufeatures.h).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from kvm_ioctls import Kvm
from vmm_reference.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvm_ioctls import CpuidEntry

__all__ = ["missing_features", "refuse_other_cpu"]

# Leaf, subleaf, register; and bits that are no features of the host: the hypervisor's own, those
# that mirror CR4 (OSXSAVE, OSPKE), the in-kernel APIC's (x2APIC, TSC deadline), the topology's
# (HTT, CMP_LEGACY, TOPOEXT), and the APIC's enable bit.
_WORDS = {
    (1, 0, "ecx"): 1 << 31 | 1 << 27 | 1 << 21 | 1 << 24,
    (1, 0, "edx"): 1 << 28 | 1 << 9,
    (7, 0, "ebx"): 0,
    (7, 0, "ecx"): 1 << 4,
    (7, 0, "edx"): 0,
    (7, 1, "eax"): 0,
    (7, 1, "edx"): 0,
    (0xD, 0, "eax"): 0,
    (0xD, 0, "edx"): 0,
    (0xD, 1, "eax"): 0,
    (0x80000001, 0, "ecx"): 1 << 1 | 1 << 22,
    (0x80000001, 0, "edx"): 1 << 9,
    (0x80000008, 0, "ebx"): 0,
}

_NAMES = {
    (1, "ecx"): {0: "pni", 1: "pclmulqdq", 9: "ssse3", 12: "fma", 13: "cx16", 17: "pcid",
                 19: "sse4_1", 20: "sse4_2", 22: "movbe", 23: "popcnt", 25: "aes", 26: "xsave",
                 28: "avx", 29: "f16c", 30: "rdrand"},
    (1, "edx"): {0: "fpu", 4: "tsc", 15: "cmov", 19: "clflush", 23: "mmx", 24: "fxsr", 25: "sse",
                 26: "sse2"},
    (7, "ebx"): {0: "fsgsbase", 3: "bmi1", 5: "avx2", 7: "smep", 8: "bmi2", 9: "erms",
                 10: "invpcid", 16: "avx512f", 17: "avx512dq", 18: "rdseed", 19: "adx", 20: "smap",
                 23: "clflushopt", 24: "clwb", 28: "avx512cd", 29: "sha_ni", 30: "avx512bw",
                 31: "avx512vl"},
    (7, "ecx"): {2: "umip", 3: "pku", 8: "gfni", 9: "vaes", 10: "vpclmulqdq", 11: "avx512_vnni",
                 16: "la57", 22: "rdpid"},
    (7, "edx"): {4: "fsrm", 22: "amx_bf16", 23: "avx512_fp16", 24: "amx_tile", 25: "amx_int8",
                 26: "spec_ctrl", 27: "intel_stibp", 29: "arch_capabilities", 31: "ssbd"},
    (0x80000001, "ecx"): {0: "lahf_lm", 5: "abm", 6: "sse4a", 8: "3dnowprefetch", 11: "xop",
                          16: "fma4", 21: "tbm"},
    (0x80000001, "edx"): {11: "syscall", 20: "nx", 26: "pdpe1gb", 27: "rdtscp", 29: "lm"},
}  # fmt: skip


def missing_features(wanted: Iterable[CpuidEntry], offered: Iterable[CpuidEntry]) -> list[str]:
    """Features in `wanted` that are not in `offered`, by the kernel's names.

    One without a name here is told by its place, such as `cpuid 0x7.0 edx bit 9`.
    """
    have = _words(offered)
    missing = []
    for (leaf, subleaf, register), value in _words(wanted).items():
        lacking = value & ~have.get((leaf, subleaf, register), 0)
        names = _NAMES.get((leaf, register), {}) if subleaf == 0 else {}
        for bit in range(32):
            if lacking >> bit & 1:
                place = f"cpuid {leaf:#x}.{subleaf} {register} bit {bit}"
                missing.append(names.get(bit, place))
    return missing


def refuse_other_cpu(wanted: Iterable[CpuidEntry]) -> None:
    """Refuse a guest that uses what this host has not.

    Raises:
        HostError: names the features.
        KvmError: the host has no KVM.
    """
    wanted = tuple(wanted)
    missing = missing_features(wanted, _supported())
    if missing:
        missing = missing_features(wanted, _given())
    if missing:
        hint = "continue it on a host that has them, or boot it with a CPU that both have"
        raise HostError("this host's CPU", f"lacks what the guest uses: {', '.join(missing)}", hint)


@functools.cache
def _supported() -> tuple[CpuidEntry, ...]:
    """What this host says that it supports; it stays so while this process lives."""
    with Kvm() as kvm:
        return tuple(kvm.get_supported_cpuid())


@functools.cache
def _given() -> tuple[CpuidEntry, ...]:
    """What a vCPU gets: some hosts give it more than they say they support."""
    with Kvm() as kvm, kvm.create_vm() as vm, vm.create_vcpu(0) as vcpu:
        vcpu.set_cpuid2(_supported())
        return tuple(vcpu.get_cpuid2())


def _words(entries: Iterable[CpuidEntry]) -> dict[tuple[int, int, str], int]:
    found: dict[tuple[int, int, str], int] = {}
    for entry in entries:
        for register in ("eax", "ebx", "ecx", "edx"):
            key = (entry.function, entry.index, register)
            if key in _WORDS:
                found[key] = getattr(entry, register) & ~_WORDS[key]
    return found
