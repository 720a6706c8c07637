"""Packets of the socket device: virtio 1.3, section 5.10.6."""

from __future__ import annotations

from struct import Struct
from typing import NamedTuple

__all__ = ["HEADER", "HOST_CID", "MASK32", "TYPE_STREAM", "Packet"]

# struct virtio_vsock_hdr: src_cid, dst_cid, src_port, dst_port, len, type, op, flags, buf_alloc,
# fwd_cnt.
HEADER = Struct("<QQIIIHHIII")
HOST_CID = 2
TYPE_STREAM = 1
MASK32 = 0xFFFFFFFF

REQUEST, RESPONSE, RST, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST = range(1, 8)
SHUTDOWN_RCV, SHUTDOWN_SEND = 1, 2  # flags of SHUTDOWN: who sends it will not do this any more
SHUTDOWN_BOTH = SHUTDOWN_RCV | SHUTDOWN_SEND

EVENT = Struct("<I")
TRANSPORT_RESET = 0


class Packet(NamedTuple):
    """A header, in the order of its fields on the wire; `kind` is its `type`."""

    src_cid: int
    dst_cid: int
    src_port: int
    dst_port: int
    len: int
    kind: int
    op: int
    flags: int = 0
    buf_alloc: int = 0
    fwd_cnt: int = 0
