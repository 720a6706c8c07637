"""What else is shared with the kernel: synchronised registers, and rings of writes and pages."""

from __future__ import annotations

from struct import Struct

from kvm_ioctls._native import ffi, lib
from kvm_ioctls.vcpu.run import VcpuRun
from kvm_ioctls.vm.memory import PAGE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kvm_ioctls.state.events import VcpuEvents
    from kvm_ioctls.state.regs import Regs
    from kvm_ioctls.state.sregs import Sregs
    from kvm_ioctls.vcpu.rings import CoalescedWrite, DirtyPage
    from kvm_ioctls.vm import Vm

__all__ = ["VcpuShared"]

_VALID, _DIRTY = slice(288, 296), slice(296, 304)
_REGS, _SREGS, _EVENTS = slice(304, 448), slice(448, 760), slice(760, 824)
_COALESCED = Struct("<QII8s")
_GFN = Struct("<IIQ")
_BATCH = 512
_COALESCED_AT = lib.KVMI_COALESCED_PAGE * PAGE


class VcpuShared(VcpuRun):
    """The part of a vCPU that exchanges state through memory instead of ioctls."""

    vm: Vm

    _ring: Any = None
    _ring_entries = 0
    _ring_fetch: Any = None

    @property
    def sync_valid(self) -> int:
        """KVM_SYNC_X86_*: register sets that every exit leaves in the run page (K72).

        Setting it takes effect with the next run (KVM_CAP_SYNC_REGS).
        """
        return int.from_bytes(self._shared()[_VALID], "little")

    @sync_valid.setter
    def sync_valid(self, sets: int) -> None:
        self._shared()[_VALID] = sets.to_bytes(8, "little")

    def sync_regs(self) -> Regs:
        """General registers at the last exit, without an ioctl; needs KVM_SYNC_X86_REGS."""
        from kvm_ioctls.state.regs import Regs

        return Regs.from_bytes(self._shared()[_REGS])

    def sync_sregs(self) -> Sregs:
        """Special registers at the last exit; needs KVM_SYNC_X86_SREGS."""
        from kvm_ioctls.state.sregs import Sregs

        return Sregs.from_bytes(self._shared()[_SREGS])

    def sync_events(self) -> VcpuEvents:
        """Events at the last exit; needs KVM_SYNC_X86_EVENTS."""
        from kvm_ioctls.state.events import VcpuEvents

        return VcpuEvents.from_bytes(self._shared()[_EVENTS])

    def set_sync(
        self,
        *,
        regs: Regs | None = None,
        sregs: Sregs | None = None,
        events: VcpuEvents | None = None,
    ) -> None:
        """Registers that the next run takes over before it enters the guest."""
        dirty = int.from_bytes(self._shared()[_DIRTY], "little")
        for bit, place, value in ((1, _REGS, regs), (2, _SREGS, sregs), (4, _EVENTS, events)):
            if value is not None:
                self._shared()[place] = value.to_bytes()
                dirty |= bit
        self._shared()[_DIRTY] = dirty.to_bytes(8, "little")

    def coalesced_writes(self, limit: int = 1 << 16) -> list[CoalescedWrite]:
        """Writes to coalesced zones that have not been looked at, oldest first.

        The ring belongs to the VM: any of its vCPUs shows the same one. It holds 169 writes; when
        it is full, writes exit as others do, and what is in the ring is older than such an exit.
        Call it from one thread at a time.
        """
        from kvm_ioctls.vcpu.rings import CoalescedWrite

        size, offset = PAGE, _COALESCED_AT
        ring = ffi.from_buffer(self._shared()[offset : offset + size])
        room = (size - 8) // _COALESCED.size
        out = bytearray(_COALESCED.size * room)
        held = ffi.from_buffer(out)
        found: list[CoalescedWrite] = []
        while len(found) < limit:
            count = lib.kvmi_coalesced_take(
                ffi.cast("uint8_t *", ring), size, ffi.cast("uint8_t *", held),
                min(room, limit - len(found)),
            )  # fmt: skip
            for number in range(count):
                address, length, pio, data = _COALESCED.unpack_from(out, 24 * number)
                found.append(CoalescedWrite(address, data[:length], bool(pio)))
            if not count:
                break
        return found

    def _map_dirty_ring(self) -> None:
        size = self.vm.dirty_ring_size
        if not size:  # the kernel would map it, and end the process when it is looked at
            from kvm_ioctls._hints import refuse

            raise refuse("dirty_pages", 22, {"vcpu": self.id}, "this VM has no dirty rings: enable"
                         " KVM_CAP_DIRTY_LOG_RING before the first vCPU")  # fmt: skip
        address = ffi.new("uint8_t **")
        result = lib.kvmi_map(self._fd, 64 * PAGE, size, address)
        if result < 0:
            self._fail("mmap", -result, {"offset": 64 * PAGE, "size": size})
        self._ring = ffi.gc(address[0], lambda ring: lib.kvmi_unmap(ring, size))
        self._ring_entries = size // _GFN.size
        self._ring_fetch = ffi.new("uint32_t *")

    def dirty_pages(self) -> list[DirtyPage]:
        """Pages in this vCPU's ring that have not been harvested, in the order they were written.

        The same page may come more than once. They are watched again, and their places in the ring
        free, after Vm.reset_dirty_rings(). It may be called while the vCPU runs, from one thread at
        a time; a page that the guest is just writing may come with the next call.
        """
        from kvm_ioctls.vcpu.rings import DirtyPage

        if self._ring is None:
            self._map_dirty_ring()
        out = bytearray(_GFN.size * _BATCH)
        held = ffi.from_buffer(out)
        found: list[DirtyPage] = []
        while True:
            count = lib.kvmi_dirty_take(
                self._ring, self._ring_entries, self._ring_fetch,
                ffi.cast("uint8_t *", held), _BATCH,
            )  # fmt: skip
            for number in range(count):
                _, slot, page = _GFN.unpack_from(out, _GFN.size * number)
                found.append(DirtyPage(slot, page))
            if count < _BATCH:
                return found

    def close(self) -> None:
        """End a run under way in another thread, wait for it, and close; again: nothing."""
        super().close()
        self._ring = None
