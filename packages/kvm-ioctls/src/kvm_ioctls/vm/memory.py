"""Memory slots: which host memory a guest sees where, and which pages it has written."""

from __future__ import annotations

from _thread import allocate_lock
from os import sysconf
from struct import pack

from kvm_ioctls._fd import Descriptor
from kvm_ioctls._native import ffi, lib
from kvm_ioctls._values import frozen

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

    from typing_extensions import Buffer

__all__ = ["HostMemory", "Slot", "VmMemory"]

PAGE = sysconf("SC_PAGESIZE")
"""Bytes of a page of this machine."""
_LOG, _READONLY = 1, 2
_EINVAL, _EEXIST, _ENOENT, _EFAULT = 22, 17, 2, 14


@frozen
class HostMemory:
    """Memory given by address, with whoever keeps it mapped.

    Attributes:
        address: where it begins in this process, a multiple of the page size.
        size: its length in bytes, a multiple of the page size.
        owner: any object that keeps it mapped as long as it is referenced.
    """

    address: int
    size: int
    owner: object


@frozen
class Slot:
    """One memory slot as it was set.

    Attributes:
        slot: its number; the address space is in the upper 16 bits.
        guest_phys_addr: where the guest sees it.
        size: bytes.
        host_address: where it lies in this process.
        flags: KVM_MEM_* bits.
        owner: what keeps the host memory mapped.
    """

    slot: int
    guest_phys_addr: int
    size: int
    host_address: int
    flags: int
    owner: object


class VmMemory(Descriptor):
    """The part of a VM that deals with its memory."""

    def _init_memory(self) -> None:
        self._slots: dict[int, Slot] = {}
        self._slots_lock = allocate_lock()

    def _forget_memory(self) -> None:
        self._slots = {}

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The memory slots set through this object, by number."""
        return tuple(self._slots[number] for number in sorted(self._slots))

    def set_user_memory_region(
        self,
        *,
        slot: int,
        guest_phys_addr: int = 0,
        memory: Buffer | HostMemory | None,
        flags: int = 0,
    ) -> None:
        """KVM_SET_USER_MEMORY_REGION: show host memory to the guest, move it, or take it away.

        Args:
            slot: the slot's number; bits 16 and up choose the address space.
            guest_phys_addr: where the guest sees it, a multiple of 4096.
            memory: a writable buffer that begins and ends on page boundaries, such as an mmap or a
                vm_memory region's buffer; HostMemory for an address; None deletes the slot. It is
                referenced until the slot is deleted or the VM closed.
            flags: KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY.

        Raises:
            ArgumentError: nothing to map, not on page boundaries, beyond the address space, or over
                another slot. Nothing has changed then.
            KvmError: the kernel refused. Nothing has changed then.
        """
        if memory is None:
            self._delete_slot(slot)
            return
        owner, address, size = self._host_memory(slot, memory, flags)
        new = Slot(slot, guest_phys_addr, size, address, flags, owner)
        with self._slots_lock:
            self._check_slot(new)
            self._write(
                lib.KVM_SET_USER_MEMORY_REGION,
                pack("<IIQQQ", slot, flags, guest_phys_addr, size, address),
                slot=slot,
                flags=flags,
                guest_phys_addr=guest_phys_addr,
                memory_size=size,
                userspace_addr=address,
            )
            self._slots[slot] = new

    def _delete_slot(self, slot: int) -> None:
        with self._slots_lock:
            if slot not in self._slots:
                self._refuse(_ENOENT, {"slot": slot}, "no such slot was set: there is nothing to"
                             " delete")  # fmt: skip
            self._write(
                lib.KVM_SET_USER_MEMORY_REGION,
                pack("<IIQQQ", slot, 0, self._slots[slot].guest_phys_addr, 0, 0),
                slot=slot,
                memory_size=0,
            )
            del self._slots[slot]

    def _host_memory(
        self, slot: int, memory: Buffer | HostMemory, flags: int
    ) -> tuple[object, int, int]:
        if isinstance(memory, HostMemory):
            return memory.owner, memory.address, memory.size
        try:
            held = ffi.from_buffer("char[]", memory, require_writable=not flags & _READONLY)
        except (TypeError, BufferError, ValueError) as error:
            self._refuse(
                _EFAULT,
                {"slot": slot, "memory": memory},
                f"{error}: give a"
                " writable, contiguous buffer, or KVM_MEM_READONLY with a read-only one",
            )
        return held, int(ffi.cast("uintptr_t", held)), len(held)

    def _check_slot(self, new: Slot) -> None:
        shown = {
            "slot": new.slot,
            "guest_phys_addr": new.guest_phys_addr,
            "memory_size": new.size,
            "userspace_addr": new.host_address,
        }
        if not 0 <= new.slot < 1 << 32 or not 0 <= new.flags < 1 << 32:
            self._refuse(_EINVAL, shown, "slot and flags are 32-bit numbers")
        if new.size <= 0 or new.size % PAGE:
            self._refuse(_EINVAL, shown, f"memory_size is a positive multiple of {PAGE}")
        if new.guest_phys_addr % PAGE or new.host_address % PAGE:
            self._refuse(_EINVAL, shown, "guest_phys_addr and the buffer's address are multiples of"
                         f" {PAGE}: an mmap is aligned, a bytearray is not")  # fmt: skip
        if new.guest_phys_addr < 0 or new.guest_phys_addr + new.size > 1 << 52:
            self._refuse(_EINVAL, shown, "the slot ends beyond the 52 bits of a physical address")
        old = self._slots.get(new.slot)
        if old and old.size != new.size:
            self._refuse(_EINVAL, shown, f"slot {new.slot} lives with {old.size:#x} bytes, and"
                         " slots cannot change their size: delete it first")  # fmt: skip
        end = new.guest_phys_addr + new.size
        for other in self._slots.values():
            if other.slot == new.slot or other.slot >> 16 != new.slot >> 16:
                continue
            if new.guest_phys_addr < other.guest_phys_addr + other.size and (
                other.guest_phys_addr < end
            ):
                self._refuse(_EEXIST, shown, f"it overlaps slot {other.slot} at"
                             f" {other.guest_phys_addr:#x} of {other.size:#x} bytes")  # fmt: skip

    def _refuse(self, errno: int, arguments: dict[str, Any], why: str) -> NoReturn:
        from kvm_ioctls._hints import refuse

        raise refuse("KVM_SET_USER_MEMORY_REGION", errno, arguments, why)

    def get_dirty_log(self, slot: int) -> bytes:
        """KVM_GET_DIRTY_LOG: a bitmap of the slot's pages written since the last call.

        Bit n of the whole, counted from the lowest bit of the first byte, is the slot's page n. The
        length is a multiple of 8 bytes. Unless KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 is enabled, the
        call also clears the log.

        Args:
            slot: a slot set through this object, with KVM_MEM_LOG_DIRTY_PAGES.
        """
        with self._slots_lock:  # the kernel fills a bitmap for the size that the slot has then
            known = self._slots.get(slot)
            if known is None:
                from kvm_ioctls._hints import refuse

                raise refuse("KVM_GET_DIRTY_LOG", _ENOENT, {"slot": slot}, "no such slot was set"
                             " through this object, so the bitmap's size is unknown")  # fmt: skip
            bitmap = bytearray(-(-(known.size // PAGE) // 64) * 8)
            held = ffi.from_buffer(bitmap)
            self._write(
                lib.KVM_GET_DIRTY_LOG,
                pack("<IIQ", slot, 0, int(ffi.cast("uintptr_t", held))),
                slot=slot,
            )
        return bytes(bitmap)
