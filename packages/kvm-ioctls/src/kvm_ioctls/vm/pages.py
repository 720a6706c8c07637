"""Memory beyond plain slots: guest_memfd, private memory, dirty logs, coalesced writes."""

from __future__ import annotations

from struct import pack, unpack_from

from kvm_ioctls._fd import Descriptor
from kvm_ioctls._native import ffi, lib
from kvm_ioctls.vm.memory import PAGE, Slot, VmMemory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing_extensions import Buffer

    from kvm_ioctls.vm.memory import HostMemory

__all__ = ["GuestMemfd", "VmPages"]

_GUEST_MEMFD = 4


class GuestMemfd(Descriptor):
    """Memory that only guests can reach, made by Vm.create_guest_memfd().

    Attributes:
        size: bytes.
    """

    _kind = "guest_memfd"

    def __init__(self, fd: int, size: int) -> None:
        super().__init__(fd)
        self.size = size


class VmPages(VmMemory):
    """The part of a VM that deals with pages one by one."""

    def create_guest_memfd(self, size: int, flags: int = 0) -> GuestMemfd:
        """KVM_CREATE_GUEST_MEMFD (KVM_CAP_GUEST_MEMFD): memory that user space need not map.

        Args:
            size: bytes, a positive multiple of the page size.
            flags: GUEST_MEMFD_FLAG_*.
        """
        data = bytearray(pack("<QQ48x", size, flags))
        fd = self._write(lib.KVM_CREATE_GUEST_MEMFD, data, size=size, flags=flags)
        return GuestMemfd(fd, size)

    def set_user_memory_region2(
        self,
        *,
        slot: int,
        guest_phys_addr: int,
        memory: Buffer | HostMemory,
        guest_memfd: GuestMemfd,
        guest_memfd_offset: int = 0,
        flags: int = 0,
    ) -> None:
        """KVM_SET_USER_MEMORY_REGION2 (KVM_CAP_USER_MEMORY2): a slot with private memory too.

        Args:
            slot: the slot's number.
            guest_phys_addr: where the guest sees it.
            memory: its shared half, as for set_user_memory_region().
            guest_memfd: its private half; referenced until the slot is deleted.
            guest_memfd_offset: where in it the slot begins, a multiple of the page size.
            flags: KVM_MEM_*; KVM_MEM_GUEST_MEMFD is added.

        A slot without private memory is the business of set_user_memory_region(), which also
        deletes these.
        """
        owner, address, size = self._host_memory(slot, memory, flags)
        flags |= _GUEST_MEMFD
        new = Slot(slot, guest_phys_addr, size, address, flags, (owner, guest_memfd))
        with self._slots_lock:
            self._check_slot(new)
            self._write(
                lib.KVM_SET_USER_MEMORY_REGION2,
                pack(
                    "<IIQQQQI4x112x", slot, flags, guest_phys_addr, size, address,
                    guest_memfd_offset, guest_memfd.fileno(),
                ),
                slot=slot,
                flags=flags,
                guest_phys_addr=guest_phys_addr,
                memory_size=size,
                guest_memfd_offset=guest_memfd_offset,
            )  # fmt: skip
            self._slots[slot] = new

    def set_memory_attributes(self, address: int, size: int, attributes: int) -> None:
        """KVM_SET_MEMORY_ATTRIBUTES (KVM_CAP_MEMORY_ATTRIBUTES): make pages private or shared.

        Args:
            address: guest-physical, a multiple of the page size.
            size: bytes, likewise.
            attributes: KVM_MEMORY_ATTRIBUTE_PRIVATE, or 0 for shared.
        """
        self._write(
            lib.KVM_SET_MEMORY_ATTRIBUTES,
            pack("<QQQQ", address, size, attributes, 0),
            address=address,
            size=size,
            attributes=attributes,
        )

    def clear_dirty_log(
        self,
        slot: int,
        first_page: int = 0,
        num_pages: int | None = None,
        bitmap: bytes | None = None,
    ) -> None:
        """KVM_CLEAR_DIRTY_LOG (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2): clear part of a slot's log.

        Args:
            slot: a slot set through this object.
            first_page: where to begin, a multiple of 64.
            num_pages: how many, a multiple of 64 unless it ends with the slot; None for the rest.
            bitmap: which of them; None for all. Its first bit is `first_page`.

        Raises:
            ArgumentError: the range lies outside the slot, or the bitmap is too short for it.
        """
        from kvm_ioctls._hints import refuse

        shown = {"slot": slot, "first_page": first_page, "num_pages": num_pages}
        known = self._slots.get(slot)
        if known is None:
            raise refuse("KVM_CLEAR_DIRTY_LOG", 2, shown, "no such slot was set here")
        pages = known.size // PAGE
        count = pages - first_page if num_pages is None else num_pages
        if not (0 <= first_page < pages and 0 < count <= pages - first_page):
            raise refuse("KVM_CLEAR_DIRTY_LOG", 22, shown, f"slot {slot} has {pages} pages")
        wanted = -(-count // 64) * 8
        if bitmap is not None and len(bitmap) < wanted:
            why = f"the bitmap has {len(bitmap)} bytes of the {wanted} it takes"
            raise refuse("KVM_CLEAR_DIRTY_LOG", 22, shown, why)
        held = ffi.from_buffer(bitmap if bitmap is not None else b"\xff" * wanted)
        self._write(
            lib.KVM_CLEAR_DIRTY_LOG,
            bytearray(pack("<IIQQ", slot, count, first_page, int(ffi.cast("uintptr_t", held)))),
            slot=slot,
            first_page=first_page,
            num_pages=count,
        )

    def reset_dirty_rings(self) -> int:
        """KVM_RESET_DIRTY_RINGS (KVM_CAP_DIRTY_LOG_RING): watch harvested pages again.

        Returns:
            How many entries were reset.
        """
        return self._value(lib.KVM_RESET_DIRTY_RINGS)

    def register_coalesced_mmio(self, address: int, size: int, *, pio: bool = False) -> None:
        """KVM_REGISTER_COALESCED_MMIO: let writes there wait in a ring instead of making exits.

        Vcpu.coalesced_writes() reads the ring, in order, and must be asked before any other exit is
        acted on. Reads and everything elsewhere still exit at once.

        Args:
            address: guest-physical address, or port (KVM_CAP_COALESCED_PIO).
            size: bytes.
            pio: ports instead of memory.
        """
        self._zone(lib.KVM_REGISTER_COALESCED_MMIO, address, size, pio)

    def unregister_coalesced_mmio(self, address: int, size: int, *, pio: bool = False) -> None:
        """KVM_UNREGISTER_COALESCED_MMIO: make every zone within this range exit again."""
        self._zone(lib.KVM_UNREGISTER_COALESCED_MMIO, address, size, pio)

    def _zone(self, request: int, address: int, size: int, pio: bool) -> None:
        self._write(request, pack("<QII", address, size, pio), address=address, size=size, pio=pio)

    def set_nr_mmu_pages(self, count: int) -> None:
        """KVM_SET_NR_MMU_PAGES (KVM_CAP_MMU_SHADOW_CACHE_CONTROL): limit KVM's own page tables."""
        self._value(lib.KVM_SET_NR_MMU_PAGES, count, count=count)

    def get_nr_mmu_pages(self) -> int:
        """KVM_GET_NR_MMU_PAGES (KVM_CAP_MMU_SHADOW_CACHE_CONTROL): that limit."""
        return self._value(lib.KVM_GET_NR_MMU_PAGES)

    def memory_encrypt_reg_region(self, address: int, size: int) -> None:
        """KVM_MEMORY_ENCRYPT_REG_REGION: pin host memory that an SEV guest will encrypt."""
        self._write(lib.KVM_MEMORY_ENCRYPT_REG_REGION, pack("<QQ", address, size),
                    address=address, size=size)  # fmt: skip

    def memory_encrypt_unreg_region(self, address: int, size: int) -> None:
        """KVM_MEMORY_ENCRYPT_UNREG_REGION: unpin it again."""
        self._write(lib.KVM_MEMORY_ENCRYPT_UNREG_REGION, pack("<QQ", address, size),
                    address=address, size=size)  # fmt: skip

    def memory_encrypt_op(self, command: bytearray) -> None:
        """KVM_MEMORY_ENCRYPT_OP: a command of SEV (struct kvm_sev_cmd) or TDX (kvm_tdx_cmd).

        Args:
            command: the structure as bytes; results are left in it.
        """
        self._write(lib.KVM_MEMORY_ENCRYPT_OP, command, id=unpack_from("<I", command)[0])
