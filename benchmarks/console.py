"""All of the kernel's log through a guest's consoles, ours and QEMU's in turn: seconds.

Over the UART each character is an exit to the VMM; over hvc0 (virtio-console) a buffer is. What
comes out goes to a pipe from the UART, and to a file nobody reads from hvc0.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from benchmarks._guests import Job, compare, ours, qemu
from benchmarks.harness import Bench, Goal, Row


def _compare(bench: Bench, name: str, command: str) -> Iterator[Row]:
    from vmm_reference.image import debian_kernel
    from vmm_reference.image.initramfs import guest_initramfs

    kernel = debian_kernel("cloud")
    initrd = guest_initramfs(kernel, modules=("virtio_console",))
    ready = "until [ -c /dev/hvc0 ]; do usleep 10000; done"
    options = (
        "-chardev file,id=c,path=/dev/null -device virtio-serial-pci -device virtconsole,chardev=c"
    )
    job = Job(
        f"dmesg {name}",
        command,
        operations=lambda _printed: 1,
        unit="s",
        rate=lambda _printed, seconds: seconds,
        goal=Goal.peer(1.0),
    )
    yield from compare(
        bench,
        [(ours("--device console,file:/dev/null", ready=ready), qemu(bench, options, ready=ready))],
        [job],
        setup=f"cp {kernel.vmlinuz} vmlinuz; cp {initrd} initrd",
    )


PARTS = {
    "uart": partial(_compare, name="over the UART", command="dmesg"),
    "hvc0": partial(
        _compare, name="over hvc0", command="for n in 0 1 2 3 4 5 6 7; do dmesg; done >/dev/hvc0"
    ),
}
