"""What belongs to the machine as a whole: capabilities, timers, clocks, reserved pages."""

from __future__ import annotations

from struct import pack

from kvm_ioctls._fd import Descriptor
from kvm_ioctls._native import lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvm_ioctls.state.clock import ClockData
    from kvm_ioctls.state.pit import PitState2

__all__ = ["VmPlatform"]


_DIRTY_RINGS = (192, 223)  # KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL
_MANUAL_PROTECT = 168  # KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2


class VmPlatform(Descriptor):
    """The part of a VM that deals with the machine as a whole.

    Attributes:
        dirty_ring_size: bytes of each vCPU's ring of dirty pages; 0 where there are none.
        manual_protect: whether KVM's dirty bitmap stays until clear_dirty_log().
    """

    dirty_ring_size = 0
    manual_protect = False

    def check_extension(self, cap: int) -> int:
        """KVM_CHECK_EXTENSION for this VM (KVM_CAP_CHECK_EXTENSION_VM): 0 if it is lacking."""
        return self._value(lib.KVM_CHECK_EXTENSION, cap, cap=cap)

    def enable_cap(self, cap: int, args: tuple[int, ...] = (), flags: int = 0) -> None:
        """KVM_ENABLE_CAP: switch on a capability that is off by default.

        Args:
            cap: KVM_CAP_*.
            args: up to four 64-bit arguments; the others are 0.
            flags: 0 for every capability known so far.
        """
        a, b, c, d = (*args, 0, 0, 0, 0)[:4]
        self._write(
            lib.KVM_ENABLE_CAP, pack("<II4Q64x", cap, flags, a, b, c, d), cap=cap, args=args
        )
        if cap in _DIRTY_RINGS:
            self.dirty_ring_size = a
        elif cap == _MANUAL_PROTECT:
            self.manual_protect = bool(a)

    def set_tss_addr(self, addr: int) -> None:
        """KVM_SET_TSS_ADDR: three pages below 4 GiB that Intel hosts use in real mode.

        They must lie in no slot and be reserved in the guest's memory map.
        """
        self._value(lib.KVM_SET_TSS_ADDR, addr, addr=addr)

    def set_identity_map_addr(self, addr: int) -> None:
        """KVM_SET_IDENTITY_MAP_ADDR: one page below 4 GiB for Intel hosts, before the first vCPU.

        0 chooses the default, 0xfffbc000.
        """
        self._write(lib.KVM_SET_IDENTITY_MAP_ADDR, pack("<Q", addr), addr=addr)

    def set_boot_cpu_id(self, vcpu_id: int) -> None:
        """KVM_SET_BOOT_CPU_ID: which vCPU starts first, before any is made; else it is 0."""
        self._value(lib.KVM_SET_BOOT_CPU_ID, vcpu_id, vcpu_id=vcpu_id)

    def create_pit2(self, flags: int = 0) -> None:
        """KVM_CREATE_PIT2 (KVM_CAP_PIT2): an i8254 timer in the kernel, after create_irqchip().

        Args:
            flags: KVM_PIT_SPEAKER_DUMMY also answers port 0x61.
        """
        self._write(lib.KVM_CREATE_PIT2, pack("<I60x", flags), flags=flags)

    def get_pit2(self) -> PitState2:
        """KVM_GET_PIT2 (KVM_CAP_PIT_STATE2): the timer's three channels."""
        from kvm_ioctls.state.pit import PitState2

        return PitState2.from_bytes(self._read(lib.KVM_GET_PIT2, 112))

    def set_pit2(self, state: PitState2) -> None:
        """KVM_SET_PIT2 (KVM_CAP_PIT_STATE2): put back what get_pit2() gave."""
        self._write(lib.KVM_SET_PIT2, state.to_bytes())

    def create_pit(self) -> None:
        """KVM_CREATE_PIT (KVM_CAP_PIT): the older create_pit2()."""
        self._value(lib.KVM_CREATE_PIT)

    def get_pit(self) -> PitState2:
        """KVM_GET_PIT (KVM_CAP_PIT): the older get_pit2(), without flags."""
        from kvm_ioctls.state.pit import PitState2

        return PitState2.from_bytes(bytes(self._read(lib.KVM_GET_PIT, 72)) + bytes(40))

    def set_pit(self, state: PitState2) -> None:
        """KVM_SET_PIT (KVM_CAP_PIT): the older set_pit2(); flags are not taken."""
        self._write(lib.KVM_SET_PIT, bytearray(state.to_bytes()[:72]))

    def reinject_control(self, reinject: bool) -> None:
        """KVM_REINJECT_CONTROL (KVM_CAP_REINJECT_CONTROL): whether late timer ticks are made up."""
        self._write(lib.KVM_REINJECT_CONTROL, pack("<B31x", reinject), reinject=reinject)

    def get_clock(self) -> ClockData:
        """KVM_GET_CLOCK (KVM_CAP_ADJUST_CLOCK): the guest's kvmclock, in nanoseconds."""
        from kvm_ioctls.state.clock import ClockData

        return ClockData.from_bytes(self._read(lib.KVM_GET_CLOCK, 48))

    def set_clock(self, state: ClockData) -> None:
        """KVM_SET_CLOCK (KVM_CAP_ADJUST_CLOCK): continue the kvmclock from a saved value.

        Only KVM_CLOCK_REALTIME of the flags is taken: with it the clock is advanced by the wall
        time that passed since.
        """
        self._write(lib.KVM_SET_CLOCK, state.to_bytes(), clock=state.clock, flags=state.flags)

    def get_tsc_khz(self) -> int:
        """KVM_GET_TSC_KHZ (KVM_CAP_VM_TSC_CONTROL): the rate new vCPUs' TSC will have."""
        return self._value(lib.KVM_GET_TSC_KHZ)

    def set_tsc_khz(self, khz: int) -> None:
        """KVM_SET_TSC_KHZ (KVM_CAP_VM_TSC_CONTROL): choose that rate, before the first vCPU."""
        self._value(lib.KVM_SET_TSC_KHZ, khz, khz=khz)
