"""arm64 and riscv64 Images: unwrapped, placed by their rules, handed a device tree."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from linux_loader import (
    E820Entry,
    Format,
    LoadedImage,
    LoaderError,
    PlacementError,
    inspect,
    load_image,
    plan,
)
from linux_loader.decompress import COMPRESSIONS
from linux_loader.fdt import DeviceTree, Node, cells
from linux_loader.testing import build_image, build_zboot, compress, image_file, lies
from vm_memory import GuestAddress, GuestMemory

BASE, SIZE = 0x40000000, 64 << 20
MAP = [E820Entry(BASE, SIZE, 1)]
CODE = b"\x1f\x20\x03\xd5" * 100
both = pytest.mark.parametrize("architecture", ["arm64", "riscv64"])


def boot(  # type: ignore[no-untyped-def]
    kernel: bytes, tree: DeviceTree | None = None, **arguments
) -> tuple[GuestMemory, LoadedImage]:
    guest = GuestMemory.from_ranges([(GuestAddress(BASE), SIZE)])
    guest.fill(GuestAddress(BASE), 0x10000, 0xAA)
    tree = DeviceTree(Node("")) if tree is None else tree
    with image_file(kernel) as fd:
        return guest, load_image(guest, fd, memory_map=MAP, device_tree=tree, **arguments)


def handed(guest: GuestMemory, loaded: LoadedImage) -> DeviceTree:
    """Read the tree where the register says."""
    address = loaded.entry.arguments[0 if loaded.entry.architecture == "arm64" else 1]
    assert address % 8 == 0
    size = int.from_bytes(guest.read(GuestAddress(address + 4), 4), "big")
    return DeviceTree.parse(guest.read(GuestAddress(address), size))


@both
@pytest.mark.parametrize("text_offset", [0, 0x80000, 0x200000])
def test_an_image_lies_behind_a_2_mib_boundary(architecture: str, text_offset: int) -> None:
    """The kernel goes to text_offset behind the start of RAM; its BSS is zero."""
    image = build_image(architecture, CODE, text_offset=text_offset, image_size=0x8000)
    guest, loaded = boot(image)
    assert loaded.entry.pc == BASE + text_offset
    assert guest.read(GuestAddress(loaded.entry.pc), 0x8000) == image.ljust(0x8000, b"\0")
    assert loaded.entry.pstate == (0x3C5 if architecture == "arm64" else 0)


@both
def test_the_tree_tells_what_was_loaded(architecture: str) -> None:
    """/chosen holds command line, initrd and seed; memory nodes are added; the rest is kept."""
    tree = DeviceTree(Node("", {"model": b"demo\0"}))
    with image_file(b"first") as one, image_file(b"second") as two:
        guest, loaded = boot(
            build_image(architecture, CODE),
            tree,
            cmdline="console=hvc0",
            initrd=[one, two],
            rng_seed=b"seed" * 8,
        )
    found = handed(guest, loaded)
    assert found == loaded.device_tree
    chosen = found.root.find("/chosen").properties
    assert chosen["bootargs"] == b"console=hvc0\0"
    assert chosen["rng-seed"] == b"seed" * 8
    (start,) = struct.unpack(">Q", chosen["linux,initrd-start"])
    (end,) = struct.unpack(">Q", chosen["linux,initrd-end"])
    assert guest.read(GuestAddress(start), end - start) == b"first\0\0\0second"
    memory = found.root.find(f"/memory@{BASE:x}").properties
    assert memory["reg"] == struct.pack(">QQ", BASE, SIZE)
    assert found.root.properties["model"] == b"demo\0"
    assert tree == DeviceTree(Node("", {"model": b"demo\0"})), "the caller's tree is not touched"
    assert "device tree" in str(loaded)


def test_a_tree_with_memory_is_left_alone() -> None:
    """Where the tree describes memory, nothing is added to it."""
    node = Node("memory@0", {"device_type": b"memory\0", "reg": cells(0, 1)})
    guest, loaded = boot(build_image("arm64", CODE), DeviceTree(Node("", {}, [node])))
    assert [child.name for child in handed(guest, loaded).root.children] == ["memory@0", "chosen"]
    narrow = DeviceTree(Node("", {"#address-cells": cells(1)}))
    with pytest.raises(PlacementError, match="#address-cells"):
        boot(build_image("arm64", CODE), narrow)


@both
@pytest.mark.parametrize("name", COMPRESSIONS)
@pytest.mark.parametrize("zboot", [False, True])
def test_wrapped_images_are_unwrapped(architecture: str, name: str, zboot: bool) -> None:
    """Compressed Images and zboot images load as the Image they hold."""
    image = build_image(architecture, CODE)
    guest, loaded = boot(build_zboot(name, image) if zboot else compress(name, image))
    assert loaded.wrapping == (f"zboot {name}" if zboot else name)
    assert guest.read(GuestAddress(loaded.entry.pc), len(image)) == image


def test_the_oldest_arm64_images_have_a_fixed_offset() -> None:
    """An image_size of 0 means text_offset 0x80000, whatever the field says."""
    _, loaded = boot(build_image("arm64", CODE, image_size=0, text_offset=0x1234))
    assert loaded.entry.pc == BASE + 0x80000


@pytest.mark.parametrize(
    ("image", "field"),
    [
        (build_image("riscv64", CODE, image_size=0), "image_size"),
        (build_image("arm64", CODE, image_size=1 << 40), "image_size"),
        (build_image("arm64", CODE, image_size=SIZE), "device tree"),
        (build_image("arm64", CODE, image_size=SIZE + 1), "image_size"),
        (build_image("arm64", CODE, text_offset=1 << 31), "text_offset"),
        (build_image("arm64", CODE, text_offset=5), "text_offset"),
        (build_image("arm64", CODE)[:60], "magic"),
        (b"MZ" + bytes(100), "magic"),
        (build_zboot("gzip", b"no image" * 10), "magic"),
        (build_zboot("gzip", CODE).replace(b"gzip", b"zstd"), "comp_type"),
        (build_zboot("gzip", CODE)[:200][:70], "zboot payload"),
    ],
)
def test_lies_are_named(image: bytes, field: str) -> None:
    """Sizes, offsets and wrappings that cannot be are errors with the field's name."""
    with pytest.raises(LoaderError) as caught:
        boot(image)
    assert caught.value.field == field


valid = st.builds(
    build_image,
    st.sampled_from(["arm64", "riscv64"]),
    st.binary(min_size=1, max_size=100),
    text_offset=st.sampled_from([0, 0x80000, 0x200000]),
    image_size=st.sampled_from([None, 0x10000]),
)
wrapped = st.one_of(
    valid,
    st.builds(build_zboot, st.sampled_from(COMPRESSIONS), valid),
    st.builds(compress, st.sampled_from(COMPRESSIONS), valid),
)


@settings(max_examples=80)
@given(st.one_of(wrapped, lies(wrapped, within=80)))
def test_any_image_is_loaded_or_refused(image: bytes) -> None:
    """Hostile images raise LoaderError, or lie inside RAM with their tree."""
    try:
        guest, loaded = boot(image)
    except LoaderError:
        return
    assert all(item.address >= BASE for item in loaded.placements)
    assert all(item.address + item.size <= BASE + SIZE for item in loaded.placements)
    handed(guest, loaded)
    guest.close()


def test_load_sends_them_to_load_image() -> None:
    """The x86 loader names the function that takes such an image."""
    with image_file(build_image("arm64", CODE)) as fd, pytest.raises(LoaderError, match="load_ima"):
        plan(fd, memory_map=MAP)


@both
def test_command_lines_and_initrds_that_do_not_fit(architecture: str) -> None:
    """The kernel's own limit of the command line and the guest's RAM are obeyed."""
    image = build_image(architecture, CODE)
    with pytest.raises(LoaderError, match="characters"):
        boot(image, cmdline="x" * 2048)
    with image_file(bytes(SIZE)) as big, pytest.raises(PlacementError, match="initrd"):
        boot(image, initrd=big)


def volume(
    *, length: int | None = None, header: int = 72, spoil: int = 0, front: bool = False
) -> bytes:
    """arm64 firmware: a volume of UEFI that begins with a branch, or has one in front."""
    size = 0x4000 if length is None else length
    fields = (0x14000020, b"guid", size, b"_FVH", 0x4FEFF, header, 0, 0, 0, 2)
    head = bytearray(struct.pack("<I12x16sQ4sIHHHBB", *fields).ljust(header + header % 2, b"\0"))
    total = sum(struct.unpack(f"<{len(head) // 2}H", head)) + spoil
    head[0x32:0x34] = struct.pack("<H", -total & 0xFFFF)
    data = bytes(head).ljust(0x4000, b"\xd5")
    return struct.pack("<I", 0x14000400).ljust(0x1000, b"\xff") + data if front else data


def start_firmware(data: bytes, at: int = 0, **arguments: object) -> LoadedImage:
    ranges = [(GuestAddress(0), 0x8000), (GuestAddress(BASE), SIZE)]
    with GuestMemory.from_ranges(ranges) as guest, image_file(data) as fd:
        loaded = load_image(
            guest, fd, memory_map=MAP, device_tree=DeviceTree(Node("")), firmware=at,
            **arguments,  # type: ignore[arg-type]
        )  # fmt: skip
        assert guest.read(GuestAddress(at), len(data)) == data
        memory = handed(guest, loaded).root.find(f"memory@{BASE:x}")
        assert memory.properties["device_type"] == b"memory\0"
    return loaded


@pytest.mark.parametrize("front", [False, True])
def test_arm64_starts_by_uefi(front: bool) -> None:
    """The firmware lies outside RAM, begins with its first instruction, and finds the tree."""
    loaded = start_firmware(volume(front=front), 0x2000)
    assert (loaded.entry.pc, loaded.entry.architecture) == (0x2000, "arm64")
    assert loaded.entry.arguments == (BASE, 0, 0, 0)
    assert (loaded.wrapping, loaded.entry.pstate) == ("", 0x3C5)
    with image_file(volume(front=front)) as fd:
        found = inspect(fd)
    assert (found.format, found.architecture, found.entries) == (Format.FIRMWARE, "arm64", {})


@pytest.mark.parametrize(
    ("data", "field"),
    [
        (b"", "ZeroVector"),
        (bytes(4) + volume()[4:], "ZeroVector"),
        (volume().replace(b"_FVH", b"_FVX"), "ZeroVector"),
        (volume(front=True)[:0x1020], "ZeroVector"),
        (volume(front=True)[:0x4FFF], "FvLength"),
        (volume(length=0x4001), "FvLength"),
        (volume(length=63), "FvLength"),
        (volume(header=62), "HeaderLength"),
        (volume(header=73), "HeaderLength"),
        (volume(header=4098), "HeaderLength"),
        (volume(spoil=1), "Checksum"),
    ],
)
def test_firmware_that_lies_is_refused(data: bytes, field: str) -> None:
    """Each field of the volume's header by its name, by inspect as well."""
    with pytest.raises(LoaderError) as caught:
        start_firmware(data)
    assert caught.value.field == field
    with image_file(data) as fd, pytest.raises(LoaderError):
        inspect(fd)


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"at": 0x10}, "firmware"),
        ({"at": -4096}, "firmware"),
        ({"at": 1 << 48}, "firmware"),
        ({"at": BASE - 0x1000}, "firmware"),
        ({"at": 0x100000}, "firmware"),
        ({"cmdline": "x"}, "cmdline"),
        ({"rng_seed": b"x"}, "rng_seed"),
        ({"initrd": __file__}, "initrd"),
    ],
)
def test_what_uefi_cannot_take_is_refused(arguments: dict[str, object], field: str) -> None:
    """Places that are no pages, in RAM or without memory, and what firmware has to find itself."""
    with pytest.raises(LoaderError) as caught:
        start_firmware(volume(), **arguments)  # type: ignore[arg-type]
    assert caught.value.field == field


@given(lies(st.just(volume()), within=80))
def test_a_lie_in_a_volume_is_started_or_refused(data: bytes) -> None:
    """And nothing else."""
    try:
        loaded = start_firmware(data)
    except LoaderError:
        return
    assert loaded.entry.pc == 0
