"""Loading kernels into guest memory: against a copy of the same bytes, and the libraries alone.

The kernels are Debian's: the cloud kernel (LZ4, some 50 MB unpacked) and the generic one (XZ).
Guest memory is touched beforehand, so that no row measures the host's page faults; only the mapped
rows begin with fresh memory, which they replace.
"""

from __future__ import annotations

import lzma
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from time import perf_counter

from benchmarks.harness import Bench, Goal, Measure, Row, Skip, per_call
from linux_loader import Placement, Protocol, load, plan, unpack_kernel
from linux_loader.bzimage import parse_bzimage
from linux_loader.source import Source
from linux_loader.testing import build_elf, image_file, memory_map, pvh_note
from linux_loader.unpacking import unpack_payload
from vm_memory import GuestAddress, GuestMemory, Permissions

SIZE = 256 << 20
MAP = memory_map(SIZE)


def rows(bench: Bench) -> Iterator[Row]:
    """Each row in turn; see the module's text."""
    from vmm_reference.image import debian_kernel

    cloud, generic = debian_kernel("cloud").vmlinuz, debian_kernel("generic").vmlinuz
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=Path.cwd())))
        vmlinux = folder / "vmlinux"
        vmlinux.write_bytes(unpack_kernel(cloud))
        cache = folder / "cache"
        guest = stack.enter_context(GuestMemory.from_ranges([(GuestAddress(0), SIZE)]))
        guest.fill(GuestAddress(0), SIZE, 1)
        for path in (cloud, generic):
            load(guest, path, memory_map=MAP, cache=cache)
        bench.note(f"{cloud.name}: {vmlinux.stat().st_size / 1e6:.1f} MB unpacked")

        yield from copied(bench, guest, vmlinux, cloud, generic, cache)
        yield from mapped(bench, vmlinux, cloud, cache)
        yield cold(bench, guest, vmlinux)
        yield from first(bench, guest, cloud, generic, folder / "fresh")
        yield from planning(bench)


def kernel_pieces(path: Path, cache: Path | None = None) -> list[Placement]:
    """What of a plan comes from the kernel's file."""
    made = plan(path, memory_map=MAP, cache=cache)
    return [item for item in made.placements if item.name.startswith("kernel")]


def timed(work: Callable[[], object], *, before: Callable[[], object] | None = None) -> Measure:
    """Milliseconds of one call, after another that is not measured."""

    def measure() -> float:
        if before is not None:
            before()
        start = perf_counter()
        work()
        return (perf_counter() - start) * 1e3

    return measure


def scaled(nanoseconds: Measure) -> float:
    """Microseconds of a measure of nanoseconds."""
    return nanoseconds() / 1e3


def memcpy(guest: GuestMemory, pieces: list[Placement]) -> Measure:
    """Copy as many bytes as a kernel's pieces have to where they go, from memory."""
    work = []
    for piece in pieces:
        origin = memoryview(bytearray(os.urandom(4096)) * (piece.content_size // 4096 + 1))
        address = GuestAddress(piece.address)
        targets = guest.slices(address, piece.content_size, Permissions.WRITE)
        work.append((targets, origin))

    def copy() -> None:
        for targets, origin in work:
            offset = 0
            for target in targets:
                target[:] = origin[offset : offset + target.nbytes]
                offset += target.nbytes

    return timed(copy)


def rust_vmm(bench: Bench, vmlinux: Path) -> Measure | Skip:
    """Load a vmlinux with rust-vmm's crate, the third time in a process."""
    try:
        program = bench.cargo(Path(__file__).parent / "peers" / "linux-loader", "linux-loader-peer")
    except Skip as skip:
        return skip

    def measure() -> float:
        done = subprocess.run(
            [program, vmlinux, "3"], check=True, capture_output=True, text=True, timeout=60
        )
        return float(done.stdout.split()[-1])

    return measure


def copied(
    bench: Bench, guest: GuestMemory, vmlinux: Path, cloud: Path, generic: Path, cache: Path
) -> Iterator[Row]:
    """Warm files, copied into memory that is there already."""
    for name, path, folder in (
        ("vmlinux, warm, copied", vmlinux, None),
        ("bzImage (lz4), cached, copied", cloud, cache),
        ("bzImage (xz), cached, copied", generic, cache),
    ):
        yield bench.compare(
            name,
            "ms",
            ours=timed(
                partial(
                    load,
                    guest,
                    path,
                    memory_map=MAP,
                    cache=folder,
                    zeroed=True,
                    map_files=False,
                )
            ),
            floor=memcpy(guest, kernel_pieces(path, folder)),
            peer=rust_vmm(bench, path) if folder is None else None,
            peer_name="rust-vmm linux-loader" if folder is None else None,
            goal=Goal.floor(1.2),
        )


def mapped(bench: Bench, vmlinux: Path, cloud: Path, cache: Path) -> Iterator[Row]:
    """Warm files, mapped copy-on-write into fresh memory."""
    for name, path, folder in (
        ("vmlinux, warm, mapped", vmlinux, None),
        ("bzImage (lz4), cached, mapped", cloud, cache),
    ):

        def measure(path: Path = path, folder: Path | None = folder) -> float:
            with GuestMemory.from_ranges([(GuestAddress(0), SIZE)]) as guest:
                start = perf_counter()
                load(guest, path, memory_map=MAP, cache=folder, zeroed=True)
                return (perf_counter() - start) * 1e3

        yield bench.compare(name, "ms", ours=measure, goal=Goal.at_most(3))


def cold(bench: Bench, guest: GuestMemory, vmlinux: Path) -> Row:
    """A file that is not in the page cache, against reading it once."""

    def forget() -> None:
        with vmlinux.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    buffer = bytearray(vmlinux.stat().st_size)

    def read() -> None:
        with vmlinux.open("rb", buffering=0) as file:
            view = memoryview(buffer)
            while view and (count := file.readinto(view)):
                view = view[count:]

    return bench.compare(
        "vmlinux, cold, copied",
        "ms",
        ours=timed(
            lambda: load(guest, vmlinux, memory_map=MAP, zeroed=True, map_files=False),
            before=forget,
        ),
        floor=timed(read, before=forget),
    )


def first(
    bench: Bench, guest: GuestMemory, cloud: Path, generic: Path, folder: Path
) -> Iterator[Row]:
    """The first time of a boot image: unpacked, against the library's own speed at it."""
    for name, path, unpack in (("lz4", cloud, unpack_lz4), ("xz", generic, unpack_xz)):
        with Source.open(path) as source:
            image = parse_bzimage(source)
            payload = source.read("payload", image.payload_offset, image.payload_size)
        yield bench.compare(
            f"bzImage ({name}), decompression alone",
            "ms",
            ours=timed(partial(unpack_payload, payload)),
            floor=timed(partial(unpack, payload)),
            goal=Goal.floor(1 / 0.95),
            rounds=5,
        )
        yield bench.compare(
            f"bzImage ({name}), loaded for the first time, into the cache",
            "ms",
            ours=timed(
                partial(load, guest, path, memory_map=MAP, cache=folder, zeroed=True),
                before=lambda: shutil.rmtree(folder, ignore_errors=True),
            ),
            floor=timed(partial(unpack, payload)),
            rounds=5,
        )


def unpack_lz4(payload: bytes) -> bytes:
    """Decompress legacy LZ4 blocks with the library, without a check."""
    from lz4.block import decompress  # type: ignore[import-untyped]

    pieces, position = [], 4
    while position + 4 < len(payload):
        size = int.from_bytes(payload[position : position + 4], "little")
        block = memoryview(payload)[position + 4 : position + 4 + size]
        pieces.append(decompress(block, uncompressed_size=8 << 20))
        position += 4 + size
    return b"".join(pieces)


def unpack_xz(payload: bytes) -> bytes:
    """Decompress XZ with the library, without a check."""
    return lzma.LZMADecompressor(format=lzma.FORMAT_XZ).decompress(payload)


def planning(bench: Bench) -> Iterator[Row]:
    """All that Python does for a small image: headers, checks, tables, without the writing."""
    kernel = build_elf([(0x1000000, b"\xf4" * 64)], entry=0x1000000, notes=pvh_note(0x1000000))
    with image_file(kernel) as fd:
        for protocol in (Protocol.PVH, Protocol.LINUX64):
            nanoseconds = per_call(
                partial(plan, fd, memory_map=MAP, protocol=protocol, cmdline="console=ttyS0"),
                calls=200,
            )
            yield bench.compare(
                f"plan of a small image, {protocol.value}",
                "us",
                ours=partial(scaled, nanoseconds),
            )
