"""What guests of other hypervisors and restricted guests need: Xen, Hyper-V, filters."""

from __future__ import annotations

from struct import pack

from kvm_ioctls._fd import Descriptor
from kvm_ioctls._native import ffi, lib
from kvm_ioctls._values import frozen

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvm_ioctls.vm.events import HasFileno

__all__ = ["MsrFilterRange", "VmGuests"]


@frozen
class MsrFilterRange:
    """Some MSRs in a row, each allowed or denied.

    Attributes:
        flags: KVM_MSR_FILTER_READ and KVM_MSR_FILTER_WRITE: what the range decides about.
        base: the first MSR.
        allowed: one truth value for each MSR from there on.
    """

    flags: int
    base: int
    allowed: tuple[bool, ...]


class VmGuests(Descriptor):
    """The part of a VM that deals with what a guest may do, and with whom it believes to speak."""

    def x86_set_msr_filter(
        self, ranges: Iterable[MsrFilterRange] = (), *, default_deny: bool = False
    ) -> None:
        """KVM_X86_SET_MSR_FILTER (KVM_CAP_X86_MSR_FILTER): which MSRs a guest may use.

        A denied access faults, or exits with Rdmsr or Wrmsr where KVM_CAP_X86_USER_SPACE_MSR is
        enabled with KVM_MSR_EXIT_REASON_FILTER.

        Args:
            ranges: at most 16; MSRs in none of them follow the default.
            default_deny: deny these.
        """
        from kvm_ioctls._hints import refuse

        rows = list(ranges)
        if len(rows) > 16:
            raise refuse("KVM_X86_SET_MSR_FILTER", 22, {"ranges": len(rows)}, "at most 16 ranges")
        held, packed = [], []
        for row in rows:
            if not 0 < len(row.allowed) <= 0x600 * 8:
                raise refuse("KVM_X86_SET_MSR_FILTER", 22, {"base": row.base},
                             "a range has 1 to 12288 MSRs")  # fmt: skip
            bits = sum(1 << i for i, allowed in enumerate(row.allowed) if allowed)
            bitmap = ffi.from_buffer(bits.to_bytes(-(-len(row.allowed) // 64) * 8, "little"))
            held.append(bitmap)
            packed.append(pack("<III4xQ", row.flags, len(row.allowed), row.base,
                               int(ffi.cast("uintptr_t", bitmap))))  # fmt: skip
        data = pack("<I4x", int(default_deny)) + b"".join(packed).ljust(16 * 24, b"\0")
        self._write(lib.KVM_X86_SET_MSR_FILTER, data, ranges=len(rows), default_deny=default_deny)

    def set_pmu_event_filter(
        self, events: Iterable[int], *, deny: bool, fixed_counter_bitmap: int = 0, flags: int = 0
    ) -> None:
        """KVM_SET_PMU_EVENT_FILTER (KVM_CAP_PMU_EVENT_FILTER): which events a guest may count.

        Args:
            events: event selectors with unit masks, at most 300.
            deny: whether the list is what is denied, or all that is allowed.
            fixed_counter_bitmap: the same for fixed counters.
            flags: KVM_PMU_EVENT_FLAG_*.
        """
        rows = list(events)
        self._write(
            lib.KVM_SET_PMU_EVENT_FILTER,
            pack(f"<IIII16x{len(rows)}Q", int(deny), len(rows), fixed_counter_bitmap, flags, *rows),
            nevents=len(rows),
            deny=deny,
        )

    def hyperv_eventfd(self, conn_id: int, fd: int | HasFileno, *, deassign: bool = False) -> None:
        """KVM_HYPERV_EVENTFD (KVM_CAP_HYPERV_EVENTFD): an eventfd for a Hyper-V signal.

        Args:
            conn_id: the connection, 24 bits.
            fd: an eventfd, signalled by HvSignalEvent on that connection.
            deassign: undo it.
        """
        number = fd if isinstance(fd, int) else fd.fileno()
        self._write(lib.KVM_HYPERV_EVENTFD, pack("<IiI12x", conn_id, number, int(deassign)),
                    conn_id=conn_id, fd=number, deassign=deassign)  # fmt: skip

    def xen_hvm_config(
        self, flags: int, msr: int, blob_32: bytes = b"", blob_64: bytes = b""
    ) -> None:
        """KVM_XEN_HVM_CONFIG (KVM_CAP_XEN_HVM): look like Xen to the guest.

        Args:
            flags: KVM_XEN_HVM_CONFIG_* that the capability's value offers.
            msr: the MSR through which the guest asks for its hypercall page.
            blob_32: hypercall pages for 32-bit guests, whole pages, if KVM does not write them.
            blob_64: the same for 64-bit guests.
        """
        first, second = ffi.from_buffer(blob_32), ffi.from_buffer(blob_64)
        addresses = [
            int(ffi.cast("uintptr_t", blob)) if data else 0
            for blob, data in ((first, blob_32), (second, blob_64))
        ]
        self._write(
            lib.KVM_XEN_HVM_CONFIG,
            pack("<IIQQBB30x", flags, msr, *addresses, len(blob_32) // 4096, len(blob_64) // 4096),
            flags=flags,
            msr=msr,
        )

    def xen_hvm_get_attr(self, type: int) -> bytes:  # noqa: A002 - the kernel's name
        """KVM_XEN_HVM_GET_ATTR (KVM_CAP_XEN_HVM): the 64 bytes of an attribute's union."""
        data = bytearray(pack("<H70x", type))
        self._write(lib.KVM_XEN_HVM_GET_ATTR, data, type=type)
        return bytes(data[8:])

    def xen_hvm_set_attr(self, type: int, value: bytes) -> None:  # noqa: A002
        """KVM_XEN_HVM_SET_ATTR (KVM_CAP_XEN_HVM): set an attribute; `value` is its union."""
        self._write(lib.KVM_XEN_HVM_SET_ATTR, pack("<H6x64s", type, value), type=type)

    def xen_hvm_evtchn_send(self, port: int, vcpu: int, priority: int = 0xFFFFFFFF) -> int:
        """KVM_XEN_HVM_EVTCHN_SEND (KVM_CAP_XEN_HVM): signal an event channel of the guest."""
        return self._write(lib.KVM_XEN_HVM_EVTCHN_SEND, pack("<III", port, vcpu, priority),
                           port=port, vcpu=vcpu)  # fmt: skip
