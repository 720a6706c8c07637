"""Guest memory: single accesses, transfers, dirty bitmaps, look-up and hot swap.

The workloads of rust-vmm's own suite keep their names: 8 regions of 2 GiB, 512 bytes (8 for small
and 96 for big objects) at four places, fourteen operations. The floor of an access is the same
access as a Python method with one bounds check over one flat memoryview; that of a transfer is
memcpy or preadv in C, that of a harvest is to read the bitmap's memory once, that of a mark of many
pages a mark of one, and that of a look-up among 256 regions the same among 16.
"""

from __future__ import annotations

import array
import ctypes
import os
import random
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from struct import Struct
from time import perf_counter_ns

from benchmarks.harness import Bench, Goal, Measure, Row, Skip, per_call
from vm_memory import DirtyBitmap, GuestAddress, GuestMemory, MemoryHolder, Order

HERE = Path(__file__).parent
PEER = "rust-vmm vm-memory"
REGION = 2 << 30
PLACES = {
    "first": 0x1000,
    "crossing-0-1": REGION - 256,
    "crossing-6-7": 7 * REGION - 256,
    "last": 7 * REGION + 0x1000,
}
SMALL, BIG = Struct("<Q"), Struct("<12Q")
A = GuestAddress


class Flat:
    """The floor of an access: one memoryview, one check."""

    def __init__(self) -> None:
        self.view = memoryview(bytearray(1 << 20))
        self.words = self.view.cast("I")
        self.size = 1 << 20

    def read(self, address: int, length: int) -> bytes:
        if address < 0 or address + length > self.size:
            raise IndexError(address)
        return self.view[address : address + length].tobytes()

    def write(self, address: int, data: bytes) -> None:
        if address < 0 or address + len(data) > self.size:
            raise IndexError(address)
        self.view[address : address + len(data)] = data

    def read_into(self, address: int, buffer: memoryview) -> None:
        if address < 0 or address + len(buffer) > self.size:
            raise IndexError(address)
        buffer[:] = self.view[address : address + len(buffer)]

    def read_file(self, address: int, fd: int, length: int) -> None:
        if address < 0 or address + length > self.size:
            raise IndexError(address)
        os.readv(fd, [self.view[address : address + length]])

    def write_file(self, address: int, fd: int, length: int) -> None:
        if address < 0 or address + length > self.size:
            raise IndexError(address)
        os.writev(fd, [self.view[address : address + length]])

    def read_u32(self, address: int) -> int:
        if address < 0 or address + 4 > self.size:
            raise IndexError(address)
        return self.words[address >> 2]

    def write_u32(self, address: int, value: int) -> None:
        if address < 0 or address + 4 > self.size:
            raise IndexError(address)
        self.words[address >> 2] = value


def rows(bench: Bench) -> Iterator[Row]:
    """Each row in turn; see the module's text."""
    try:
        program: Path | Skip = bench.cargo(HERE / "peers" / "vm-memory", "vm-memory-peer")
    except Skip as skip:
        program = skip

    def peer(*arguments: str) -> Measure | Skip:
        if isinstance(program, Skip):
            return program
        command = [str(program), *arguments]
        return lambda: float(subprocess.check_output(command, text=True))

    yield from accesses(bench, peer)
    yield from scalars(bench, peer)
    library = bench.compile(HERE / "native" / "memory_floor.c", "-shared", "-fPIC")
    floors = ctypes.CDLL(str(library))
    for name in ("floor_read", "floor_copy", "floor_preadv"):
        getattr(floors, name).restype = ctypes.c_double
    yield from transfers(bench, floors)
    yield from dirty(bench, peer, floors)
    yield from maps(bench, peer)


def accesses(bench: Bench, peer: Callable[..., Measure | Skip]) -> Iterator[Row]:
    """The fourteen operations at the four places."""
    memory = GuestMemory.from_ranges([(A(i * REGION), REGION) for i in range(8)])
    flat, data, target = Flat(), bytes(512), bytearray(512)
    view = memoryview(target)
    small, big = SMALL.pack(1), BIG.pack(*range(12))
    zero, null = os.open("/dev/zero", os.O_RDONLY), os.open(os.devnull, os.O_WRONLY)
    for place, start in PLACES.items():
        cross = place.startswith("crossing")
        at, small_at, big_at = A(start), A(start + 252 * cross), A(start + 208 * cross)
        scope = {**globals(), **locals(), "f": 0x1000}
        work = {
            "read_from": ("memory.read_partial(at, 512)", "flat.read(f, 512)"),
            "read_from_file": ("memory.read_from_file(at, zero, 512)",
                               "flat.read_file(f, zero, 512)"),
            "read_exact_from": ("memory.read(at, 512)", "flat.read(f, 512)"),
            "read_entire_slice_from": ("memory.read_into(at, view)", "flat.read_into(f, view)"),
            "read_slice_from": ("memory.read(at, 512)", "flat.read(f, 512)"),
            "read_small_obj_from": ("SMALL.unpack(memory.read(small_at, 8))",
                                    "SMALL.unpack(flat.read(f, 8))"),
            "read_big_obj_from": ("BIG.unpack(memory.read(big_at, 96))",
                                  "BIG.unpack(flat.read(f, 96))"),
            "write_to": ("memory.write_partial(at, data)", "flat.write(f, data)"),
            "write_to_file": ("memory.write_to_file(at, null, 512)",
                              "flat.write_file(f, null, 512)"),
            "write_exact_to": ("memory.write(at, data)", "flat.write(f, data)"),
            "write_entire_slice_to": ("memory.write(at, view)", "flat.write(f, view)"),
            "write_slice_to": ("memory.write(at, data)", "flat.write(f, data)"),
            "write_small_obj_to": ("memory.write(small_at, small)", "flat.write(f, small)"),
            "write_big_obj_to": ("memory.write(big_at, big)", "flat.write(f, big)"),
        }  # fmt: skip
        for name, (ours, floor) in work.items():
            yield bench.compare(
                f"{name} {place}", "ns",
                ours=per_call(ours, calls=5000, setup=ours, scope=scope),
                floor=per_call(floor, calls=5000, scope=scope),
                peer=peer(name, place),
                peer_name=PEER,
                goal=Goal.floor(2.0) if not cross and "file" not in name else (),
            )  # fmt: skip
    os.close(zero)
    os.close(null)


def scalars(bench: Bench, peer: Callable[..., Measure | Skip]) -> Iterator[Row]:
    """Words of 32 bits: by method, by an accessor bound once, atomically."""
    memory = GuestMemory.from_ranges([(A(0), 1 << 20), (A(1 << 20), 1 << 20)])
    flat, scalar = Flat(), memory.scalar(A(0x1000), 4)
    scope = {"memory": memory, "flat": flat, "load": scalar.load, "store": scalar.store,
             "Order": Order}  # fmt: skip
    read, write = "flat.read_u32(0x1000)", "flat.write_u32(0x1000, 7)"
    for name, ours, floor, goal, workload in (
        ("read_u32", "memory.read_u32(0x1000)", read, 2.0, None),
        ("write_u32", "memory.write_u32(0x1000, 7)", write, 2.0, None),
        ("bound scalar load", "load()", read, 1.5, None),
        ("bound scalar store", "store(7)", write, 1.5, None),
        ("atomic load", "memory.atomic_load(0x1000, 4)", read, None, "load"),
        ("atomic store", "memory.atomic_store(0x1000, 4, 7)", write, None, "store"),
        ("atomic fetch_add", "memory.atomic_fetch_add(0x1000, 4, 7)", write, None, None),
    ):
        yield bench.compare(
            name, "ns",
            ours=per_call(ours, calls=20_000, scope=scope),
            floor=per_call(floor, calls=20_000, scope=scope),
            peer=peer(workload) if workload else None,
            peer_name=PEER if workload else None,
            goal=Goal.floor(goal) if goal else (),
        )  # fmt: skip


def transfers(bench: Bench, floors: ctypes.CDLL) -> Iterator[Row]:
    """Copies into a caller's buffer, and from a file in the page cache, as rates."""
    size = 64 << 20
    memory = GuestMemory.from_ranges([(A(0), size)])
    memory.fill(A(0), size, 1)
    host = memory.regions[0].host_address
    target = bytearray(size)
    place = ctypes.addressof(ctypes.c_char.from_buffer(target))
    with tempfile.TemporaryFile(dir=Path.cwd()) as file:
        memory.write_all_to_file(A(0), file, size)
        fd = file.fileno()
        for length, bound in ((64 << 10, 0.80), (1 << 20, 0.95), (16 << 20, 0.95)):
            calls = (512 << 20) // length  # 10 ms and more
            scope = {"memory": memory, "view": memoryview(target)[:length], "fd": fd}
            copy = per_call("memory.read_into(0, view)", calls=calls, scope=scope)
            load = per_call(f"memory.read_exact_from_file(0, fd, {length}, 0)", calls=calls,
                            scope=scope)  # fmt: skip

            def copy_floor(length: int = length, calls: int = calls) -> float:
                ours, its = ctypes.c_void_p(place), ctypes.c_void_p(host)
                return float(floors.floor_copy(ours, its, ctypes.c_uint64(length), calls))

            def load_floor(length: int = length, calls: int = calls) -> float:
                where = ctypes.c_void_p(host)
                return float(floors.floor_preadv(fd, where, ctypes.c_uint64(length), calls))

            for name, ours, floor in (
                ("read_into a buffer", copy, copy_floor),
                ("read_exact_from_file", load, load_floor),
            ):
                yield bench.compare(
                    f"{name}, {length >> 10} KiB", "GB/s",
                    ours=rate(ours, length),
                    floor=rate(floor, length),
                    goal=Goal.floor_rate(bound),
                )  # fmt: skip
    whole = GuestMemory.from_ranges([(A(0), 1 << 30)])
    whole.fill(A(0), 1 << 30, 1)
    with tempfile.TemporaryFile(dir=Path.cwd()) as file:
        whole.write_all_to_file(A(0), file, 1 << 30)
        fd, where = file.fileno(), ctypes.c_void_p(whole.regions[0].host_address)
        scope = {"memory": whole, "fd": fd}
        ours = per_call("memory.read_exact_from_file(0, fd, 1 << 30, 0)", calls=1, scope=scope)
        yield bench.compare(
            "1 GiB fill from a file", "GB/s",
            ours=rate(ours, 1 << 30),
            floor=rate(
                lambda: floors.floor_preadv(fd, where, ctypes.c_uint64(1 << 30), 1), 1 << 30
            ),
            goal=Goal.floor_rate(0.95),
            rounds=3,
        )  # fmt: skip


def rate(measure: Measure, length: int) -> Measure:
    """Gigabytes in a second, from the nanoseconds of one turn."""
    return lambda: length / measure()


def dirty(bench: Bench, peer: Callable[..., Measure | Skip], floors: ctypes.CDLL) -> Iterator[Row]:
    """Marks of 1 to 256 pages, and harvests of a bitmap of 384 MB."""
    bitmap = DirtyBitmap(1 << 30)
    scope = {"mark": bitmap.mark}
    one = per_call("mark(28672, 4096)", calls=20_000, scope=scope)
    for pages in (1, 16, 64, 256):
        yield bench.compare(
            f"mark_dirty {pages} pages", "ns",
            ours=per_call(f"mark(28672, {4096 * pages})", calls=20_000, scope=scope),
            floor=one,
            peer=peer(f"mark-{pages}"),
            peer_name=PEER,
            goal=Goal.floor(1.5) if pages == 256 else (),
        )  # fmt: skip
    size = 384 << 20
    large = DirtyBitmap(size * 8 * 4096)
    flat = array.array("Q", bytes(size))
    words = ctypes.c_void_p(flat.buffer_info()[0])
    chance = random.Random(5)
    runs = [chance.randrange(size * 8 // 512) for _ in range(size * 8 // 512 // 100)]
    runs_of_2m = sorted(set(runs))
    sparse, dense = (scattered(chance, share) for share in (0.001, 0.01))

    def nothing() -> None:
        large.clear()

    def some() -> None:
        for start in range(0, size, len(sparse)):
            large.merge(sparse, start * 8 * 4096)

    def blocks() -> None:
        for run in runs_of_2m:
            large.mark(run << 21, 2 << 20)

    def singles() -> None:
        for start in range(0, size, len(dense)):
            large.merge(dense, start * 8 * 4096)

    for name, prepare, bound in (
        ("0 %", nothing, 1.2),
        ("0.1 % random pages", some, None),
        ("1 % runs of 2 MiB", blocks, 1.5),
        ("1 % random pages", singles, 12.0),
    ):

        def harvest(prepare: Callable[[], None] = prepare) -> float:
            prepare()
            start = perf_counter_ns()
            for _ in large.batches():
                pass
            return (perf_counter_ns() - start) / 1e6

        yield bench.compare(
            f"harvest 384 MB, {name}", "ms",
            ours=harvest,
            floor=lambda: floors.floor_read(words, ctypes.c_uint64(size // 8)) / 1e6,
            goal=Goal.floor(bound) if bound else (),
            rounds=3,
        )  # fmt: skip


def finding(count: int) -> Measure:
    """Nanoseconds of one look-up in so many regions."""
    memory = GuestMemory.from_ranges([(A(i * 8192), 4096) for i in range(count)])
    places = [A((37 * i % count) * 8192 + 100) for i in range(256)]
    scope = {"find": memory.find_region, "places": places}
    measure = per_call("for place in places: find(place)", calls=100, scope=scope)
    return lambda: measure() / len(places)


def scattered(chance: random.Random, share: float) -> bytes:
    """A MiB of bitmap with single bits at random."""
    block = bytearray(1 << 20)
    for _ in range(round(len(block) * 8 * share)):
        bit = chance.randrange(len(block) * 8)
        block[bit // 8] |= 1 << bit % 8
    return bytes(block)


def maps(bench: Bench, peer: Callable[..., Measure | Skip]) -> Iterator[Row]:
    """Finding regions, taking the current map, swapping it."""
    few, many = finding(16), finding(256)
    yield bench.compare("find_region in 16 regions", "ns", ours=few)
    yield bench.compare(
        "find_region in 256 regions (floor: in 16)", "ns",
        ours=many,
        floor=few,
        peer=peer("find_region"),
        peer_name=PEER,
        goal=Goal.floor(2.0),  # the logarithm of 256 is twice that of 16
    )  # fmt: skip
    one, other = (GuestMemory.from_ranges([(A(0), 4096)]) for _ in range(2))
    holder = MemoryHolder(one)

    def swap() -> None:
        with holder.lock():
            holder.replace(other)

    yield bench.compare("hot swap: take the map", "ns",
                        ours=per_call("holder.memory", calls=20_000, scope={"holder": holder}),
                        peer=peer("snapshot"), peer_name=PEER)  # fmt: skip
    yield bench.compare("hot swap: replace the map", "ns", ours=per_call(swap, calls=20_000),
                        peer=peer("swap"), peer_name=PEER)  # fmt: skip
