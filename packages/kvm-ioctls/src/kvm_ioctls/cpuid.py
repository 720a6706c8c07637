"""CPUID tables as values: leaves looked up, changed, filtered, compared and printed by name.

```python
table = Cpuid(kvm.get_supported_cpuid())
table.has("avx2")                               # leaf 7, EBX bit 5
vcpu.set_cpuid2(table.without_features("avx2", "avx512f"))
print(table)                                    # one leaf a line, with its features' names
print(table.compare(other))                     # what differs, by name
```

Names are those of Linux's /proc/cpuinfo where it has one, and the manuals' elsewhere (Intel SDM
volume 2A, CPUID; AMD APM volume 3, appendix E; Documentation/virt/kvm/x86/cpuid.rst).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import attrs

from kvm_ioctls.state.cpuid import CpuidEntry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = ["FEATURES", "Cpuid", "Difference", "Place"]

SIGNIFICANT_INDEX = 1
"""KVM_CPUID_FLAG_SIGNIFCANT_INDEX: the subleaf matters."""


class Place(NamedTuple):
    """Where a feature's bit is.

    Attributes:
        function: the leaf.
        subleaf: the subleaf; 0 where there are none.
        register: `eax`, `ebx`, `ecx` or `edx`.
        bit: 0 to 31.
    """

    function: int
    subleaf: int
    register: str
    bit: int


# From bit 0 up; `-` stands for a bit without a name here.
_BITS: dict[tuple[int, int, str], str] = {
    (1, 0, "ecx"): (
        "pni pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm -"
        " pcid dca sse4_1 sse4_2 x2apic movbe popcnt tsc_deadline_timer aes xsave osxsave avx f16c"
        " rdrand hypervisor"
    ),
    (1, 0, "edx"): (
        "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn clflush - ds"
        " acpi mmx fxsr sse sse2 ss ht tm ia64 pbe"
    ),
    (6, 0, "eax"): "dtherm ida arat - pln - pts hwp hwp_notify hwp_act_window hwp_epp hwp_pkg_req",
    (7, 0, "ebx"): (
        "fsgsbase tsc_adjust sgx bmi1 hle avx2 fdp_excptn_only smep bmi2 erms invpcid rtm cqm"
        " zero_fcs_fds mpx rdt_a avx512f avx512dq rdseed adx smap avx512ifma - clflushopt clwb"
        " intel_pt avx512pf avx512er avx512cd sha_ni avx512bw avx512vl"
    ),
    (7, 0, "ecx"): (
        "prefetchwt1 avx512vbmi umip pku ospke waitpkg avx512_vbmi2 user_shstk gfni vaes vpclmulqdq"
        " avx512_vnni avx512_bitalg tme avx512_vpopcntdq - la57 - - - - - rdpid -"
        " bus_lock_detect cldemote - movdiri movdir64b enqcmd sgx_lc pks"
    ),
    (7, 0, "edx"): (
        "- - avx512_4vnniw avx512_4fmaps fsrm uintr - - avx512_vp2intersect srbds_ctrl md_clear"
        " rtm_always_abort - tsx_force_abort serialize hybrid tsxldtrk - pconfig arch_lbr ibt -"
        " amx_bf16 avx512_fp16 amx_tile amx_int8 spec_ctrl intel_stibp flush_l1d"
        " arch_capabilities core_capabilities spec_ctrl_ssbd"
    ),
    (7, 1, "eax"): (
        "sha512 sm3 sm4 rao_int avx_vnni avx512_bf16 lass cmpccxadd archperfmonext - fzrm fsrs fsrc"
        " - - - - fred lkgs wrmsrns nmi_source amx_fp16 hreset avx_ifma - - lam msrlist"
    ),
    (7, 1, "edx"): "- - - - avx_vnni_int8 avx_ne_convert - - amx_complex - avx_vnni_int16 - - -"
                   " prefetchiti - - uiret_uif - avx10",
    (7, 2, "edx"): "psfd ipred_ctrl rrsba_ctrl ddpd_u bhi_ctrl mcdt_no",
    (0xD, 1, "eax"): "xsaveopt xsavec xgetbv1 xsaves xfd",
    (0x40000001, 0, "eax"): (
        "kvm_clocksource kvm_nop_io_delay kvm_mmu_op kvm_clocksource2 kvm_async_pf kvm_steal_time"
        " kvm_pv_eoi kvm_pv_unhalt - kvm_pv_tlb_flush kvm_async_pf_vmexit kvm_pv_send_ipi"
        " kvm_poll_control kvm_pv_sched_yield kvm_async_pf_int kvm_msi_ext_dest_id"
        " kvm_hc_map_gpa_range kvm_migration_control - - - - - - kvm_clocksource_stable"
    ),
    (0x80000001, 0, "ecx"): (
        "lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop"
        " skinit wdt - lwp fma4 tce - nodeid_msr - tbm topoext perfctr_core perfctr_nb - bpext ptsc"
        " perfctr_llc mwaitx"
    ),
    (0x80000001, 0, "edx"): (
        "- - - - - - - - - - - syscall - - - - - - - mp nx - mmxext - - fxsr_opt pdpe1gb rdtscp -"
        " lm 3dnowext 3dnow"
    ),
    (0x80000007, 0, "edx"): "ts fid vid ttp htc stc 100mhzsteps hwpstate constant_tsc cpb"
                            " aperfmperf_ro proc_feedback acc_power",
    (0x80000008, 0, "ebx"): (
        "clzero irperf xsaveerptr - rdpru - - mcommit - wbnoinvd - - amd_ibpb - amd_ibrs amd_stibp"
        " ibrs_always_on stibp_always_on ibrs_prefer same_mode_ibrs no_efer_lmsle invlpgb_nested -"
        " amd_ppin amd_ssbd virt_ssbd amd_ssb_no cppc amd_psfd btc_no ibpb_ret"
    ),
    (0x8000000A, 0, "edx"): (
        "npt lbrv svm_lock nrip_save tsc_scale vmcb_clean flushbyasid decodeassists - - pausefilter"
        " - pfthreshold avic - v_vmsave_vmload vgif gmet x2avic sss_check v_spec_ctrl rogpt -"
        " host_mce_override tlbictl vnmi ibsvirt"
    ),
    (0x8000001F, 0, "eax"): "sme sev vm_page_flush sev_es sev_snp vmpl",
    (0x80000021, 0, "eax"): (
        "no_nested_data_bp - lfence_rdtsc smm_page_cfg_lock - - null_sel_clr_base upper_addr_ignore"
        " autoibrs no_smm_ctl_msr - - - - - - - prefetchi - - - - - - - - - sbpb ibpb_brtype"
        " srso_no"
    ),
}  # fmt: skip

FEATURES: dict[str, Place] = {
    name: Place(function, index, register, bit)
    for (function, index, register), names in _BITS.items()
    for bit, name in enumerate(names.split())
    if name != "-"
}
"""Every feature that has a name here, and where its bit is."""

_REGISTERS = ("eax", "ebx", "ecx", "edx")


class Difference(NamedTuple):
    """One register of one leaf in which two tables differ.

    Attributes:
        function: the leaf.
        subleaf: the subleaf.
        register: `eax`, `ebx`, `ecx` or `edx`.
        ours: its value in the first table, or None if it has no such leaf.
        theirs: the same for the second table.
    """

    function: int
    subleaf: int
    register: str
    ours: int | None
    theirs: int | None

    def __str__(self) -> str:
        ours, theirs = self.ours or 0, self.theirs or 0
        shown = [f"-{name}" for name in _names(self[:3], ours & ~theirs)]
        shown += [f"+{name}" for name in _names(self[:3], theirs & ~ours)]
        values = [("none" if v is None else f"{v:#010x}") for v in (self.ours, self.theirs)]
        text = f"{self.function:#010x}.{self.subleaf} {self.register}: {values[0]} -> {values[1]}"
        return f"{text} ({' '.join(shown)})" if shown else text


def _names(place: tuple[int, int, str], bits: int) -> list[str]:
    names = _BITS.get(place, "").split()
    return [name for bit, name in enumerate(names) if bits >> bit & 1 and name != "-"]


def _entries(entries: Iterable[CpuidEntry]) -> tuple[CpuidEntry, ...]:
    return tuple(entries)


@attrs.frozen
class Cpuid:
    """A CPUID table; changes give new ones. It is iterable, as Vcpu.set_cpuid2() wants it.

    Attributes:
        entries: the leaves, in the order in which KVM has or gets them.

    >>> table = Cpuid([CpuidEntry(7, flags=1, ebx=0x20)])
    >>> table.has("avx2"), table.has("sse2")
    (True, False)
    >>> print(table.with_features("bmi1").without_features("avx2"))
    0x00000007.0  eax=0x00000000 ebx=0x00000008 ecx=0x00000000 edx=0x00000000  bmi1
    """

    entries: tuple[CpuidEntry, ...] = attrs.field(converter=_entries)

    def __iter__(self) -> Iterator[CpuidEntry]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def leaf(self, function: int, index: int = 0) -> CpuidEntry | None:
        """The answer to CPUID with these EAX and ECX, as KVM finds it; None if it has none."""
        for entry in self.entries:
            if entry.function == function and (
                entry.index == index or not entry.flags & SIGNIFICANT_INDEX
            ):
                return entry
        return None

    def with_leaf(self, *entries: CpuidEntry) -> Cpuid:
        """With leaves in the place of those of the same function and index, or added."""
        changed = {(entry.function, entry.index): entry for entry in entries}
        kept = [changed.pop((e.function, e.index), e) for e in self.entries]
        return Cpuid((*kept, *changed.values()))

    def without_leaf(self, function: int, index: int | None = None) -> Cpuid:
        """Without a leaf: all of its subleaves, or one."""
        return self.filter(
            lambda entry: entry.function != function or index not in (None, entry.index)
        )

    def filter(self, keep: Callable[[CpuidEntry], bool]) -> Cpuid:
        """With the leaves for which `keep` is true."""
        return Cpuid(entry for entry in self.entries if keep(entry))

    def has(self, feature: str) -> bool:
        """Whether a feature's bit is set; KeyError if it has no name here."""
        place = FEATURES[feature]
        entry = self.leaf(place.function, place.subleaf)
        return entry is not None and bool(getattr(entry, place.register) >> place.bit & 1)

    def features(self) -> tuple[str, ...]:
        """The names of all bits that are set, by leaf and bit."""
        return tuple(name for name in FEATURES if self.has(name))

    def with_features(self, *features: str) -> Cpuid:
        """With the bits of features set, in leaves that are added where there are none.

        Raises:
            KeyError: a feature has no name here.
        """
        return self._switched(features, on=True)

    def without_features(self, *features: str) -> Cpuid:
        """With the bits of features cleared; KeyError as for with_features()."""
        return self._switched(features, on=False)

    def _switched(self, features: Iterable[str], *, on: bool) -> Cpuid:
        table = self
        for feature in features:
            function, index, register, bit = FEATURES[feature]
            entry = table.leaf(function, index)
            if entry is None:
                if not on:
                    continue
                subleaves = any(key[0] == function and key[1] for key in _BITS)
                entry = CpuidEntry(function, index, SIGNIFICANT_INDEX if subleaves else 0)
            value = getattr(entry, register) & ~(1 << bit) | on << bit
            table = table.with_leaf(attrs.evolve(entry, **{register: value}))
        return table

    def __and__(self, other: Cpuid) -> Cpuid:
        """With only the features by name that `other` has too; all else is as it is here."""
        return self.without_features(*(name for name in self.features() if not other.has(name)))

    def compare(self, other: Cpuid) -> tuple[Difference, ...]:
        """Every register in which `other` differs, by leaf, subleaf and register."""
        ours = {(e.function, e.index): e for e in self.entries}
        theirs = {(e.function, e.index): e for e in other.entries}
        return tuple(
            Difference(*key, register, *values)
            for key in sorted(ours.keys() | theirs.keys())
            for register in _REGISTERS
            if (values := (getattr(ours.get(key), register, None),
                           getattr(theirs.get(key), register, None)))[0] != values[1]
        )  # fmt: skip

    @property
    def vendor(self) -> str:
        """The processor's maker, such as `GenuineIntel`; empty without leaf 0."""
        entry = self.leaf(0)
        if entry is None:
            return ""
        return _text(entry.ebx, entry.edx, entry.ecx)

    @property
    def brand(self) -> str:
        """The processor's name; empty without leaves 0x80000002 to 0x80000004."""
        parts = [self.leaf(function) for function in (0x80000002, 0x80000003, 0x80000004)]
        return "".join(_text(e.eax, e.ebx, e.ecx, e.edx) for e in parts if e is not None).strip()

    def __str__(self) -> str:
        lines = []
        for e in self.entries:
            values = " ".join(f"{name}={getattr(e, name):#010x}" for name in _REGISTERS)
            names = [n for r in _REGISTERS
                     for n in _names((e.function, e.index, r), getattr(e, r))]  # fmt: skip
            lines.append(f"{e.function:#010x}.{e.index}  {values}  {' '.join(names)}".rstrip())
        return "\n".join(lines)


def _text(*registers: int) -> str:
    raw = b"".join(value.to_bytes(4, "little") for value in registers)
    return raw.split(b"\0")[0].decode("latin-1")
