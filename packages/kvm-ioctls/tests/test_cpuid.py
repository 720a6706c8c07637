"""CPUID tables: looked up, changed, filtered, compared and printed by name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvm_ioctls import CpuidEntry, Kvm
from kvm_ioctls.cpuid import FEATURES, Cpuid
from kvm_ioctls.testing import Guest, Mode

U32 = st.integers(0, (1 << 32) - 1)
TABLES = st.lists(
    st.builds(
        CpuidEntry, st.sampled_from([0, 1, 7, 0xD, 0x80000001]), st.integers(0, 2), st.just(1),
        U32, U32, U32, U32,
    ),
    unique_by=lambda entry: (entry.function, entry.index),
).map(Cpuid)  # fmt: skip
NAMES = st.sampled_from(sorted(FEATURES))


def test_places_of_well_known_features() -> None:
    """Bits that the manuals state."""
    for name, place in {
        "vmx": (1, 0, "ecx", 5), "hypervisor": (1, 0, "ecx", 31), "x2apic": (1, 0, "ecx", 21),
        "pbe": (1, 0, "edx", 31), "avx2": (7, 0, "ebx", 5), "avx512vl": (7, 0, "ebx", 31),
        "la57": (7, 0, "ecx", 16), "spec_ctrl_ssbd": (7, 0, "edx", 31), "pks": (7, 0, "ecx", 31),
        "svm": (0x80000001, 0, "ecx", 2), "nx": (0x80000001, 0, "edx", 20),
        "lm": (0x80000001, 0, "edx", 29), "topoext": (0x80000001, 0, "ecx", 22),
        "constant_tsc": (0x80000007, 0, "edx", 8), "xsaves": (0xD, 1, "eax", 3),
        "kvm_clocksource_stable": (0x40000001, 0, "eax", 24), "npt": (0x8000000A, 0, "edx", 0),
        "vnmi": (0x8000000A, 0, "edx", 25), "amd_ssbd": (0x80000008, 0, "ebx", 24),
        "sev_snp": (0x8000001F, 0, "eax", 4), "fred": (7, 1, "eax", 17), "lam": (7, 1, "eax", 26),
    }.items():  # fmt: skip
        assert tuple(FEATURES[name]) == place, name
    assert len({tuple(place) for place in FEATURES.values()}) == len(FEATURES)


@given(TABLES, NAMES)
def test_switching_a_feature(table: Cpuid, name: str) -> None:
    """On, off, and back; nothing else changes; the comparison names just this."""
    on, off = table.with_features(name), table.without_features(name)
    assert on.has(name)
    assert not off.has(name)
    changed = {name} if not table.has(name) else set()
    assert set(on.features()) - set(table.features()) == changed
    differences = off.compare(on)
    if table.leaf(FEATURES[name].function, FEATURES[name].subleaf) is not None:
        assert len(differences) == 1
        assert on.without_features(name) == off
        assert str(differences[0]).endswith(f"(+{name})")
        assert str(on.compare(off)[0]).endswith(f"(-{name})")


@given(TABLES, TABLES)
def test_what_two_have_in_common(one: Cpuid, other: Cpuid) -> None:
    """The intersection has a feature exactly if both have it; a table equals itself."""
    both = one & other
    for name in FEATURES:
        assert both.has(name) == (one.has(name) and other.has(name))
    assert one.compare(one) == ()
    assert (len(one.compare(other)) == 0) == ({*one.entries} == {*other.entries})


@given(TABLES, st.sampled_from([0, 1, 7, 0xD]), st.integers(0, 2))
def test_leaves(table: Cpuid, function: int, index: int) -> None:
    """A leaf is found, replaced, added and taken away."""
    entry = CpuidEntry(function, index, 1, 1, 2, 3, 4)
    changed = table.with_leaf(entry)
    assert changed.leaf(function, index) == entry
    assert len(changed) == len(table) + (table.leaf(function, index) is None)
    assert changed.without_leaf(function, index).leaf(function, index) is None
    assert all(e.function != function for e in changed.without_leaf(function))
    assert table.filter(lambda e: e.function == function).entries == tuple(
        e for e in table if e.function == function
    )


def test_unknown_names_are_errors() -> None:
    """A feature that has no name here is a KeyError, not a silent no."""
    for method in (Cpuid([]).has, Cpuid([]).with_features, Cpuid([]).without_features):
        with pytest.raises(KeyError):
            method("no_such_feature")
    assert Cpuid([]).vendor == Cpuid([]).brand == ""


@pytest.mark.kvm
def test_the_table_of_this_host() -> None:
    """What KVM offers is printed, has a maker, and can be given to a vCPU after changes."""
    with Kvm() as kvm, kvm.create_vm() as vm:
        table = Cpuid(kvm.get_supported_cpuid())
        assert table.has("hypervisor")
        assert table.vendor in ("GenuineIntel", "AuthenticAMD", "HygonGenuine")
        assert len(str(table).splitlines()) == len(table)
        vcpu = vm.create_vcpu(0)
        vcpu.set_cpuid2(table.without_features("x2apic"))
        assert {entry.function for entry in vcpu.get_cpuid2()} <= {e.function for e in table}


@pytest.mark.kvm
def test_a_guest_sees_a_leaf_of_ours() -> None:
    """A leaf that no processor has is what the guest's CPUID instruction gives."""
    with Guest("mov $0x40000010, %eax; cpuid; out %eax, $0x10; hlt", Mode.LONG) as guest:
        table = Cpuid(guest.vcpu.get_cpuid2())
        ours = CpuidEntry(0x40000010, eax=0x12345678)
        guest.vcpu.set_cpuid2(table.with_leaf(ours))
        assert guest.vcpu.get_cpuid2()[-1] == ours
