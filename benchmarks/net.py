"""Frames from a driver to the host, natively, and between Linux guests and their host, over taps.

Natively a C program on shared memory sends through a pump to a socket of the host that nobody
reads; the floor writes the same to it. In the lab iperf3 sends from guests of ours and of QEMU and
to them, in turn, with vhost-net too: megabits a second, and what a megabit costs the VMM with its
guest (iperf3's server is not counted).
"""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from benchmarks._guests import Job, compare, ours, program_files, qemu
from benchmarks.harness import Bench, Goal, Measure, Row
from virtio_queue import NetPump, Queue
from virtio_queue.constants import F_EVENT_IDX
from vm_memory import GuestAddress, GuestMemory, Memfd

PROGRAM = Path(__file__).parent / "native" / "net_driver.c"
SECONDS = 3
SIZE, DEPTH = 256, 128  # of the queue, and frames in it
DESC, AVAIL, USED = 0x1000, 0x3000, 0x4000  # as native/driver.h has them
MIB = 1 << 20
LOADS = (("1514 bytes", 1514, 300_000), ("60,000 bytes", 60_000, 30_000))


def _native(bench: Bench) -> Iterator[Row]:
    program = bench.compile(PROGRAM)
    with ExitStack() as stack:
        sink, source = (
            stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) for _ in range(2)
        )
        sink.bind(("127.0.0.1", 0))
        source.connect(sink.getsockname())
        source.setblocking(False)
        for name, size, count in LOADS:
            yield bench.compare(
                f"frames of {name}", "frame/s",
                ours=_pumped(program, source.fileno(), size, count),
                floor=lambda size=size, count=count: _figure(  # type: ignore[misc]
                    program, "floor", source.fileno(), size, DEPTH, count, fds=(source.fileno(),)
                ),
                goal=Goal.floor_rate(0.7),
            )  # fmt: skip


def _figure(*command: str | Path | int, fds: tuple[int, ...]) -> float:
    words = [str(word) for word in command]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, timeout=60, pass_fds=fds)
    return float(done.stdout)


def _pumped(program: Path, fd: int, size: int, count: int) -> Measure:
    def measure() -> float:
        with ExitStack() as stack:
            length = MIB + DEPTH * (size + 256) // 4096 * 4096
            memory = stack.enter_context(
                GuestMemory.from_ranges([(GuestAddress(0), length)], backing=Memfd())
            )
            shared = memory.regions[0].fd
            assert shared is not None
            # Touched before: page faults are not what is measured.
            memory.fill(GuestAddress(0), length, 0)
            queues = Queue(SIZE), Queue(SIZE)
            for number, queue in enumerate(queues):  # the first one, to receive, lies idle
                queue.set_features(F_EVENT_IDX)
                queue.set_descriptor_area(DESC + 0x10000 * (1 - number))
                queue.set_driver_area(AVAIL + 0x10000 * (1 - number))
                queue.set_device_area(USED + 0x10000 * (1 - number))
                queue.enable(memory)
            kicks = [os.eventfd(0), os.eventfd(0)]
            for kick in kicks:
                stack.callback(os.close, kick)
            pump = NetPump(fd)
            pump.wire(kicks, [-1, -1])
            pump.start(memory, queues, 0)
            stack.callback(pump.stop)
            load = size, DEPTH, count
            return _figure(program, "drive", shared, kicks[1], *load, fds=(shared, kicks[1]))

    return measure


def _guest(bench: Bench, vhost: bool) -> Iterator[Row]:
    """A tap of ours and one of QEMU's under iperf3."""
    from vmm_reference.image import debian_kernel
    from vmm_reference.image.initramfs import guest_initramfs

    kernel = debian_kernel("cloud")
    files = {f"iperf/{name}": source for name, source in program_files("iperf3").items()}
    initrd = guest_initramfs(kernel, modules=("virtio_net",), files=files)
    setup = [f"cp {kernel.vmlinuz} vmlinuz; cp {initrd} initrd", "ip link set lo up"]
    for number in (0, 1):
        setup += [
            f"ip tuntap add dev tap{number} mode tap vnet_hdr",
            f"ip addr add 10.0.{number}.1/24 dev tap{number}",
            f"ip link set tap{number} up",
        ]
    ready = (
        "export LD_LIBRARY_PATH=/iperf/lib; ip link set eth0 up && "
        "ip addr add 10.0.%d.2/24 dev eth0 && H=10.0.%d.1 && "
        "until ping -c 1 -w 1 $H >/dev/null; do :; done"
    )
    options = (
        f"-netdev tap,id=n,ifname=tap1,script=no,downscript=no,vhost={'on' if vhost else 'off'} "
        "-device virtio-net-pci,netdev=n,romfile="
    )
    kind = " with vhost-net" if vhost else ""
    pair = (
        ours(f"--device net,tap0{',vhost' if vhost else ''}", f"ours{kind}", ready % (0, 0)),
        qemu(bench, options, f"qemu{kind}", ready % (1, 1)),
    )
    jobs = [_iperf("guest sends", ""), _iperf("guest receives", "-R")]
    yield from compare(
        bench, [pair], jobs, "; ".join([*setup, "iperf3 -s -D"]),
        modules=("tun", "vhost_net"), namespace="unshare --net",
    )  # fmt: skip


def _iperf(name: str, options: str) -> Job:
    """As the receiver counts it. One line is printed: each character costs the VMM an exit."""

    def megabits(printed: str) -> float:
        """A second."""
        return float(printed.strip().rstrip(",")) / 1e6

    return Job(
        name,
        f"/iperf/lib/ld-linux-x86-64.so.2 /iperf/iperf3 -c $H -t {SECONDS} -J {options} "
        ">/tmp/r && sed -n '/sum_received/,/}/s/.*bits_per_second\":[[:space:]]*//p' /tmp/r",
        operations=lambda printed: megabits(printed) * SECONDS,
        unit="Mbit/s",
        rate=lambda printed, _seconds: megabits(printed),
    )


PARTS = {
    "native": _native,
    "tap": partial(_guest, vhost=False),
    "vhost": partial(_guest, vhost=True),
}
