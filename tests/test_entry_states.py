"""Entry states on a real KVM: the README's `enter` starts code by every protocol."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest

from kvm_ioctls import DescriptorTable, Kvm, Segment, Vcpu, exits
from kvm_ioctls.testing import assemble
from linux_loader import E820Entry, E820Type, EntryState, Flat, Protocol, load
from linux_loader.testing import (
    build_bzimage,
    build_elf,
    build_multiboot,
    build_multiboot2,
    image_file,
    memory_map,
    pvh_note,
)
from vm_memory import GuestAddress, GuestMemory

pytestmark = pytest.mark.kvm

SIZE = 32 << 20
KERNEL = 0x1000000
ROM = 0xFFFF0000


def enter() -> Callable[[Vcpu, EntryState], None]:
    """The function that the README of linux-loader shows."""
    readme = Path(__file__).parent.parent / "packages" / "linux-loader" / "README.md"
    (code,) = re.findall(r"```python no-run\n(.*?)```", readme.read_text(), re.DOTALL)
    names: dict[str, object] = {
        "attrs": attrs, "Segment": Segment, "DescriptorTable": DescriptorTable,
    }  # fmt: skip
    exec(code, names)
    function: Callable[[Vcpu, EntryState], None] = names["enter"]  # type: ignore[assignment]
    return function


# Each says on port 0x10 what it was handed, then what it pushed onto its stack and took back.
TELL = {
    64: "mov {0}, %eax; mov $0x10, %edx; out %eax, %dx; push $0x1234; pop %rax; out %eax, %dx; hlt",
    32: "mov {0}, %eax; mov $0x10, %edx; out %eax, %dx; push $0x1234; pop %eax; out %eax, %dx; hlt",
    16: "mov {0}, %eax; mov $0x10, %dx; out %eax, %dx; mov $0x1234, %ax; movzwl %ax, %eax; "
    "out %eax, %dx; hlt",
}
HEADER = int.from_bytes(b"HdrS", "little")
START_INFO = 0x336EC578
MULTIBOOT, MULTIBOOT2 = 0x2BADB002, 0x36D76289


def code(bits: int, handed: str) -> bytes:
    return assemble(TELL[bits].format(handed), bits=bits, origin=0)


def elf(bits: int, handed: str, *, wide: bool) -> bytes:
    return build_elf(
        [(KERNEL, code(bits, handed))],
        entry=KERNEL,
        bits=64 if wide else 32,
        notes=pvh_note(KERNEL),
    )


def bzimage(bits: int, handed: str) -> bytes:
    """The 64-bit entry lies 0x200 behind the 32-bit one."""
    text = code(bits, handed)
    return build_bzimage((bytes(0x200) + text if bits == 64 else text).ljust(0x400, b"\x90"))


CASES = [
    (Protocol.LINUX64, elf(64, "0x202(%rsi)", wide=True), None, HEADER),
    (Protocol.LINUX32, elf(32, "0x202(%esi)", wide=False), None, HEADER),
    (Protocol.LINUX64, bzimage(64, "0x202(%rsi)"), None, HEADER),
    (Protocol.LINUX32, bzimage(32, "0x202(%esi)"), None, HEADER),
    (Protocol.PVH, elf(32, "(%ebx)", wide=True), None, START_INFO),
    (Protocol.MULTIBOOT, build_multiboot(code(32, "%eax")), None, MULTIBOOT),
    (Protocol.MULTIBOOT2, build_multiboot2(code(32, "%eax")), None, MULTIBOOT2),
    (Protocol.FLAT, code(16, "%cs"), Flat(0x12340, bits=16), 0x1000),
    (Protocol.FLAT, code(32, "%cr0"), Flat(0x400000, bits=32), 0x11),
    (Protocol.FLAT, code(64, "%cs"), Flat(0x400000, bits=64), 0x10),
]


@pytest.mark.parametrize(
    ("protocol", "image", "flat", "handed"),
    CASES,
    ids=[f"{protocol.value}-{number}" for number, (protocol, _, _, _) in enumerate(CASES)],
)
def test_every_protocol_starts(
    protocol: Protocol, image: bytes, flat: Flat | None, handed: int
) -> None:
    """The code runs in its mode, finds what its protocol hands over, and has a stack."""
    with GuestMemory.from_ranges([(GuestAddress(0), SIZE)]) as memory, image_file(image) as file:
        loaded = load(
            memory,
            file,
            memory_map=memory_map(SIZE),
            protocol=protocol if flat is None else None,
            flat=flat,
        )
        assert loaded.protocol is protocol
        assert said(memory, loaded.entry) == [handed, 0x1234]


def test_firmware_starts_at_the_reset_vector() -> None:
    """The first instruction is 16 bytes below 4 GiB, and jumps within its segment."""
    text = code(16, "%cs")
    image = text.ljust(0xFFF0, b"\0") + b"\xe9\x0d\x00".ljust(16, b"\0")
    ranges = [(GuestAddress(0), SIZE), (GuestAddress(ROM), len(image))]
    with GuestMemory.from_ranges(ranges) as memory, image_file(image) as file:
        loaded = load(memory, file, memory_map=[E820Entry(0, SIZE, E820Type.RAM)])
        assert loaded.protocol is Protocol.RESET
        assert said(memory, loaded.entry) == [0xF000, 0x1234]


def said(memory: GuestMemory, entry: EntryState) -> list[int]:
    """What a guest writes to port 0x10 until it halts."""
    words = []
    with Kvm() as kvm, kvm.create_vm() as vm:
        for slot, region in enumerate(memory.regions):
            vm.set_user_memory_region(
                slot=slot, guest_phys_addr=region.guest_address, memory=region.buffer
            )
        with vm.create_vcpu(0) as vcpu:
            enter()(vcpu, entry)
            for _ in range(10):
                match vcpu.run():
                    case exits.IoOut(port=0x10, data=data):
                        words.append(struct.unpack("<I", data)[0])
                    case exits.Hlt():
                        return words
                    case other:
                        raise AssertionError(f"{other!r} after {words}")
    raise AssertionError(f"no end after {words}")
