"""The light values inside the loader behave as frozen attrs classes do."""

from __future__ import annotations

import pickle

import pytest

from linux_loader.elf import ElfSegment

ONE = {
    "offset": 1,
    "address": 2,
    "virtual_address": 3,
    "file_size": 4,
    "memory_size": 5,
    "flags": 6,
}


def test_values_compare_print_and_pickle() -> None:
    """Equality, hash, text and pickle go by the fields."""
    segment = ElfSegment(**ONE)
    assert segment == ElfSegment(**ONE) == pickle.loads(pickle.dumps(segment))
    assert hash(segment) == hash(ElfSegment(**ONE))
    assert segment != ElfSegment(**{**ONE, "flags": 7})
    assert segment != 5
    assert repr(segment).startswith("ElfSegment(offset=1, address=2")


def test_values_cannot_change() -> None:
    """Setting and deleting are errors, and so are missing or unknown fields."""
    segment = ElfSegment(**ONE)
    with pytest.raises(AttributeError, match="offset"):
        segment.offset = 2  # type: ignore[misc]
    with pytest.raises(AttributeError, match="offset"):
        del segment.offset
    with pytest.raises(TypeError, match="memory_size"):
        ElfSegment(offset=1)  # type: ignore[call-arg]
