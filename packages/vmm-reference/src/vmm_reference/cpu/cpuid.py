"""CPUID policy: what the host's KVM offers, made consistent with the machine's topology.

The machine is packages of cores of threads; APIC identifiers count up from 0, without gaps: what
is not the outermost of them comes in powers of two. Each function is pure, so that every host's
table can be tested on any host. Sections refer to the Intel
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
_DEBUG_STORE = 1 << 21  # leaf 1 EDX
_HYPERVISOR = 1 << 31  # leaf 1 ECX
_VMX, _PDCM = 1 << 5, 1 << 15  # leaf 1 ECX
_TSC_DEADLINE = 1 << 24  # leaf 1 ECX
_WAITPKG = 1 << 5  # leaf 7 ECX: a guest that waits in UMWAIT would never leave the host's CPU
_TOPOEXT = 1 << 22  # leaf 0x80000001 ECX: leaves 0x8000001D and 0x8000001E are valid
_CMP_LEGACY = 1 << 1  # leaf 0x80000001 ECX: the package has several cores
_SVM, _COUNTERS = 1 << 2, 1 << 23 | 1 << 24 | 1 << 28  # leaf 0x80000001 ECX

_AMD = (0x68747541, 0x69746E65, 0x444D4163)  # "Auth" "enti" "cAMD" in EBX, EDX, ECX
_HYGON = (0x6F677948, 0x6E65476E, 0x656E6975)


def apic_id_bits(cpus: int) -> int:
    """How many bits of the APIC identifier number `cpus` things, such as the cores of a package.

    Example:
        >>> [apic_id_bits(n) for n in (1, 2, 3, 4, 5, 254)]
        [0, 1, 2, 2, 3, 8]
    """
    return (cpus - 1).bit_length()


def topology(
    supported: Iterable[CpuidEntry],
    *,
    apic_id: int,
    cpus: int,
    tsc_deadline: bool,
    threads: int = 1,
    sockets: int = 1,
) -> list[CpuidEntry]:
    """The CPUID table of one vCPU.

    Args:
        supported: what KVM_GET_SUPPORTED_CPUID gave.
        apic_id: the identifier of this vCPU, 0 to `cpus` - 1.
        cpus: the number of vCPUs of the machine, a multiple of `threads` times `sockets`.
        tsc_deadline: whether the in-kernel local APIC has the TSC-deadline timer; KVM does not say
            so in the table, but as KVM_CAP_TSC_DEADLINE_TIMER.
        threads: of each core; a power of two unless there is one core.
        sockets: packages; where there are several, each has a power of two of cores.

    Returns:
        A new table: leaves 1, 4, 0xB, 0x1F, 0x80000001, 0x80000008, 0x8000001D and 0x8000001E
        agree on the topology. Nested virtualization, performance counters and UMWAIT are not
        there; all the others are as KVM gave them.
    """
    table = list(supported)
    vendor = next(((e.ebx, e.edx, e.ecx) for e in table if e.function == 0), None)
    amd = vendor in (_AMD, _HYGON)
    logical = cpus // sockets  # processors of a package
    within = apic_id_bits(threads)  # bits of a thread
    core_bits = apic_id_bits(logical // threads)
    bits = within + core_bits
    core = (apic_id >> within) & ((1 << core_bits) - 1)
    result = []
    levels = {}
    for entry in table:
        match entry.function:
            case 0x1:
                ebx = entry.ebx & 0xFFFF | min(1 << bits, 255) << 16 | apic_id << 24
                ecx = entry.ecx & ~(_TSC_DEADLINE | _VMX | _PDCM) | _HYPERVISOR
                edx = entry.edx & ~(_HTT | _DEBUG_STORE) | (_HTT if logical > 1 else 0)
                entry = evolve(
                    entry, ebx=ebx, ecx=ecx | (_TSC_DEADLINE if tsc_deadline else 0), edx=edx
                )
            case 0x4 if entry.eax & 0x1F:
                eax = entry.eax & 0x3FFF | (_sharing(entry.eax, within, bits) - 1) << 14
                entry = evolve(entry, eax=eax | min((1 << core_bits) - 1, 63) << 26)
            case 0x7 if entry.index == 0:
                entry = evolve(entry, ecx=entry.ecx & ~_WAITPKG)
            case 0xB | 0x1F:
                levels[entry.function] = entry
                continue
            case 0x80000001:
                ecx = entry.ecx & ~(_SVM | _COUNTERS)
                if amd:
                    ecx = ecx & ~_CMP_LEGACY | _TOPOEXT | (_CMP_LEGACY if logical > 1 else 0)
                entry = evolve(entry, ecx=ecx)
            case 0xA | 0x8000000A | 0x80000022:  # counters, SVM, counters
                entry = evolve(entry, eax=0, ebx=0, ecx=0, edx=0)
            case 0x80000008:
                ecx = entry.ecx & ~0xF0FF | (bits << 12 | (logical - 1) if amd else 0)
                entry = evolve(entry, ecx=ecx)
            case 0x8000001D if entry.eax & 0x1F:
                eax = entry.eax & 0x3FFF | (_sharing(entry.eax, within, bits) - 1) << 14
                entry = evolve(entry, eax=eax)
            case 0x8000001E:
                ebx = (threads - 1) << 8 | core & 0xFF
                entry = evolve(entry, eax=apic_id, ebx=ebx, ecx=apic_id >> bits & 0xFF)
        result.append(entry)
    for function, entry in levels.items():
        # A level of threads, one of cores, and the one of type 0 that ends.
        rows = ((within, threads, 0x100), (bits, logical, 0x201), (0, 0, 2))
        result += [
            evolve(entry, function=function, index=index, eax=eax, ebx=ebx, ecx=ecx, edx=apic_id)
            for index, (eax, ebx, ecx) in enumerate(rows)
        ]
    return result


def _sharing(eax: int, within: int, bits: int) -> int:
    """How many APIC identifiers share a cache: a package the last level, else a core its own."""
    return 1 << (bits if eax >> 5 & 7 >= 3 else within)
