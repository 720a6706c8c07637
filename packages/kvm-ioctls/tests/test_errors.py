"""Errors: every method on a closed and on a wrong descriptor, and what the messages say."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvm_ioctls import (
    ArgumentError,
    ClosedError,
    DebugRegs,
    Fpu,
    HostMemory,
    Kvm,
    KvmError,
    LapicState,
    MpState,
    PicState,
    PitState2,
    Regs,
    Sregs,
    Vcpu,
    VcpuEvents,
    Vm,
    Xcrs,
    Xsave,
)
from kvm_ioctls._hints import HINTS, hint
from kvm_ioctls.device import Device
from kvm_ioctls.state import ClockData, NestedState, Sregs2
from kvm_ioctls.state.arm64 import ArmBreakpoints, ArmVcpuInit
from kvm_ioctls.table import IOCTLS, Ioctl
from kvm_ioctls.testing import Guest
from kvm_ioctls.vm.pages import GuestMemfd

pytestmark = pytest.mark.kvm

PAGE = mmap.PAGESIZE
MEMORY = mmap.mmap(-1, PAGE)
# The arguments of methods that take any, by name.
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "check_extension": (0,), "create_vcpu": (0,), "create_device": (4,), "test_device": (4,),
    "enable_cap": (116,), "set_device_attr": (0, 0), "get_device_attr": (0, 0),
    "has_device_attr": (0, 0), "get_msrs": ([0x10],), "set_msrs": ({0x10: 1},),
    "get_dirty_log": (0,), "clear_dirty_log": (0,), "set_nr_mmu_pages": (100,),
    "set_tss_addr": (0xFFFBD000,), "set_identity_map_addr": (0xFFFBC000,),
    "irq_line": (1, 1), "irq_line_status": (1, 1), "get_irqchip": (0,),
    "set_irqchip": (0, PicState()), "set_pit": (PitState2(),), "set_pit2": (PitState2(),),
    "register_coalesced_mmio": (0, 1), "unregister_coalesced_mmio": (0, 1),
    "set_gsi_routing": ([],), "reinject_control": (True,), "irqfd": (0, 0), "ioeventfd": (0, 0, 1),
    "set_boot_cpu_id": (0,), "xen_hvm_config": (0, 0), "set_clock": (ClockData(),),
    "set_tsc_khz": (1000,), "signal_msi": (0xFEE00000, 0x30), "set_regs": (Regs(),),
    "set_sregs": (Sregs(),), "set_sregs2": (Sregs2(),), "translate": (0,), "interrupt": (1,),
    "set_cpuid": ([],), "set_cpuid2": ([],), "set_signal_mask": ([10],), "set_fpu": (Fpu(),),
    "set_lapic": (LapicState(),), "tpr_access_reporting": (True,), "set_vapic_addr": (0,),
    "set_mp_state": (MpState.RUNNABLE,), "x86_setup_mce": (1,), "x86_set_mce": (0, 0),
    "set_vcpu_events": (VcpuEvents(),), "set_debugregs": (DebugRegs(),),
    "set_xsave": (Xsave(bytes(4096)),), "set_xcrs": (Xcrs(),), "get_one_reg": (0x30 << 48,),
    "set_one_reg": (0x30 << 48, bytes(8)), "memory_encrypt_op": (bytearray(24),),
    "memory_encrypt_reg_region": (0, PAGE), "memory_encrypt_unreg_region": (0, PAGE),
    "hyperv_eventfd": (1, 0), "set_nested_state": (NestedState(),),
    "set_pmu_event_filter": ([],), "xen_hvm_get_attr": (0,), "xen_hvm_set_attr": (0, bytes(64)),
    "xen_vcpu_get_attr": (0,), "xen_vcpu_set_attr": (0, bytes(64)), "xen_hvm_evtchn_send": (0, 0),
    "set_memory_attributes": (0, PAGE, 0), "create_guest_memfd": (PAGE,),
    "pre_fault_memory": (0, PAGE), "arm_set_device_addr": (0, 0),
    "arm_vcpu_init": (ArmVcpuInit(),), "arm_mte_copy_tags": (0, bytes(256)),
    "arm_set_counter_offset": (0,), "arm_vcpu_finalize": (4,),
}  # fmt: skip
NAMED: dict[str, dict[str, Any]] = {
    "set_user_memory_region": {"slot": 1, "guest_phys_addr": 1 << 32, "memory": MEMORY},
    "set_pmu_event_filter": {"deny": True},
    "arm_mte_copy_tags": {"write": True},
    "x86_set_mce": {},
}
# The size of a vCPU's mapping is asked once and remembered.
PARTS = [(kind, row) for row in IOCTLS for kind in row.fd.split()
         if row.name != "KVM_GET_VCPU_MMAP_SIZE"]  # fmt: skip
# C runs a vCPU by the descriptor that it was made with.
STRANGE = [part for part in PARTS if part[1].name != "KVM_RUN"]


def call(target: Any, name: str) -> Any:
    named = dict(NAMED.get(name, {}))
    if name == "set_user_memory_region2":
        memfd = GuestMemfd(os.eventfd(0), PAGE)
        try:
            return target.set_user_memory_region2(
                slot=1, guest_phys_addr=1 << 32, memory=MEMORY, guest_memfd=memfd
            )
        finally:
            memfd.close()
    return getattr(target, name)(*ARGUMENTS.get(name, ()), **named)


@pytest.fixture(scope="module")
def closed() -> dict[str, Any]:
    with Guest("hlt") as guest, Guest("hlt") as other:
        kvm = Kvm()
        with_slot = other.vm
        made = {"kvm": kvm, "vm": with_slot, "vcpu": guest.vcpu,
                "device": Device(os.eventfd(0), 4)}  # fmt: skip
    for each in made.values():
        each.close()
    return made


@pytest.mark.parametrize(("kind", "row"), PARTS, ids=lambda part: getattr(part, "name", part))
def test_a_closed_object_says_so(closed: dict[str, Any], kind: str, row: Ioctl) -> None:
    """Whatever is called on an object that was closed, the error is ClosedError; no crash."""
    # A dirty log is refused before the kernel is asked: no slot is known any more.
    logs = ("KVM_GET_DIRTY_LOG", "KVM_CLEAR_DIRTY_LOG")
    expected = ArgumentError if row.name in logs else ClosedError
    with pytest.raises(expected):
        call(closed[kind], row.method)


@pytest.fixture(scope="module")
def wrong() -> Any:
    """Objects over a descriptor that is open, but nothing of KVM's."""
    guest = Guest("hlt")
    made: dict[str, Any] = {"kvm": Kvm(), "vm": guest.vm, "vcpu": guest.vcpu,
                            "device": Device(os.eventfd(0), 4)}  # fmt: skip
    kept = {kind: each._fd for kind, each in made.items()}
    strange = os.eventfd(0)
    for each in made.values():
        each._fd = strange
    yield made
    for kind, each in made.items():
        each._fd = kept[kind]
    os.close(strange)
    for kind in ("kvm", "device"):
        made[kind].close()
    guest.close()


@pytest.mark.parametrize(("kind", "row"), STRANGE, ids=lambda part: getattr(part, "name", part))
def test_a_wrong_descriptor_is_an_error(wrong: dict[str, Any], kind: str, row: Ioctl) -> None:
    """On a descriptor of something else every ioctl fails with ENOTTY, named and explained."""
    if row.name == "KVM_HAS_DEVICE_ATTR":
        assert not call(wrong[kind], row.method)
        return
    with pytest.raises(KvmError) as caught:
        call(wrong[kind], row.method)
    if row.name == "KVM_CLEAR_DIRTY_LOG" and isinstance(caught.value, ArgumentError):
        return
    # A method may need another ioctl first (the size of the XSAVE area).
    assert caught.value.errno in (errno.ENOTTY, errno.EINVAL)
    if caught.value.errno == errno.ENOTTY:
        assert "KVM_" in caught.value.ioctl
        assert "does not know" in str(caught.value) or row.name == "KVM_GET_API_VERSION"


# What machines at hand cannot carry out, with the kernel's exact answer where it is an x86 one.
REFUSALS: list[tuple[str, Callable[[Vm, Vcpu], object], tuple[int, ...]]] = [
    ("arm target", lambda vm, vcpu: vm.arm_preferred_target(), (errno.ENOTTY,)),
    ("arm address", lambda vm, vcpu: vm.arm_set_device_addr(0, 0), (errno.ENOTTY,)),
    ("arm counter", lambda vm, vcpu: vm.arm_set_counter_offset(0), (errno.ENOTTY,)),
    ("arm masks", lambda vm, vcpu: vm.arm_get_reg_writable_masks(), (errno.ENOTTY,)),
    ("arm tags", lambda vm, vcpu: vm.arm_mte_copy_tags(0, bytes(256), write=True), (errno.ENOTTY,)),
    ("arm init", lambda vm, vcpu: vcpu.arm_vcpu_init(ArmVcpuInit()), (errno.EINVAL,)),
    ("arm finalize", lambda vm, vcpu: vcpu.arm_vcpu_finalize(4), (errno.EINVAL,)),
    ("arm debug", lambda vm, vcpu: vcpu.arm_set_guest_debug(1, ArmBreakpoints()), (errno.EINVAL,)),
    ("SEV region", lambda vm, vcpu: vm.memory_encrypt_reg_region(0, PAGE),
     (errno.ENOTTY, errno.EINVAL)),
    ("SEV", lambda vm, vcpu: vm.memory_encrypt_op(bytearray(24)), (errno.ENOTTY, errno.EINVAL)),
    ("TDX", lambda vm, vcpu: vcpu.memory_encrypt_op(bytearray(24)), (errno.ENOTTY, errno.EINVAL)),
    ("Xen attribute", lambda vm, vcpu: vcpu.xen_vcpu_get_attr(0),
     (errno.ENOTTY, errno.ENOENT, errno.EINVAL)),
    ("private memory", lambda vm, vcpu: vm.set_memory_attributes(0, PAGE, 8),
     (errno.ENOTTY, errno.EINVAL)),
]  # fmt: skip


@pytest.mark.parametrize(("ask", "codes"), [r[1:] for r in REFUSALS], ids=[r[0] for r in REFUSALS])
def test_what_this_machine_cannot_do(
    ask: Callable[[Vm, Vcpu], object], codes: tuple[int, ...]
) -> None:
    """Ioctls of other architectures and of hardware that is not here are refused in words."""
    with Guest("hlt") as guest:
        with pytest.raises(KvmError) as caught:
            ask(guest.vm, guest.vcpu)
        assert caught.value.errno in codes
        assert caught.value.ioctl.startswith("KVM_")


def test_messages_say_what_where_and_what_to_do() -> None:
    """The ioctl, its arguments, the errno, and the likely cause; and it all survives pickling."""
    with Kvm() as kvm, kvm.create_vm() as vm:
        with pytest.raises(KvmError) as caught:
            vm.create_pit2()
        assert str(caught.value) == (
            "KVM_CREATE_PIT2(flags=0): No such file or directory (ENOENT); wrong order: the timer"
            " needs create_irqchip() first"
        )
        again = pickle.loads(pickle.dumps(caught.value))
        assert (again.ioctl, again.errno, again.arguments, again.hint) == (
            "KVM_CREATE_PIT2", errno.ENOENT, {"flags": 0}, caught.value.hint
        )  # fmt: skip
        assert str(again) == str(caught.value)


@pytest.mark.parametrize(
    ("wrong_order", "rule"),
    [
        (lambda vm: (vm.create_irqchip(), vm.create_irqchip()), "already"),
        (lambda vm: (vm.create_vcpu(0), vm.create_irqchip()), "before the first vCPU"),
        (lambda vm: (vm.create_vcpu(0), vm.create_vcpu(0)), "this id exists already"),
        (lambda vm: vm.create_vcpu(1 << 20), "KVM_CAP_MAX_VCPU_ID"),
        (lambda vm: (vm.create_irqchip(), vm.create_pit2(), vm.create_pit2()), "a timer already"),
        (lambda vm: vm.get_pit2(), "create_pit2"),
        (lambda vm: vm.irq_line(1, 1), "create_irqchip"),
        (lambda vm: vm.irqfd(0, 1), "create_irqchip|not an open eventfd"),
        (lambda vm: (vm.create_vcpu(0), vm.set_boot_cpu_id(0)), "before the first vCPU"),
        (lambda vm: vm.create_vcpu(0).get_lapic(), "create_irqchip"),
        (lambda vm: vm.create_device(99), "no such device type"),
        (lambda vm: vm.enable_cap(9999), "no such capability"),
        (lambda vm: vm.create_vcpu(0).set_cpuid2([]) or vm.create_vcpu(1).set_xcrs(
            Xcrs(((0, 0xFF00000000000001),))), "CPUID does not offer"),
        (lambda vm: vm.set_user_memory_region(
            slot=0, memory=HostMemory(0x1000, 0x800, None)), "positive multiple"),
    ],
)  # fmt: skip
def test_wrong_order_and_wrong_use_are_explained(
    wrong_order: Callable[[Vm], object], rule: str
) -> None:
    """The likely cause and the cure of mistakes that everybody makes once."""
    with Kvm() as kvm, kvm.create_vm() as vm, pytest.raises(KvmError, match=rule):
        wrong_order(vm)


def test_opening_what_is_not_kvm(tmp_path: Any) -> None:
    """A path that is missing, a folder, another file, and a descriptor of something else."""
    plain = tmp_path / "plain"
    plain.write_bytes(b"")
    for path, rule in ((tmp_path / "none", "load kvm_intel"), (tmp_path, "folder"),
                       (plain, "not KVM's device")):  # fmt: skip
        with pytest.raises(KvmError, match=rule):
            Kvm(str(path))
    fd = os.eventfd(0)
    with pytest.raises(KvmError, match="not KVM's device"):
        Kvm.adopt(fd)
    os.close(fd)  # still ours


def test_descriptors_are_owned() -> None:
    """Close-on-exec, closed once, usable as fileno; adopting one is explicit and takes it over."""
    with Guest("hlt") as guest:
        for each in (guest.kvm, guest.vm, guest.vcpu):
            assert not os.get_inheritable(each.fileno())
        passed = os.dup(guest.vm.fileno())
        os.set_inheritable(passed, True)
        with Vm.adopt(passed, guest.kvm.get_vcpu_mmap_size()) as twin:
            assert not os.get_inheritable(passed)
            assert twin.slots == ()
        with Kvm.adopt(os.dup(guest.kvm.fileno())) as again:
            assert again.get_api_version() == 12
        assert repr(guest.vm) == f"<Vm fd={guest.vm.fileno()}>"
        page = guest.vcpu.run_page
        guest.vcpu.close()
        guest.vcpu.close()
        assert page[0] == 0
        assert repr(guest.vcpu) == "<Vcpu closed>"
        with pytest.raises(ClosedError):
            guest.vcpu.fileno()
        with pytest.raises(ClosedError):
            _ = guest.vcpu.if_flag
        with pytest.raises(ClosedError):
            guest.vcpu.sync_regs()


def test_what_is_forgotten_is_closed_and_told_of() -> None:
    """A descriptor that is left to the garbage collector is closed, with a warning."""
    kvm = Kvm()
    made = [kvm.create_vm()]
    fd = made[0].fileno()
    with kvm, pytest.warns(ResourceWarning, match="unclosed <Vm"):
        made.clear()
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_a_run_page_that_cannot_be_mapped() -> None:
    """The vCPU's descriptor is closed again, and the size is shown."""
    with Kvm() as kvm, kvm.create_vm() as vm:
        with Vm.adopt(os.dup(vm.fileno()), 1 << 50) as twin:
            before = sorted(Path("/proc/self/fd").iterdir())
            with pytest.raises(KvmError, match=r"mmap\(size=0x4000000000000\)"):
                twin.create_vcpu(0)
            assert sorted(Path("/proc/self/fd").iterdir()) == before
        vcpu = vm.create_vcpu(1)
        raw = vcpu.raw_regs()
        vcpu.close()
        for ask in (raw.get, raw.set):
            with pytest.raises(ClosedError):
                ask()


def test_a_device_and_its_test() -> None:
    """Asking whether a device could be made closes nothing; a device has attributes."""
    with Kvm() as kvm, kvm.create_vm() as vm:
        assert not vm.test_device(99)
        os.fstat(0)
        if not vm.test_device(4):
            pytest.skip("this kernel has no VFIO device")
        with vm.create_device(4) as device:
            assert device.type == 4
            assert device.has_device_attr(1, 1)
            assert not device.has_device_attr(77, 1)
            with pytest.raises(KvmError, match="no such group"):
                device.set_device_attr(77, 1)
            with pytest.raises(KvmError):
                device.get_device_attr(77, 1)


def test_ids_of_single_registers() -> None:
    """A register's value has the length that its id says, before the kernel is asked."""
    with Guest("hlt") as guest, pytest.raises(ArgumentError, match="has 8 bytes"):
        guest.vcpu.set_one_reg(0x30 << 48, b"1")


def test_every_hint_can_speak() -> None:
    """No row of the table of causes is hidden behind an earlier one."""
    for number, (pattern, code, text) in enumerate(HINTS):
        name = pattern.replace("*", "")
        before = [(p, c) for p, c, _ in HINTS[:number]]
        assert (pattern, code) not in before
        if "*" not in pattern:
            assert hint(name, code) == text
    assert hint("KVM_GET_SREGS2", errno.ENOTTY, "SREGS2").endswith("KVM_CAP_SREGS2")
    assert "KVM_CAP_X" in hint("KVM_NEW", errno.EINVAL, "X")
    assert hint("KVM_NEW", errno.EINVAL) == ""
