"""Kernel modules: their facts, their order, and what stands behind an alias."""

from __future__ import annotations

import contextlib
import gzip
import lzma
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from vmm_reference.image.errors import ImageError, ModuleError
from vmm_reference.image.kernels import debian_kernel
from vmm_reference.image.modules import (
    ModuleTree,
    index_files,
    load_order,
    module_name,
    parse_modinfo,
)
from vmm_reference.image.packages import find_tool
from vmm_reference.image.testing import make_kernel, make_module

NAMES = st.sampled_from([f"m{number}" for number in range(9)])


@st.composite
def acyclic(draw: st.DrawFn) -> dict[str, list[str]]:
    """Graphs without circles: each name depends on earlier ones alone."""
    names = draw(st.lists(NAMES, unique=True, min_size=1))
    return {
        name: draw(st.lists(st.sampled_from(names[:place]), unique=True)) if place else []
        for place, name in enumerate(names)
    }


@given(acyclic(), st.data())
def test_everything_comes_after_what_it_needs(
    graph: dict[str, list[str]], data: st.DataObject
) -> None:
    """An order holds the roots and their needs, each once, each after its own needs."""
    roots = data.draw(st.lists(st.sampled_from(sorted(graph))))
    order = load_order(graph, roots)
    assert len(set(order)) == len(order)
    place = {name: number for number, name in enumerate(order)}
    assert all(place[need] < place[name] for name in order for need in graph[name])
    reached = set(roots)
    while grown := {need for name in reached for need in graph[name]} - reached:
        reached |= grown
    assert set(order) == reached


@given(acyclic().filter(lambda graph: len(graph) > 1), st.data())
def test_circles_are_named(graph: dict[str, list[str]], data: st.DataObject) -> None:
    """A circle raises an error with the names on it, from each of them."""
    names = data.draw(st.lists(st.sampled_from(sorted(graph)), unique=True, min_size=1))
    for name, following in zip(names, [*names[1:], names[0]], strict=True):
        graph[name].append(following)
    with pytest.raises(ModuleError, match="->"):
        load_order(graph, [names[0]])


def test_long_chains() -> None:
    """A chain deeper than Python's stack is no trouble."""
    graph = {str(number): [str(number + 1)] for number in range(5000)} | {"5000": []}
    assert load_order(graph, ["0"])[::-1] == list(graph)


def test_missing_need_names_who_wants_it() -> None:
    """A need that is not there is reported with the module that needs it."""
    with pytest.raises(ModuleError, match="ring, which blk depends on"):
        load_order({"blk": ["ring"]}, ["blk"])


@given(
    st.lists(NAMES, unique=True),
    st.lists(st.text("abc:*-", min_size=1)),
    st.integers(0, 400),
    st.binary(min_size=1, max_size=4),
)
def test_modinfo_survives_damage(
    depends: list[str], aliases: list[str], at: int, noise: bytes
) -> None:
    """Facts are read back as written, and a damaged file raises nothing but ModuleError."""
    image = make_module(depends, aliases)
    facts = parse_modinfo(image)
    assert [value for key, value in facts if key == "alias"] == aliases
    assert dict(facts)["depends"] == ",".join(depends)
    for broken in (image[:at], image[:at] + noise + image[at + len(noise) :]):
        with contextlib.suppress(ModuleError):
            parse_modinfo(broken)


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [
        ("", bytes),
        (".gz", gzip.compress),
        (".xz", lzma.compress),
        (".zst", zstandard.ZstdCompressor().compress),
    ],
)
def test_compressed_modules(
    tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    """A module comes out of its compression, under its plain name; a damaged one is named."""
    image = make_module(["virtio"], ["virtio:d00000004v*"])
    kernel = make_kernel(tmp_path, {f"virtio-rng.ko{suffix}": compress(image)})
    module = kernel.tree().module("virtio-rng")
    assert (module.name, module.image) == ("virtio_rng", image)
    assert module.path == "kernel/drivers/virtio-rng.ko"
    assert (module.depends, module.aliases) == (("virtio",), ("virtio:d00000004v*",))
    module.file.write_bytes(module.file.read_bytes()[:20])
    with pytest.raises(ModuleError, match=r"virtio-rng\.ko"):
        kernel.tree().module("virtio_rng")


@pytest.fixture
def tree(tmp_path: Path) -> ModuleTree:
    """A kernel with a transport, a disk, a file system and what they need."""
    return make_kernel(
        tmp_path,
        {
            "virtio.ko": make_module(),
            "virtio-ring.ko": make_module(["virtio"]),
            "virtio_mmio.ko": make_module(["virtio", "virtio-ring"], ["acpi*:LNRO0005:*"]),
            "virtio_blk.ko": make_module(["virtio_ring"], ["virtio:d00000002v*"]),
            "crc32c_generic.ko": make_module([], ["crc32c"]),
            "crc32c-intel.ko": make_module([], ["crc32c"]),
            "ext4.ko": make_module(["jbd2"], ["fs-ext4"], ["pre: crc32c nothing"]),
            "jbd2.ko": make_module(["built_in"], [], ["pre: ext4"]),
            "late.ko": make_module([], [], ["post: virtio_mmio"]),
            "broken.ko": make_module(["nowhere"]),
        },
        builtin=["drivers/built-in"],
    ).tree()


def names(tree: ModuleTree, *wanted: str, optional: tuple[str, ...] = ()) -> list[str]:
    return [module.name for module in tree.closure(wanted, optional=optional)]


def test_closure_by_name_and_alias(tree: ModuleTree) -> None:
    """Names, with dashes or underscores, and aliases of devices bring all they need before them."""
    assert names(tree, "virtio-blk") == ["virtio", "virtio_ring", "virtio_blk"]
    assert names(tree, "acpi:LNRO0005:") == ["virtio", "virtio_ring", "virtio_mmio"]
    assert names(tree, "virtio:d00000002v00001AF4", "virtio") == [
        "virtio", "virtio_ring", "virtio_blk",
    ]  # fmt: skip


def test_soft_dependencies(tree: ModuleTree) -> None:
    """Wished modules come before, or after, where they exist, and where that makes no circle."""
    order = names(tree, "fs-ext4")
    assert set(order) == {"jbd2", "crc32c_generic", "crc32c_intel", "ext4"}
    assert order[-1] == "ext4"
    assert names(tree, "late") == ["late", "virtio", "virtio_ring", "virtio_mmio"]


def test_built_in_is_left_out(tree: ModuleTree) -> None:
    """What is built in needs no loading; what is nowhere is an error unless it is optional."""
    assert names(tree, "built-in") == []
    assert names(tree, "virtio", optional=("built_in", "unheard-of")) == ["virtio"]
    with pytest.raises(ModuleError, match=r"'unheard-of'.*spelling"):
        tree.closure(["unheard-of"])
    with pytest.raises(ModuleError, match="nowhere"):
        tree.closure(["broken"])


def test_kernel_without_modules(tmp_path: Path) -> None:
    """A kernel without modules, or without that folder, has none, and says so when asked."""
    for empty in (ModuleTree(None), ModuleTree(tmp_path / "absent")):
        assert len(empty) == 0
        assert "virtio" not in empty
        assert empty.closure([], optional=["virtio"]) == []
        with pytest.raises(ModuleError, match="virtio"):
            empty.closure(["virtio"])


def test_built_in_aliases(tree: ModuleTree) -> None:
    """An alias that a built-in module serves is known, and needs nothing."""
    assert tree.root is not None
    (tree.root / "modules.builtin.modinfo").write_bytes(b"built_in.alias=fs-tar\0x.author=y\0")
    assert tree.resolve("fs-tar") == ()


def test_index_is_preferred(tree: ModuleTree) -> None:
    """Where depmod has left an index, aliases come from there."""
    assert tree.root is not None
    (tree.root / "modules.alias").write_text("# comment\nalias odd-name virtio_blk\n")
    assert tree.resolve("odd_name") == ("virtio_blk",)
    with pytest.raises(ModuleError):
        tree.resolve("acpi:LNRO0005:")


def test_index_of_a_closure(tree: ModuleTree) -> None:
    """The index has each module's needs, the deepest last, its aliases and its wishes."""
    files = index_files(tree.closure(["virtio_blk", "ext4"]))
    lines = files["modules.dep"].decode().splitlines()
    prefix = "kernel/drivers/"
    assert f"{prefix}virtio_blk.ko: {prefix}virtio-ring.ko {prefix}virtio.ko" in lines
    assert f"{prefix}virtio.ko:" in lines
    assert b"alias virtio:d00000002v* virtio_blk\n" in files["modules.alias"]
    assert b"softdep ext4 pre: crc32c nothing\n" in files["modules.softdep"]


def test_names_of_files() -> None:
    """A module's name is that of its file, with underscores, without any suffix."""
    assert module_name("kernel/drivers/a-b.ko.zst") == "a_b"
    assert module_name("a_b") == "a_b"


@pytest.mark.timeout(300)
def test_like_depmod_on_a_real_kernel(tmp_path: Path) -> None:
    """Over all modules of Debian's cloud kernel, needs and aliases are those that depmod finds."""
    depmod = find_tool("depmod")
    if depmod is None:
        pytest.skip("the program depmod is not installed")
    try:
        kernel = debian_kernel()
    except ImageError as error:
        pytest.skip(f"Debian's kernel can't be had: {error}")
    assert kernel.modules is not None
    copy = tmp_path / "lib/modules" / kernel.version
    copy.mkdir(parents=True)
    for path in kernel.modules.iterdir():
        if not path.name.startswith("modules.") or path.name.startswith(
            ("modules.builtin", "modules.order")
        ):
            (copy / path.name).symlink_to(path)
    subprocess.run([depmod, "-b", tmp_path, kernel.version], check=True, timeout=120)
    tree = ModuleTree(kernel.modules)
    everything = tree.closure(
        [module_name(path.name) for path in kernel.modules.glob("kernel/**/*.ko*")]
    )
    files = index_files(everything)

    def needs(text: str) -> dict[str, set[str]]:
        pairs = (line.partition(":") for line in text.splitlines())
        return {module_name(path): set(map(module_name, rest.split())) for path, _, rest in pairs}

    assert needs(files["modules.dep"].decode()) == needs((copy / "modules.dep").read_text())
    ours = {tuple(line.split()) for line in files["modules.alias"].decode().splitlines()}
    listing = (copy / "modules.alias").read_text().splitlines()
    assert ours == {tuple(line.split()) for line in listing if line.startswith("alias ")}
