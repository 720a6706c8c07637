"""Access to guest memory as structures, and as pieces for other code."""

from __future__ import annotations

from vm_memory._atomics import AtomicAccess
from vm_memory.permissions import Permissions

TYPE_CHECKING = False
if TYPE_CHECKING:
    from struct import Struct
    from typing import Any, TypeVar

    from vm_memory.address import GuestAddress
    from vm_memory.iovec import Iovecs

    T = TypeVar("T")

__all__ = ["RecordAccess"]


class RecordAccess(AtomicAccess):
    """Structures of the `struct` module, of attrs and of C; vectors; marks."""

    __slots__ = ()

    def read_struct(self, address: GuestAddress, layout: str | Struct) -> tuple[Any, ...]:
        """The values of a `struct` format, such as `"<QIHH"`.

        Raises:
            MemoryAccessError: when the range is not all memory.
            InvalidValueError: when the format is none.

        >>> from vm_memory import GuestAddress, GuestMemory
        >>> memory = GuestMemory.from_ranges([(GuestAddress(0), 4096)])
        >>> memory.write_struct(GuestAddress(8), "<QIHH", 0x1000, 512, 1, 2)
        >>> memory.read_struct(GuestAddress(8), "<QIHH")
        (4096, 512, 1, 2)
        """
        from vm_memory.records import compiled

        form = compiled(layout)
        return form.unpack(self.read(address, form.size))

    def write_struct(self, address: GuestAddress, layout: str | Struct, *values: object) -> None:
        """Write values in a `struct` format.

        Raises:
            MemoryAccessError: when the range is not all memory.
            InvalidValueError: when the format is none, or the values do not fit it.
        """
        from vm_memory.records import compiled, packed

        self.write(address, packed(compiled(layout), values))

    def read_record(self, address: GuestAddress, kind: type[T]) -> T:
        """An instance of an attrs class whose fields say how they lie in memory.

        See `vm_memory.records` for how to write such a class.

        Raises:
            MemoryAccessError: when the range is not all memory.
            InvalidValueError: when the class has fields without a format.
        """
        from vm_memory.records import layout_of

        return kind(*self.read_struct(address, layout_of(kind)))

    def write_record(self, address: GuestAddress, record: object) -> None:
        """Write an instance of such a class.

        Raises:
            MemoryAccessError: when the range is not all memory.
            InvalidValueError: when the class has fields without a format, or values do not fit.
        """
        from vm_memory.records import layout_of, packed, values_of

        self.write(address, packed(layout_of(type(record)), values_of(record)))

    def read_cdata(self, address: GuestAddress, ffi: Any, kind: str) -> Any:
        """A copy of a C type, as `ffi.new` makes it.

        Args:
            address: where it is.
            ffi: the `cffi.FFI` that knows the type.
            kind: the type, `"struct virtio_blk_req"` for example.

        Raises:
            MemoryAccessError: when the range is not all memory.
        """
        value = ffi.new(f"{kind} *")
        self.read_into(address, memoryview(ffi.buffer(value)))
        return value

    def write_cdata(self, address: GuestAddress, ffi: Any, value: Any) -> None:
        """Write what a cffi pointer or array refers to.

        Raises:
            MemoryAccessError: when the range is not all memory.
        """
        self.write(address, memoryview(ffi.buffer(value)))

    def iovecs(
        self,
        address: GuestAddress,
        length: int,
        permissions: Permissions = Permissions.READ_WRITE,
    ) -> Iovecs:
        """The pieces of a range as an array of `struct iovec`, for C code and io_uring.

        Like `slices`, it marks the range dirty at once with `WRITE`.

        Raises:
            MemoryAccessError: when the range is not all memory.
        """
        from vm_memory.iovec import Iovecs

        return Iovecs(self.slices(address, length, permissions))

    def mark_dirty(self, address: GuestAddress, length: int) -> None:
        """Say that a range was written, by way of a slice or the guest's own hand.

        Raises:
            MemoryAccessError: when the range is not all memory.
        """
        self._wrote(address, self._pieces(address, length, write=True))
