"""CPUID: the leaves that tell of the topology agree with one another for every machine size."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvm_ioctls import CpuidEntry
from vmm_reference.config import MAX_CPUS
from vmm_reference.cpu.cpuid import apic_id_bits, topology

INTEL = (0x756E6547, 0x49656E69, 0x6C65746E)
AMD = (0x68747541, 0x69746E65, 0x444D4163)

words = st.integers(0, 0xFFFFFFFF)
Lookup = Callable[[int, int], CpuidEntry]


def entry(function: int, index: int = 0, *registers: int) -> CpuidEntry:
    eax, ebx, ecx, edx = registers or (0, 0, 0, 0)
    return CpuidEntry(function=function, index=index, flags=0, eax=eax, ebx=ebx, ecx=ecx, edx=edx)


@st.composite
def hosts(draw: st.DrawFn) -> list[CpuidEntry]:
    """What a KVM might offer: noise in every register, the caches of the vendor's leaf."""
    ebx, edx, ecx = draw(st.sampled_from([INTEL, AMD]))

    def noise() -> list[int]:
        return [draw(words) for _ in range(4)]

    table = [entry(0, 0, 0x1F, ebx, ecx, edx), entry(1, 0, *noise()), entry(7, 0, *noise())]
    leaf = 4 if ebx == INTEL[0] else 0x8000001D
    for index, (level, kind) in enumerate(((1, 1), (1, 2), (2, 3), (3, 3), (0, 0))):
        eax, *others = noise()
        table.append(entry(leaf, index, eax & ~0xFF | level << 5 | kind, *others))
    table += [entry(0xB, 0, *noise()), entry(0x1F, 0, *noise()), entry(0xD, 1, *noise())]
    table += [entry(f, 0, *noise()) for f in (0x80000001, 0x80000008, 0x8000001E)]
    return table


def vcpus(host: list[CpuidEntry], cpus: int) -> list[Lookup]:
    """The finished table of every vCPU, as a function of leaf and subleaf."""

    def lookup(apic_id: int) -> Lookup:
        table = topology(host, apic_id=apic_id, cpus=cpus, tsc_deadline=True)
        found = {(e.function, e.index): e for e in table}
        assert len(found) == len(table), "an entry twice"

        def leaf(function: int, index: int = 0) -> CpuidEntry:
            return found[function, index]

        return leaf

    return [lookup(apic_id) for apic_id in range(cpus)]


@given(hosts(), st.integers(1, MAX_CPUS))
def test_every_vcpu_names_itself_the_same_everywhere(host: list[CpuidEntry], cpus: int) -> None:
    """The APIC identifier is the same in leaves 1, 0xB, 0x1F and 0x8000001E, and unique."""
    for apic_id, leaf in enumerate(vcpus(host, cpus)):
        assert leaf(1, 0).ebx >> 24 == apic_id
        assert leaf(0x8000001E, 0).eax == apic_id
        for function in (0xB, 0x1F):
            assert {leaf(function, index).edx for index in range(3)} == {apic_id}


@given(hosts(), st.integers(1, MAX_CPUS))
def test_all_leaves_count_the_same_cores(host: list[CpuidEntry], cpus: int) -> None:
    """Leaves 1, 4, 0xB, 0x1F, 0x80000008 and the caches tell of one package of `cpus` cores."""
    bits = apic_id_bits(cpus)
    leaf = vcpus(host, cpus)[0]
    assert cpus <= 1 << bits
    assert (leaf(1, 0).ebx >> 16 & 0xFF) == min(1 << bits, 255)
    assert bool(leaf(1, 0).edx >> 28 & 1) == (cpus > 1)
    for function in (0xB, 0x1F):
        threads, cores, end = (leaf(function, index) for index in range(3))
        assert (threads.eax, threads.ebx, threads.ecx >> 8) == (0, 1, 1)
        assert (cores.eax, cores.ebx, cores.ecx >> 8) == (bits, cpus, 2)
        assert (end.ebx, end.ecx >> 8) == (0, 0)
    amd = host[0].ebx == AMD[0]
    if amd:
        assert leaf(0x80000008, 0).ecx & 0xFF == cpus - 1
        assert leaf(0x80000008, 0).ecx >> 12 & 0xF == bits
        assert leaf(0x80000001, 0).ecx >> 22 & 1
    for index, shared in ((0, 1), (1, 1), (2, 1), (3, 1 << bits)):
        cache = leaf(0x8000001D if amd else 4, index)
        assert (cache.eax >> 14 & 0xFFF) + 1 == shared
        if not amd:
            assert (cache.eax >> 26) + 1 == min(1 << bits, 64) or bits > 6


@given(hosts(), st.integers(1, MAX_CPUS), st.booleans())
def test_what_is_not_topology_stays_the_hosts(
    host: list[CpuidEntry], cpus: int, deadline: bool
) -> None:
    """Leaf 0xD is untouched; the hypervisor bit is set, UMWAIT hidden, the timer as told."""
    table = topology(host, apic_id=0, cpus=cpus, tsc_deadline=deadline)
    found = {(e.function, e.index): e for e in table}
    original = {(e.function, e.index): e for e in host}
    assert found[0xD, 1] == original[0xD, 1]
    assert found[1, 0].ecx >> 31 == 1
    assert bool(found[1, 0].ecx >> 24 & 1) == deadline
    assert not found[7, 0].ecx >> 5 & 1
    kept = 0xFFFFFFFF & ~(1 << 31 | 1 << 24 | 1 << 15 | 1 << 5)
    assert found[1, 0].ecx & kept == original[1, 0].ecx & kept


@pytest.mark.parametrize("cpus", [1, 2, 3, 5, 8, 32, 254])
def test_apic_bits_number_all_cores_and_no_more(cpus: int) -> None:
    """The field is as wide as the highest identifier needs."""
    assert apic_id_bits(cpus) == (cpus - 1).bit_length()


shapes = st.builds(
    lambda threads, cores, sockets: (1 << threads, 1 << cores, sockets),
    st.integers(0, 2),
    st.integers(0, 3),
    st.integers(1, 7),
)


@given(hosts(), shapes)
def test_packages_of_cores_of_threads(host: list[CpuidEntry], shape: tuple[int, int, int]) -> None:
    """Whoever asks any leaf finds the same package, core and thread for each processor."""
    threads, cores, sockets = shape
    cpus = threads * cores * sockets
    amd = host[0].ebx == AMD[0]
    seen = set()
    for apic_id in range(cpus):
        table = topology(
            host, apic_id=apic_id, cpus=cpus, tsc_deadline=True, threads=threads, sockets=sockets
        )
        leaf = {(e.function, e.index): e for e in table}
        for function in (0xB, 0x1F):
            thread_level, core_level = leaf[function, 0], leaf[function, 1]
            assert (thread_level.ebx, core_level.ebx) == (threads, threads * cores)
            package = apic_id >> core_level.eax
            core = (apic_id & (1 << core_level.eax) - 1) >> thread_level.eax
            thread = apic_id & (1 << thread_level.eax) - 1
        assert (package, core, thread) == (
            apic_id // (threads * cores), apic_id // threads % cores, apic_id % threads,
        )  # fmt: skip
        assert leaf[1, 0].ebx >> 16 & 0xFF == threads * cores
        assert bool(leaf[1, 0].edx >> 28 & 1) == (threads * cores > 1)
        private, shared = (leaf[0x8000001D if amd else 4, index].eax for index in (0, 3))
        assert (private >> 14 & 0xFFF) + 1 == threads
        assert (shared >> 14 & 0xFFF) + 1 == threads * cores
        extended = leaf[0x8000001E, 0]
        assert (extended.eax, extended.ecx) == (apic_id, package)
        assert (extended.ebx & 0xFF, (extended.ebx >> 8) + 1) == (core, threads)
        if amd:
            assert leaf[0x80000008, 0].ecx & 0xFF == threads * cores - 1
        else:
            assert (shared >> 26) + 1 == cores
        seen.add((package, core, thread))
    assert len(seen) == cpus
