"""Looking into images: every fact is found where it is, and its source is named."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from linux_loader import Format, ImageError, LoaderError, Protocol, inspect
from linux_loader.kallsyms import find_kallsyms
from linux_loader.kernel_config import embedded_config
from linux_loader.source import Source
from linux_loader.symbols import elf_symbols
from linux_loader.testing import (
    build_bzimage,
    build_elf,
    build_image,
    build_multiboot,
    build_multiboot2,
    build_zboot,
    bzimages,
    compress,
    elf_images,
    image_file,
    lies,
    multiboot_images,
    pvh_note,
)

BANNER = b"\0Linux version %s (%s)\0Linux version 6.9.1-test (me@here) #1 SMP\n\0"
CONFIG = "CONFIG_VIRTIO_MMIO=y\nCONFIG_VIRTIO_PCI=m\n# CONFIG_EXT4_FS is not set\n"
BASE = 0xFFFFFFFF81000000


def ikconfig(text: str = CONFIG) -> bytes:
    return b"IKCFG_ST" + gzip.compress(text.encode()) + b"IKCFG_ED"


def aligned(data: bytes, size: int = 8) -> bytes:
    return data.ljust(-(-len(data) // size) * size, b"\0")


def kallsyms(
    symbols: dict[str, int], *, newer: bool, percpu: bool = True, base: int = BASE
) -> bytes:
    """Write the table as scripts/kallsyms.c does, each letter its own token but for one."""
    tokens = [bytes([code]) if chr(code).isalnum() or code == 0x5F else b"" for code in range(256)]
    tokens[1] = b"virtio_"
    table, offsets = b"", []
    for token in tokens:
        offsets.append(len(table))
        table += token + b"\0"
    names, marks = b"", []
    for number, name in enumerate(symbols):
        if number % 256 == 0:
            marks.append(len(names))
        packed = ("T" + name).encode().replace(b"virtio_", b"\1")
        length = len(packed)
        names += bytes([length] if length < 128 else [length & 0x7F | 0x80, length >> 7]) + packed
    values = [BASE - 1 - address if percpu else address - BASE for address in symbols.values()]
    places = aligned(struct.pack(f"<{len(values)}i", *values)) + struct.pack("<Q", base)
    count = struct.pack("<II", len(symbols), 0)
    index = aligned(struct.pack("<256H", *offsets))
    marks_data = aligned(struct.pack(f"<{len(marks)}I", *marks))
    middle = count + aligned(names) + marks_data
    if not newer:
        middle += aligned(bytes(3 * len(symbols)))
    tail = aligned(table) + index
    return (
        b"\xcc" * 64 + (middle + tail + places if newer else places + middle + tail) + b"\xcc" * 64
    )


SYMBOLS = {f"function_{index}": BASE + 16 * index for index in range(600)} | {
    "virtio_mmio_probe": BASE + 0x10000,
    "x" * 200: BASE + 0x10010,
}


@pytest.mark.parametrize("newer", [True, False])
@pytest.mark.parametrize("percpu", [True, False])
def test_kallsyms_of_both_layouts(newer: bool, percpu: bool) -> None:
    """Names and addresses are found before and behind the tokens, whichever Linux wrote them."""
    assert find_kallsyms(kallsyms(SYMBOLS, newer=newer, percpu=percpu)) == SYMBOLS


@pytest.mark.parametrize("newer", [True, False])
def test_kallsyms_without_a_base(newer: bool) -> None:
    """Where the base is left to a relocation, addresses count from the kernel's beginning."""
    found = find_kallsyms(kallsyms(SYMBOLS, newer=newer, percpu=False, base=0))
    assert found == {name: address - BASE for name, address in SYMBOLS.items()}


@settings(max_examples=40)
@given(st.data())
def test_broken_kallsyms_are_not_found(data: st.DataObject) -> None:
    """A table with one byte changed, or cut, gives symbols or None, and never raises."""
    table = bytearray(kallsyms(SYMBOLS, newer=data.draw(st.booleans())))
    if data.draw(st.booleans()):
        table = table[: data.draw(st.integers(0, len(table)))]
    else:
        table[data.draw(st.integers(0, len(table) - 1))] ^= data.draw(st.integers(1, 255))
    find_kallsyms(bytes(table))


def test_many_false_tables_cost_little() -> None:
    """An image full of digits is given up on, not searched for ever."""
    digits = b"".join(bytes([digit, 0]) for digit in b"0123456789")
    assert find_kallsyms(digits * 20000) is None


def test_embedded_configuration() -> None:
    """IKCONFIG is unpacked; without its end it is an error, elsewhere it is absent."""
    assert embedded_config(b"xx" + ikconfig()) == {
        "CONFIG_VIRTIO_MMIO": "y",
        "CONFIG_VIRTIO_PCI": "m",
    }
    assert embedded_config(b"nothing") is None
    with pytest.raises(ImageError, match="IKCFG_ED"):
        embedded_config(ikconfig()[:-3])
    with pytest.raises(ImageError):
        embedded_config(b"IKCFG_ST" + b"garbage" + b"IKCFG_ED")


def kernel_elf(*parts: bytes) -> bytes:
    return build_elf(
        [(0x1000000, b"\xf4" * 64 + b"".join(aligned(part) for part in parts))],
        entry=0x1000000,
        notes=pvh_note(0x1000010),
        page_aligned=True,
    )


def test_a_boot_image_tells_all(tmp_path: Path) -> None:
    """Header, payload, PVH note, symbols and configuration of a bzImage are reported."""
    inner = kernel_elf(BANNER, ikconfig(), kallsyms(SYMBOLS, newer=True))
    path = tmp_path / "vmlinuz"
    path.write_bytes(build_bzimage(b"\x90" * 600, payload=compress("xz", inner)))
    found = inspect(path)
    assert (found.format, found.architecture) == (Format.BZIMAGE, "x86_64")
    assert (found.version, found.boot_protocol, found.compression) == ("6.1.0-test", "2.15", "xz")
    assert found.entries == {
        Protocol.LINUX64: 0x1000200,
        Protocol.LINUX32: 0x1000000,
        Protocol.PVH: 0x1000010,
    }
    assert found.config_source == "IKCONFIG"
    assert found.drivers["virtio_mmio"].state == "built in"
    assert found.drivers["virtio_pci"].state == "module"
    assert (found.drivers["ext4"].state, found.drivers["ext4"].source) == ("absent", "IKCONFIG")
    assert (found.symbols, found.symbols_source) == (SYMBOLS, "kallsyms")
    assert found.unpacked_size == len(inner)
    assert "entry pvh: 0x1000010" in str(found)


def test_symbols_answer_where_no_configuration_does(tmp_path: Path) -> None:
    """Of a bare kernel, its own symbols tell what is built in; the rest stays open."""
    path = tmp_path / "vmlinux"
    path.write_bytes(kernel_elf(BANNER, kallsyms(SYMBOLS, newer=False)))
    found = inspect(path)
    assert found.version == "6.9.1-test (me@here) #1 SMP"
    assert (found.drivers["virtio_mmio"].state, found.drivers["virtio_mmio"].source) == (
        "built in",
        "kallsyms",
    )
    assert found.drivers["ext4"].state == "not built in"
    path.write_bytes(kernel_elf(BANNER))
    assert inspect(path).drivers["ext4"].state == "unknown"


def test_files_beside_the_image_answer(tmp_path: Path) -> None:
    """config-VERSION beside vmlinuz-VERSION, or its modules lists, are sources by name."""
    boot = tmp_path / "boot"
    boot.mkdir()
    path = boot / "vmlinuz-6.9"
    path.write_bytes(kernel_elf(BANNER))
    modules = tmp_path / "lib" / "modules" / "6.9"
    modules.mkdir(parents=True)
    (modules / "modules.builtin").write_text("kernel/drivers/virtio/virtio_mmio.ko\n")
    (modules / "modules.order").write_text("kernel/drivers/block/virtio_blk.ko.xz\nkernel/x-y.ko\n")
    found = inspect(path).drivers
    assert (found["virtio_mmio"].state, found["virtio_mmio"].source) == (
        "built in",
        str(modules / "modules.builtin"),
    )
    assert found["virtio_blk"].state == "module"
    assert found["ext4"].state == "absent"
    (boot / "config-6.9").write_text(CONFIG)
    found = inspect(path).drivers
    assert (found["virtio_pci"].state, found["virtio_pci"].source) == (
        "module",
        str(boot / "config-6.9"),
    )


@pytest.mark.parametrize(
    ("image", "kind", "entries"),
    [
        (
            build_elf([(0x100000, b"\xf4")], entry=0x100000, bits=32),
            Format.ELF32,
            {Protocol.LINUX32: 0x100000},
        ),
        (build_multiboot(b"\xf4"), Format.MULTIBOOT, {Protocol.MULTIBOOT: 0x100030}),
        (build_multiboot2(b"\xf4"), Format.MULTIBOOT, {Protocol.MULTIBOOT2: 0x100040}),
        (
            bytes(0x1FFF0) + b"\xea\x5b\xe0\0\xf0".ljust(16, b"\0"),
            Format.FIRMWARE,
            {Protocol.RESET: 0xFFFFFFF0},
        ),
        (build_image("arm64", BANNER), Format.ARM64, {}),
        (build_zboot("zstd", build_image("riscv64", BANNER)), Format.RISCV64, {}),
    ],
)
def test_every_kind_is_told(image: bytes, kind: Format, entries: dict[Protocol, int]) -> None:
    """Format and entries of each kind of image that can be loaded."""
    with image_file(image) as fd:
        found = inspect(fd)
    assert (found.format, found.entries) == (kind, entries)
    assert found.size == len(image)
    if kind in (Format.ARM64, Format.RISCV64):
        assert found.version.startswith("6.9.1-test")
        assert found.architecture == kind.value


def test_what_is_no_image_is_refused() -> None:
    """Other files are ImageErrors."""
    for content in (b"", b"text\n" * 300, compress("gzip", b"no image" * 20)):
        with image_file(content) as fd, pytest.raises(ImageError):
            inspect(fd)


kinds = st.one_of(elf_images(), bzimages(), multiboot_images())


@settings(max_examples=80)
@given(st.one_of(kinds, lies(kinds)))
def test_any_image_is_inspected_or_refused(image: bytes) -> None:
    """Hostile images give facts or LoaderError; facts can always be printed."""
    with image_file(image) as fd:
        try:
            found = inspect(fd)
        except LoaderError:
            return
    assert str(found).startswith("format: ")


def with_symbols(bits: int) -> bytes:
    """An executable with a symbol table behind its segments."""
    image = bytearray(build_elf([(0x100000, b"\xf4")], entry=0x100000, bits=bits))
    wide = bits == 64
    names = b"\0main\0data\0"
    form = "<IBBHQQ" if wide else "<IIIBBH"
    fields = (
        [(0, 0, 0, 0, 0, 0), (1, 0, 0, 0, 0x100000, 1), (6, 0, 0, 0, 0x200000, 1)]
        if wide
        else [(0, 0, 0, 0, 0, 0), (1, 0x100000, 1, 0, 0, 0), (6, 0x200000, 1, 0, 0, 0)]
    )
    table = b"".join(struct.pack(form, *item) for item in fields)
    at_names, at_table = len(image), len(image) + len(names)
    at_sections = at_table + len(table)
    section = "<IIQQQQIIQQ" if wide else "<10I"
    sections = b"".join(
        struct.pack(section, *item)
        for item in (
            (0,) * 10,
            (0, 3, 0, 0, at_names, len(names), 0, 0, 1, 0),
            (0, 2, 0, 0, at_table, len(table), 1, 0, 8, struct.calcsize(form)),
        )
    )
    struct.pack_into("<Q" if wide else "<I", image, 40 if wide else 32, at_sections)
    struct.pack_into("<HH", image, 58 if wide else 46, struct.calcsize(section), 3)
    return bytes(image) + names + table + sections


@pytest.mark.parametrize("bits", [32, 64])
def test_elf_symbols(bits: int) -> None:
    """The file's own table is read; lies in it are errors."""
    data = with_symbols(bits)
    assert elf_symbols(Source.of_bytes(data, "x")) == {"main": 0x100000, "data": 0x200000}
    with image_file(data) as fd:
        assert inspect(fd).symbols_source == "ELF"
    at = 58 if bits == 64 else 46
    broken = data[:at] + b"\1\0" + data[at + 2 :]
    with pytest.raises(ImageError, match="e_shentsize"):
        elf_symbols(Source.of_bytes(broken, "x"))


@settings(max_examples=60)
@given(lies(st.sampled_from([with_symbols(32), with_symbols(64)]), within=500))
def test_lying_symbol_tables(data: bytes) -> None:
    """A table that lies is read inside the file, or refused."""
    try:
        elf_symbols(Source.of_bytes(data, "x"))
    except ImageError:
        return
