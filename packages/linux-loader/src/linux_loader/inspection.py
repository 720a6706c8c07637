"""Looking into an image: what it is, what it was built from, what it can do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

from linux_loader.errors import ImageError
from linux_loader.kallsyms import find_kallsyms
from linux_loader.kernel_config import (
    Driver,
    config_beside,
    drivers,
    embedded_config,
    modules_beside,
)
from linux_loader.kinds import Format, Protocol, format_of
from linux_loader.source import Source

if TYPE_CHECKING:
    from linux_loader.pe import PeImage
    from linux_loader.source import File

__all__ = ["Inspection", "inspect"]

# A compressed Image has its header inside, where no firmware looks.
_WITH_STUBS = (Format.BZIMAGE, Format.ARM64, Format.RISCV64)
_BANNER = b"Linux version "


@attrs.frozen
class Inspection:
    """What an image tells about itself. Printed, one line a fact.

    Attributes:
        format: what the file is.
        architecture: `i386`, `x86_64`, `arm64` or `riscv64`; empty where nothing tells.
        size: bytes of the file.
        version: the kernel's version string; empty where there is none.
        compression: of the payload or the whole file, such as `zstd` or `zboot gzip`; empty for
            none.
        boot_protocol: of a boot image, such as `2.15`; else empty.
        entries: each protocol that starts it, with the address where it starts.
        efi: the PE header by which UEFI firmware starts it; None where there is none.
        unpacked_size: bytes of the kernel inside, where it was unpacked.
        config: its configuration, where one was found.
        config_source: `IKCONFIG`, or the path of the file beside the image; else empty.
        drivers: for each of `linux_loader.kernel_config.DRIVERS` whether it is there, and who
            says so.
        symbols: names and virtual addresses; empty where no table was found.
        symbols_source: `ELF`, `kallsyms` or empty.
    """

    format: Format
    architecture: str
    size: int
    version: str
    compression: str
    boot_protocol: str
    entries: dict[Protocol, int]
    efi: PeImage | None
    unpacked_size: int
    config: dict[str, str] | None = attrs.field(repr=False)
    config_source: str
    drivers: dict[str, Driver]
    symbols: dict[str, int] = attrs.field(repr=False)
    symbols_source: str

    def __str__(self) -> str:
        """One line a fact that is known."""
        lines = [f"format: {self.format.value}", f"size: {self.size}"]
        for name in ("architecture", "version", "compression", "boot_protocol", "config_source"):
            value = getattr(self, name)
            if value:
                lines.append(f"{name.replace('_', ' ')}: {value}")
        lines += [f"entry {key.value}: {value:#x}" for key, value in self.entries.items()]
        if self.efi is not None:
            lines.append(
                f"entry efi: {self.efi.entry:#x} of {self.efi.image_size:#x} ({self.efi.machine})"
            )
        if self.symbols:
            lines.append(f"symbols: {len(self.symbols)} from {self.symbols_source}")
        for name, driver in self.drivers.items():
            said = f" ({driver.source})" if driver.source else ""
            lines.append(f"driver {name}: {driver.state}{said}")
        return "\n".join(lines)


class _Facts:
    """What is found on the way."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.sources = [source]
        self.architecture = ""
        self.version = ""
        self.compression = ""
        self.boot_protocol = ""
        self.entries: dict[Protocol, int] = {}
        self.kernel: Source | None = None
        self.symbols: dict[str, int] | None = None


def inspect(file: File) -> Inspection:
    """Look into an image of any known kind; kernels are unpacked for it.

    Args:
        file: path, or an open descriptor.

    Raises:
        ImageError: it is of no known kind, or broken.
        OSError: it cannot be read.
    """
    source = Source.open(file)
    facts = _Facts(source)
    try:
        kind = format_of(source.read_up_to(0, 1024))
        if kind is Format.BZIMAGE:
            _look_at_bzimage(facts)
        elif kind is not None:
            _look_at_elf(facts, source)
            facts.kernel = source
        else:
            kind = _look_at_others(facts)
        return _conclude(facts, kind)
    finally:
        for opened in facts.sources:
            opened.close()


def _look_at_bzimage(facts: _Facts) -> None:
    from linux_loader.bzimage import XLF_KERNEL_64, parse_bzimage
    from linux_loader.decompress import compression_of
    from linux_loader.unpacking import unpack_payload

    source = facts.source
    image = parse_bzimage(source)
    facts.version = image.version
    facts.boot_protocol = f"{image.protocol >> 8}.{image.protocol & 0xFF:02}"
    facts.architecture = "x86_64" if image.xloadflags & XLF_KERNEL_64 else "i386"
    start = image.pref_address if image.relocatable else image.code32_start
    if facts.architecture == "x86_64":
        facts.entries[Protocol.LINUX64] = start + 0x200
    facts.entries[Protocol.LINUX32] = start
    offset, size = image.payload_offset, image.payload_size
    if size < 16:
        return
    facts.compression = compression_of(source.read("payload", offset, 16)) or "unknown"
    if facts.compression == "unknown":
        return
    data = unpack_payload(source.read("payload", offset, size), limit=image.unpacked_limit)
    facts.kernel = Source.of_bytes(data, f"kernel of {source.name}")
    facts.sources.append(facts.kernel)
    _look_at_elf(facts, facts.kernel, inner=True)


def _look_at_elf(facts: _Facts, source: Source, *, inner: bool = False) -> None:
    from linux_loader.elf import EM_X86_64, parse_elf
    from linux_loader.symbols import elf_symbols

    elf = parse_elf(source)
    facts.architecture = "x86_64" if elf.machine == EM_X86_64 else "i386"
    if elf.pvh_entry is not None:
        facts.entries[Protocol.PVH] = elf.pvh_entry
    facts.symbols = elf_symbols(source)
    if inner:
        return
    _look_for_multiboot(facts, elf.entry)
    facts.entries[Protocol.LINUX64 if elf.bits == 64 else Protocol.LINUX32] = elf.entry


def _look_for_multiboot(facts: _Facts, entry: int | None) -> bool:
    from linux_loader.multiboot import find_multiboot
    from linux_loader.multiboot2 import find_multiboot2

    newer = find_multiboot2(facts.source)
    if newer is not None and (newer.entry is not None or entry is not None):
        begin = newer.entry if newer.entry is not None else entry
        assert begin is not None
        facts.entries[Protocol.MULTIBOOT2] = begin
    older = find_multiboot(facts.source)
    if older is not None:
        begin = entry
        if older.addresses is not None:
            begin = older.addresses.entry
        if begin is not None:
            facts.entries[Protocol.MULTIBOOT] = begin
    return newer is not None or older is not None


def _look_at_others(facts: _Facts) -> Format:
    from linux_loader.flat import check_volume, find_volume, is_firmware
    from linux_loader.image import parse_image, unwrap

    source = facts.source
    if _look_for_multiboot(facts, None) and facts.entries:
        facts.architecture = "i386"
        return Format.MULTIBOOT
    if is_firmware(source):
        facts.entries[Protocol.RESET] = 0xFFFFFFF0
        facts.architecture = "i386"
        return Format.FIRMWARE
    if find_volume(source) is not None:
        check_volume(source)
        facts.architecture = "arm64"
        return Format.FIRMWARE
    inner, facts.compression = unwrap(source, facts.sources.append)
    image = parse_image(inner)
    if image is None:
        raise ImageError("image", 0, source.name, "is of no kind that this package knows")
    facts.architecture = image.architecture
    facts.kernel = inner
    return Format.ARM64 if image.architecture == "arm64" else Format.RISCV64


def _conclude(facts: _Facts, kind: Format) -> Inspection:
    from linux_loader.pe import parse_pe

    config, modules = None, None
    symbols, symbols_source = facts.symbols, "ELF"
    if facts.kernel is not None:
        data = facts.kernel.read("kernel", 0, facts.kernel.size)
        facts.version = facts.version or _banner(data)
        embedded = embedded_config(data)
        if embedded is not None:
            config = (embedded, "IKCONFIG")
        if symbols is None:
            symbols, symbols_source = find_kallsyms(data), "kallsyms"
    if config is None:
        config = config_beside(facts.source.name)
    if config is None:
        modules = modules_beside(facts.source.name)
    is_linux = facts.version[:1].isdigit() or symbols or config or modules
    return Inspection(
        format=kind,
        architecture=facts.architecture,
        size=facts.source.size,
        version=facts.version,
        compression=facts.compression,
        boot_protocol=facts.boot_protocol,
        entries=facts.entries,
        efi=parse_pe(facts.source) if kind in _WITH_STUBS else None,
        unpacked_size=facts.kernel.size if facts.kernel is not None else 0,
        config=config[0] if config is not None else None,
        config_source=config[1] if config is not None else "",
        drivers=drivers(config, modules, symbols) if is_linux else {},
        symbols=symbols or {},
        symbols_source=symbols_source if symbols else "",
    )


def _banner(data: bytes) -> str:
    """Find linux_banner: the one that holds a number, not a format."""
    position = data.find(_BANNER)
    while position >= 0:
        start = position + len(_BANNER)
        if data[start : start + 1].isdigit():
            text = data[start : start + 512].split(b"\n")[0].split(b"\0")[0]
            return "".join([chr(byte) if 0x20 <= byte < 0x7F else "?" for byte in text])
        position = data.find(_BANNER, start)
    return ""
