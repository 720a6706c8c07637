"""Transfers between guest memory and files or sockets, without a copy on the way."""

from __future__ import annotations

from vm_memory._map import WHY_LOST
from vm_memory._native import ffi, lib
from vm_memory.errors import (
    BackingLostError,
    InvalidValueError,
    ShortTransferError,
    TransferError,
)
from vm_memory.permissions import Permissions

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence
    from typing import Protocol, TypeAlias

    from vm_memory._map import Piece
    from vm_memory.address import GuestAddress
    from vm_memory.iommu import IommuMemory
    from vm_memory.memory import GuestMemory

    class HasFileno(Protocol):
        """Whatever has a descriptor: files, sockets."""

        def fileno(self) -> int: ...

    File: TypeAlias = int | HasFileno

__all__ = ["receive_message", "send_message"]

_EINTR = 4
_EFAULT = 14
_PIECES = 1024  # IOV_MAX
_LAST = (1 << 63) - 1


def transfer(
    memory: GuestMemory,
    address: GuestAddress,
    file: File,
    length: int,
    offset: int | None,
    *,
    out: bool,
    exact: bool,
) -> int:
    """Move bytes between memory and a file; `GuestMemory` has the methods to call.

    Args:
        memory: the memory, whose range the caller has checked.
        address: where in the memory.
        file: a descriptor, or an object that has one.
        length: how many bytes.
        offset: where in the file; its own position when None.
        out: from memory to the file, else from the file to memory.
        exact: until all is done, else with one system call.

    Returns:
        The bytes moved.

    Raises:
        InvalidValueError: when the offset is negative or past any file's end.
        ShortTransferError: when an exact transfer meets the end of the file.
        TransferError: when a system call fails.
        BackingLostError: when pages of the range are lost.
    """
    _check_offset(offset, length)
    fd = descriptor(file)
    table = memory._native()
    error = ffi.new("int *")
    done = 0
    while done < length or length == 0:
        position = -1 if offset is None else offset + done
        count = lib.vmm_transfer(
            table.pointer, address + done, length - done, fd, position, out, exact, error
        )
        done += count
        if error[0] == _EINTR:
            # Back in Python its signal handlers have run, and may have raised; then go on.
            if exact or done == 0:
                continue
            return done
        if error[0]:
            raise _told(
                address, length, done, error[0], memory._walk(address + done, length - done)
            )
        if exact and done < length:
            raise ShortTransferError(address, length, done)
        break
    _check_lost(address, length, memory._walk(address, done))
    return done


def transfer_pieces(
    memory: IommuMemory,
    address: GuestAddress,
    file: File,
    length: int,
    offset: int | None,
    *,
    out: bool,
    exact: bool,
) -> int:
    """As `transfer`, for memory whose pieces lie anywhere; the caller has checked the range.

    Raises:
        InvalidValueError, ShortTransferError, TransferError, BackingLostError: as `transfer`.
    """
    import os

    _check_offset(offset, length)
    fd = descriptor(file)
    done = 0
    while done < length:
        pieces = memory._pieces(address + done, length - done, write=not out)[:_PIECES]
        views = [region.buffer[start : start + count] for region, start, count in pieces]
        try:
            if offset is None:
                count = os.writev(fd, views) if out else os.readv(fd, views)
            elif out:
                count = os.pwritev(fd, views, offset + done)
            else:
                count = os.preadv(fd, views, offset + done)
        except OSError as error:
            raise _told(address, length, done, error.errno or 0, pieces) from error
        if not out and count:
            memory.mark_dirty(address + done, count)  # type: ignore[arg-type]
        done += count
        if not exact:
            _check_lost(address, length, pieces)
            break
        if count == 0:
            raise ShortTransferError(address, length, done)
        _check_lost(address, length, pieces)
    return done


def descriptor(file: File) -> int:
    """The number of an open file.

    Raises:
        InvalidValueError: when it can be none.
    """
    fd = file if isinstance(file, int) else file.fileno()
    if not -1 << 31 <= fd < 1 << 31:
        raise InvalidValueError("file", fd, "must be a file descriptor")
    return fd


def _check_offset(offset: int | None, length: int) -> None:
    if offset is not None and not 0 <= offset <= _LAST - length:
        raise InvalidValueError("offset", offset, "must be 0 to 2**63 less the length")


def receive_message(
    memory: GuestMemory | IommuMemory,
    address: GuestAddress,
    length: int,
    sock: socket.socket,
    ancillary: int = 0,
    flags: int = 0,
) -> tuple[int, list[tuple[int, int, bytes]], int, object]:
    """`recvmsg` straight into memory; what arrived is marked dirty.

    Returns:
        Bytes, ancillary data, message flags and the sender's address, as `recvmsg_into` does.

    Raises:
        MemoryAccessError: when the range is not all memory.
        OSError: what the socket raises.
    """
    pieces = [
        region.buffer[start : start + count]
        for region, start, count in memory._pieces(address, length, write=True)
    ]
    count, control, message, sender = sock.recvmsg_into(pieces, ancillary, flags)
    memory.mark_dirty(address, count)
    return count, control, message, sender


def send_message(
    memory: GuestMemory | IommuMemory,
    address: GuestAddress,
    length: int,
    sock: socket.socket,
    ancillary: Sequence[tuple[int, int, bytes]] = (),
    flags: int = 0,
) -> int:
    """`sendmsg` straight from memory; returns how many bytes were sent.

    Raises:
        MemoryAccessError: when the range is not all memory.
        OSError: what the socket raises.
    """
    return sock.sendmsg(memory.slices(address, length, Permissions.READ), ancillary, flags)


def _told(
    address: GuestAddress, length: int, done: int, errno: int, pieces: list[Piece]
) -> TransferError | BackingLostError:
    """EFAULT on memory that was checked means that the kernel found no page behind it."""
    if errno == _EFAULT and any(r.fragile or r.mapping.overlaid for r, _, _ in pieces):
        return BackingLostError(
            address, length, f"pages from {address + done:#x} on are lost: {WHY_LOST}"
        )
    return TransferError(address, length, done, errno)


def _check_lost(address: GuestAddress, length: int, pieces: list[Piece]) -> None:
    """What was moved is not the guest's if pages were lost before, and are zeros now."""
    for region, _, _ in pieces:
        if (region.fragile or region.mapping.overlaid) and region.mapping.lost:
            raise BackingLostError(
                address,
                length,
                f"the region at {region.guest_address:#x} has lost pages: {WHY_LOST}",
            )
