"""Hypothesis strategies for buffers, rings and what hostile drivers do to them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import strategies as st

from virtio_queue.constants import F_EVENT_IDX, F_IN_ORDER, F_INDIRECT_DESC, F_VERSION_1
from virtio_queue.testing.images import RingImage, random_image

if TYPE_CHECKING:
    from random import Random

__all__ = ["buffers", "cuts", "queue_features", "ring_images", "split_sizes"]


def split_sizes(largest: int = 64) -> st.SearchStrategy[int]:
    """Sizes of split queues: powers of two from 1 to `largest`."""
    return st.integers(0, largest.bit_length() - 1).map(lambda bits: 1 << bits)


def queue_features(*, in_order: bool = True) -> st.SearchStrategy[int]:
    """Feature bits a driver may accept of those that change what rings look like."""
    bits = [F_INDIRECT_DESC, F_EVENT_IDX, *([F_IN_ORDER] if in_order else [])]
    return st.sets(st.sampled_from(bits)).map(lambda chosen: sum(chosen) | F_VERSION_1)


def cuts(data: bytes) -> st.SearchStrategy[list[bytes]]:
    """Ways to cut a message into elements, one byte pieces and empty ones included (2.7.4)."""
    places = st.lists(st.integers(0, len(data)), max_size=8).map(sorted)
    return places.map(
        lambda at: [data[start:end] for start, end in zip([0, *at], [*at, len(data)], strict=True)]
    )


def buffers(
    *, most_elements: int = 4, most_bytes: int = 64
) -> st.SearchStrategy[tuple[list[bytes], list[int]]]:
    """Arguments of `Driver.add`: readable contents and writable lengths, at least one element."""
    readable = st.lists(st.binary(max_size=most_bytes), max_size=most_elements)
    writable = st.lists(st.integers(0, most_bytes), max_size=most_elements)
    return (
        st.tuples(readable, writable)
        .filter(lambda both: bool(both[0] or both[1]))
        .map(lambda both: (both[0], both[1][: max(most_elements - len(both[0]), 0)]))
        .filter(lambda both: bool(both[0] or both[1]))
    )


def ring_images(*, packed: bool | None = None) -> st.SearchStrategy[RingImage]:
    """Rings in memory, valid and hostile, of one format or both (`packed` None)."""

    def make(random: Random, form: bool) -> RingImage:
        return random_image(random, packed=form)

    forms = st.booleans() if packed is None else st.just(packed)
    return st.builds(make, st.randoms(use_true_random=False), forms)
