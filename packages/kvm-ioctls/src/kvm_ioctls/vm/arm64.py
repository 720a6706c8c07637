"""What only a VM on arm64 has; elsewhere the kernel refuses these with ENOTTY."""

from __future__ import annotations

from struct import pack, unpack_from

from kvm_ioctls._fd import Descriptor
from kvm_ioctls._native import ffi, lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvm_ioctls.state.arm64 import ArmVcpuInit

__all__ = ["VmArm64"]

_MASKS = 3 * 8 * 8
_GRANULE = 16


class VmArm64(Descriptor):
    """The part of a VM that only arm64 has."""

    def arm_preferred_target(self) -> ArmVcpuInit:
        """KVM_ARM_PREFERRED_TARGET: what arm_vcpu_init() takes to be like the host's processor."""
        from kvm_ioctls.state.arm64 import ArmVcpuInit

        return ArmVcpuInit.from_bytes(self._read(lib.KVM_ARM_PREFERRED_TARGET, 32))

    def arm_set_device_addr(self, id: int, addr: int) -> None:  # noqa: A002 - the kernel's name
        """KVM_ARM_SET_DEVICE_ADDR (KVM_CAP_ARM_SET_DEVICE_ADDR): where a GICv2 part lies.

        Args:
            id: the device in the upper 16 bits, the kind of address in the lower.
            addr: guest-physical.
        """
        self._write(lib.KVM_ARM_SET_DEVICE_ADDR, pack("<QQ", id, addr), id=id, addr=addr)

    def arm_mte_copy_tags(self, guest_ipa: int, tags: bytes | bytearray, *, write: bool) -> int:
        """KVM_ARM_MTE_COPY_TAGS (KVM_CAP_ARM_MTE): copy memory tags, one byte each 16 bytes.

        Args:
            guest_ipa: where the tagged memory begins, a multiple of the page size.
            tags: the tags to write, or a bytearray to read into; whole pages of them.
            write: into the guest's memory, or out of it.

        Returns:
            Bytes of guest memory whose tags were copied.
        """
        held = ffi.from_buffer("char[]", tags, require_writable=not write)
        length = len(tags) * _GRANULE
        data = bytearray(
            pack("<QQQQ16x", guest_ipa, length, int(ffi.cast("uintptr_t", held)), int(not write))
        )
        return self._write(
            lib.KVM_ARM_MTE_COPY_TAGS, data, guest_ipa=guest_ipa, length=length, write=write
        )

    def arm_set_counter_offset(self, counter_offset: int) -> None:
        """KVM_ARM_SET_COUNTER_OFFSET (KVM_CAP_COUNTER_OFFSET): what both counters are behind by."""
        self._write(lib.KVM_ARM_SET_COUNTER_OFFSET, pack("<Q8x", counter_offset),
                    counter_offset=counter_offset)  # fmt: skip

    def arm_get_reg_writable_masks(self, range: int = 0) -> tuple[int, ...]:  # noqa: A002
        """KVM_ARM_GET_REG_WRITABLE_MASKS (KVM_CAP_ARM_SUPPORTED_REG_MASK_RANGES).

        Args:
            range: KVM_ARM_FEATURE_ID_RANGE.

        Returns:
            For each identification register, by op1, CRm and op2, the bits that may be set.
        """
        masks = bytearray(8 * _MASKS)
        held = ffi.from_buffer(masks)
        data = bytearray(pack("<QI52x", int(ffi.cast("uintptr_t", held)), range))
        self._write(lib.KVM_ARM_GET_REG_WRITABLE_MASKS, data, range=range)
        return unpack_from(f"<{_MASKS}Q", masks)
