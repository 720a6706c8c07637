"""Helpers for tests of saved and moved machines: a guest whose end tells everything before it.

Run as a module it is one side of a migration, in a process that dies at a step of it: see `side`.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import threading
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import attrs

from vmm_reference.cli.run import Signals
from vmm_reference.config import MachineConfig
from vmm_reference.machine import Machine
from vmm_reference.outcome import Outcome
from vmm_reference.testing import tiny_kernel

from .incoming import Incoming
from .wire import Kind, Link, Role

if TYPE_CHECKING:
    from pathlib import Path

    from kvm_ioctls.state import Regs
    from vm_memory import GuestMemory

__all__ = ["COMPUTE", "PIECES", "Remains", "digest", "side", "undisturbed"]

# Writes pseudo-random words all over 4 MiB and reads some back; after each of 24 pieces tells the
# host how far it is, and waits for a byte: so it ends when it is let, on a host of any speed.
COMPUTE = """
    movl $12345, %eax
    xorl %esi, %esi
    xorl %ebp, %ebp
1:  imull $1103515245, %eax
    addl $12345, %eax
    movl %eax, %ebx
    shrl $8, %ebx
    andl $0x3ffffc, %ebx
    addl 0x200000(%ebx), %ebp
    movl %eax, 0x200000(%ebx)
    incl %esi
    testl $0x7ff, %esi
    jnz 1b
    movl %eax, %edi
    movl %esi, %eax
    shrl $11, %eax
    movw $0x3f8, %dx
    outb %al, %dx
2:  movw $0x3fd, %dx
    inb %dx, %al
    testb $1, %al
    jz 2b
    movw $0x3f8, %dx
    inb %dx, %al
    movl %edi, %eax
    cmpl $0xC000, %esi
    jb 1b
    POWER_OFF
"""
PIECES = 0xC000 >> 11


@attrs.frozen
class Remains:
    """What a machine that has ended leaves behind.

    Attributes:
        memory: digest of all of it, which takes in what no page table shows.
        regs: of its first vCPU, but for where the end found it: before or behind the last `hlt`.
    """

    memory: str
    regs: Regs

    @classmethod
    def of(cls, machine: Machine) -> Remains:
        """Of a machine that has ended and is not closed."""
        board = machine._board
        assert board is not None
        regs = board.vm.vcpus[0].get_regs()
        return cls(digest(board.memory), attrs.evolve(regs, rip=0))


def digest(memory: GuestMemory) -> str:
    """Of all memory."""
    found = hashlib.sha256()
    for region in memory.regions:
        found.update(region.buffer)
    return found.hexdigest()


def undisturbed(kernel: Path, source: str, pieces: int) -> tuple[Remains, bytes]:
    """What a computation like `COMPUTE` leaves and says when nothing interrupts it."""
    kernel.write_bytes(tiny_kernel(source))
    config = MachineConfig(kernel=str(kernel), memory="32M", on_reset="exit")
    with Machine(config) as machine:
        machine.console.send("g" * pieces)
        if machine.wait(600) is not Outcome.POWER_OFF:
            raise RuntimeError(f"the guest ended in {machine.outcome}: {machine.detail}")
        return Remains.of(machine), bytes(machine.console._output)


def side(what: str, address: str, role: Role, number: int, kernel: str | None = "") -> list[str]:
    """The command of a side that dies instead of sending a frame.

    Args:
        what: `source` and `split-source` run `kernel` and move it, the second with post-copy from
            the start; `destination` prints where it waits, lets the machine go on, and prints how
            it ended; `reader` reads all of its memory first, on a thread that holds the
            interpreter's lock; `deaf` does so with the MiB at 16 MiB, says so before, and ends at
            SIGTERM.
        address: where to.
        role: of the links that are counted on.
        number: of the frame on them that is not sent any more.
        kernel: of a source.
    """
    command = [sys.executable, "-m", "vmm_reference.state.testing"]
    return [*command, what, address, str(role.value), str(number), kernel or ""]


def _die(role: int, number: int) -> threading.Event:
    """Do so; set once `FILLING` is sent."""
    filling = threading.Event()
    real = Link.send_parts
    left = number

    def send(link: Link, kind: Kind, *rest: Any, **named: Any) -> None:
        nonlocal left
        if link.role == role:
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
        real(link, kind, *rest, **named)
        if kind is Kind.FILLING:
            filling.set()

    Link.send_parts = send  # type: ignore[assignment, method-assign]
    return filling


def _main(what: str, address: str, role: str, number: str, kernel: str = "") -> None:
    filling = _die(int(role), int(number))
    if what.endswith("source"):
        with Machine(MachineConfig(kernel=kernel, memory="32M", on_reset="exit")) as machine:
            machine.migrate(address, post_copy=0 if what == "split-source" else None)
        return
    incoming = Incoming(address)
    print(incoming.address, flush=True)
    with incoming.receive() as machine:
        if what in ("reader", "deaf"):
            assert machine._board is not None
            filling.wait(30)  # or the source would wait for the word that this can't say any more
            stack = ExitStack()
            if what == "deaf":
                stack.enter_context(Signals(machine, lambda _: machine.stop(), signal.SIGTERM))
                print("reads", flush=True)
            part = slice(16 << 20, 17 << 20) if what == "deaf" else slice(None)
            regions = machine._board.memory.regions
            size = sum(len(bytes(region.buffer[part])) for region in regions)
            print("read", size, flush=True)
            if what == "deaf":
                print(machine.wait().value, bool(machine._board.memory.lost_regions), flush=True)
                machine.close()
                stack.close()
                return
        machine.console.send("g" * PIECES)
        print(machine.wait().value, flush=True)
        incoming.close()


if __name__ == "__main__":
    _main(*sys.argv[1:])
