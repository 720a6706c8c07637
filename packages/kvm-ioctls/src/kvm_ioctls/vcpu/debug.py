"""Looking into a guest: breakpoints, single steps, address translation, statistics."""

from __future__ import annotations

from struct import pack, unpack_from

from kvm_ioctls._fd import Descriptor
from kvm_ioctls._native import lib
from kvm_ioctls._values import frozen

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvm_ioctls.stats import Stats

__all__ = ["HardwareBreakpoint", "Translation", "VcpuDebug"]

_LENGTHS = {1: 0, 2: 1, 4: 3, 8: 2}
_ACCESSES = {"execute": 0, "write": 1, "access": 3}


@frozen
class HardwareBreakpoint:
    """One of the four breakpoints that the processor watches for the debugger.

    Attributes:
        address: linear address, a multiple of `length`.
        length: 1, 2, 4 or 8 bytes; 1 for `execute`.
        on: `execute`, `write`, or `access` for reads and writes.
    """

    address: int
    length: int = 1
    on: str = "execute"


@frozen
class Translation:
    """What a guest-virtual address stands for.

    Attributes:
        physical_address: guest-physical address, if `valid`.
        valid: whether it is mapped.
        writeable: as the kernel reports it; x86 always says yes.
        usermode: as the kernel reports it; x86 always says no.
    """

    physical_address: int
    valid: bool
    writeable: bool
    usermode: bool


class VcpuDebug(Descriptor):
    """The part of a vCPU for debuggers."""

    def set_guest_debug(
        self,
        *,
        enable: bool = True,
        single_step: bool = False,
        software_breakpoints: bool = False,
        hardware_breakpoints: Iterable[HardwareBreakpoint] = (),
        block_interrupts: bool = False,
        inject: int | None = None,
    ) -> None:
        """KVM_SET_GUEST_DEBUG (KVM_CAP_SET_GUEST_DEBUG): which events exit with `Debug`.

        Each call replaces the last. The guest's own debug registers are hidden from it meanwhile.

        Args:
            enable: False switches all of it off.
            single_step: exit after each instruction.
            software_breakpoints: exit on INT3 (0xcc), before it is executed.
            hardware_breakpoints: at most four.
            block_interrupts: hold interrupts back while stepping (KVM_CAP_SET_GUEST_DEBUG2).
            inject: 1 or 3: give the guest a #DB or #BP that turned out to be its own.

        Raises:
            ArgumentError: more than four breakpoints, or one that the processor cannot watch.
            KvmError: EBUSY if an exception is pending when one is to be injected.
        """
        from kvm_ioctls._hints import refuse

        control = int(enable) | 2 * single_step | 0x10000 * software_breakpoints
        control |= 0x100000 * block_interrupts
        control |= {None: 0, 1: 0x40000, 3: 0x80000}[inject]
        registers = [0] * 8
        points = list(hardware_breakpoints)
        if len(points) > 4:
            raise refuse("KVM_SET_GUEST_DEBUG", 22, {"breakpoints": len(points)}, "at most four")
        for number, point in enumerate(points):
            wrong = (
                point.length not in _LENGTHS
                or point.on not in _ACCESSES
                or point.address % point.length
                or (point.on == "execute" and point.length != 1)
            )
            if wrong:
                raise refuse("KVM_SET_GUEST_DEBUG", 22, {"breakpoint": point}, "length is 1, 2, 4"
                             " or 8 and divides the address, and 1 for execute")  # fmt: skip
            control |= 0x20000
            registers[number] = point.address
            bits = _ACCESSES[point.on] | _LENGTHS[point.length] << 2
            registers[7] |= 2 << 2 * number | bits << 16 + 4 * number
        if points:
            registers[7] |= 0x600
        self._write(lib.KVM_SET_GUEST_DEBUG, pack("<I4x8Q", control, *registers), control=control)

    def translate(self, linear_address: int) -> Translation:
        """KVM_TRANSLATE: walk the guest's page tables as they are now."""
        data = bytearray(pack("<Q16x", linear_address))
        self._write(lib.KVM_TRANSLATE, data, linear_address=linear_address)
        physical, *flags = unpack_from("<QBBB", data, 8)
        return Translation(physical, *(bool(flag) for flag in flags))

    def get_stats_fd(self) -> Stats:
        """KVM_GET_STATS_FD (KVM_CAP_BINARY_STATS_FD): KVM's statistics of this vCPU."""
        from kvm_ioctls.stats import Stats

        return Stats(self._value(lib.KVM_GET_STATS_FD))
