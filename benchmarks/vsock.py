"""Streams of a driver and its host, natively, and of Linux guests, ours and QEMU's in turn.

Natively a C program on shared memory is the driver, and the host's end of a stream that a pump
serves; the floor moves the same between two threads over a socket. In the lab it is MiB a second,
and CPU a MiB: ours is once the device in user space, whose other ends are Unix sockets, and once
the kernel's vhost-vsock; QEMU has the kernel's alone. What costs CPU is the VMM with its guest and
its thread in the kernel; who is at the host's end of a stream (`guest/vsock_ends.py`) is not
counted.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

from benchmarks._guests import Job, compare, ours, qemu
from benchmarks.harness import Bench, Goal, Measure, Row
from virtio_queue import Queue, VsockPump
from virtio_queue.constants import F_EVENT_IDX
from vm_memory import GuestAddress, GuestMemory, Memfd

HERE = Path(__file__).parent
MIB = 1 << 20
SIZE = 192  # MiB of a stream: to start it takes as long as a few MiB do
PLACES = 0x10000, 0  # of the rings to receive and to send, as native/vsock_driver.c has them
TO_HOST, TO_GUEST, ANSWERED = range(3)
BIG, SMALL = 64 << 10, 256  # bytes: the most that Linux puts into a packet, and a message
LOADS = (
    ("1 MiB to the host in packets of 64 KiB", TO_HOST, BIG, 32, 48_000, Goal.floor_rate(0.95)),
    ("1 MiB to the guest, written by 64 KiB", TO_GUEST, BIG, 32, 48_000, Goal.floor_rate(0.95)),
    ("256 bytes to the host, 32 at once", TO_HOST, SMALL, 32, 400_000, Goal.floor_rate(0.7)),
    ("256 bytes to the guest, one write each", TO_GUEST, SMALL, 32, 400_000, Goal.floor_rate(0.7)),
    ("256 bytes and an answer", ANSWERED, SMALL, 32, 40_000, ()),
)


def _native(bench: Bench) -> Iterator[Row]:
    program = bench.compile(HERE / "native" / "vsock_driver.c", "-pthread")
    for name, way, size, depth, count, goal in LOADS:
        yield bench.compare(
            name, "1/s", ours=_pumped(program, way, size, depth, count),
            floor=partial(_figure, program, "floor", way, size, count), goal=goal,
        )  # fmt: skip


def _figure(*command: str | Path | int, fds: tuple[int, ...] = ()) -> float:
    words = [str(word) for word in command]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, timeout=60, pass_fds=fds)
    return float(done.stdout)


def _pumped(program: Path, way: int, size: int, depth: int, count: int) -> Measure:
    def measure() -> float:
        with ExitStack() as stack:
            memory = stack.enter_context(
                GuestMemory.from_ranges([(GuestAddress(0), 16 * MIB)], backing=Memfd())
            )
            shared = memory.regions[0].fd
            assert shared is not None
            # Touched before: page faults are not what is measured.
            memory.fill(GuestAddress(0), 16 * MIB, 0)
            queues = Queue(256), Queue(256)
            for place, queue in zip(PLACES, queues, strict=True):
                queue.set_features(F_EVENT_IDX)
                queue.set_descriptor_area(place + 0x1000)
                queue.set_driver_area(place + 0x3000)
                queue.set_device_area(place + 0x4000)
                queue.enable(memory)
            kicks = [os.eventfd(0), os.eventfd(0)]
            for kick in kicks:
                stack.callback(os.close, kick)
            end, host = socket.socketpair()
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            stack.enter_context(host)
            pump = VsockPump(3)
            stack.callback(pump.forget)
            pump.wire(kicks, [-1, -1])
            pump.start(memory, queues)
            stack.callback(pump.stop)
            while not pump.thread_id:
                time.sleep(0.001)
            with suppress(OSError):  # the driver has the first processor
                os.sched_setaffinity(pump.thread_id, {1})
            pump.connect(1024, 1 << 30, end.detach())
            fds = shared, *kicks, host.fileno()
            return _figure(program, "drive", *fds, way, size, depth, count, fds=fds)

    return measure


def _guest(bench: Bench, vhost: bool) -> Iterator[Row]:
    """Streams both ways, each of them opened by the guest."""
    from vmm_reference.image import debian_kernel
    from vmm_reference.image.initramfs import guest_initramfs

    kernel = debian_kernel("cloud")
    program = bench.compile(HERE / "native" / "vsock_load.c", "-static")
    initrd = guest_initramfs(
        kernel, modules=("vmw_vsock_virtio_transport",), files={"bin/load": program}
    )
    where, kind = ("vhost", " with vhost-vsock") if vhost else ("v.sock", "")
    pair = (
        ours(f"--device vsock,{where},cid=5", f"ours{kind}"),
        qemu(bench, "-device vhost-vsock-pci,guest-cid=6"),
    )
    ends = f"{sys.executable} {HERE / 'guest' / 'vsock_ends.py'} $PWD/v.sock"
    yield from compare(
        bench,
        [pair],
        [_stream("guest sends", "send 52"), _stream("guest receives", "receive 53")],
        setup=f"cp {kernel.vmlinuz} vmlinuz; cp {initrd} initrd; {ends} </dev/null >/dev/null &",
        modules=("vhost_vsock",),
    )


def _stream(name: str, what: str) -> Job:
    return Job(
        name,
        f"load {what} {SIZE * MIB}",
        operations=lambda _printed: SIZE,
        unit="MiB/s",
        rate=lambda _printed, seconds: SIZE / seconds,
    )


PARTS = {
    "native": _native,
    "user": partial(_guest, vhost=False),
    "vhost": partial(_guest, vhost=True),
}
