"""Feature bits of network devices (5.1.3), and the header in front of each frame (5.1.6)."""

from __future__ import annotations

from struct import Struct

__all__ = ["fault_of"]

# Feature masks, 5.1.3
F_CSUM, F_GUEST_CSUM, F_CTRL_GUEST_OFFLOADS, F_MTU, F_MAC = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 5
F_GUEST_TSO4, F_GUEST_TSO6, F_GUEST_ECN, F_GUEST_UFO = 1 << 7, 1 << 8, 1 << 9, 1 << 10
F_HOST_TSO4, F_HOST_TSO6, F_HOST_ECN, F_HOST_UFO = 1 << 11, 1 << 12, 1 << 13, 1 << 14
F_MRG_RXBUF, F_STATUS, F_CTRL_VQ, F_CTRL_RX = 1 << 15, 1 << 16, 1 << 17, 1 << 18
F_CTRL_VLAN, F_CTRL_RX_EXTRA, F_GUEST_ANNOUNCE = 1 << 19, 1 << 20, 1 << 21
F_MQ, F_CTRL_MAC_ADDR = 1 << 22, 1 << 23

GUEST_OFFLOADS = F_GUEST_CSUM | F_GUEST_TSO4 | F_GUEST_TSO6 | F_GUEST_ECN | F_GUEST_UFO
HOST_OFFLOADS = F_CSUM | F_HOST_TSO4 | F_HOST_TSO6 | F_HOST_ECN | F_HOST_UFO
# What needs what, 5.1.3.1: the first without one of the others counts as not accepted.
NEEDS = {
    F_GUEST_TSO4: F_GUEST_CSUM, F_GUEST_TSO6: F_GUEST_CSUM, F_GUEST_UFO: F_GUEST_CSUM,
    F_GUEST_ECN: F_GUEST_TSO4 | F_GUEST_TSO6, F_HOST_TSO4: F_CSUM, F_HOST_TSO6: F_CSUM,
    F_HOST_UFO: F_CSUM, F_HOST_ECN: F_HOST_TSO4 | F_HOST_TSO6, F_CTRL_RX: F_CTRL_VQ,
    F_CTRL_VLAN: F_CTRL_VQ, F_CTRL_RX_EXTRA: F_CTRL_RX, F_GUEST_ANNOUNCE: F_CTRL_VQ,
    F_MQ: F_CTRL_VQ, F_CTRL_MAC_ADDR: F_CTRL_VQ, F_CTRL_GUEST_OFFLOADS: F_CTRL_VQ,
}  # fmt: skip

# struct virtio_net_hdr, 5.1.6: flags, gso_type, hdr_len, gso_size, csum_start, csum_offset,
# num_buffers; and what is in front of the last.
HEADER = Struct("<BBHHHHH")
BEFORE_COUNT = 10
COUNT = Struct("<H")
HDR_F_NEEDS_CSUM = 1
GSO_NONE, GSO_TCPV4, GSO_UDP, GSO_TCPV6, GSO_ECN = 0, 1, 3, 4, 0x80
_GSO_NEEDS = {GSO_TCPV4: F_HOST_TSO4, GSO_UDP: F_HOST_UFO, GSO_TCPV6: F_HOST_TSO6}

ETHERNET_HEADER = 14
# The longest frame: a segment of 64 KiB with its headers, one VLAN tag included.
MAX_FRAME = 65535 + ETHERNET_HEADER + 4


def fault_of(header: bytes, size: int, features: int) -> str:
    """Why a driver's frame can't be sent, or an empty string.

    Args:
        header: a copy of its `struct virtio_net_hdr`.
        size: of the frame behind it, in bytes.
        features: negotiated.
    """
    flags, gso, _, gso_size, csum_start, csum_offset, _ = HEADER.unpack(header)
    if size < ETHERNET_HEADER:
        return "short"
    if size > MAX_FRAME:
        return "long"
    if flags & HDR_F_NEEDS_CSUM:
        if not features & F_CSUM:
            return "offload"
        if csum_start + csum_offset + 2 > size:
            return "header"
    kind = gso & ~GSO_ECN
    if kind != GSO_NONE:
        if kind not in _GSO_NEEDS or gso_size == 0 or not flags & HDR_F_NEEDS_CSUM:
            return "header"
        if not features & _GSO_NEEDS[kind]:
            return "offload"
    if gso & GSO_ECN and (kind == GSO_NONE or not features & F_HOST_ECN):
        return "offload"
    return ""
