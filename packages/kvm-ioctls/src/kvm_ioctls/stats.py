"""KVM's own statistics of a VM or a vCPU, by name."""

from __future__ import annotations

import os
from struct import Struct
from typing import TYPE_CHECKING

import attrs

from kvm_ioctls._fd import Descriptor

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["Statistic", "Stats"]

_HEADER = Struct("<6I")
_DESCRIPTOR = Struct("<IhHII")
_TYPES = ("cumulative", "instant", "peak", "linear histogram", "logarithmic histogram")
_UNITS = ("", "bytes", "seconds", "cycles", "boolean")


@attrs.frozen
class Statistic:
    """What a figure means.

    Attributes:
        name: the kernel's name of it.
        type: cumulative, instant, peak, linear histogram or logarithmic histogram.
        unit: bytes, seconds, cycles, boolean, or nothing for a plain count.
        base: 10 or 2, and exponent: the figure counts in units of base ** exponent.
        exponent: see base.
        size: how many numbers it has: 1, or the buckets of a histogram.
        offset: where they lie.
        bucket_size: width of a linear histogram's buckets.
        version: of this form; 1.
    """

    name: str
    type: str
    unit: str
    base: int
    exponent: int
    size: int
    offset: int
    bucket_size: int
    version: int = attrs.field(default=1, kw_only=True)


class Stats(Descriptor):
    """Statistics of a VM or vCPU (KVM_GET_STATS_FD, KVM_CAP_BINARY_STATS_FD).

    Attributes:
        id: whose they are, such as `kvm-1234` or `kvm-1234/vcpu-0`.
        descriptors: what each figure means, by name.
    """

    _kind = "stats"

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        _, name_size, count, id_at, descriptors_at, self._data_at = _HEADER.unpack(
            os.pread(fd, _HEADER.size, 0)
        )
        self.id = os.pread(fd, name_size, id_at).split(b"\0")[0].decode()
        step = _DESCRIPTOR.size + name_size
        raw = os.pread(fd, step * count, descriptors_at)
        self.descriptors: Mapping[str, Statistic] = {
            found.name: found
            for found in (_describe(raw[i * step : (i + 1) * step]) for i in range(count))
        }
        self._size = max((d.offset + 8 * d.size for d in self.descriptors.values()), default=0)

    def read(self) -> dict[str, int | tuple[int, ...]]:
        """All figures now, by name: a number, or the buckets of a histogram."""
        data = os.pread(self.fileno(), self._size, self._data_at)
        values: dict[str, int | tuple[int, ...]] = {}
        for name, what in self.descriptors.items():
            numbers = memoryview(data)[what.offset : what.offset + 8 * what.size].cast("Q")
            values[name] = numbers[0] if what.size == 1 else tuple(numbers)
        return values


def _describe(raw: bytes) -> Statistic:
    flags, exponent, size, offset, bucket = _DESCRIPTOR.unpack_from(raw)
    kind, unit, base = flags & 0xF, flags >> 4 & 0xF, flags >> 8 & 0xF
    return Statistic(
        name=raw[_DESCRIPTOR.size :].split(b"\0")[0].decode(),
        type=_TYPES[kind] if kind < len(_TYPES) else f"type {kind}",
        unit=_UNITS[unit] if unit < len(_UNITS) else f"unit {unit}",
        base=2 if base else 10,
        exponent=exponent,
        size=size,
        offset=offset,
        bucket_size=bucket,
    )
