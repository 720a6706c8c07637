"""Rings as a hostile driver may leave them in memory: mostly right, with rare flips.

An image is bytes at guest addresses and nothing else, so that the same one can be laid into
several memories and read by several implementations.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from attrs import frozen

from virtio_queue.constants import (
    DESC_F_AVAIL,
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_USED,
    DESC_F_WRITE,
    F_EVENT_IDX,
    F_IN_ORDER,
    F_INDIRECT_DESC,
    F_RING_PACKED,
    F_VERSION_1,
)

if TYPE_CHECKING:
    from random import Random

    from virtio_queue._configuration import QueueConfiguration
    from vm_memory import GuestAddress, GuestMemory

__all__ = ["MEMORY_RANGES", "RingImage", "random_image"]

MEMORY_RANGES = ((0, 0x4000), (0x4000, 0x4000), (0x1_0000, 0x1000), (0xFFFF_FFFF_FFFF_F000, 0x1000))
"""What an image expects of memory: two neighbours, a hole, and the end of the address space."""

_DESCRIPTOR = struct.Struct("<QIHH")
_TABLE_AT = 0x6000
_DATA_AT = 0x1000


@frozen
class RingImage:
    """One ring in memory.

    Attributes:
        size: queue size.
        features: feature bits to negotiate.
        start: position both sides begin at (split: an index, packed: always 0x8000).
        areas: descriptor, driver and device area.
        contents: (guest address, bytes) to write.
    """

    size: int
    features: int
    start: int
    areas: tuple[int, int, int]
    contents: tuple[tuple[int, bytes], ...]

    def write(self, memory: GuestMemory) -> None:
        """Lay the image into a memory that holds `MEMORY_RANGES`."""
        for address, data in self.contents:
            place: GuestAddress = address  # type: ignore[assignment]
            memory.write(place, data)

    def configure(self, queue: QueueConfiguration) -> None:
        """Set size, features and addresses of a queue; enabling it is left to the caller."""
        queue.set_features(self.features)
        queue.set_size(self.size)
        for setter, area in zip(
            (queue.set_descriptor_area, queue.set_driver_area, queue.set_device_area),
            self.areas,
            strict=True,
        ):
            setter(area)


def random_image(random: Random, *, packed: bool) -> RingImage:
    """Make an image: chains as drivers make them, and a fault here and there.

    Args:
        random: where all decisions come from; Hypothesis' `randoms` shrink.
        packed: which ring format.
    """
    size = random.choice((3, 5, 8) if packed else (1, 2, 4, 8))
    features = F_VERSION_1 | (F_RING_PACKED if packed else 0)
    for feature in (F_INDIRECT_DESC, F_EVENT_IDX, F_IN_ORDER):
        if random.random() < 0.5:
            features |= feature
    # Sometimes across the border of two regions.
    descriptors = random.choice((0, 0x4000 - 32, 0x1_0000))
    areas = (
        descriptors,
        random.choice((0x400, 0x4000 - 4 if packed else 0x4000 - 8)),
        random.choice((0x5000, 0x8000 - 0x200)),
    )
    start = 0x8000 if packed else random.choice((0, 0, 0xFFFE, 0xFFFF - size))
    build = _packed_ring if packed else _split_ring
    contents = build(random, size, areas, start)
    return RingImage(size, features, start, areas, tuple(contents))


def _table_at(random: Random, areas: tuple[int, int, int]) -> int:
    """Where indirect tables begin: at any alignment, sometimes across two regions."""
    if areas[0] == 0 and areas[1] < 0x1000 and random.random() < 0.5:
        return 0x4000 - random.randrange(1, 64)
    return _TABLE_AT + random.randrange(16)


def _address(random: Random) -> int:
    kind = random.random()
    if kind < 0.85:
        return _DATA_AT + random.randrange(0x2000)
    if kind < 0.95:
        # Across a border, up to an end, past it.
        border = random.choice((0x4000, 0x8000, 0x1_1000, 1 << 64))
        return (border - random.randrange(64)) % (1 << 64)
    return random.choice((0x9000, 1 << 40, (1 << 64) - 1, 0x1_2000))


def _length(random: Random) -> int:
    if random.random() < 0.97:
        return random.randrange(64)
    return random.choice((0, 1, 0x1000, 0x8000, 0xFFFF_FFFF))


def _flip(random: Random, value: int, choices: tuple[int, ...], chance: float = 0.04) -> int:
    return random.choice(choices) if random.random() < chance else value


def _elements(random: Random, most: int) -> list[tuple[int, int, int]]:
    count = random.randint(1, max(1, most))
    split = random.randint(0, count)
    result = []
    for at in range(count):
        write = DESC_F_WRITE if at >= split else 0
        write = _flip(random, write, (0, DESC_F_WRITE))
        result.append((_address(random), _length(random), write))
    return result


def _split_table(random: Random, table: int) -> tuple[int, bytes]:
    """Make an indirect table and return the length to claim for it, and its bytes."""
    elements = _elements(random, 5)
    data = b""
    for at, (address, length, flags) in enumerate(elements):
        following = at + 1
        if following < len(elements):
            flags |= DESC_F_NEXT
        flags = _flip(random, flags, (DESC_F_NEXT, DESC_F_INDIRECT, flags | 0x80))
        following = _flip(random, following, (0, at, 0xFFFF, len(elements)))
        data += _DESCRIPTOR.pack(address, length, flags, following)
    del table
    return _flip(random, len(data), (0, 8, 24, len(data) + 16, 1 << 20)), data


def _split_ring(
    random: Random, size: int, areas: tuple[int, int, int], start: int
) -> list[tuple[int, bytes]]:
    contents: list[tuple[int, bytes]] = []
    descriptors = [(0, 0, 0, 0)] * size
    free = list(range(size))
    random.shuffle(free)
    heads: list[int] = []
    table = _table_at(random, areas)
    while free and random.random() < 0.9:
        indirect = random.random() < 0.3
        elements = _elements(random, 1 if indirect else min(len(free), 3))
        own = [free.pop() for _ in elements]
        for at, (address, length, flags) in enumerate(elements):
            following = own[at + 1] if at + 1 < len(own) else 0
            if at + 1 < len(own):
                flags |= DESC_F_NEXT
            if indirect and at + 1 == len(own):
                claimed, data = _split_table(random, table)
                contents.append((table, data))
                address, length, flags = table, claimed, flags | DESC_F_INDIRECT
                table += len(data)
            flags = _flip(random, flags, (flags | DESC_F_NEXT, DESC_F_INDIRECT, 0xFFFF))
            following = _flip(random, following, (0, own[0], size, 0xFFFF))
            descriptors[own[at]] = (address, length, flags, following)
        heads.append(_flip(random, own[0], (size, 0xFFFF, own[0] ^ 1, heads[0] if heads else 0)))
    raw = b"".join(_DESCRIPTOR.pack(*fields) for fields in descriptors)
    contents.append((areas[0], raw))
    idx = _flip(random, start + len(heads), (start - 1, start + size + 1, start + 0x8000), 0.05)
    ring = [0] * size
    for at, head in enumerate(heads):
        ring[(start + at) % size] = head
    event = random.choice((0, start, start + 1, 0xFFFF, random.randrange(0x10000)))
    words = [random.choice((0, 0, 1)), idx & 0xFFFF, *ring, event & 0xFFFF]
    contents.append((areas[1], struct.pack(f"<{size + 3}H", *words)))
    contents.append((areas[2], struct.pack("<HH", 0, start) + bytes(8 * size + 2)))
    return contents


def _packed_ring(
    random: Random, size: int, areas: tuple[int, int, int], start: int
) -> list[tuple[int, bytes]]:
    del start
    contents: list[tuple[int, bytes]] = []
    descriptors: list[tuple[int, int, int, int]] = []
    table = _table_at(random, areas)
    buffer_id = 0
    while len(descriptors) < size and random.random() < 0.9:
        indirect = random.random() < 0.3
        room = size - len(descriptors)
        elements = _elements(random, 1 if indirect else min(room, 3))
        for at, (address, length, flags) in enumerate(elements):
            if at + 1 < len(elements):
                flags |= DESC_F_NEXT
            if indirect:
                inner = _elements(random, 5)
                data = b"".join(
                    _DESCRIPTOR.pack(where, much, 7, write | random.choice((0, 1, 4)))
                    for where, much, write in inner
                )
                contents.append((table, data))
                claimed = _flip(random, len(data), (0, 8, 24, 1 << 20))
                address, length, flags = table, claimed, flags | DESC_F_INDIRECT
                table += len(data)
            flags |= DESC_F_AVAIL
            choices = (flags | DESC_F_NEXT, flags ^ DESC_F_AVAIL, flags | DESC_F_USED, 0xFFFF)
            flags = _flip(random, flags, choices)
            number = _flip(random, buffer_id, (0, size, 0xFFFF))
            descriptors.append((address, length, number, flags))
        buffer_id += 1
    descriptors += [(0, 0, 0, 0)] * (size - len(descriptors))
    contents.append((areas[0], b"".join(_DESCRIPTOR.pack(*fields) for fields in descriptors)))
    wish = random.choice((0, 0x8000, 0x8001, random.randrange(0x10000)))
    contents.append((areas[1], struct.pack("<HH", wish, random.randrange(4))))
    contents.append((areas[2], bytes(4)))
    return contents
