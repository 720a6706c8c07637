"""Kernel modules: where they lie, what they need, and in which order to load them.

A package unpacked without its maintainer scripts has no `modules.dep`; the same facts stand in
each module's ELF section `.modinfo`, so they are read from there.
"""

from __future__ import annotations

import fnmatch
import os
import re
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from attrs import frozen

from .errors import ModuleError

__all__ = ["Module", "ModuleTree", "index_files", "load_order", "module_name", "parse_modinfo"]

_SUFFIXES = (".ko", ".ko.gz", ".ko.xz", ".ko.zst")
_PATTERN_CHARACTER = re.compile(r"[*?\[]")


@frozen
class Module:
    """One loadable module.

    Attributes:
        name: as the kernel shows it, with underscores.
        path: of its file below the tree's root, without the suffix of a compression.
        file: where it lies, as it lies there.
        image: the ELF file, decompressed.
        depends: names of the modules whose symbols it uses.
        aliases: patterns of the devices and functions it serves.
        before: modules or aliases that should be loaded before it, where they exist (softdep pre).
        after: the same, loaded after it (softdep post).
    """

    name: str
    path: str
    file: Path
    image: bytes
    depends: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()


def module_name(path: str) -> str:
    """The name of the module in a file.

    Example:
        >>> module_name("kernel/drivers/char/hw_random/virtio-rng.ko.xz")
        'virtio_rng'
    """
    return path.rpartition("/")[2].split(".ko")[0].replace("-", "_")


def parse_modinfo(image: bytes) -> list[tuple[str, str]]:
    """The `key=value` strings of a module's section `.modinfo`, in their order.

    Raises:
        ModuleError: the image is no 64-bit little-endian ELF file, or its sections lie outside it.
    """
    if image[:6] != b"\x7fELF\x02\x01":
        raise ModuleError("not a 64-bit little-endian ELF file")
    try:
        table, size, count, names = struct.unpack_from("<Q10xHHH", image, 0x28)
        sections = [struct.unpack_from("<I20xQQ", image, table + size * n) for n in range(count)]
        names_at = sections[names][1]
    except (struct.error, IndexError):
        raise ModuleError("its table of sections lies outside the file") from None
    for name, offset, length in sections:
        if image[names_at + name : names_at + name + 9] == b".modinfo\0":
            if offset + length > len(image):
                raise ModuleError("its section .modinfo lies outside the file")
            strings = image[offset : offset + length].decode("utf-8", "replace").split("\0")
            pairs = (text.partition("=") for text in strings if "=" in text)
            return [(key, value) for key, _, value in pairs]
    return []


def load_order(graph: Mapping[str, Sequence[str]], roots: Iterable[str]) -> list[str]:
    """The roots and all they depend on, each once and after everything it depends on.

    Args:
        graph: for each name, the names it depends on.
        roots: names wanted; their order is kept as far as the dependencies allow.

    Raises:
        ModuleError: a name is not in the graph, or depends on itself.

    Example:
        >>> load_order({"blk": ["ring", "virtio"], "virtio": ["ring"], "ring": []}, ["blk"])
        ['ring', 'virtio', 'blk']
    """
    order: list[str] = []
    open_names: dict[str, None] = {}  # the path from a root, in order, to name a cycle
    done: set[str] = set()
    for root in roots:
        stack = [(root, iter(graph.get(root, ())))] if root not in done else []
        if stack:
            _require(root, graph, None)
            open_names[root] = None
        while stack:
            name, rest = stack[-1]
            for needed in rest:
                if needed in done:
                    continue
                _require(needed, graph, name)
                if needed in open_names:
                    path = list(open_names)
                    circle = [*path[path.index(needed) :], needed]
                    raise ModuleError(f"modules depend on each other: {' -> '.join(circle)}")
                open_names[needed] = None
                stack.append((needed, iter(graph[needed])))
                break
            else:
                stack.pop()
                open_names.pop(name)
                done.add(name)
                order.append(name)
    return order


def _reached(graph: Mapping[str, Sequence[str]], start: str) -> set[str]:
    """The start and all it depends on, directly or not."""
    reached: set[str] = set()
    waiting = [start]
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting += graph[name]
    return reached


def _require(name: str, graph: Mapping[str, Sequence[str]], wanted_by: str | None) -> None:
    if name not in graph:
        reason = f", which {wanted_by} depends on," if wanted_by else ""
        raise ModuleError(f"module {name}{reason} is not there")


class ModuleTree:
    """The modules of one kernel: the folder `lib/modules/VERSION`.

    Only names are read at first; a module's file is read when it is asked for.

    Args:
        root: the folder; one that is absent or empty is a kernel without modules.
    """

    def __init__(self, root: Path | None) -> None:
        self.root = root
        self._paths: dict[str, str] = {}
        self._modules: dict[str, Module] = {}
        self._aliases: _Aliases | None = None
        self.builtin: frozenset[str] = frozenset()
        if root is None:
            return
        for folder, folders, files in os.walk(root):
            folders.sort()
            for file in sorted(files):
                if file.endswith(_SUFFIXES):
                    path = os.path.relpath(os.path.join(folder, file), root)  # noqa: PTH118
                    self._paths[module_name(file)] = path
        listing = root / "modules.builtin"
        if listing.exists():
            self.builtin = frozenset(map(module_name, listing.read_text().split()))

    def __contains__(self, name: str) -> bool:
        return module_name(name) in self._paths

    def __len__(self) -> int:
        return len(self._paths)

    def module(self, name: str) -> Module:
        """The module of a name, with dashes or underscores.

        Raises:
            ModuleError: there is none, or its file cannot be read.
        """
        name = module_name(name)
        if name not in self._modules:
            if self.root is None or name not in self._paths:
                raise ModuleError(
                    f"no module {name} in {self.root or 'this kernel'}",
                    "give the folder lib/modules/VERSION that belongs to the kernel",
                )
            path = self._paths[name]
            file = self.root / path
            try:
                image = _decompressed(file)
                info = parse_modinfo(image)
            except (ModuleError, OSError, EOFError, zlib.error) as error:
                raise ModuleError(f"{file} cannot be read: {error}") from error
            self._modules[name] = _module(path, file, image, info)
        return self._modules[name]

    def resolve(self, wanted: str) -> tuple[str, ...]:
        """Names of the modules that a name or an alias stands for; none where it is built in.

        Raises:
            ModuleError: nothing by that name is there, neither loadable nor built in.
        """
        name = module_name(wanted)
        if name in self._paths:
            return (name,)
        if name in self.builtin:
            return ()
        found = self._aliased(wanted) if self.root is not None else ()
        if not found:
            raise ModuleError(
                f"neither a module nor a built-in {wanted!r} in {self.root or 'this kernel'}",
                "check the spelling, or take a kernel that has it",
            )
        return tuple(name for name in found if name in self._paths)

    def closure(self, wanted: Iterable[str], *, optional: Iterable[str] = ()) -> list[Module]:
        """The wanted modules and all they need, in an order in which they can be loaded.

        Args:
            wanted: names or aliases; what is built into the kernel is left out silently.
            optional: the same, but left out silently too where the kernel has no such thing.

        Raises:
            ModuleError: a wanted name is unknown, or a module needs what is not there.
        """
        roots = [name for want in wanted for name in self.resolve(want)]
        roots += [name for want in optional for name in self._softly(want)]
        needs: dict[str, list[str]] = {}
        wishes: list[tuple[str, str]] = []
        waiting = list(reversed(roots))
        while waiting:
            name = waiting.pop()
            if name in needs:
                continue
            module = self.module(name)
            needs[name] = [need for need in module.depends if need not in self.builtin]
            before = [found for want in module.before for found in self._softly(want)]
            after = [found for want in module.after for found in self._softly(want)]
            wishes += [(name, found) for found in before]
            roots += after
            waiting += [*needs[name], *before, *after]
        for name, wish in wishes:
            # A wish is not worth a circle: modules name each other there now and then.
            if name not in _reached(needs, wish):
                needs[name].append(wish)
        return [self.module(name) for name in load_order(needs, roots)]

    def _softly(self, wanted: str) -> tuple[str, ...]:
        try:
            return self.resolve(wanted)
        except ModuleError:
            return ()

    def _aliased(self, wanted: str) -> tuple[str, ...]:
        """Names of the modules, built-in ones included, that have an alias for this."""
        if self._aliases is None:
            self._aliases = _Aliases(self._alias_lines())
        return self._aliases.find(wanted)

    def _alias_lines(self) -> Iterator[tuple[str, str]]:
        """All aliases with their modules: from the index where there is one, else from each."""
        assert self.root is not None
        listing = self.root / "modules.alias"
        if listing.exists():
            for line in listing.read_text().splitlines():
                words = line.split()
                if len(words) == 3 and words[0] == "alias":
                    yield words[1], module_name(words[2])
        else:
            for name in self._paths:
                for alias in self.module(name).aliases:
                    yield alias, name
        facts = self.root / "modules.builtin.modinfo"
        if facts.exists():
            for text in facts.read_text(errors="replace").split("\0"):
                name, _, alias = text.partition(".alias=")
                if alias:
                    yield alias, module_name(name)


class _Aliases:
    """Many aliases, found without trying each pattern: there are 26,000 in a generic kernel."""

    def __init__(self, lines: Iterable[tuple[str, str]]) -> None:
        self._plain: dict[str, list[str]] = {}
        self._patterns: list[tuple[str, str, str]] = []
        for alias, name in lines:
            start = _PATTERN_CHARACTER.search(alias)
            if start is None:
                self._plain.setdefault(alias.replace("-", "_"), []).append(name)
            else:
                self._patterns.append((alias[: start.start()], alias, name))

    def find(self, wanted: str) -> tuple[str, ...]:
        found = list(self._plain.get(wanted.replace("-", "_"), ()))
        for prefix, pattern, name in self._patterns:
            if wanted.startswith(prefix) and fnmatch.fnmatchcase(wanted, pattern):
                found.append(name)
        return tuple(dict.fromkeys(found))


def index_files(modules: Sequence[Module]) -> dict[str, bytes]:
    """`modules.dep`, `modules.alias` and `modules.softdep` of some modules, for modprobe.

    Raises:
        ModuleError: a module depends on one that is neither among them nor absent from all of them.
    """
    names = {module.name: module for module in modules}
    graph = {m.name: tuple(need for need in m.depends if need in names) for m in modules}
    dep: list[str] = []
    for module in modules:
        needs = load_order(graph, [module.name])[:-1]
        paths = [names[need].path for need in reversed(needs)]
        dep.append(" ".join([f"{module.path}:", *paths]) + "\n")
    alias = [f"alias {alias} {module.name}\n" for module in modules for alias in module.aliases]
    soft = [
        f"softdep {module.name}"
        + "".join(
            f" {word}: {' '.join(names)}"
            for word, names in (("pre", module.before), ("post", module.after))
            if names
        )
        + "\n"
        for module in modules
        if module.before or module.after
    ]
    return {
        "modules.dep": "".join(dep).encode(),
        "modules.alias": "".join(alias).encode(),
        "modules.softdep": "".join(soft).encode(),
    }


def _module(path: str, file: Path, image: bytes, info: list[tuple[str, str]]) -> Module:
    fields: dict[str, list[str]] = {"depends": [], "alias": [], "pre": [], "post": []}
    for key, value in info:
        if key == "depends":
            fields["depends"] += [module_name(need) for need in value.split(",") if need]
        elif key == "alias":
            fields["alias"].append(value)
        elif key == "softdep":
            kind = ""
            for word in value.split():
                if word in ("pre:", "post:"):
                    kind = word[:-1]
                elif kind:
                    fields[kind].append(word)
    plain = path.rpartition(".ko")[0] + ".ko"
    depends, aliases, before, after = (tuple(dict.fromkeys(each)) for each in fields.values())
    return Module(module_name(path), plain, file, image, depends, aliases, before, after)


def _decompressed(file: Path) -> bytes:
    """The contents of a file that may be compressed, as its suffix says."""
    data = file.read_bytes()
    # Few kernels need one of these, and each costs time to import.
    if file.suffix == ".xz":
        import lzma

        try:
            return lzma.decompress(data)
        except lzma.LZMAError as error:
            raise ModuleError(f"not a whole xz file: {error}") from error
    if file.suffix == ".gz":
        import gzip

        return gzip.decompress(data)
    if file.suffix == ".zst":
        import zstandard

        try:
            return zstandard.ZstdDecompressor().stream_reader(data).read()
        except zstandard.ZstdError as error:
            raise ModuleError(f"not a whole zstd file: {error}") from error
    return data
