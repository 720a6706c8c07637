"""Giving memory to another process: a description in plain fields, and file descriptors.

The other process maps the same pages. Only memory that is in a file can be shared: `Memfd` and
`FileShared`.

>>> import socket
>>> from vm_memory import GuestAddress, GuestMemory, Memfd
>>> here, there = socket.socketpair()
>>> memory = GuestMemory.from_ranges([(GuestAddress(0), 4096)], backing=Memfd())
>>> send(here, memory)
>>> other = receive(there)
>>> memory.write(GuestAddress(0), b"shared")
>>> other.read(GuestAddress(0), 6)
b'shared'
>>> here.close(), there.close()
(None, None)
"""

from __future__ import annotations

import json
import os
import socket

import attrs

from vm_memory._mapping import MAP_SHARED
from vm_memory.backing import FileShared
from vm_memory.errors import InvalidValueError, RegionError
from vm_memory.memory import GuestMemory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["MemoryDescription", "RegionDescription", "describe", "rebuild", "receive", "send"]

_MOST_REGIONS = 253  # descriptors in one message, SCM_MAX_FD
_MOST_BYTES = 1 << 16


def _number(_instance: object, attribute: attrs.Attribute[int], value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 64:
        raise InvalidValueError(attribute.name, value, "must be a number from 0 to 2**64 - 1")


@attrs.frozen
class RegionDescription:
    """One region that can be shared.

    Attributes:
        guest_address: where it starts.
        size: bytes.
        file_offset: where it starts in its file.
    """

    guest_address: int = attrs.field(validator=_number)
    size: int = attrs.field(validator=_number)
    file_offset: int = attrs.field(validator=_number)


@attrs.frozen
class MemoryDescription:
    """A map that can be shared: its regions, each with one file descriptor alongside.

    Attributes:
        regions: sorted by address.
        version: of this layout.
    """

    regions: tuple[RegionDescription, ...]
    version: int = 1


def describe(memory: GuestMemory) -> tuple[MemoryDescription, list[int]]:
    """What another process needs: the description, and the regions' descriptors, in order.

    The descriptors stay the memory's.

    Raises:
        RegionError: when a region is not shared with a file.
    """
    regions, fds = [], []
    for region in memory.regions:
        if region.fd is None or not region.mapping.flags & MAP_SHARED:
            raise RegionError(
                region.guest_address, region.size, "only Memfd and FileShared can be shared"
            )
        regions.append(RegionDescription(region.guest_address, region.size, region.file_offset))
        fds.append(region.fd)
    return MemoryDescription(tuple(regions)), fds


def rebuild(
    description: MemoryDescription, fds: Sequence[int], *, dirty_page_size: int | None = None
) -> GuestMemory:
    """Map memory that another process described; nothing it says is trusted.

    Args:
        description: what it sent.
        fds: one descriptor for each region; they stay the caller's.
        dirty_page_size: as for `GuestMemory.from_ranges`.

    Raises:
        InvalidValueError: when the numbers differ, the version is unknown, or a file is too small.
        RegionError: when regions overlap or are misplaced.
        MappingError: when the host refuses.
    """
    if description.version != 1:
        raise InvalidValueError("version", description.version, "must be 1")
    if len(fds) != len(description.regions):
        rule = f"must be one for each of the {len(description.regions)} regions"
        raise InvalidValueError("fds", len(fds), rule)
    regions = []
    for part, fd in zip(description.regions, fds, strict=True):
        backing = FileShared(fd, part.file_offset)
        (region,) = GuestMemory.from_ranges(
            [(part.guest_address, part.size)],  # type: ignore[list-item]
            backing=backing,
            dirty_page_size=dirty_page_size,
        ).regions
        regions.append(region)
    return GuestMemory(regions)


def send(sock: socket.socket, memory: GuestMemory) -> None:
    """Describe memory to the process at the other end of a Unix socket.

    Raises:
        RegionError: when a region is not in a file that can be shared.
        InvalidValueError: when there are more than 253 regions.
        OSError: what the socket raises.
    """
    description, fds = describe(memory)
    if len(fds) > _MOST_REGIONS:
        raise InvalidValueError("regions", len(fds), f"must not be more than {_MOST_REGIONS}")
    body = json.dumps(attrs.asdict(description)).encode()
    message = len(body).to_bytes(4, "little") + body
    sent = socket.send_fds(sock, [message], fds)
    sock.sendall(message[sent:])


def receive(sock: socket.socket, *, dirty_page_size: int | None = None) -> GuestMemory:
    """Map what the process at the other end of a Unix socket sends.

    Raises:
        InvalidValueError: when what arrives is no description.
        RegionError: when regions overlap or are misplaced.
        MappingError: when the host refuses.
        OSError: what the socket raises.
    """
    data, fds, _, _ = socket.recv_fds(sock, 4, _MOST_REGIONS, socket.MSG_CMSG_CLOEXEC)
    try:
        data += _exactly(sock, 4 - len(data))
        length = int.from_bytes(data, "little")
        if length > _MOST_BYTES:
            raise InvalidValueError("length", length, f"must not be more than {_MOST_BYTES}")
        return rebuild(_parse(_exactly(sock, length)), fds, dirty_page_size=dirty_page_size)
    finally:
        for fd in fds:
            os.close(fd)


def _exactly(sock: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        more = sock.recv(length - len(data))
        if not more:
            raise InvalidValueError("message", data, f"ended {length - len(data)} bytes too early")
        data += more
    return data


def _parse(body: bytes) -> MemoryDescription:
    try:
        value = json.loads(body)
        if set(value) != {"version", "regions"}:
            raise ValueError("it has other fields")
        regions = tuple(RegionDescription(**region) for region in value["regions"])
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidValueError("description", body[:80], f"cannot be read: {error}") from error
    return MemoryDescription(regions, value["version"])
