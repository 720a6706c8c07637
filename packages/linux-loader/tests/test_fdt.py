"""Device trees: round trips, the specification's rules, and `dtc` as the oracle."""

from __future__ import annotations

import shutil
import struct
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from linux_loader import ImageError, LoaderError
from linux_loader.fdt import DeviceTree, Node, cells, strings

names = st.text("abcxyz019,._+-", min_size=1, max_size=8)
printable = st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1)
values = st.one_of(
    st.binary(max_size=12),
    st.lists(st.integers(0, 0xFFFFFFFF), max_size=3).map(lambda items: cells(*items)),
    st.lists(
        st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1), max_size=2
    ).map(lambda items: strings(*items)),
)


def nodes(depth: int) -> st.SearchStrategy[Node]:
    children: st.SearchStrategy[list[Node]] = st.just([])
    if depth:
        children = st.lists(nodes(depth - 1), max_size=3, unique_by=lambda node: node.name)
    name = st.one_of(names, st.tuples(names, names).map("@".join))
    return st.builds(Node, name, st.dictionaries(names, values, max_size=3), children)


trees = st.builds(
    lambda node, reserved: DeviceTree(Node("", node.properties, node.children), reserved),
    nodes(2),
    st.lists(st.tuples(st.integers(0, (1 << 64) - 1), st.integers(1, (1 << 64) - 1)), max_size=2),
)

dtc = pytest.mark.skipif(shutil.which("dtc") is None, reason="dtc is not installed")


def run_dtc(data: bytes, source: str, target: str) -> bytes:
    command = ["dtc", "-q", "-f", "-I", source, "-O", target, "-o", "-", "-"]
    return subprocess.run(command, input=data, capture_output=True, check=True, timeout=20).stdout


@settings(max_examples=60)
@given(trees)
def test_round_trip(tree: DeviceTree) -> None:
    """What is encoded is read back as it was."""
    assert DeviceTree.parse(tree.encode()) == tree


@dtc
@settings(max_examples=25)
@given(trees)
def test_dtc_reads_the_blob_and_the_dump(tree: DeviceTree) -> None:
    """Dtc compiles our dump, and re-encodes our blob, to the same tree."""
    assert DeviceTree.parse(run_dtc(tree.dump().encode(), "dts", "dtb")) == tree
    assert DeviceTree.parse(run_dtc(tree.encode(), "dtb", "dtb")) == tree


@settings(max_examples=60)
@given(trees, st.data())
def test_broken_blobs_raise_only_image_errors(tree: DeviceTree, data: st.DataObject) -> None:
    """A blob with one number changed, or cut, is read or refused; it never loops."""
    blob = bytearray(tree.encode())
    if data.draw(st.booleans()):
        blob = blob[: data.draw(st.integers(0, len(blob)))]
    else:
        offset = data.draw(st.integers(0, len(blob) // 4 - 1)) * 4
        blob[offset : offset + 4] = data.draw(st.binary(min_size=4, max_size=4))
    try:
        DeviceTree.parse(bytes(blob))
    except ImageError:
        return


def deep(depth: int) -> Node:
    node = Node("n")
    for _ in range(depth):
        node = Node("n", {}, [node])
    return node


@pytest.mark.parametrize(
    "tree",
    [
        DeviceTree(Node("named")),
        DeviceTree(Node("", {"x y": b""})),
        DeviceTree(Node("", {"": b""})),
        DeviceTree(Node("", {"x" * 32: b""})),
        DeviceTree(Node("", {}, [Node("a/b")])),
        DeviceTree(Node("", {}, [Node("")])),
        DeviceTree(Node("", {}, [Node("a@")])),
        DeviceTree(Node("", {}, [Node("a"), Node("a")])),
        DeviceTree(
            Node("", {}, [Node("a", {"phandle": cells(1)}), Node("b", {"phandle": cells(1)})])
        ),
        DeviceTree(Node("", {}, [deep(70)])),
        DeviceTree(Node("", {"big": bytes(2 << 20)})),
    ],
)
def test_rules_of_the_specification(tree: DeviceTree) -> None:
    """Wrong names, names that occur twice, shared phandles, depth and size are refused."""
    with pytest.raises(LoaderError):
        tree.encode()


def blob(*tokens: int, table: bytes = b"a\0") -> bytes:
    body = struct.pack(f">{len(tokens)}I", *tokens)
    at = 40 + 16
    total = at + len(body) + len(table)
    header = (0xD00DFEED, total, at, at + len(body), 40, 17, 16, 0, len(table), len(body))
    return struct.pack(">10I", *header) + bytes(16) + body + table


@pytest.mark.parametrize(
    ("data", "field"),
    [
        (blob(1, 0, 2), "structure"),
        (blob(2, 9), "FDT_END_NODE"),
        (blob(9), "FDT_END"),
        (blob(1, 0, 9), "FDT_END"),
        (blob(1, 0, 2, 1, 0, 2, 9), "FDT_BEGIN_NODE"),
        (blob(1, 0x61000000, 2, 9), "FDT_BEGIN_NODE"),
        (blob(3, 0, 0, 9), "FDT_PROP"),
        (blob(1, 0, 3, 0, 0, 3, 0, 0, 2, 9), "nameoff"),
        (blob(1, 0, 3, 0, 7, 2, 9), "nameoff"),
        (blob(1, 0, 3, 0xFFFFFFFF, 0, 2, 9), "len"),
        (blob(1, 0, 1, 0x61000000, 2, 3, 0, 0, 2, 9), "FDT_PROP"),
        (blob(1, 0xFF000000, 2, 9), "node name"),
        (blob(7), "token"),
        (blob(1, 0, 3, 0, 0, 2, 9, table=b"a" * 256 + b"\0"), "nameoff"),
        (blob(*[1, 0x61000000] * 80), "FDT_BEGIN_NODE"),
        (b"", "header"),
        (bytes(40), "magic"),
    ],
)
def test_each_lie_is_named(data: bytes, field: str) -> None:
    """The error names the token or header field that breaks the rule."""
    with pytest.raises(ImageError) as caught:
        DeviceTree.parse(data)
    assert caught.value.field == field


def test_empty_instructions_are_skipped() -> None:
    """FDT_NOP may stand anywhere."""
    assert DeviceTree.parse(blob(4, 1, 0, 4, 3, 0, 0, 4, 2, 4, 9)).root.properties == {"a": b""}


def test_nodes_are_found_by_path() -> None:
    """Children are made on demand and found again; what is not there is a KeyError."""
    tree = DeviceTree(Node(""))
    serial = tree.root.child("soc").child("serial@1000")
    serial.set("status", strings("okay"))
    assert (
        tree.root.find("/soc/serial@1000") is serial is tree.root.child("soc").child("serial@1000")
    )
    assert [path for path, _ in tree.root.walk()] == ["/", "/soc", "/soc/serial@1000"]
    with pytest.raises(KeyError):
        tree.root.find("/soc/none")


def test_values_out_of_range_are_refused() -> None:
    """Cells hold 32 bits; strings hold no NUL."""
    for value in (-1, 1 << 32):
        with pytest.raises(LoaderError, match="32 bits"):
            cells(value)
    for text in ("a\0b", "é"):
        with pytest.raises(LoaderError, match="ASCII"):
            strings(text)
