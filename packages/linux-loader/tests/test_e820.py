"""Memory maps and errors: checked once, shown well."""

from __future__ import annotations

import pickle
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from linux_loader import CmdlineError, E820Entry, ImageError, LoaderError, PlacementError
from linux_loader.e820 import checked_map, encode, ram_ranges

entries = st.builds(
    E820Entry, st.integers(0, 1 << 16), st.integers(1, 1 << 12), st.sampled_from([1, 1, 1, 2, 3])
)


@given(st.lists(entries, max_size=8))
def test_a_map_is_sorted_or_refused(items: list[E820Entry]) -> None:
    """Overlap is refused; otherwise the map comes back sorted, and RAM counts the same bytes."""
    used: set[int] = set()
    overlap = False
    for item in items:
        block = set(range(item.address, item.address + item.size))
        overlap = overlap or bool(used & block)
        used |= block
    if overlap:
        with pytest.raises(PlacementError):
            checked_map(items)
        return
    result = checked_map(items)
    assert sorted(result, key=lambda item: item.address) == list(result)
    ram = ram_ranges(result)
    assert sum(stop - start for start, stop in ram) == sum(
        item.size for item in items if item.type == 1
    )
    assert all(before[1] < after[0] for before, after in pairwise(ram))


@pytest.mark.parametrize(
    "entry",
    [
        E820Entry(0, 0, 1),
        E820Entry(-1, 5, 1),
        E820Entry((1 << 64) - 1, 2, 1),
        E820Entry(0, 1, 1 << 32),
        E820Entry(0, 1, -1),
    ],
)
def test_impossible_entries_are_refused(entry: E820Entry) -> None:
    """Empty ranges, ranges outside 64 bits and types outside 32 bits are errors."""
    with pytest.raises(PlacementError):
        checked_map([entry])


def test_entries_are_20_bytes() -> None:
    """The encoding is the packed structure of the zero page."""
    data = encode([E820Entry(0x1122334455667788, 0x100, 7)])
    assert data.hex() == "8877665544332211" + "0001000000000000" + "07000000"


@pytest.mark.parametrize("kind", [LoaderError, ImageError, PlacementError, CmdlineError])
def test_errors_pickle_and_explain(kind: type[LoaderError]) -> None:
    """An error keeps its fields through pickle, and its message is one line."""
    error = pickle.loads(pickle.dumps(kind("field", 16, b"x" * 200, "must be short")))
    assert type(error) is kind
    assert (error.field, error.offset, error.rule) == ("field", 16, "must be short")
    assert len(str(error)) < 120
    assert "\n" not in str(error)
    assert isinstance(error, ValueError)
