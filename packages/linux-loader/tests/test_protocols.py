"""What each x86 protocol hands over, read back from guest memory as a kernel reads it."""

from __future__ import annotations

import struct

import pytest

from linux_loader import (
    CmdlineError,
    E820Entry,
    Format,
    ImageError,
    Layout,
    Loaded,
    LoaderError,
    PlacementError,
    Protocol,
    Screen,
    load,
    plan,
)
from linux_loader.decompress import COMPRESSIONS
from linux_loader.testing import (
    build_bzimage,
    build_elf,
    compress,
    image_file,
    memory_map,
    pvh_note,
)
from vm_memory import GuestAddress, GuestMemory

SIZE = 64 << 20
MAP = memory_map(SIZE)
CODE = b"\xf4" * 64
ELF = build_elf([(0x1000000, CODE, 0x3000)], entry=0x1000010, notes=pvh_note(0x1000020))


def boot(kernel: bytes, size: int = SIZE, **arguments) -> tuple[GuestMemory, Loaded]:  # type: ignore[no-untyped-def]
    guest = GuestMemory.from_ranges([(GuestAddress(0), size)])
    with image_file(kernel) as fd:
        return guest, load(guest, fd, memory_map=memory_map(size), **arguments)


def word(guest: GuestMemory, address: int, size: int = 4) -> int:
    return int.from_bytes(guest.read(GuestAddress(address), size), "little")


def string(guest: GuestMemory, address: int) -> bytes:
    return guest.read(GuestAddress(address), 4096).split(b"\0")[0]


def translate(guest: GuestMemory, root: int, address: int) -> int:
    """Walk four levels of page tables as the processor does."""
    table = root
    for shift in (39, 30, 21):
        entry = word(guest, table + ((address >> shift) & 511) * 8, 8)
        assert entry & 3 == 3, "present and writable"
        if entry & 0x80:
            mask = (1 << shift) - 1
            return (entry & ~mask & ~0x1FFF) | (address & mask)
        table = entry & ~0xFFF
    raise AssertionError("no large page")


def test_linux64_zero_page() -> None:
    """The zero page holds what boot.rst demands, and RSI points at it."""
    with image_file(b"initrd!") as initrd:
        guest, loaded = boot(
            ELF, protocol=Protocol.LINUX64, cmdline="console=ttyS0", initrd=initrd, rsdp=0xE0000
        )
    page = loaded.entry.rsi
    assert page == 0x7000
    assert (word(guest, page + 0x1FE, 2), guest.read(GuestAddress(page + 0x202), 4)) == (
        0xAA55,
        b"HdrS",
    )
    assert word(guest, page + 0x210, 1) == 0xFF
    assert string(guest, word(guest, page + 0x228)) == b"console=ttyS0"
    address, size = word(guest, page + 0x218), word(guest, page + 0x21C)
    assert guest.read(GuestAddress(address), size) == b"initrd!"
    assert address % 4096 == 0
    assert word(guest, page + 0x70, 8) == 0xE0000
    count = word(guest, page + 0x1E8, 1)
    table = guest.read(GuestAddress(page + 0x2D0), count * 20)
    assert [E820Entry(*item) for item in struct.iter_unpack("<QQI", table)] == MAP


def test_linux64_processor_state() -> None:
    """Long mode, flat __BOOT_CS and __BOOT_DS in a GDT that says the same, interrupts off."""
    guest, loaded = boot(ELF, protocol=Protocol.LINUX64)
    state = loaded.entry
    assert state.rip == 0x1000010
    assert state.rflags == 2
    assert state.cr0 & 0x80000001 == 0x80000001
    assert (state.cr4 & 0x20, state.efer & 0x500) == (0x20, 0x500)
    assert (state.cs.selector, state.cs.l, state.cs.db) == (0x10, 1, 0)
    for segment in (state.ds, state.es, state.ss):
        assert (segment.selector, segment.base, segment.limit) == (0x18, 0, 0xFFFFFFFF)
    for address in (0, 0x7ABC, 0x1000010, 0xFFFF_FFFF, 0x8000_0000):
        assert translate(guest, state.cr3, address) == address
    for segment in (state.cs, state.ds):
        raw = word(guest, state.gdt.base + segment.selector, 8)
        assert raw >> 40 & 0xF == segment.type | 0  # type bits
        assert raw >> 44 & 1 == segment.s
        assert raw >> 47 & 1 == segment.present
        assert (raw >> 53 & 1, raw >> 54 & 1, raw >> 55 & 1) == (segment.l, segment.db, segment.g)
    assert state.gdt.limit == 47


def test_pvh_start_info() -> None:
    """EBX points at a start info of version 1 with command line, module, map and RSDP."""
    with image_file(b"initrd!") as initrd:
        guest, loaded = boot(ELF, cmdline="quiet", initrd=initrd, rsdp=0xE0000)
    assert loaded.protocol is Protocol.PVH
    assert loaded.entry.rip == 0x1000020
    info = guest.read(GuestAddress(loaded.entry.rbx), 56)
    magic, version, flags, count, modules, cmdline, rsdp, at_map, entries, _ = struct.unpack(
        "<IIIIQQQQII", info
    )
    assert (magic, version, flags, count, rsdp) == (0x336EC578, 1, 0, 1, 0xE0000)
    assert string(guest, cmdline) == b"quiet"
    address, size, _, _ = struct.unpack("<QQQQ", guest.read(GuestAddress(modules), 32))
    assert guest.read(GuestAddress(address), size) == b"initrd!"
    table = guest.read(GuestAddress(at_map), entries * 24)
    assert [E820Entry(*item[:3]) for item in struct.iter_unpack("<QQII", table)] == MAP


def test_pvh_processor_state() -> None:
    """32-bit protected mode without paging, flat segments, TF, IF and VM clear."""
    _, loaded = boot(ELF)
    state = loaded.entry
    assert (state.cr0 & 0x80000001, state.cr4, state.efer) == (1, 0, 0)
    assert state.rflags & 0x20300 == 0
    assert (state.cs.db, state.cs.l, state.cs.type, state.cs.limit) == (1, 0, 11, 0xFFFFFFFF)
    assert (state.tr.base, state.tr.limit, state.tr.type) == (0, 0x67, 11)
    for segment in (state.ds, state.es, state.ss):
        assert (segment.db, segment.type & ~1, segment.base) == (1, 2, 0)


def test_an_elf_without_a_pvh_note_starts_by_linux64() -> None:
    """The image decides the protocol where the caller does not."""
    _, loaded = boot(build_elf([(0x1000000, CODE)], entry=0x1000000))
    assert (loaded.protocol, loaded.format) == (Protocol.LINUX64, Format.ELF64)


def test_pvh_without_its_note_is_refused() -> None:
    """A protocol that the image does not speak is an error."""
    with pytest.raises(ImageError, match="PHYS32_ENTRY"):
        boot(build_elf([(0x1000000, CODE)], entry=0x1000000), protocol=Protocol.PVH)


def test_a_32_bit_kernel_needs_the_32_bit_protocol() -> None:
    """ELF32 is refused by linux64 and started by linux32 with ESI at the zero page."""
    image = build_elf([(0x1000000, CODE)], entry=0x1000004, bits=32)
    with pytest.raises(ImageError, match="linux32"):
        boot(image, protocol=Protocol.LINUX64)
    _, loaded = boot(image, protocol=Protocol.LINUX32)
    assert (loaded.format, loaded.entry.rip, loaded.entry.rsi) == (Format.ELF32, 0x1000004, 0x7000)
    assert loaded.entry.cr0 == 0x11


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_a_boot_image_is_unpacked_here(name: str) -> None:
    """Each compression's payload ends up at its physical address, its header in the zero page."""
    image = build_bzimage(b"\x90" * 32, payload=compress(name, ELF))
    guest, loaded = boot(image)
    assert (loaded.format, loaded.protocol) == (Format.BZIMAGE, Protocol.LINUX64)
    assert loaded.version == "6.1.0-test"
    assert loaded.entry.rip == 0x1000010
    assert guest.read(GuestAddress(0x1000000), 64) == CODE
    assert word(guest, 0x7000 + 0x206, 2) == 0x20F
    assert word(guest, 0x7000 + 0x258, 8) == 0x1000000
    _, by_pvh = boot(image, protocol=Protocol.PVH)
    assert by_pvh.entry.rip == 0x1000020


def test_kaslr_starts_the_image_itself() -> None:
    """The protected-mode code goes to its preferred address and starts 0x200 into it."""
    code = bytes(range(256)) * 8
    image = build_bzimage(code, payload=compress("gzip", ELF))
    guest, loaded = boot(image, kaslr=True)
    assert loaded.entry.rip == 0x1000200
    assert guest.read(GuestAddress(0x1000000), len(code)) == code
    assert word(guest, 0x7000 + 0x214) == 0x1000000
    assert loaded.plan.find("kernel").size >= 0x100000


def test_a_relocatable_image_moves_where_there_is_ram() -> None:
    """With less RAM than its preferred address, the image goes as low as alignment allows."""
    image = build_bzimage(b"\x90" * 2048, kernel_alignment=0x200000, init_size=0x80000)
    _, loaded = boot(image, 8 << 20)
    assert loaded.entry.rip == 0x200200


def test_an_image_that_cannot_move_keeps_its_place() -> None:
    """Without `relocatable` the code goes to code32_start, and its working room is kept free."""
    image = build_bzimage(b"\x90" * 2048, relocatable=False, pref_address=0x100000)
    _, loaded = boot(image)
    assert loaded.entry.rip == 0x100200
    room = loaded.plan.find("kernel's working room")
    assert room.address + room.size == 0x200000
    with pytest.raises(PlacementError, match="working room"):
        boot(build_bzimage(b"\x90" * 2048, relocatable=False, pref_address=0x4000000))


def test_no_room_for_init_size_is_refused() -> None:
    """An image that needs more memory than there is says so."""
    with pytest.raises(PlacementError, match="init_size"):
        boot(build_bzimage(b"\x90" * 2048, init_size=0x7000000))


def test_an_image_without_a_64_bit_entry_starts_by_linux32() -> None:
    """Old images run from their 32-bit entry; asking more of them is refused."""
    image = build_bzimage(b"\x90" * 2048, protocol=0x203, relocatable=False)
    _, loaded = boot(image)
    assert (loaded.protocol, loaded.entry.rip) == (Protocol.LINUX32, 0x100000)
    with pytest.raises(ImageError, match="XLF_KERNEL_64"):
        boot(image, protocol=Protocol.LINUX64)


@pytest.mark.parametrize("loadflags", [0, 1])
def test_the_oldest_images_find_all_at_0x90000(loadflags: int) -> None:
    """Protocol 2.00 has the zero page at 0x90000 and its command line behind, by CL_MAGIC."""
    image = build_bzimage(
        b"\x90" * 2048,
        protocol=0x200,
        relocatable=False,
        loadflags=loadflags,
        code32_start=0x100000 if loadflags else 0x1000,
    )
    guest, loaded = boot(image, cmdline="root=301")
    assert loaded.protocol is Protocol.LINUX32
    assert loaded.entry.rip == (0x100000 if loadflags else 0x1000)
    assert loaded.entry.rsi == 0x90000
    magic, offset = word(guest, 0x90020, 2), word(guest, 0x90022, 2)
    assert magic == 0xA33F
    assert string(guest, 0x90000 + offset) == b"root=301"
    assert word(guest, 0x901E0) == word(guest, 0x90002, 2) == 63 << 10


def test_an_image_that_ends_before_its_entry_is_refused() -> None:
    """A 64-bit entry needs more than 0x200 bytes of code in front of it."""
    with pytest.raises(ImageError, match="0x200"):
        boot(build_bzimage(b"\x90" * 0x200))


def test_an_unknown_payload_is_left_to_the_image() -> None:
    """A compression that the host does not know is unpacked by the kernel's own code."""
    _, loaded = boot(build_bzimage(b"\x90" * 2048, payload=b"NEW!" * 16))
    assert loaded.entry.rip == 0x1000200


def test_pvh_of_a_packed_image_is_refused() -> None:
    """The PVH entry lies inside the payload, so it goes with unpacking only."""
    image = build_bzimage(b"\x90" * 2048, payload=compress("gzip", ELF))
    with pytest.raises(ImageError, match="kaslr"):
        boot(image, protocol=Protocol.PVH, kaslr=True)


def test_kaslr_without_a_decompressor_is_refused() -> None:
    """A bare ELF file has nothing that could randomise it."""
    with pytest.raises(LoaderError, match="decompressor"):
        boot(ELF, kaslr=True)


def test_the_command_line_obeys_the_image() -> None:
    """The limit is the image's own cmdline_size, exactly."""
    image = build_bzimage(b"\x90" * 2048, cmdline_size=100)
    boot(image, cmdline="x" * 100)
    with pytest.raises(CmdlineError, match="100 characters"):
        boot(image, cmdline="x" * 101)
    with pytest.raises(CmdlineError, match="printable"):
        boot(image, cmdline="a\nb")


def test_initrds_are_joined_with_padding() -> None:
    """Several initrds lie one behind the other, each at a multiple of four, zeros between."""
    with image_file(b"abcde") as one, image_file(b"") as two, image_file(b"xyz") as three:
        guest, loaded = boot(ELF, initrd=[one, two, three], protocol=Protocol.LINUX64)
    address, size = word(guest, 0x7218), word(guest, 0x721C)
    assert guest.read(GuestAddress(address), size) == b"abcde\0\0\0xyz"
    assert loaded.plan.find(f"initrd file descriptor {one}").address == address


def test_microcode_comes_first() -> None:
    """An uncompressed archive with microcode is moved before the others, whose order stays."""
    early = b"070701" + b"0" * 104 + b"kernel/x86/microcode/AuthenticAMD.bin\0..."
    with image_file(b"main") as one, image_file(b"next") as two, image_file(early) as three:
        guest, _ = boot(ELF, initrd=[one, two, three], protocol=Protocol.LINUX64)
    address, size = word(guest, 0x7218), word(guest, 0x721C)
    data = guest.read(GuestAddress(address), size)
    padding = bytes(-len(early) % 4)
    assert data == early + padding + b"main" + b"next"


def test_the_initrd_stays_below_the_image_s_limit() -> None:
    """initrd_addr_max is the last byte an initrd may use."""
    image = build_bzimage(b"\x90" * 2048, initrd_addr_max=0x2FFFFFF)
    with image_file(bytes(5000)) as initrd:
        guest, _ = boot(image, initrd=initrd)
    assert word(guest, 0x7218) == 0x3000000 - 8192


def test_an_initrd_without_room_is_refused() -> None:
    """The error tells how much was wanted and where RAM is."""
    with (
        image_file(bytes(8 << 20)) as initrd,
        pytest.raises(PlacementError, match="give the guest more"),
    ):
        boot(build_elf([(0x100000, CODE)], entry=0x100000), 4 << 20, initrd=initrd)


def test_an_initrd_avoids_the_kernel() -> None:
    """Where the kernel lies at the top of RAM, the initrd goes below it."""
    image = build_elf([(SIZE - 0x10000, CODE, 0x10000)], entry=SIZE - 0x10000)
    with image_file(bytes(5000)) as initrd:
        guest, _ = boot(image, initrd=initrd)
    assert word(guest, 0x7218) == SIZE - 0x10000 - 8192


def test_a_layout_moves_the_tables() -> None:
    """Every address of the layout is obeyed."""
    layout = Layout(
        gdt=0x80000, zero_page=0x81000, stack=0x83000, page_tables=0x84000, cmdline=0x90000
    )
    guest, loaded = boot(ELF, protocol=Protocol.LINUX64, layout=layout, cmdline="x")
    state = loaded.entry
    assert (state.gdt.base, state.rsi, state.rsp, state.cr3) == (0x80000, 0x81000, 0x83000, 0x84000)
    assert string(guest, 0x90000) == b"x"
    assert translate(guest, state.cr3, 0x1234567) == 0x1234567
    guest, loaded = boot(ELF, layout=Layout(start_info=0x85000))
    assert loaded.entry.rbx == 0x85000


def test_a_kernel_over_the_tables_is_refused() -> None:
    """A segment that overlaps the loader's own pieces is an error that names both."""
    with pytest.raises(PlacementError, match=r"overlaps zero page|zero page is"):
        boot(build_elf([(0x7800, CODE)], entry=0x7800))


def setup_data(guest: GuestMemory, page: int) -> list[tuple[int, bytes]]:
    """Follow the list as Linux does."""
    result, address = [], word(guest, page + 0x250, 8)
    while address:
        following, kind, length = struct.unpack("<QII", guest.read(GuestAddress(address), 16))
        result.append((kind, guest.read(GuestAddress(address + 16), length)))
        address = following
    return result


def test_more_ranges_than_the_zero_page_holds() -> None:
    """128 ranges lie in the zero page, the others in setup_data; PVH takes any number."""
    many = [E820Entry(index << 20, 1 << 20, 1 + index % 2) for index in range(130)]
    kernel = build_elf([(0x200000, CODE)], entry=0x200000, notes=pvh_note(0x200000))
    with GuestMemory.from_ranges([(GuestAddress(0), 130 << 20)]) as guest, image_file(kernel) as fd:
        load(guest, fd, memory_map=many, protocol=Protocol.LINUX64, rng_seed=b"s" * 33)
        assert word(guest, 0x71E8, 1) == 128
        (first, rest), (second, seed) = setup_data(guest, 0x7000)
        assert (first, second, seed) == (1, 9, b"s" * 33)
        assert [E820Entry(*item) for item in struct.iter_unpack("<QQI", rest)] == many[128:]
        plan(fd, memory_map=many, protocol=Protocol.PVH)


def test_the_seed_reaches_the_kernel_only_by_linux() -> None:
    """PVH and images older than setup_data refuse a seed; without one there is no list."""
    guest, _ = boot(ELF, protocol=Protocol.LINUX64, rng_seed=b"0123456789")
    assert setup_data(guest, 0x7000) == [(9, b"0123456789")]
    guest, _ = boot(ELF, protocol=Protocol.LINUX64)
    assert setup_data(guest, 0x7000) == []
    with pytest.raises(LoaderError, match="leave it out"):
        boot(ELF, protocol=Protocol.PVH, rng_seed=b"x")
    with pytest.raises(ImageError, match="setup_data"):
        boot(build_bzimage(b"\x90" * 2048, protocol=0x208), rng_seed=b"x")


def test_a_screen_is_described() -> None:
    """screen_info tells size, place, stride and colours of the framebuffer."""
    screen = Screen(0x1_F000_0000, 1024, 768, 4352)
    guest, _ = boot(ELF, protocol=Protocol.LINUX64, screen=screen)
    info = guest.read(GuestAddress(0x7000), 64)
    assert info[0x0F] == 0x23
    assert struct.unpack_from("<HHHII", info, 0x12) == (1024, 768, 32, 0xF0000000, 51)
    assert struct.unpack_from("<H8B", info, 0x24) == (4352, 8, 16, 8, 8, 8, 0, 8, 24)
    assert struct.unpack_from("<II", info, 0x36) == (2, 1)
    with pytest.raises(LoaderError, match="leave it out"):
        boot(ELF, screen=screen)


@pytest.mark.parametrize(
    "fields",
    [(0, 0, 1), (0, 1, 0), (0, 65536, 1), (1, 4, 4), (1 << 52, 4, 4), (0, 4, 4, 15), (0, 20000, 4)],
)
def test_impossible_screens_are_refused(fields: tuple[int, ...]) -> None:
    """Sizes, places and strides out of range are errors at once."""
    with pytest.raises(PlacementError, match="screen"):
        Screen(*fields)


def test_bss_is_cleared_unless_memory_is_fresh() -> None:
    """What the file does not fill of a segment becomes zero, whatever was there."""
    guest = GuestMemory.from_ranges([(GuestAddress(0), SIZE)])
    guest.fill(GuestAddress(0x1000000), 0x4000, 0xAA)
    with image_file(ELF) as fd:
        load(guest, fd, memory_map=MAP)
    assert guest.read(GuestAddress(0x1000000), 0x3001) == CODE + bytes(0x3000 - 64) + b"\xaa"
