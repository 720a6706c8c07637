"""Model-specific registers, read and written in batches."""

from __future__ import annotations

from itertools import chain
from struct import Struct, error, pack

from kvm_ioctls._native import lib
from kvm_ioctls._values import field, frozen
from kvm_ioctls.state._codec import pack_fields

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import Any

    from kvm_ioctls._fd import Descriptor

__all__ = ["MsrReport", "read_msrs", "write_msrs"]

_HEAD = Struct("<II")
_ENTRY = Struct("<I4xQ")
_BATCH = 256


@frozen
class MsrReport:
    """What became of a batch of MSRs.

    Attributes:
        values: the MSRs that worked, by index, in the order they were asked for.
        refused: indices that the kernel refused: unknown here, or the value was not legal.
        version: of this form; 1.
    """

    values: dict[int, int]
    refused: tuple[int, ...] = ()
    version: int = field(default=1, kw_only=True)

    def __getitem__(self, index: int) -> int:
        return self.values[index]

    def require(self) -> MsrReport:
        """The report itself, if nothing was refused.

        Raises:
            KvmError: EINVAL; it names every MSR that was refused.
        """
        if self.refused:
            from kvm_ioctls.errors import KvmError
            from kvm_ioctls.msrs import msr_name

            names = ", ".join(map(msr_name, self.refused))
            raise KvmError("MSRs", 22, {"refused": self.refused}, f"the kernel refuses {names}")
        return self

    def __str__(self) -> str:
        from kvm_ioctls.msrs import msr_name

        lines = [f"{msr_name(index)} = {value:#x}" for index, value in self.values.items()]
        return "\n".join([*lines, *(f"{msr_name(index)} refused" for index in self.refused)])


def _batches(
    source: Descriptor, request: int, pairs: list[tuple[int, int]]
) -> tuple[dict[int, int], tuple[int, ...]]:
    """Carry out all of them: the kernel stops at one it refuses, we go on behind it."""
    done: dict[int, int] = {}
    refused: list[int] = []
    start = 0
    while start < len(pairs):
        batch = pairs[start : start + _BATCH]
        data = bytearray(_HEAD.pack(len(batch), 0) + _packed(batch))
        count = source._write(request, data, nmsrs=len(batch), first=batch[0][0])
        done.update(_ENTRY.iter_unpack(memoryview(data)[8 : 8 + 16 * count]))
        start += count
        if count < len(batch):
            refused.append(batch[count][0])
            start += 1
    return done, tuple(refused)


def _packed(pairs: list[tuple[int, int]]) -> bytes:
    """All in one call: a migration's guest stands still for as long as this takes."""
    try:
        return pack(f"<{'I4xQ' * len(pairs)}", *chain.from_iterable(pairs))
    except error:  # tell which it is
        return b"".join(pack_fields(pair, _ENTRY, pair) for pair in pairs)


def read_msrs(source: Descriptor, indices: Iterable[int]) -> MsrReport:
    """KVM_GET_MSRS on a vCPU or the system."""
    return MsrReport(*_batches(source, lib.KVM_GET_MSRS, [(index, 0) for index in indices]))


def write_msrs(source: Descriptor, values: Mapping[int, int] | Any) -> MsrReport:
    """KVM_SET_MSRS on a vCPU, in the mapping's order."""
    return MsrReport(*_batches(source, lib.KVM_SET_MSRS, list(values.items())))
