"""State that few machines have: machine checks, nested guests, single registers, Xen, Hyper-V."""

from __future__ import annotations

from struct import pack, unpack_from

from kvm_ioctls._fd import Descriptor
from kvm_ioctls._native import ffi, lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvm_ioctls.state.cpuid import CpuidEntry
    from kvm_ioctls.state.nested import NestedState

__all__ = ["VcpuExtras"]

_E2BIG, _EINTR = 7, 4


class VcpuExtras(Descriptor):
    """The part of a vCPU that few machines need."""

    def x86_setup_mce(self, mcg_cap: int) -> None:
        """KVM_X86_SETUP_MCE (KVM_CAP_MCE): give the vCPU machine-check banks.

        Args:
            mcg_cap: the MCG_CAP MSR: the number of banks in bits 0 to 7, and features that
                Kvm.x86_get_mce_cap_supported() offers.
        """
        self._write(lib.KVM_X86_SETUP_MCE, pack("<Q", mcg_cap), mcg_cap=mcg_cap)

    def x86_set_mce(
        self, bank: int, status: int, *, addr: int = 0, misc: int = 0, mcg_status: int = 0
    ) -> None:
        """KVM_X86_SET_MCE (KVM_CAP_MCE): report a machine check to the guest."""
        self._write(lib.KVM_X86_SET_MCE, pack("<4QB31x", status, addr, misc, mcg_status, bank),
                    bank=bank, status=status)  # fmt: skip

    def tpr_access_reporting(self, enabled: bool) -> None:
        """KVM_TPR_ACCESS_REPORTING (KVM_CAP_VAPIC): exit with TprAccess, for old 32-bit guests."""
        self._write(lib.KVM_TPR_ACCESS_REPORTING, bytearray(pack("<I36x", enabled)),
                    enabled=enabled)  # fmt: skip

    def set_vapic_addr(self, vapic_addr: int) -> None:
        """KVM_SET_VAPIC_ADDR (KVM_CAP_VAPIC): where the guest keeps its task priority."""
        self._write(lib.KVM_SET_VAPIC_ADDR, pack("<Q", vapic_addr), vapic_addr=vapic_addr)

    def get_nested_state(self) -> NestedState:
        """KVM_GET_NESTED_STATE (KVM_CAP_NESTED_STATE): what a hypervisor in the guest was doing."""
        from kvm_ioctls.state.nested import NestedState

        room = 0x2080
        while True:
            data = bytearray(pack("<HHI", 0, 0, room) + bytes(room - 8))
            result = self._try(lib.KVM_GET_NESTED_STATE, data)
            (size,) = unpack_from("<I", data, 4)
            if result == -_E2BIG and size > room:
                room = size
                continue
            if result < 0:
                self._fail(lib.KVM_GET_NESTED_STATE, -result, {"size": room})
            return NestedState.from_bytes(data[:size])

    def set_nested_state(self, state: NestedState) -> None:
        """KVM_SET_NESTED_STATE (KVM_CAP_NESTED_STATE), after CPUID, MSRs and sregs."""
        self._write(lib.KVM_SET_NESTED_STATE, state.to_bytes(), format=state.format)

    def get_one_reg(self, id: int) -> bytes:  # noqa: A002 - the kernel's name
        """KVM_GET_ONE_REG (KVM_CAP_ONE_REG): one register, as long as bits 52 to 55 of `id` say."""
        value = bytearray(1 << (id >> 52 & 15))
        held = ffi.from_buffer(value)
        self._write(lib.KVM_GET_ONE_REG, pack("<QQ", id, int(ffi.cast("uintptr_t", held))), id=id)
        return bytes(value)

    def set_one_reg(self, id: int, value: bytes) -> None:  # noqa: A002 - the kernel's name
        """KVM_SET_ONE_REG (KVM_CAP_ONE_REG); `value` is as long as bits 52 to 55 of `id` say.

        Raises:
            ArgumentError: it has another length.
        """
        wanted = 1 << (id >> 52 & 15)
        if len(value) != wanted:
            from kvm_ioctls._hints import refuse

            raise refuse("KVM_SET_ONE_REG", 22, {"id": id, "value": value},
                         f"this register has {wanted} bytes")  # fmt: skip
        held = ffi.from_buffer(value)
        self._write(lib.KVM_SET_ONE_REG, pack("<QQ", id, int(ffi.cast("uintptr_t", held))), id=id)

    def get_reg_list(self) -> tuple[int, ...]:
        """KVM_GET_REG_LIST (KVM_CAP_ONE_REG): the ids that get_one_reg() takes."""
        count = 0
        while True:
            data = bytearray(pack("<Q", count) + bytes(8 * count))
            result = self._try(lib.KVM_GET_REG_LIST, data)
            (wanted,) = unpack_from("<Q", data)
            if result == -_E2BIG and wanted > count:
                count = wanted
                continue
            if result < 0:
                self._fail(lib.KVM_GET_REG_LIST, -result, {"n": count})
            return unpack_from(f"<{wanted}Q", data, 8)

    def set_signal_mask(self, signals: Iterable[int] | None) -> None:
        """KVM_SET_SIGNAL_MASK: the signals blocked while the guest runs; None for the thread's own.

        The kick's signal must not be among them, or kick() waits for the next exit.
        """
        if signals is None:
            result = lib.kvmi_ioctl_value(self._fd, lib.KVM_SET_SIGNAL_MASK, 0)
            if result < 0:
                self._fail(lib.KVM_SET_SIGNAL_MASK, -result, {"signals": None})
            return
        numbers = tuple(signals)
        mask = sum({1 << (number - 1) for number in numbers})
        self._write(lib.KVM_SET_SIGNAL_MASK, pack("<IQ", 8, mask), signals=numbers)

    def set_cpuid(self, entries: Iterable[CpuidEntry]) -> None:
        """KVM_SET_CPUID: the older set_cpuid2(), without subleaves; index and flags are ignored."""
        rows = [pack("<5I4x", e.function, e.eax, e.ebx, e.ecx, e.edx) for e in entries]
        self._write(lib.KVM_SET_CPUID, pack("<II", len(rows), 0) + b"".join(rows), nent=len(rows))

    def get_supported_hv_cpuid(self) -> tuple[CpuidEntry, ...]:
        """KVM_GET_SUPPORTED_HV_CPUID (KVM_CAP_HYPERV_CPUID): Hyper-V's leaves for this vCPU."""
        from kvm_ioctls.state.cpuid import unpack_entries

        data = bytearray(8 + 40 * 64)
        data[0] = 64
        self._write(lib.KVM_GET_SUPPORTED_HV_CPUID, data, nent=64)
        return unpack_entries(data)

    def xen_vcpu_get_attr(self, type: int) -> bytes:  # noqa: A002 - the kernel's name
        """KVM_XEN_VCPU_GET_ATTR (KVM_CAP_XEN_HVM): the 64 bytes of an attribute's union."""
        data = bytearray(pack("<H70x", type))
        self._write(lib.KVM_XEN_VCPU_GET_ATTR, data, type=type)
        return bytes(data[8:])

    def xen_vcpu_set_attr(self, type: int, value: bytes) -> None:  # noqa: A002
        """KVM_XEN_VCPU_SET_ATTR (KVM_CAP_XEN_HVM): set an attribute; `value` is its union."""
        self._write(lib.KVM_XEN_VCPU_SET_ATTR, pack("<H6x64s", type, value), type=type)

    def memory_encrypt_op(self, command: bytearray) -> None:
        """KVM_MEMORY_ENCRYPT_OP on a vCPU: a command of TDX (struct kvm_tdx_cmd).

        Args:
            command: the structure as bytes; results are left in it.
        """
        self._write(lib.KVM_MEMORY_ENCRYPT_OP, command, id=unpack_from("<I", command)[0])

    def pre_fault_memory(self, gpa: int, size: int) -> None:
        """KVM_PRE_FAULT_MEMORY (KVM_CAP_PRE_FAULT_MEMORY): map guest memory before it is touched.

        Args:
            gpa: guest-physical address, a multiple of the page size.
            size: bytes, likewise. Interruptions by signals are continued.
        """
        data = bytearray(pack("<QQ48x", gpa, size))
        while True:
            result = self._try(lib.KVM_PRE_FAULT_MEMORY, data)
            if result == 0 and unpack_from("<Q", data, 8)[0] == 0:
                return
            if result < 0 and result != -_EINTR:
                self._fail(lib.KVM_PRE_FAULT_MEMORY, -result, {"gpa": gpa, "size": size})
