"""Exits: every reason is decoded from a run page laid out as the header says."""

from __future__ import annotations

import struct
from collections.abc import Mapping

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvm_ioctls import exits
from kvm_ioctls.exits.decoders import Decoders
from kvm_ioctls.table import EXITS, ExitRow, exit_layout

LETTERS = {1: "B", 2: "H", 4: "I", 8: "Q"}
# Names that differ from the header's, with the reason: one is a keyword or says less than it could.
RENAMED = {"phys_addr": "address", "reason": "cause", "longmode": "flags"}


def _page(row: ExitRow, values: Mapping[str, tuple[int, ...]]) -> memoryview:
    page = bytearray(12288)
    struct.pack_into("<I", page, 8, row.reason)
    for name, (offset, size, count) in exit_layout(row).items():
        struct.pack_into(f"<{count}{LETTERS[size]}", page, offset, *values[name])
    return memoryview(page)


@pytest.mark.parametrize("row", EXITS, ids=lambda row: row.name)
@settings(max_examples=10)
@given(raw=st.binary(min_size=256, max_size=256), kind=st.integers(0, 4))
def test_every_reason_is_decoded(row: ExitRow, raw: bytes, kind: int) -> None:
    """Whatever the run page holds, the exit is of the declared class and has the page's values."""
    page = bytearray(12288)
    struct.pack_into("<I", page, 8, row.reason)
    page[32:288] = raw
    if row.name in ("HYPERV", "XEN"):
        struct.pack_into("<I", page, 32, kind)
    seen = Decoders()[row.reason](memoryview(page))
    kinds = {"HYPERV": (1, 2, 3), "XEN": (1,)}.get(row.name, (kind,))
    allowed = [getattr(exits, name) for name in row.classes] if kind in kinds else [exits.Unknown]
    assert type(seen) in allowed
    for name, (offset, size, count) in exit_layout(row).items():
        expected = struct.unpack_from(f"<{count}{LETTERS[size]}", page, offset)
        found = getattr(seen, RENAMED.get(name, name), None)
        if isinstance(found, bool):
            assert found == bool(expected[0])
        elif isinstance(found, tuple):
            assert found == expected[: len(found)]
        elif isinstance(found, int) and name != "longmode":  # whose upper half flags has too
            assert found == expected[0]


@given(reason=st.integers(44, (1 << 31) - 1), raw=st.binary(min_size=256, max_size=256))
def test_future_reasons_are_values(reason: int, raw: bytes) -> None:
    """A reason that this library does not know is Unknown with the page's bytes, not an error."""
    page = bytearray(4096)
    struct.pack_into("<I", page, 8, reason)
    page[32:288] = raw
    assert Decoders()[reason](memoryview(page)) == exits.Unknown(reason, raw)


def test_string_io_keeps_size_and_count_apart() -> None:
    """One 4-byte access and four 1-byte accesses are different exits."""
    row = EXITS[2]
    values = {"direction": (1,), "port": (0x10,), "data_offset": (4096,)}
    one = _page(row, values | {"size": (4,), "count": (1,)})
    four = _page(row, values | {"size": (1,), "count": (4,)})
    assert Decoders()[2](one) == exits.IoOut(0x10, 4, 1, bytes(4))
    assert Decoders()[2](four) == exits.IoOut(0x10, 1, 4, bytes(4))


def test_emulation_failure_has_the_instruction() -> None:
    """The bytes of the instruction that KVM could not emulate are given, and only these."""
    page = bytearray(4096)
    struct.pack_into("<IIIQB15s", page, 8, 17, 0, 0, 0, 0, b"")
    struct.pack_into("<IIQB15s", page, 32, 1, 3, 1, 3, b"\x0f\xc7\x0f" + b"\xcc" * 12)
    seen = Decoders()[17](memoryview(page))
    assert isinstance(seen, exits.EmulationFailure)
    assert seen.instruction == b"\x0f\xc7\x0f"
    assert len(seen.data) == 3


@pytest.mark.parametrize(
    ("reason", "offset", "answer", "expected"),
    [
        (3, 88, lambda e: e.respond(-1), b"\xff" * 8),
        (29, 48, lambda e: e.respond(0x1234), b"\x34\x12" + bytes(6)),
        (29, 32, lambda e: e.refuse(), b"\x01"),
        (30, 32, lambda e: e.refuse(), b"\x01"),
        (35, 96, lambda e: e.respond(-2, 5), struct.pack("<qQ", -2, 5)),
        (36, 56, lambda e: e.respond(9), struct.pack("<Q", 9)),
        (19, 40, lambda e: e.respond(-5), struct.pack("<q", -5)),
        (23, 32, lambda e: e.respond(7), struct.pack("<I", 7)),
        (40, 48, lambda e: e.respond(8), struct.pack("<Q", 8)),
        (43, 40, lambda e: e.respond(28, 3), struct.pack("<QQ", 3, 28)),
    ],
)
def test_answers_reach_the_run_page(reason, offset, answer, expected) -> None:  # type: ignore[no-untyped-def]
    """An answer given through an exit lies where the kernel looks for it."""
    page = bytearray(b"\x00" * 4096)
    answer(Decoders()[reason](memoryview(page)))
    assert page[offset : offset + len(expected)] == expected


@pytest.mark.parametrize(("kind", "offset"), [(2, 48), (3, 56)])
def test_hyperv_answers(kind: int, offset: int) -> None:
    """Answers to Hyper-V's exits lie where the kernel looks for them."""
    page = bytearray(4096)
    struct.pack_into("<I", page, 32, kind)
    answered = Decoders()[27](memoryview(page))
    assert isinstance(answered, exits.HypervHcall | exits.HypervSyndbg)
    answered.respond(77)
    assert struct.unpack_from("<Q", page, offset) == (77,)


def test_xen_answer() -> None:
    """The result of a Xen hypercall lies where the kernel looks for it."""
    page = bytearray(4096)
    struct.pack_into("<I", page, 32, 1)
    answered = Decoders()[34](memoryview(page))
    assert isinstance(answered, exits.XenHcall)
    answered.respond(-38)
    assert struct.unpack_from("<q", page, 56) == (-38,)


def test_every_class_is_exported_and_matches_by_position() -> None:
    """Each class of the table is public, an attrs class, and usable in a `case` pattern."""
    for row in EXITS:
        for name in row.classes:
            kind = getattr(exits, name)
            assert name in exits.__all__
            assert attrs.has(kind)
            assert issubclass(kind, exits.Exit)
            assert kind.reason == row.reason
