"""Streams between Linux guests and their host, ours and QEMU's in turn: MiB a second, CPU a MiB.

Ours is once the device in user space, whose other ends are Unix sockets, and once the kernel's
vhost-vsock; QEMU has the kernel's alone. What costs CPU is the VMM with its guest and its thread in
the kernel; who is at the host's end of a stream (`guest/vsock_ends.py`) is not counted.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks._guests import Job, compare, ours, qemu
from benchmarks.harness import Bench, Row

HERE = Path(__file__).parent
MIB = 1 << 20
SIZE = 48  # MiB of a stream


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


PARTS = {"user": partial(_guest, vhost=False), "vhost": partial(_guest, vhost=True)}
