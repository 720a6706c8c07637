"""Which pages a guest writes: one way to ask, whichever way KVM keeps the answer.

```python
with track(vm) as tracker:            # or BitmapTracker(vm), RingTracker(vm)
    copy_all_memory()
    for slot, pages in tracker.harvest().items():
        ...                           # pages: a bitmap, as Vm.get_dirty_log() gives it
```

`BitmapTracker` asks KVM for its bitmap of each slot; with KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 enabled
it clears, a piece at a time, just what it has seen. `RingTracker` takes the pages out of the rings
that each vCPU has (KVM_CAP_DIRTY_LOG_RING); a run that finds its ring full returns `DirtyRingFull`,
and goes on after a harvest. The rings cost by what is written, the bitmap by what there is.
"""

from __future__ import annotations

from _thread import allocate_lock
from typing import TYPE_CHECKING

import attrs

from kvm_ioctls.constants import (
    KVM_CAP_DIRTY_LOG_RING,
    KVM_CAP_DIRTY_LOG_RING_ACQ_REL,
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
    KVM_MEM_GUEST_MEMFD,
    KVM_MEM_LOG_DIRTY_PAGES,
    KVM_MEM_READONLY,
)
from kvm_ioctls.vm.memory import PAGE, HostMemory

if TYPE_CHECKING:
    from threading import Lock
    from types import TracebackType
    from typing import Self

    from kvm_ioctls.vm import Vm

__all__ = ["BitmapTracker", "RingTracker", "enable_dirty_ring", "enable_manual_protect", "track"]


def enable_manual_protect(vm: Vm) -> None:
    """Let KVM's bitmap stay until it is cleared, which costs the guest less.

    Raises:
        KvmError: the kernel has no KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.
    """
    vm.enable_cap(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, (KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,))


def enable_dirty_ring(vm: Vm, entries: int = 4096) -> None:
    """Give each vCPU that will be made a ring for the pages it writes.

    Args:
        vm: without vCPUs so far.
        entries: a power of two, at least twice what KVM reserves (64 and more).

    Raises:
        KvmError: the kernel has no such rings, or not of this size, or there are vCPUs already.
    """
    ordered = vm.check_extension(KVM_CAP_DIRTY_LOG_RING_ACQ_REL)
    cap = KVM_CAP_DIRTY_LOG_RING_ACQ_REL if ordered else KVM_CAP_DIRTY_LOG_RING
    vm.enable_cap(cap, (entries * 16,))


@attrs.define
class _Tracker:
    """What both ways share: logging is on in all slots from start() to stop()."""

    vm: Vm
    _slots: dict[int, int] = attrs.field(factory=dict, init=False)

    def start(self) -> None:
        """Watch all slots that the VM has now; their pages count as clean from here on.

        Left out are slots that a guest cannot write, or that have private memory, which KVM does
        not log.
        """
        for slot in self.vm.slots:
            if not slot.flags & (KVM_MEM_READONLY | KVM_MEM_GUEST_MEMFD):
                self._slots[slot.slot] = slot.flags
                self._flags(slot.slot, slot.flags | KVM_MEM_LOG_DIRTY_PAGES)

    def stop(self) -> None:
        """Watch no more."""
        slots, self._slots = self._slots, {}
        living = {slot.slot for slot in self.vm.slots}
        for number, flags in slots.items():
            if number in living:
                self._flags(number, flags)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self.vm.closed:
            self.stop()

    def _flags(self, number: int, flags: int) -> None:
        slot = next(slot for slot in self.vm.slots if slot.slot == number)
        if slot.flags != flags:
            self.vm.set_user_memory_region(
                slot=number,
                guest_phys_addr=slot.guest_phys_addr,
                memory=HostMemory(slot.host_address, slot.size, slot.owner),
                flags=flags,
            )


@attrs.define
class BitmapTracker(_Tracker):
    """Asks for KVM's bitmap of each slot; between start() and stop().

    Attributes:
        vm: the VM. With enable_manual_protect() harvests clear what they have seen.
    """

    def harvest(self) -> dict[int, bytes]:
        """The pages written since the last harvest, or the start, and watched again from now on.

        It may be called while vCPUs run: a page that is written meanwhile is in this harvest or in
        the next one, and never in none.

        Returns:
            By slot, a bitmap as from Vm.get_dirty_log(), for slots in which anything was written.
        """
        found = {}
        for number in self._slots:
            bitmap = self.vm.get_dirty_log(number)
            if not any(bitmap):
                continue
            if self.vm.manual_protect:
                self.vm.clear_dirty_log(number, bitmap=bitmap)
            found[number] = bitmap
        return found


@attrs.define
class RingTracker(_Tracker):
    """Takes pages out of the vCPUs' rings; between start() and stop().

    Attributes:
        vm: the VM, on which enable_dirty_ring() was called before its vCPUs were made.
    """

    _lock: Lock = attrs.field(factory=allocate_lock, init=False)

    def start(self) -> None:
        """Watch all slots that the VM has now, and forget what the rings held before."""
        _Tracker.start(self)
        self._take()

    def harvest(self) -> dict[int, bytes]:
        """The pages written since the last harvest, or the start, and watched again from now on.

        It may be called while vCPUs run, and is what a run that returned `DirtyRingFull` needs. A
        page that is written meanwhile is in this harvest or in the next one. What a vCPU has
        written may wait, unseen, in a buffer of the processor until the vCPU leaves the guest: kick
        the vCPUs before a harvest that must be the last.

        Returns:
            By slot, a bitmap as from Vm.get_dirty_log(), for slots in which anything was written.
        """
        sizes = {slot.slot: slot.size for slot in self.vm.slots}
        found: dict[int, bytearray] = {}
        for number, page in self._take():
            if page * PAGE >= sizes.get(number, 0):
                continue  # written before the slot was deleted, or made anew and smaller
            bitmap = found.get(number)
            if bitmap is None:
                bitmap = found[number] = bytearray(-(-(sizes[number] // PAGE) // 64) * 8)
            bitmap[page >> 3] |= 1 << (page & 7)
        return {number: bytes(bitmap) for number, bitmap in found.items()}

    def _take(self) -> list[tuple[int, int]]:
        with self._lock:
            pages: list[tuple[int, int]] = []
            for vcpu in self.vm.vcpus:
                pages += vcpu.dirty_pages()
            if pages:
                self.vm.reset_dirty_rings()
        return pages


def track(vm: Vm) -> BitmapTracker | RingTracker:
    """The tracker for the way in which this VM was set up."""
    return RingTracker(vm) if vm.dirty_ring_size else BitmapTracker(vm)
