"""The rules a driver can break, by the numbers the C part uses (`enum vq_rule`)."""

from __future__ import annotations

from virtio_queue.errors import ChainError

# Section where the split format states it, where the packed format does, and the rule.
_RULES: dict[int, tuple[str, str, str]] = {
    1: ("2.7.6.1", "", "available idx went back, or is further ahead than the queue is long"),
    2: ("2.7.13.1", "2.8.21.1", "buffer made available while it is still in flight"),
    3: ("2.7.5", "", "descriptor index not below the queue size"),
    4: ("2.7.5.2", "", "descriptor chain loops"),
    5: ("2.7.5.3.1", "2.8.19", "INDIRECT without VIRTIO_F_INDIRECT_DESC"),
    6: ("2.7.5.3.1", "2.8.19", "INDIRECT in a list linked by NEXT"),
    7: ("2.7.5.3", "2.8.7", "indirect table length 0 or not a multiple of 16"),
    8: ("2.7.5.3", "2.8.7", "indirect table longer than the device's limit of descriptors"),
    9: ("2.7.5.3", "2.8.7", "indirect table outside guest memory"),
    10: ("2.7.5.3", "", "next outside the indirect table"),
    11: ("2.7.5.2", "", "indirect descriptor chain loops"),
    12: ("2.7.5.3.1", "", "INDIRECT inside an indirect table"),
    13: ("2.7.4.2", "2.8.17", "device-readable element after a device-writable one"),
    14: ("2.7.5.2", "2.8.5", "chain longer than 2**32 bytes in total"),
    15: ("2.7.5", "2.8.4", "address + length passes 2**64"),
    16: ("2.7.5", "2.8.4", "buffer outside guest memory"),
    17: ("", "2.8.17", "descriptor list longer than the queue"),
    18: ("", "2.8.17", "first descriptor made available before the whole list"),
    19: ("", "2.8.17", "more descriptors in flight than the ring holds"),
    20: ("2.7.4.1", "2.8.5", "chain in more pieces than the device's limit"),
}

(
    AVAIL_IDX,
    IN_FLIGHT,
    INDEX,
    LOOP,
    NOT_NEGOTIATED,
    INDIRECT_NEXT,
    TABLE_LENGTH,
    TABLE_LIMIT,
    TABLE_PLACE,
    TABLE_NEXT,
    TABLE_LOOP,
    NESTED,
    ORDER,
    TOTAL,
    WRAPS,
    PLACE,
    LIST_LENGTH,
    LIST_PARTIAL,
    RING_FULL,
    FRAGMENTED,
) = range(1, 21)

# `enum vq_usage`
NOT_IN_FLIGHT = 100
LENGTH = 101


def broken(rule: int, descriptor: int | None, value: int, *, packed: bool) -> ChainError:
    """Make the error for a broken rule."""
    split_section, packed_section, words = _RULES[rule]
    return ChainError(packed_section if packed else split_section, descriptor, value, words)
