"""Flattened device trees: built, read, checked and printed (Devicetree Specification 0.4).

>>> tree = DeviceTree(Node("", {"model": strings("demo")}))
>>> tree.root.child("memory@80000000").set("reg", cells(0, 0x80000000, 0, 0x1000))
>>> DeviceTree.parse(tree.encode()) == tree
True
>>> print(tree.dump(), end="")
/dts-v1/;
<BLANKLINE>
/ {
    model = "demo";
<BLANKLINE>
    memory@80000000 {
        reg = <0x0 0x80000000 0x0 0x1000>;
    };
};
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import attrs

from linux_loader.errors import ImageError, LoaderError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["DeviceTree", "Node", "cells", "strings"]

_MAGIC = 0xD00DFEED
_VERSION, _COMPATIBLE = 17, 16
_BEGIN_NODE, _END_NODE, _PROP, _NOP, _END = 1, 2, 3, 4, 9
_HEADER = struct.Struct(">10I")
_MAX_DEPTH = 64
_MAX_NAME = 255
_MAX_SIZE = 2 << 20  # what Linux takes
_LETTERS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_NODE_LETTERS = frozenset(_LETTERS + ",._+-")
_PROPERTY_LETTERS = frozenset(_LETTERS + ",._+?#-")


def cells(*values: int) -> bytes:
    """Return 32-bit big-endian cells.

    Raises:
        LoaderError: a value does not fit 32 bits.
    """
    for value in values:
        if not 0 <= value < 1 << 32:
            raise LoaderError("cell", None, value, "must fit 32 bits: split it in two")
    return struct.pack(f">{len(values)}I", *values)


def strings(*values: str) -> bytes:
    """Return a list of strings, each with its NUL.

    Raises:
        LoaderError: a string holds a NUL or is not ASCII.
    """
    for value in values:
        if "\0" in value or not value.isascii():
            raise LoaderError("string", None, value, "must be ASCII without NUL")
    return "".join([value + "\0" for value in values]).encode("ascii")


@attrs.define
class Node:
    """A node: its name with the unit address, properties in order, children in order."""

    name: str
    properties: dict[str, bytes] = attrs.field(factory=dict)
    children: list[Node] = attrs.field(factory=list)

    def child(self, name: str) -> Node:
        """Return the child of that name; it is made where it is not there."""
        for node in self.children:
            if node.name == name:
                return node
        node = Node(name)
        self.children.append(node)
        return node

    def set(self, name: str, value: bytes = b"") -> None:
        """Set a property; an empty value is a flag."""
        self.properties[name] = value

    def find(self, path: str) -> Node:
        """Return the node at a path such as `/soc/serial@1000`, below this one.

        Raises:
            KeyError: there is none.
        """
        node = self
        for name in path.split("/"):
            if name:
                for inner in node.children:
                    if inner.name == name:
                        node = inner
                        break
                else:
                    raise KeyError(path)
        return node

    def walk(self, path: str = "") -> Iterator[tuple[str, Node]]:
        """Yield each node with its path, parents first."""
        yield path or "/", self
        for node in self.children:
            yield from node.walk(f"{path}/{node.name}")


@attrs.define
class DeviceTree:
    """A whole tree.

    Attributes:
        root: its name is empty.
        reservations: address and size of memory that the guest must leave alone.
        boot_cpu: physical number of the processor that boots.
    """

    root: Node
    reservations: list[tuple[int, int]] = attrs.field(factory=list)
    boot_cpu: int = 0

    def check(self) -> None:
        """Check what encoding and the specification demand.

        Raises:
            LoaderError: a name has wrong characters or length, occurs twice, the tree is too
                deep, or two nodes have the same phandle.
        """
        if self.root.name:
            raise LoaderError("root", None, self.root.name, "the root's name is empty")
        phandles: dict[bytes, str] = {}
        for path, node in self.root.walk():
            if path.count("/") > _MAX_DEPTH:
                raise LoaderError("depth", None, path, f"must be at most {_MAX_DEPTH}")
            if node is not self.root:
                _check_name(path, node.name, _NODE_LETTERS)
            names = [inner.name for inner in node.children]
            if len(set(names)) != len(names):
                raise LoaderError("name", None, path, "two children have the same name")
            for name in node.properties:
                _check_name(path, name, _PROPERTY_LETTERS, property=True)
            phandle = node.properties.get("phandle")
            if phandle is not None and phandles.setdefault(phandle, path) != path:
                raise LoaderError("phandle", None, path, f"{phandles[phandle]} has the same")

    def encode(self) -> bytes:
        """Return the blob, version 17.

        Raises:
            LoaderError: the tree breaks a rule, or needs more than the 2 MiB that Linux takes.
        """
        self.check()
        table = bytearray()
        places: dict[str, int] = {}
        structure: list[bytes] = []
        _encode_node(self.root, structure, table, places)
        structure.append(_END.to_bytes(4, "big"))
        body = b"".join(structure)
        reserved = b"".join([struct.pack(">QQ", *item) for item in self.reservations])
        reserved += bytes(16)
        at_structure = _HEADER.size + len(reserved)
        at_strings = at_structure + len(body)
        total = at_strings + len(table)
        if total > _MAX_SIZE:
            raise LoaderError("totalsize", None, total, f"must be at most {_MAX_SIZE:#x}")
        header = _HEADER.pack(
            _MAGIC,
            total,
            at_structure,
            at_strings,
            _HEADER.size,
            _VERSION,
            _COMPATIBLE,
            self.boot_cpu,
            len(table),
            len(body),
        )
        return header + reserved + body + bytes(table)

    @classmethod
    def parse(cls, data: bytes) -> DeviceTree:
        """Read a blob of version 16 or 17.

        Raises:
            ImageError: it is malformed.
        """
        if len(data) < _HEADER.size:
            raise ImageError("header", 0, len(data), f"must have {_HEADER.size} bytes")
        (
            magic,
            total,
            at_struct,
            at_strings,
            at_reserved,
            version,
            compatible,
            cpu,
            n_strings,
            _,
        ) = _HEADER.unpack_from(data)
        if magic != _MAGIC:
            raise ImageError("magic", 0, magic, f"must be {_MAGIC:#x}")
        if compatible > _VERSION or version < _COMPATIBLE:
            raise ImageError("version", 20, version, "must be 16 or 17, or compatible with them")
        if not _HEADER.size <= total <= min(len(data), _MAX_SIZE):
            raise ImageError("totalsize", 4, total, "must be the size of the blob, 2 MiB at most")
        if at_strings + n_strings > total:
            raise ImageError("off_dt_strings", 12, at_strings, "the strings must end in the blob")
        table = data[at_strings : at_strings + n_strings]
        root = _parse_structure(data[:total], at_struct, table)
        return cls(root, _parse_reservations(data[:total], at_reserved), cpu)

    def dump(self) -> str:
        """Return the source text that `dtc` compiles to this tree."""
        lines = ["/dts-v1/;"]
        lines += [f"/memreserve/ {start:#x} {size:#x};" for start, size in self.reservations]
        lines.append("")
        _dump_node(self.root, "", lines)
        return "\n".join(lines) + "\n"


def _check_name(
    path: str,
    name: str,
    letters: frozenset[str],
    *,
    property: bool = False,  # noqa: A002
) -> None:
    stem, at, unit = (name, "", "") if property else name.partition("@")
    wrong = not set(stem) <= letters or not set(unit) <= letters
    if wrong or not 1 <= len(stem) <= 31 or (at and not unit):
        kind = "property" if property else "node"
        raise LoaderError(
            f"{kind} name", None, f"{path} {name}", "must be 1 to 31 letters of its set"
        )


def _encode_node(
    node: Node, structure: list[bytes], table: bytearray, places: dict[str, int]
) -> None:
    structure.append(_padded(_BEGIN_NODE.to_bytes(4, "big") + node.name.encode() + b"\0"))
    for name, value in node.properties.items():
        place = places.get(name)
        if place is None:
            place = places[name] = len(table)
            table += name.encode() + b"\0"
        structure.append(_padded(struct.pack(">III", _PROP, len(value), place) + value))
    for child in node.children:
        _encode_node(child, structure, table, places)
    structure.append(_END_NODE.to_bytes(4, "big"))


def _padded(data: bytes) -> bytes:
    return data.ljust(-(-len(data) // 4) * 4, b"\0")


def _text(data: bytes, start: int, field: str) -> str:
    # The specification allows 31 letters; without a bound, names could overlap without end.
    end = data.find(b"\0", start, start + _MAX_NAME + 1)
    if start >= len(data) or end < 0:
        raise ImageError(field, start, None, f"must end with a NUL within {_MAX_NAME} bytes")
    try:
        return data[start:end].decode("ascii")
    except UnicodeDecodeError as error:
        raise ImageError(field, start, data[start:end], "must be ASCII") from error


def _parse_reservations(data: bytes, offset: int) -> list[tuple[int, int]]:
    result: list[tuple[int, int]] = []
    while True:
        if offset + 16 > len(data):
            raise ImageError("off_mem_rsvmap", 16, offset, "the list must end with zeros")
        address, size = struct.unpack_from(">QQ", data, offset)
        if not address and not size:
            return result
        result.append((address, size))
        offset += 16


def _parse_structure(data: bytes, offset: int, table: bytes) -> Node:
    """Read nodes and properties; the depth is bounded, so is the work by the size of `data`."""
    if offset % 4:
        raise ImageError("off_dt_struct", 8, offset, "must be a multiple of 4")
    stack: list[Node] = []
    root: Node | None = None
    while True:
        if offset + 4 > len(data):
            raise ImageError("structure", offset, None, "must end with FDT_END")
        token = int.from_bytes(data[offset : offset + 4], "big")
        at, offset = offset, offset + 4
        if token == _NOP:
            continue
        if token == _BEGIN_NODE:
            name = _text(data, offset, "node name")
            offset += -(-(len(name) + 1) // 4) * 4
            node = Node(name)
            if stack:
                stack[-1].children.append(node)
            elif root is None and not name:
                root = node
            else:
                raise ImageError("FDT_BEGIN_NODE", at, name, "there is one root, without a name")
            stack.append(node)
            if len(stack) > _MAX_DEPTH:
                raise ImageError("FDT_BEGIN_NODE", at, name, f"deeper than {_MAX_DEPTH} nodes")
        elif token == _END_NODE:
            if not stack:
                raise ImageError("FDT_END_NODE", at, None, "closes no node")
            stack.pop()
        elif token == _PROP:
            if offset + 8 > len(data) or not stack or stack[-1].children:
                raise ImageError("FDT_PROP", at, None, "must lie in a node, before its children")
            length, place = struct.unpack_from(">II", data, offset)
            offset += 8
            if offset + length > len(data):
                raise ImageError("len", at + 4, length, "the value must end inside the blob")
            name = _text(table, place, "nameoff")
            if name in stack[-1].properties:
                raise ImageError("nameoff", at + 8, name, "occurs twice in its node")
            stack[-1].properties[name] = data[offset : offset + length]
            offset += -(-length // 4) * 4
        elif token == _END:
            if stack or root is None:
                raise ImageError("FDT_END", at, None, "must follow the root's end")
            return root
        else:
            raise ImageError("token", at, token, "must be one of 1, 2, 3, 4 and 9")


def _dump_node(node: Node, indent: str, lines: list[str]) -> None:
    lines.append(f"{indent}{node.name or '/'} {{")
    inner = indent + "    "
    for name, value in node.properties.items():
        lines.append(f"{inner}{name}{_dump_value(value)};")
    for child in node.children:
        if lines[-1] and not lines[-1].endswith("{"):
            lines.append("")
        _dump_node(child, inner, lines)
    lines.append(f"{indent}}};")


def _dump_value(value: bytes) -> str:
    if not value:
        return ""
    parts = value[:-1].split(b"\0")
    if value[-1] == 0 and all(parts) and all(0x20 <= byte < 0x7F for byte in b"".join(parts)):
        quoted = [part.decode().replace("\\", "\\\\").replace('"', '\\"') for part in parts]
        return " = " + ", ".join([f'"{part}"' for part in quoted])
    if len(value) % 4 == 0:
        words = [f"{word:#x}" for (word,) in struct.iter_unpack(">I", value)]
        return f" = <{' '.join(words)}>"
    return f" = [{value.hex(' ')}]"
