"""Feed hostile images to the loader for as long as wanted: `python -m linux_loader.testing.fuzz`.

Unlike the property tests it keeps no examples and shrinks none: it is for long runs. What it finds
is printed as the seed that makes it again.
"""

from __future__ import annotations

import random
import sys
import time
import tracemalloc
from typing import TYPE_CHECKING

from linux_loader.decompress import COMPRESSIONS
from linux_loader.device_tree_boot import load_image
from linux_loader.errors import LoaderError
from linux_loader.fdt import DeviceTree, Node
from linux_loader.inspection import inspect
from linux_loader.loading import load
from linux_loader.testing.images import (
    build_bzimage,
    build_elf,
    build_image,
    build_multiboot,
    build_multiboot2,
    build_zboot,
    compress,
    image_file,
    memory_map,
    pvh_note,
    reloc_note,
    with_pe,
)
from vm_memory import GuestAddress, GuestMemory

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["fuzz", "hostile_image"]

_SIZE = 32 << 20
_OFFSETS = (4096, 2 << 20, -(2 << 20), 1 << 32, 3)
_MEMORY_LIMIT = 160 << 20
"""What handling one small image may allocate: a window of zstd, and its output."""


def _valid_images() -> list[bytes]:
    code = b"\xf4" * 600
    elf = build_elf([(0x1000000, code, 0x3000)], entry=0x1000000, notes=pvh_note(0x1000010))
    images = [
        elf,
        build_elf([(0x100000, code)], entry=0x100000, bits=32),
        build_elf([(0x1000000, code)], entry=0x1000000, kind=3, notes=reloc_note(4096, 0)),
        build_multiboot(code, memory=0x4000),
        build_multiboot2(code, tags=[(5, 1, bytes(12))]),
        bytes(0xF000) + b"\xf4" * 0xFF0 + b"\xea\x5b\xe0\0\xf0".ljust(16, b"\0"),
    ]
    for name in COMPRESSIONS:
        images.append(build_bzimage(code, payload=compress(name, elf)))
        images.append(build_zboot(name, build_image("arm64", code)))
    for machine, name in ((0xAA64, "arm64"), (0x5064, "riscv64")):
        images.append(with_pe(build_image(name, bytes(0x400)), machine, entry=0x100))
    images.append(with_pe(build_bzimage(code), 0x8664))
    images += [build_bzimage(code, protocol=version) for version in (0x200, 0x203, 0x209, 0x20C)]
    return images


def hostile_image(seed: int, valid: Sequence[bytes]) -> bytes:
    """Return one of the valid images with one to four lies in it, the same for the same seed."""
    chance = random.Random(seed)
    image = bytearray(chance.choice(valid))
    for _ in range(chance.randint(1, 4)):
        kind = chance.random()
        within = len(image) if kind < 0.3 else min(len(image), 1024)
        if within < 8:
            break
        width = chance.choice((1, 2, 4, 8))
        offset = chance.randrange(within - width + 1)
        if kind > 0.95:
            del image[chance.randrange(len(image)) :]
            continue
        value = chance.choice((0, 1, (1 << 8 * width) - 1, chance.getrandbits(8 * width)))
        image[offset : offset + width] = value.to_bytes(width, "little")
    return bytes(image)


def _try(guest: GuestMemory, image: bytes, chance: random.Random) -> None:
    """Give an image to everything that reads images; LoaderError is the one way to refuse it."""
    tree = DeviceTree(Node(""))
    ram = memory_map(_SIZE)
    with image_file(image) as fd:
        for use in (
            lambda: load(guest, fd, memory_map=ram, kaslr=chance.random() < 0.2, zeroed=True),
            lambda: load(guest, fd, memory_map=ram, offset=chance.choice(_OFFSETS), zeroed=True),
            lambda: inspect(fd),
            lambda: load_image(guest, fd, memory_map=ram, device_tree=tree, zeroed=True),
        ):
            try:
                use()
            except LoaderError as error:
                str(error)


def fuzz(seconds: float, *, seed: int = 0) -> int:
    """Try hostile images until the time is over; return how many.

    Args:
        seconds: how long.
        seed: of the first image; each further one counts up.

    Raises:
        AssertionError: an image made the loader raise anything but LoaderError, take more than
            10 seconds, or allocate more than it may; the message names the seed.
    """
    valid = _valid_images()
    end = time.monotonic() + seconds
    first = seed
    tracemalloc.start()
    try:
        with GuestMemory.from_ranges([(GuestAddress(0), _SIZE)]) as guest:
            while time.monotonic() < end:
                image = hostile_image(seed, valid)
                tracemalloc.reset_peak()
                start = time.monotonic()
                try:
                    _try(guest, image, random.Random(seed))
                except Exception as error:
                    raise AssertionError(f"seed {seed} raised {error!r}") from error
                took, peak = time.monotonic() - start, tracemalloc.get_traced_memory()[1]
                if took > 10 or peak > _MEMORY_LIMIT:
                    raise AssertionError(f"seed {seed} took {took:.1f} s and {peak} bytes")
                seed += 1
    finally:
        tracemalloc.stop()
    return seed - first


if __name__ == "__main__":
    wanted = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
    begin = int(sys.argv[2]) if len(sys.argv) > 2 else random.getrandbits(32)
    print(f"{fuzz(wanted, seed=begin)} images from seed {begin} on, none got through")
