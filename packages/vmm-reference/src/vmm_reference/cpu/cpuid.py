"""CPUID policy: what the host's KVM offers, made consistent with the machine's topology.

The machine is one package of single-threaded cores; APIC identifiers count up from 0. Each
function is pure, so that every host's table can be tested on any host. Sections refer to the Intel
SDM, volume 2A, CPUID, and to the AMD APM, volume 3, appendix E.
"""

from __future__ import annotations

from vm_memory._values import evolve

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvm_ioctls import CpuidEntry

__all__ = ["apic_id_bits", "topology"]

_HTT = 1 << 28  # leaf 1 EDX: the count in EBX[23:16] is valid
_HYPERVISOR = 1 << 31  # leaf 1 ECX
_TSC_DEADLINE = 1 << 24  # leaf 1 ECX
_WAITPKG = 1 << 5  # leaf 7 ECX: a guest that waits in UMWAIT would never leave the host's CPU
_TOPOEXT = 1 << 22  # leaf 0x80000001 ECX: leaves 0x8000001D and 0x8000001E are valid
_CMP_LEGACY = 1 << 1  # leaf 0x80000001 ECX: the package has several cores

_AMD = (0x68747541, 0x69746E65, 0x444D4163)  # "Auth" "enti" "cAMD" in EBX, EDX, ECX
_HYGON = (0x6F677948, 0x6E65476E, 0x656E6975)

# The highest number of logical processors that shares a cache, at levels below the last.
_PRIVATE = 1


def apic_id_bits(cpus: int) -> int:
    """How many bits of the APIC identifier number the `cpus` cores of a package.

    Example:
        >>> [apic_id_bits(n) for n in (1, 2, 3, 4, 5, 254)]
        [0, 1, 2, 2, 3, 8]
    """
    return (cpus - 1).bit_length()


def topology(
    supported: Iterable[CpuidEntry], *, apic_id: int, cpus: int, tsc_deadline: bool
) -> list[CpuidEntry]:
    """The CPUID table of one vCPU.

    Args:
        supported: what KVM_GET_SUPPORTED_CPUID gave.
        apic_id: the identifier of this vCPU, 0 to `cpus` - 1.
        cpus: the number of vCPUs of the machine.
        tsc_deadline: whether the in-kernel local APIC has the TSC-deadline timer; KVM does not say
            so in the table, but as KVM_CAP_TSC_DEADLINE_TIMER.

    Returns:
        A new table: leaves 1, 4, 0xB, 0x1F, 0x80000001, 0x80000008, 0x8000001D and 0x8000001E
        agree on the topology; all the others are as KVM gave them.
    """
    table = list(supported)
    vendor = next(((e.ebx, e.edx, e.ecx) for e in table if e.function == 0), None)
    amd = vendor in (_AMD, _HYGON)
    bits = apic_id_bits(cpus)
    result = []
    levels = {}
    for entry in table:
        match entry.function:
            case 0x1:
                ebx = entry.ebx & 0xFFFF | min(1 << bits, 255) << 16 | apic_id << 24
                ecx = entry.ecx & ~_TSC_DEADLINE | _HYPERVISOR
                edx = entry.edx & ~_HTT | (_HTT if cpus > 1 else 0)
                entry = evolve(
                    entry, ebx=ebx, ecx=ecx | (_TSC_DEADLINE if tsc_deadline else 0), edx=edx
                )
            case 0x4 if entry.eax & 0x1F:
                eax = entry.eax & 0x3FFF | (_sharing(entry.eax, bits) - 1) << 14
                entry = evolve(entry, eax=eax | ((1 << bits) - 1) << 26)
            case 0x7 if entry.index == 0:
                entry = evolve(entry, ecx=entry.ecx & ~_WAITPKG)
            case 0xB | 0x1F:
                levels[entry.function] = entry
                continue
            case 0x80000001 if amd:
                ecx = entry.ecx & ~_CMP_LEGACY | _TOPOEXT | (_CMP_LEGACY if cpus > 1 else 0)
                entry = evolve(entry, ecx=ecx)
            case 0x80000008:
                ecx = entry.ecx & ~0xF0FF | (bits << 12 | (cpus - 1) if amd else 0)
                entry = evolve(entry, ecx=ecx)
            case 0x8000001D if entry.eax & 0x1F:
                eax = entry.eax & 0x3FFF | (_sharing(entry.eax, bits) - 1) << 14
                entry = evolve(entry, eax=eax)
            case 0x8000001E:
                entry = evolve(entry, eax=apic_id, ebx=apic_id & 0xFF, ecx=0)
        result.append(entry)
    for function, entry in levels.items():
        result += _levels(entry, function, apic_id, cpus, bits)
    return result


def _sharing(eax: int, bits: int) -> int:
    """How many APIC identifiers share a cache: all of them the last level, else each its own."""
    return 1 << bits if eax >> 5 & 7 >= 3 else _PRIVATE


def _levels(
    entry: CpuidEntry, function: int, apic_id: int, cpus: int, bits: int
) -> list[CpuidEntry]:
    """Leaves 0xB and 0x1F: one thread a core, `cpus` cores, and the level of type 0 that ends."""
    rows = ((0, 1, 0x100), (bits, cpus, 0x201), (0, 0, 2))
    return [
        evolve(entry, function=function, index=index, eax=eax, ebx=ebx, ecx=ecx, edx=apic_id)
        for index, (eax, ebx, ecx) in enumerate(rows)
    ]
