"""Atomic access to guest memory, with the memory orders of C11."""

from __future__ import annotations

from vm_memory._native import ffi, lib
from vm_memory._words import WordAccess, limit, unsigned
from vm_memory.atomic import Order
from vm_memory.errors import InvalidValueError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vm_memory.address import GuestAddress
    from vm_memory.region import GuestRegion

__all__ = ["AtomicAccess"]

_load = lib.vmm_load
_store = lib.vmm_store
_update = lib.vmm_update

# What a load or store may ask for (C11, 7.17.7).
_LOADS = (Order.RELAXED, Order.ACQUIRE, Order.SEQ_CST)
_STORES = (Order.RELAXED, Order.RELEASE, Order.SEQ_CST)

_ORDERS = frozenset(Order)

# enum vmm_operation
_EXCHANGE, _ADD, _OR, _AND, _XOR = range(5)


class AtomicAccess(WordAccess):
    """Atomic operations on scalars of 1, 2, 4 and 8 bytes that lie within one region."""

    __slots__ = ()

    def atomic_load(self, address: GuestAddress, size: int, order: Order = Order.ACQUIRE) -> int:
        """Read 1, 2, 4 or 8 bytes as one, ordered with what surrounds it.

        Raises:
            MemoryAccessError: here and below, when the address is no multiple of `size`, or the
                range is not all memory of one region.
            InvalidValueError: here and below, when the size is another, a value does not fit, or
                the operation cannot have that order.
            BackingLostError: here and below, when pages of the region are lost.
        """
        if order not in _LOADS:
            raise InvalidValueError("order", order, "a load is RELAXED, ACQUIRE or SEQ_CST")
        region, offset = self._one(address, size, write=False)
        value = _load(region.host_address + offset, size, order)
        if region is not self._recent:
            self._check_lost(address, size, [(region, offset, size)])
        return value

    def atomic_store(
        self, address: GuestAddress, size: int, value: int, order: Order = Order.RELEASE
    ) -> None:
        """Write 1, 2, 4 or 8 bytes as one, ordered with what surrounds it."""
        if order not in _STORES:
            raise InvalidValueError("order", order, "a store is RELAXED, RELEASE or SEQ_CST")
        unsigned(value, size)
        region, offset = self._one(address, size, write=True)
        _store(region.host_address + offset, size, value, order)
        self._stored(address, region, offset, size)

    def atomic_exchange(
        self, address: GuestAddress, size: int, value: int, order: Order = Order.SEQ_CST
    ) -> int:
        """Write a value; returns the one before."""
        return self._update(address, size, _EXCHANGE, unsigned(value, size), order)

    def atomic_fetch_add(
        self, address: GuestAddress, size: int, value: int, order: Order = Order.SEQ_CST
    ) -> int:
        """Add a value, which may be negative, modulo the width; returns the sum's left side."""
        return self._update(address, size, _ADD, value & (limit(size) - 1), order)

    def atomic_fetch_or(
        self, address: GuestAddress, size: int, value: int, order: Order = Order.SEQ_CST
    ) -> int:
        """Set bits; returns the value before."""
        return self._update(address, size, _OR, unsigned(value, size), order)

    def atomic_fetch_and(
        self, address: GuestAddress, size: int, value: int, order: Order = Order.SEQ_CST
    ) -> int:
        """Keep only the bits that are set in `value`; returns the value before."""
        return self._update(address, size, _AND, unsigned(value, size), order)

    def atomic_fetch_xor(
        self, address: GuestAddress, size: int, value: int, order: Order = Order.SEQ_CST
    ) -> int:
        """Flip bits; returns the value before."""
        return self._update(address, size, _XOR, unsigned(value, size), order)

    def atomic_compare_exchange(
        self,
        address: GuestAddress,
        size: int,
        expected: int,
        desired: int,
        order: Order = Order.SEQ_CST,
    ) -> tuple[bool, int]:
        """Write `desired` if the value is `expected`; never fails without reason.

        Returns:
            Whether it was written, and the value before.
        """
        unsigned(expected, size)
        unsigned(desired, size)
        region, offset = self._one(address, size, write=True)
        found = ffi.new("uint64_t *", expected)
        done = lib.vmm_compare_exchange(
            region.host_address + offset, size, found, desired, _checked(order)
        )
        if done:
            self._stored(address, region, offset, size)
        else:
            self._check_lost(address, size, [(region, offset, size)])
        return bool(done), found[0]

    def _update(self, address: int, size: int, operation: int, value: int, order: Order) -> int:
        region, offset = self._one(address, size, write=True)
        before = _update(region.host_address + offset, size, operation, value, _checked(order))
        self._stored(address, region, offset, size)
        return before

    def _stored(self, address: int, region: GuestRegion, offset: int, size: int) -> None:
        """What follows each write."""
        if region is self._recent:  # which is sound, and known by its own addresses
            if region.dirty is not None:
                region.dirty.mark(offset, size)
            return
        pieces = [(region, offset, size)]
        self._wrote(address, pieces)
        self._check_lost(address, size, pieces)


def _checked(order: int) -> int:
    if order not in _ORDERS:
        raise InvalidValueError("order", order, "must be one of Order")
    return order
