"""Helpers for tests of saved and moved machines: a guest whose end tells everything before it."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import attrs

from vmm_reference.config import MachineConfig
from vmm_reference.machine import Machine
from vmm_reference.outcome import Outcome
from vmm_reference.testing import tiny_kernel

if TYPE_CHECKING:
    from pathlib import Path

    from kvm_ioctls.state import Regs
    from vm_memory import GuestMemory

__all__ = ["COMPUTE", "PIECES", "Remains", "digest", "undisturbed"]

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
