"""Exits that mean something is wrong, and exits from the future."""

from __future__ import annotations

from struct import unpack_from

import attrs

from kvm_ioctls.exits.base import Exit

__all__ = ["EmulationFailure", "FailEntry", "InternalError", "MemoryFault", "Unknown"]


@attrs.frozen
class Unknown(Exit):
    """KVM_EXIT_UNKNOWN, or a reason newer than this library.

    Attributes:
        number: the reason; 0 for KVM_EXIT_UNKNOWN itself.
        raw: the 256 bytes of the run page that describe it.
    """

    reason = 0
    number: int
    raw: bytes

    @property
    def hardware_exit_reason(self) -> int:
        """What the processor said, for KVM_EXIT_UNKNOWN."""
        return int.from_bytes(self.raw[:8], "little")


@attrs.frozen
class FailEntry(Exit):
    """KVM_EXIT_FAIL_ENTRY: the processor refused the guest's state.

    Attributes:
        hardware_entry_failure_reason: the processor's own code.
        cpu: the host CPU it happened on.
    """

    reason = 9
    hardware_entry_failure_reason: int
    cpu: int


@attrs.frozen
class InternalError(Exit):
    """KVM_EXIT_INTERNAL_ERROR: KVM itself cannot go on.

    Attributes:
        suberror: KVM_INTERNAL_ERROR_*.
        data: up to sixteen words that explain it.
    """

    reason = 17
    suberror: int
    data: tuple[int, ...]


@attrs.frozen
class EmulationFailure(InternalError):
    """KVM_INTERNAL_ERROR_EMULATION: an instruction that KVM cannot emulate.

    Attributes:
        flags: KVM_INTERNAL_ERROR_EMULATION_FLAG_*.
        instruction: its bytes, up to 15, or none if the kernel did not say.
    """

    flags: int = 0
    instruction: bytes = b""


@attrs.frozen
class MemoryFault(Exit):
    """KVM_EXIT_MEMORY_FAULT: an access that guest_memfd or missing host memory cannot serve.

    Attributes:
        flags: KVM_MEMORY_EXIT_FLAG_PRIVATE if the guest meant private memory.
        gpa: guest-physical address.
        size: bytes concerned.
    """

    reason = 39
    flags: int
    gpa: int
    size: int


def decode_unknown(page: memoryview) -> Exit:
    """From a run page with any reason."""
    return Unknown(int.from_bytes(page[8:12], "little"), bytes(page[32:288]))


def decode_fail_entry(page: memoryview) -> Exit:
    """From a run page whose exit reason is KVM_EXIT_FAIL_ENTRY."""
    return FailEntry(*unpack_from("<QI", page, 32))


def decode_internal_error(page: memoryview) -> Exit:
    """From a run page whose exit reason is KVM_EXIT_INTERNAL_ERROR."""
    suberror, ndata = unpack_from("<II", page, 32)
    data = unpack_from(f"<{min(ndata, 16)}Q", page, 40)
    if suberror != 1:
        return InternalError(suberror, data)
    if not data:
        return EmulationFailure(suberror, data)
    flags, size = unpack_from("<QB", page, 40)
    known = flags & 1 and len(data) >= 3
    return EmulationFailure(
        suberror, data, flags, bytes(page[49 : 49 + min(size, 15)]) if known else b""
    )


def decode_memory_fault(page: memoryview) -> Exit:
    """From a run page whose exit reason is KVM_EXIT_MEMORY_FAULT."""
    return MemoryFault(*unpack_from("<QQQ", page, 32))
