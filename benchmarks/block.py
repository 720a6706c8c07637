"""Block requests from the ring to the file: a pump under a driver in another process.

The driver is a C program on shared memory that polls for used buffers and kicks when it is asked
to; the floor is the same reads by a bare loop around pread, or io_uring. The file is in the host's
page cache, so what is measured is what each request costs beside the copy. Operations a second.

Then fio in Linux guests of ours and of QEMU, in turn, on images of the same content: operations a
second, and what one costs the host in all, guest included.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

from benchmarks._guests import Job, compare, ours, program_files, qemu
from benchmarks.harness import CACHE, Bench, Goal, Measure, Row
from virtio_queue import BlockPump, Queue
from virtio_queue.constants import F_EVENT_IDX
from vm_memory import GuestAddress, GuestMemory, Memfd

PROGRAM = Path(__file__).parent / "native" / "block_driver.c"
FILE_SIZE = 64 << 20
SIZE = 256  # of the queue
DESC, AVAIL, USED = 0x1000, 0x3000, 0x4000  # as native/driver.h has them
KIB, MIB = 1 << 10, 1 << 20

# Name, bytes of a request, depth, how many of them, and the least share of the floor's rate.
LOADS = (
    ("4 KiB random, depth 1", 4 * KIB, 1, 100_000, None),
    ("4 KiB random, depth 32", 4 * KIB, 32, 400_000, 0.7),
    ("1 MiB sequential, depth 1", MIB, 1, 3000, 0.95),
    ("1 MiB sequential, depth 32", MIB, 32, 3000, 0.95),
)
GUEST_SECONDS = 3
GUEST_LOADS = (
    ("4 KiB random, depth 32", "--rw=randread --bs=4k --iodepth=32", 4),
    ("1 MiB sequential, depth 4", "--rw=read --bs=1m --iodepth=4", 1024),
)
ENGINES: tuple[Literal["sync", "io_uring"], ...] = ("sync", "io_uring")


def _native(bench: Bench) -> Iterator[Row]:
    program = bench.compile(PROGRAM)
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=CACHE) as file:
        file.write(os.urandom(MIB) * (FILE_SIZE // MIB))
        file.flush()
        for engine in ENGINES:
            for name, size, depth, count, share in LOADS:
                load = [str(n) for n in (size, depth, count, FILE_SIZE // 512)]
                yield bench.compare(
                    f"{engine}: {name}", "op/s",
                    ours=_pumped(program, file.fileno(), engine, size * depth, load),
                    floor=_floor(program, engine, file.name, load),
                    goal=() if share is None else Goal.floor_rate(share),
                )  # fmt: skip


def _guest(bench: Bench) -> Iterator[Row]:
    """A disk of ours and one of QEMU's under fio."""
    from vmm_reference.image import debian_kernel
    from vmm_reference.image.disk import build_disk
    from vmm_reference.image.initramfs import guest_initramfs

    kernel = debian_kernel("cloud")
    tools = build_disk(None, size=192 << 20, files=program_files("fio"))
    ready = "mkdir -p /fio && mount -o ro /dev/vda /fio"
    drive, device = "-drive if=none,format=raw", "-device virtio-blk-pci,romfile="
    options = f"{drive},file=tools2.img,id=t,readonly=on {device},drive=t "
    options += f"{drive},file=qemu.img,id=d {device},drive=d"
    yield from compare(
        bench,
        [
            (
                ours("--drive tools.img,ro --drive ours.img", ready=ready),
                qemu(bench, options, ready=ready),
            )
        ],
        [_fio(*load) for load in GUEST_LOADS],
        setup=f"cp {kernel.vmlinuz} vmlinuz; cp {guest_initramfs(kernel)} initrd; "
        f"cp --sparse=always {tools} tools.img; cp --sparse=always tools.img tools2.img; "
        f"head -c {FILE_SIZE} /dev/urandom >ours.img; cp ours.img qemu.img",
    )


def _fio(name: str, options: str, kib: int) -> Job:
    """A job of fio for a while, which prints KiB read and reads a second of its long report.

    Each character costs the VMM an exit, which is no work of its disk.
    """
    command = (
        "/fio/lib/ld-linux-x86-64.so.2 --library-path /fio/lib /fio/fio --thread --name=job "
        "--output-format=terse --filename=/dev/vdb --direct=1 --ioengine=libaio --time_based "
        f"--runtime={GUEST_SECONDS} {options} >/tmp/r && sed -n '/^3;/p' /tmp/r | cut -d';' -f6,8"
    )

    def fields(printed: str) -> list[str]:
        return printed.strip().split(";")

    return Job(
        f"guest: {name}",
        command,
        operations=lambda printed: int(fields(printed)[0]) / kib,
        unit="op/s",
        rate=lambda printed, _seconds: float(fields(printed)[1]),
    )


def _figure(*command: str | Path, fds: tuple[int, ...] = ()) -> float:
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=60, pass_fds=fds)
    return float(done.stdout)


def _floor(program: Path, engine: str, file: str, load: list[str]) -> Measure:
    return lambda: _figure(program, "floor", engine, file, *load)


def _pumped(
    program: Path, file: int, engine: Literal["sync", "io_uring"], data: int, load: list[str]
) -> Measure:
    def measure() -> float:
        with ExitStack() as stack:
            size = MIB + data
            memory = stack.enter_context(
                GuestMemory.from_ranges([(GuestAddress(0), size)], backing=Memfd())
            )
            shared = memory.regions[0].fd
            assert shared is not None
            # Touched before: page faults are not what is measured.
            memory.fill(GuestAddress(0), size, 0)
            queue = Queue(SIZE)
            queue.set_features(F_EVENT_IDX)
            queue.set_descriptor_area(DESC)
            queue.set_driver_area(AVAIL)
            queue.set_device_area(USED)
            queue.enable(memory)
            kick = os.eventfd(0)
            stack.callback(os.close, kick)
            pump = BlockPump(file, sectors=FILE_SIZE // 512, engine=engine)
            pump.wire([kick], [-1])
            pump.start(memory, [queue], 0)
            stack.callback(pump.stop)
            return _figure(program, "drive", str(shared), str(kick), *load, fds=(shared, kick))

    return measure


PARTS = {"native": _native, "guest": _guest}
