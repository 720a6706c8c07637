"""Images as Debian packages them: each is recognised and placed, and boots where it can.

Kernels of three flavours, memtest86+ of both widths, SeaBIOS, OVMF and an arm64 kernel.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from binascii import crc32
from pathlib import Path

import pytest
from lab.dialogue import Dialogue
from lab.direct import Direct
from lab.lab import Lab

from kvm_ioctls.testing import assemble
from linux_loader import E820Entry, E820Type, Format, Protocol, inspect, load, load_image
from linux_loader.decompress import COMPRESSIONS
from linux_loader.elf import parse_elf
from linux_loader.fdt import DeviceTree, Node
from linux_loader.source import Source
from linux_loader.testing import memory_map
from vm_memory import GuestAddress, GuestMemory
from vmm_reference.config import Drive, MachineConfig
from vmm_reference.devices.debug_console import DebugLog
from vmm_reference.image.initramfs import guest_initramfs
from vmm_reference.image.kernels import FLAVOURS, Kernel, debian_kernel
from vmm_reference.image.packages import fetch_package, find_tool
from vmm_reference.layout import EBDA, HIGH_MEMORY, e820_ranges
from vmm_reference.machine import Machine
from vmm_reference.outcome import Outcome

pytestmark = pytest.mark.timeout(600)

SIZE = 256 << 20
FOUR_GIB = 4 << 30
MEMTEST = "memtest86+"
ARM64 = "debian-installer-12-netboot-arm64"
ARM64_KERNEL = "usr/lib/debian-installer/images/12/arm64/text/debian-installer/arm64/linux"
SEABIOS = [("seabios", f"usr/share/seabios/{name}") for name in ("bios.bin", "bios-256k.bin")]
OVMF = [("ovmf", f"usr/share/OVMF/{name}") for name in ("OVMF_CODE.fd", "OVMF_CODE_4M.fd")]


@pytest.fixture(autouse=True)
def packages() -> None:
    """Skip where Debian's packages can't be unpacked, which CI can."""
    if find_tool("dpkg-deb") is None:
        assert "CI" not in os.environ, "dpkg-deb is not here"
        pytest.skip("dpkg-deb is not here to unpack Debian's packages with")


def image(package: str, name: str) -> Path:
    """A file of a package, unpacked into the cache."""
    return fetch_package(package).root / name


@pytest.fixture(params=FLAVOURS)
def kernel(request: pytest.FixtureRequest) -> Kernel:
    """One of Debian's kernels."""
    return debian_kernel(request.param)


# Linux for x86.


def test_a_kernel_tells_about_itself(kernel: Kernel, tmp_path: Path) -> None:
    """Version, compression, entries and symbols; drivers from each source that can be there."""
    found = inspect(kernel.vmlinuz)
    assert (found.format, found.architecture) == (Format.BZIMAGE, "x86_64")
    assert found.version.startswith(f"{kernel.version} ")
    assert found.compression in COMPRESSIONS
    assert found.boot_protocol == "2.15"
    assert found.unpacked_size > 3 * found.size
    assert found.entries[Protocol.LINUX64] == 0x1000200
    assert found.entries[Protocol.LINUX32] == 0x1000000
    assert found.efi is not None
    (text,) = [section for section in found.efi.sections if section.name == ".text"]
    assert text.address <= found.efi.entry < text.address + text.memory_size
    assert (found.efi.machine, found.efi.image_size >= found.size) == ("x86_64", True)
    # Debian's kernels embed no configuration; their packages lay one beside them.
    assert found.config_source == str(kernel.vmlinuz.parent / f"config-{kernel.version}")
    assert found.config is not None
    assert found.config["CONFIG_PVH"] == "y"
    assert found.symbols_source == "kallsyms"
    # The note's entry is the function's physical address; the kernel's text begins at 16 MiB.
    assert found.entries[Protocol.PVH] >= 0x1000000
    assert found.symbols["pvh_start_xen"] & 0xFFFFFFF == found.entries[Protocol.PVH]

    # The same image with only its modules' lists beside it, then alone.
    listed = tmp_path / "boot" / kernel.vmlinuz.name
    listed.parent.mkdir()
    shutil.copy(kernel.vmlinuz, listed)
    assert kernel.modules is not None
    beside = tmp_path / "lib/modules" / kernel.version
    beside.mkdir(parents=True)
    for name in ("modules.builtin", "modules.order"):
        shutil.copy(kernel.modules / name, beside / name)
    by_list = inspect(listed)
    shutil.rmtree(tmp_path / "lib")
    by_symbols = inspect(listed)
    for name, driver in found.drivers.items():
        assert driver.source == found.config_source
        assert by_list.drivers[name].state == driver.state, name
        expected = "built in" if driver.state == "built in" else "not built in"
        assert (by_symbols.drivers[name].state, by_symbols.drivers[name].source) == (
            expected,
            "kallsyms",
        ), name


def test_a_kernel_is_the_same_by_every_way_into_memory(kernel: Kernel, tmp_path: Path) -> None:
    """Unpacked, from the cache, mapped and copied: the same bytes at the same places."""
    seen = set()
    for protocol, cache, map_files, zeroed in (
        (Protocol.LINUX64, None, True, False),
        (Protocol.LINUX64, tmp_path, True, False),
        (Protocol.PVH, tmp_path, False, False),
        (Protocol.PVH, tmp_path, False, True),
    ):
        with GuestMemory.from_ranges([(GuestAddress(0), SIZE)]) as guest:
            loaded = load(
                guest,
                kernel.vmlinuz,
                memory_map=memory_map(SIZE),
                protocol=protocol,
                cache=cache,
                map_files=map_files,
                zeroed=zeroed,
            )
            assert loaded.version.startswith(f"{kernel.version} ")
            assert any(guest.read(GuestAddress(loaded.entry.rip), 16))
            assert (loaded.mapped > 16 << 20) == (cache is not None and map_files)
            pieces = [item for item in loaded.plan.placements if item.name.startswith("kernel")]
            seen.add(tuple(crc32(guest.read(GuestAddress(p.address), p.size)) for p in pieces))
    assert len(seen) == 1


def test_a_kernel_may_unpack_itself(kernel: Kernel) -> None:
    """With kaslr the code starts at its preferred address and keeps room to unpack."""
    with GuestMemory.from_ranges([(GuestAddress(0), SIZE)]) as guest:
        loaded = load(guest, kernel.vmlinuz, memory_map=memory_map(SIZE), kaslr=True)
        assert loaded.entry.rip == 0x1000200
        assert loaded.plan.find("kernel").size > 32 << 20


def test_the_kernel_inside_has_a_pvh_entry(kernel: Kernel, tmp_path: Path) -> None:
    """The vmlinux out of a packaged kernel is an ELF64 image that starts by PVH too."""
    with GuestMemory.from_ranges([(GuestAddress(0), SIZE)]) as guest:
        load(guest, kernel.vmlinuz, memory_map=memory_map(SIZE), cache=tmp_path)
        (vmlinux,) = tmp_path.glob("*.elf")
        with Source.open(vmlinux) as source:
            assert parse_elf(source).pvh_entry
        loaded = load(guest, vmlinux, memory_map=memory_map(SIZE))
        assert (loaded.format, loaded.protocol) == (Format.ELF64, Protocol.PVH)


# Others.


@pytest.mark.parametrize(
    ("name", "architecture", "protocol", "entry"),
    [
        ("memtest86+x64.bin", "x86_64", Protocol.LINUX64, 0x100200),
        ("memtest86+ia32.bin", "i386", Protocol.LINUX32, 0x100000),
    ],
)
def test_memtest86_is_placed(name: str, architecture: str, protocol: Protocol, entry: int) -> None:
    """A boot image that is not Linux, with no payload, starts at its own entry."""
    path = image(MEMTEST, f"boot/{name}")
    found = inspect(path)
    assert (found.format, found.architecture) == (Format.BZIMAGE, architecture)
    assert (found.version, found.entries[protocol]) == ("Memtest86+ v6.10", entry)
    with GuestMemory.from_ranges([(GuestAddress(0), SIZE)]) as guest:
        loaded = load(guest, path, memory_map=memory_map(SIZE))
        assert (loaded.protocol, loaded.entry.rip) == (protocol, entry)


@pytest.mark.parametrize(("package", "name"), SEABIOS + OVMF, ids=lambda word: Path(word).name)
def test_firmware_ends_at_4_gib(package: str, name: str) -> None:
    """Firmware is known by its reset vector; all of it lies below 4 GiB, its end below 1 MiB."""
    path = image(package, name)
    data = path.read_bytes()
    found = inspect(path)
    assert (found.format, found.entries) == (Format.FIRMWARE, {Protocol.RESET: 0xFFFFFFF0})
    rom = FOUR_GIB - len(data)
    with GuestMemory.from_ranges(
        [(GuestAddress(0), 16 << 20), (GuestAddress(rom), len(data))]
    ) as guest:
        loaded = load(guest, path, memory_map=memory_map(16 << 20))
        assert loaded.protocol is Protocol.RESET
        assert (loaded.entry.cs.base, loaded.entry.rip) == (0xFFFF0000, 0xFFF0)
        assert guest.read(GuestAddress(rom), len(data)) == data
        low = min(len(data), 128 << 10)
        assert guest.read(GuestAddress((1 << 20) - low), low) == data[-low:]


@pytest.mark.parametrize(
    "name", ["usr/share/AAVMF/AAVMF_CODE.fd", "usr/share/qemu-efi-aarch64/QEMU_EFI.fd"]
)
def test_arm64_firmware_is_placed(name: str) -> None:
    """UEFI for arm64 is known by its volume, and finds the device tree where RAM begins."""
    path = image("qemu-efi-aarch64", name)
    found = inspect(path)
    assert (found.format, found.architecture) == (Format.FIRMWARE, "arm64")
    data, base = path.read_bytes(), 1 << 30
    ranges = [(GuestAddress(0), len(data)), (GuestAddress(base), 16 << 20)]
    with GuestMemory.from_ranges(ranges) as guest:
        loaded = load_image(
            guest, path, memory_map=[E820Entry(base, 16 << 20, E820Type.RAM)],
            device_tree=DeviceTree(Node("")), firmware=0,
        )  # fmt: skip
        assert (loaded.entry.pc, loaded.entry.arguments[0]) == (0, base)
        assert crc32(guest.read(GuestAddress(0), len(data))) == crc32(data)
        assert guest.read(GuestAddress(base), 4) == b"\xd0\x0d\xfe\xed"


def test_an_arm64_kernel_is_placed() -> None:
    """It tells what it is, lies 2 MiB-aligned in RAM, and finds a device tree behind it."""
    path = image(ARM64, ARM64_KERNEL)
    found = inspect(path)
    assert (found.format, found.architecture) == (Format.ARM64, "arm64")
    assert re.match(r"\d+\.\d+\.\d+-\d+-arm64 ", found.version)
    assert found.efi is not None
    assert (found.efi.machine, found.efi.sections[0].name) == ("arm64", ".text")
    assert found.symbols["_stext"] < found.symbols["kernel_init"] < found.symbols["_etext"]
    base = 1 << 30
    machine = DeviceTree(Node(""))
    with GuestMemory.from_ranges([(GuestAddress(base), SIZE)]) as guest:
        loaded = load_image(
            guest,
            path,
            memory_map=[E820Entry(base, SIZE, E820Type.RAM)],
            device_tree=machine,
            cmdline="console=ttyAMA0",
        )
        assert (loaded.entry.pc, loaded.wrapping) == (base, "")
        assert loaded.mapped > 16 << 20
        data = path.read_bytes()
        assert crc32(guest.read(GuestAddress(base), len(data))) == crc32(data)
        (tree,) = [item for item in loaded.placements if item.name == "device tree"]
        assert loaded.entry.arguments[0] == tree.address
        assert tree.address >= base + len(data)
        read = DeviceTree.parse(guest.read(GuestAddress(tree.address), tree.size))
        assert read.root.find("chosen").properties["bootargs"] == b"console=ttyAMA0\0"


# Booted.


@pytest.mark.linux
@pytest.mark.parametrize("width", ["x64", "ia32"])
def test_memtest86_says_so_itself(width: str, linux: Lab | Direct, vmm: str) -> None:
    """It starts by either Linux protocol and draws its screen on the serial port."""
    command: list[str | Path] = [
        vmm, "run", "--kernel", image(MEMTEST, f"boot/memtest86+{width}.bin"),
        "--memory", "64M", "--cmdline", "console=ttyS0,115200",
    ]  # fmt: skip

    def dialogue(job: Dialogue) -> str:
        return job.read_until(r"Memtest86\+ v6\.10", 200)

    linux.converse(command, dialogue)


@pytest.mark.linux
@pytest.mark.parametrize(
    ("flavour", "protocol", "memory"), [("rt", "linux64", 256 << 20), ("cloud", "pvh", 3073 << 20)]
)
def test_a_kernel_reads_what_it_was_handed(
    flavour: str, protocol: str, memory: int, linux: Lab | Direct, vmm: str
) -> None:
    """Its own boot log has the memory map and the command line; our init's self-check passes."""
    kernel = debian_kernel(flavour)
    cmdline = 'console=ttyS0 vmm.check word="two words"'
    result = linux.run(
        [vmm, "run", "--kernel", kernel.vmlinuz, "--initrd", guest_initramfs(kernel),
         "--protocol", protocol, "--memory", str(memory), "--cmdline", cmdline],
        timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
    log = result.stdout.replace("\r", "")
    assert "vmm-check: result=ok" in log
    assert ("PREEMPT_RT" in log) == (flavour == "rt")
    assert f"Command line: {cmdline}\n" in log
    found = re.findall(r"BIOS-e820: \[mem 0x([0-9a-f]+)-0x([0-9a-f]+)\] (usable|reserved)", log)
    expected = [(start, start + size - 1, usable) for start, size, usable in e820_ranges(memory)]
    if protocol == "pvh":  # there the kernel itself adds the range from 640 KiB to 1 MiB
        expected[1:3] = [(EBDA, HIGH_MEMORY - 1, False)]
    assert [(int(first, 16), int(last, 16), kind == "usable") for first, last, kind in found] == (
        expected
    )


# The command `vmm`, whose kernels go 48 MiB further than they were linked for.
MOVED = """
import functools, sys
from vmm_reference import boot, cli
boot.load = functools.partial(boot.load, offset=48 << 20)
sys.exit(cli.main())
"""


@pytest.mark.linux
def test_a_kernel_runs_where_it_was_moved_to(linux: Lab | Direct) -> None:
    """Unpacked on the host and put elsewhere, it finds out where it lies, and says so."""
    kernel = debian_kernel("cloud")
    command: list[str | Path] = [
        sys.executable, "-c", MOVED, "run", "--kernel", kernel.vmlinuz, "--initrd",
        guest_initramfs(kernel), "--cmdline", "console=ttyS0 quiet", "--memory", "256M",
    ]  # fmt: skip

    def dialogue(job: Dialogue) -> str:
        job.read_until("guest:", 200)
        job.write("grep Kernel /proc/iomem; poweroff -f\n")
        return job.read_until(r"Kernel code", 60)

    text = linux.converse(command, dialogue, pty=True)
    assert re.search(r"\b04000000-[0-9a-f]{8} : Kernel code", text), text


@pytest.mark.linux
@pytest.mark.parametrize("name", ["bios.bin", "bios-microvm.bin"])
def test_seabios_says_so_itself(name: str, linux: Lab | Direct, vmm: str, share: Path) -> None:
    """It starts at the reset vector, knows the debug port by its answer, and looks for a disk."""
    debug = share / f"{name}.txt"  # apart from what it writes to the serial line, at the same time
    debug.touch()
    command: list[str | Path] = [
        vmm, "run", "--firmware", image("seabios", f"usr/share/seabios/{name}"),
        "--memory", "64M", "--device", f"debug-console,{debug}",
    ]  # fmt: skip
    linux.converse(command, lambda job: job.read_until("No bootable device", 200))
    text = debug.read_text()
    assert text.startswith("SeaBIOS (version ")
    assert "qemu/e820: addr 0x0000000000000000 len 0x0000000004000000 [RAM]" in text


# Says that it runs, and powers off.
BOOT_SECTOR = """
    mov $0x402, %dx
    mov $'!', %al
    out %al, %dx
    mov $0x600, %dx
    mov $0x34, %al
    out %al, %dx
    hlt
"""


@pytest.mark.kvm
@pytest.mark.parametrize(
    ("name", "transport", "found"),
    [
        ("bios-microvm.bin", "mmio", r"found virtio-blk-mmio at 0xc0001000"),
        ("bios-256k.bin", "pci", r"found virtio-blk at 00:03\.0"),
    ],
)
def test_seabios_starts_a_disk_on_any_kvm(
    name: str, transport: str, found: str, tmp_path: Path
) -> None:
    """Told of memory and devices by fw_cfg and ACPI, it finds a virtio disk and runs its sector."""
    disk, log = tmp_path / "disk.img", tmp_path / "log"
    disk.write_bytes(
        assemble(BOOT_SECTOR, bits=16, origin=0x7C00).ljust(510, b"\0")
        + b"\x55\xaa"
        + bytes(1 << 20)
    )
    config = MachineConfig(
        firmware=str(image("seabios", f"usr/share/seabios/{name}")),
        memory="64M",
        transport=transport,
        drives=[Drive(str(disk))],
        devices=[DebugLog(str(log))],
    )
    with Machine(config) as machine:
        assert machine.wait(100) is Outcome.POWER_OFF
    text = log.read_text()
    assert re.search(found, text), text
    assert "addr 0x0000000000000000 len 0x0000000004000000 [RAM]" in text
    assert text.rstrip().endswith("!")
