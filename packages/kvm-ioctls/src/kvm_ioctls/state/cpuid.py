"""One CPUID leaf, as KVM takes and gives it."""

from __future__ import annotations

from struct import Struct

from kvm_ioctls._values import field, frozen
from kvm_ioctls.state._codec import pack_fields

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["CpuidEntry", "pack_entries", "unpack_entries"]

_ENTRY = Struct("<7I12x")
_HEAD = Struct("<II")


@frozen
class CpuidEntry:
    """struct kvm_cpuid_entry2.

    Attributes:
        function: the leaf: EAX of the CPUID instruction.
        index: the subleaf: ECX, where `flags` says that it matters.
        flags: KVM_CPUID_FLAG_*.
        eax: and ebx, ecx, edx: the answer.
        version: of this form; 1.
    """

    function: int
    index: int = 0
    flags: int = 0
    eax: int = 0
    ebx: int = 0
    ecx: int = 0
    edx: int = 0
    version: int = field(default=1, kw_only=True)


def unpack_entries(data: bytes | bytearray) -> tuple[CpuidEntry, ...]:
    """The entries of a struct kvm_cpuid2."""
    count, _ = _HEAD.unpack_from(data)
    return tuple(CpuidEntry(*_ENTRY.unpack_from(data, 8 + 40 * i)) for i in range(count))


def pack_entries(entries: Iterable[CpuidEntry]) -> bytes:
    """The struct kvm_cpuid2 of some entries."""
    rows = [
        pack_fields(e, _ENTRY, (e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx))
        for e in entries
    ]
    return _HEAD.pack(len(rows), 0) + b"".join(rows)
