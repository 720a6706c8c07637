"""Helpers for tests: kernels of a few instructions that any KVM runs, and a bench for devices."""

from __future__ import annotations

import os
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from kvm_ioctls.testing import assemble
from linux_loader.testing.images import build_elf, pvh_note
from virtio_queue.device import VirtioDevice
from virtio_queue.mmio import MmioTransport
from virtio_queue.testing import Arena, MmioDriver
from vm_memory import GuestAddress, GuestMemory
from vmm_reference.deviceconfig import parse_device
from vmm_reference.devices import REGISTRY
from vmm_reference.loop import READ, Loop

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from virtio_queue.testing import PackedDriver, SplitDriver, Used
    from vmm_reference.deviceconfig import DeviceConfig

__all__ = ["KERNEL_ADDRESS", "Bench", "PumpBench", "every_device", "tiny_kernel", "turn"]

KERNEL_ADDRESS = 0x100000


def tiny_kernel(source: str) -> bytes:
    """An ELF image that is entered by PVH: 32-bit protected mode, flat segments, no stack.

    Args:
        source: 32-bit AT&T assembly. Three macros help: `PUT c` sends a character to the serial
            port, `POWER_OFF` and `RESET` end the machine as a kernel would by ACPI.
    """
    code = assemble(_MACROS + source, bits=32, origin=KERNEL_ADDRESS)
    return build_elf([(KERNEL_ADDRESS, code)], entry=KERNEL_ADDRESS, notes=pvh_note(KERNEL_ADDRESS))


def every_device(folder: Path) -> list[DeviceConfig]:
    """A device of each kind that the registry has, with its files and sockets in a folder.

    A test may ask of each what every device has to have: a new kind without an example here is an
    error, and so found.
    """
    (folder / "disk").write_bytes(bytes(1 << 20))
    (folder / "pmem").write_bytes(bytes(2 << 20))
    examples = {
        "balloon": "balloon",
        "console": f"console,file:{folder}/console",
        "debug-console": f"debug-console,{folder}/log",
        "debug-exit": "debug-exit",
        "drive": f"drive,{folder}/disk",
        "keyboard": "keyboard",
        "memory": "memory,128M",
        "net": f"net,socket={folder}/net,peer={folder}/peer",
        "pmem": f"pmem,{folder}/pmem",
        "rng": "rng",
        "vmgenid": "vmgenid",
        "vsock": f"vsock,{folder}/vsock",
        "watchdog": "watchdog",
    }
    return [parse_device(examples[kind]) for kind in REGISTRY]


class Bench:
    """A virtio device model with memory, registers and a driver, but no machine.

    Args:
        model: the device.
        features: what the driver accepts of what is offered.
        start: whether the driver brings the device up.
        memory: bytes of RAM.

    Attributes:
        interrupts: how often the device interrupted.
        pending: queues that the model wants to have processed; see `kick_later`.
    """

    def __init__(
        self,
        model: Any,
        *,
        features: int = (1 << 64) - 1,
        start: bool = True,
        memory: int = 4 << 20,
    ) -> None:
        self.model = model
        self.interrupts = 0
        self.pending: list[int] = []
        self.memory = GuestMemory.from_ranges([(GuestAddress(0), memory)])
        self.device = VirtioDevice(model, self.memory, self._interrupt)
        self.transport = MmioTransport(self.device, self.device.process)
        self.driver = MmioDriver(self.transport, arena=Arena(0x1000, memory - 0x1000))
        if start:
            self.driver.start(features)

    def _interrupt(self) -> None:
        self.interrupts += 1

    def queue(self, index: int) -> SplitDriver | PackedDriver:
        """The driver's end of a queue."""
        return self.driver.queues[index]

    def send(
        self, index: int, readable: list[bytes] | None = None, writable: list[int] | None = None
    ) -> list[Used]:
        """Make one buffer available, kick, and take back what was used."""
        self.queue(index).add(readable or [], writable or [])
        self.driver.kick(index)
        self.settle()
        return self.queue(index).reap()

    def kick_later(self, index: int) -> None:
        """What a machine does with a model's wish to be processed; `settle` does it."""
        self.pending.append(index)

    def settle(self) -> None:
        """Process what models asked for, until they ask for nothing more."""
        while self.pending:
            self.device.process(self.pending.pop(0))

    @property
    def needs_reset(self) -> bool:
        """Whether the device has given up."""
        return bool(self.device.status & 64)

    def config(self, offset: int, length: int) -> bytes:
        """Configuration space."""
        return self.device.read_config(offset, length)

    def moved_to(self, model: Any) -> Bench:
        """Save everything and restore it into another device, around `model`, in other memory."""
        size = self.memory.regions[0].size
        other = Bench(model, start=False, memory=size)
        other.memory.write(GuestAddress(0), self.memory.read(GuestAddress(0), size))
        if hasattr(model, "restore"):
            model.restore(self.model.save())
        other.device.restore(self.device.save())
        other.transport.restore(self.transport.save())
        other.driver.queues, other.driver.features = self.driver.queues, self.driver.features
        for queue in other.driver.queues:
            queue.memory = other.memory
        for index in range(len(other.device.queues)):
            other.device.process(index)
        return other

    def close(self) -> None:
        """Give the memory back."""
        self.memory.close()


class PumpBench:
    """What a virtio device has of a machine: for tests of devices whose queues pumps serve.

    It stands for the wiring that a device's `build` is given, and for the slot that this gives.

    Args:
        size: bytes of RAM.
        neighbour: another device of the same machine, whose loop this one shares; it is closed
            after this one.

    Attributes:
        loop: listens for what is Python's; `wait` turns it.
        calls: an eventfd for each queue's interrupts.
        vectors: of MSI-X that the device wants on a PCI bus, if it says so.
        stop: what a pause does.
        go: what the end of a pause does.
    """

    interrupt_word = None

    def __init__(self, size: int = 1 << 20, *, neighbour: PumpBench | None = None) -> None:
        self.memory = GuestMemory.from_ranges([(GuestAddress(0), size)])
        self.errors: list[BaseException] = []
        self.loop: Loop = neighbour.loop if neighbour else Loop(self.errors.append)
        self._owns_loop = neighbour is None
        self.stop: Callable[[], object] = lambda: None
        self.go: Callable[[], object] = lambda: None
        self._closing: list[Callable[[], object]] = [self.memory.close]

    def virtio(self, model: Any, *, vectors: int | None = None) -> Any:
        """Plug in the device, once."""
        self.vectors = vectors
        self.device = VirtioDevice(model, self.memory, lambda: None)
        self.kicks, self.calls = (
            [os.eventfd(0, os.EFD_NONBLOCK) for _ in self.device.queues] for _ in range(2)
        )
        transport = MmioTransport(self.device, self.kick)
        size = self.memory.regions[0].size
        self.driver = MmioDriver(transport, arena=Arena(0x1000, size - 0x1000))
        for fds, answer in ((self.kicks, self._kicked), (self.calls, self._called)):
            for queue, fd in enumerate(fds):
                self.loop.add(fd, READ, partial(answer, queue))
                self._closing += [partial(os.close, fd), partial(self.loop.remove, fd)]
        return self

    def kick(self, queue: int) -> None:
        """As a driver does."""
        os.eventfd_write(self.kicks[queue], 1)

    def take_kick(self, queue: int) -> int:
        """Let a pump listen."""
        self.loop.remove(self.kicks[queue])
        return self.kicks[queue]

    def pump_call(self, queue: int) -> int:
        """Where a pump's interrupts go."""
        return self.calls[queue]

    def on_close(self, callback: Callable[[], object]) -> None:
        """Call it in `close`."""
        self._closing.append(callback)

    def on_pause(self, stop: Callable[[], object], go: Callable[[], object]) -> None:
        """Have it as `stop` and `go`."""
        self.stop, self.go = stop, go

    def on_start(self, callback: Callable[[], object]) -> None:
        """The machine has started."""
        callback()

    def wait(self, until: Callable[[], object], seconds: float = 30.0) -> None:
        """Turn the loop, and take what is used of all queues, until something holds.

        Raises:
            TimeoutError: it does not within that time.
        """

        def reaped() -> object:
            for queue in self.driver.queues:
                queue.reap()
            return until()

        turn(self.loop, reaped, seconds)

    def _kicked(self, queue: int, _events: int) -> None:
        os.eventfd_read(self.kicks[queue])
        if self.device.process(queue) and getattr(self.device.model, "unfinished", False):
            self.kick(queue)

    def _called(self, queue: int, _events: int) -> None:
        os.eventfd_read(self.calls[queue])

    def close(self) -> None:
        """Stop the pumps, and close everything.

        Raises:
            BaseException: what a callback of the loop has raised.
        """
        for callback in reversed(self._closing):
            callback()
        if self._owns_loop:
            self.loop.stop()
        for error in self.errors:
            raise error


def turn(loop: Loop, until: Callable[[], object], seconds: float = 20.0) -> None:
    """Run an I/O loop that was not started on this thread, until something holds.

    Raises:
        TimeoutError: it does not within that time.
    """
    deadline = time.monotonic() + seconds
    while not until():
        if time.monotonic() > deadline:
            raise TimeoutError(f"nothing came of it in {seconds:g} s")
        loop.turn(0.05)


_MACROS = """
.macro OUT port value
    movw $\\port, %dx
    movb $\\value, %al
    outb %al, %dx
.endm
.macro PUT character
    OUT 0x3f8 \\character
.endm
.macro POWER_OFF
    OUT 0x600 0x34
9:  hlt
    jmp 9b
.endm
.macro RESET
    OUT 0x602 1
9:  hlt
    jmp 9b
.endm
"""
