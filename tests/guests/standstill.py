"""What is to be known of a machine that does not do what is waited for.

A guest that stands still says nothing by itself, and neither does a VMM: this asks both. What it
prints goes to the standard error, the surest first, since any step may meet what the machine hangs
on. The guest does not survive it.
"""

from __future__ import annotations

import faulthandler
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kvm_ioctls.state import IoapicState
from vmm_reference.machine import Machine

__all__ = ["GUEST_OPTIONS", "explained", "kernel_stacks"]

GUEST_OPTIONS = "unknown_nmi_panic panic_print=0x41"
"""What a guest's command line needs to print every task and processor when it is sent an NMI."""

_PATIENCE = 20.0


@contextmanager
def explained(machine: Machine, what: str) -> Iterator[None]:
    """Print all that can be learnt of a machine where the block runs out of time.

    Args:
        machine: it may have ended, or hang in any place.
        what: the block waits for.
    """
    try:
        yield
    except TimeoutError as error:
        _describe(machine, f"{what}: {error}")
        raise


def _describe(machine: Machine, what: str) -> None:
    say(f"{what}; the console ends in\n{machine.console.output[-1500:]}")
    faulthandler.dump_traceback(sys.stderr, all_threads=True)
    for step in (_threads, _counters, _processors, _guest):
        _try(step, machine)


def say(text: str) -> None:
    """Print at once."""
    print(f"standstill: {text}", file=sys.stderr, flush=True)


def _try(step: Callable[[Machine], None], machine: Machine) -> None:
    """Do a step, or leave it where it hangs."""

    def run() -> None:
        try:
            step(machine)
        except Exception as error:
            say(f"{step.__name__}: {error!r}")

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(2 * _PATIENCE)
    if thread.is_alive():
        say(f"{step.__name__} hangs")


def kernel_stacks(pid: int | str) -> Iterator[str]:
    """Where in the kernel each thread of a process is, a line each."""
    for task in sorted(Path(f"/proc/{pid}/task").iterdir()):
        name, where, calls = ((task / file).read_text() for file in ("comm", "wchan", "stack"))
        yield f"thread {task.name} {name.strip()} in {where}: {' '.join(calls.split()[1::2])}"


def _threads(_: Machine) -> None:
    for line in kernel_stacks("self"):
        say(line)


def _counters(machine: Machine) -> None:
    board = machine._board
    if board is None:
        say("no board")
        return
    say(f"{machine.describe()}, {machine.resets} resets")
    for thread in board._vcpus:
        vcpu = thread.vcpu
        say(f"vCPU {vcpu.id}: {vcpu.runs} runs, {vcpu.served} served, {vcpu.kicks} kicks")
    say(f"serial: {board.serial.save()}, level {board.serial.interrupt_level}")
    say(f"typed and not taken: {machine.console._typed!r}")
    for name, counters in machine.metrics().items():
        say(f"{name}: {counters}")


def _processors(machine: Machine) -> None:
    """Registers of all vCPUs and controllers, twice."""
    board = machine._board
    assert board is not None
    for _ in range(2):
        board.park()
        for thread in board._vcpus:
            vcpu = thread.vcpu
            if not thread.wait_parked(_PATIENCE):
                say(f"vCPU {vcpu.id} does not park")
                continue
            regs, lapic = vcpu.get_regs(), vcpu.get_lapic()
            say(
                f"vCPU {vcpu.id}: rip {regs.rip:#x} rsp {regs.rsp:#x} rflags {regs.rflags:#x} "
                f"rax {regs.rax:#x} rdx {regs.rdx:#x} {vcpu.get_mp_state()!r}, APIC irr "
                f"{lapic.vectors('irr')} isr {lapic.vectors('isr')} svr {lapic.svr:#x} timer "
                f"{lapic.lvt('timer')} count {lapic.current_count} of {lapic.initial_count}, "
                f"TSC {list(map(hex, vcpu.get_msrs([0x10, 0x6E0]).values.values()))}, "
                f"{vcpu.get_vcpu_events()}"
            )
        ioapic = board.vm.get_irqchip(2)
        assert isinstance(ioapic, IoapicState)
        say(f"IOAPIC irr {ioapic.irr:#x}, clock {board.vm.get_clock()}")
        for pin, entry in enumerate(ioapic.redirtbl):
            if not entry.mask or entry.remote_irr:
                say(f"pin {pin}: {entry}")
        board.unpark()
        time.sleep(1)


def _guest(machine: Machine) -> None:
    """What the guest's own kernel says: its stacks, as it prints them on an NMI."""
    before = len(machine.console.output)
    board = machine._board
    assert board is not None
    board.legacy._pvpanic._event = lambda _: None  # or it would end before it has said anything
    board.park()
    thread = board._vcpus[0]
    if thread.wait_parked(_PATIENCE):
        thread.vcpu.nmi()
    board.unpark()
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline and machine.outcome is None:
        time.sleep(0.1)
    say(f"after an NMI {machine.outcome}:\n{_brief(machine.console.output[before:])}")


def _brief(report: str) -> str:
    """A kernel's report without idle threads, guesses at stack frames, and the scheduler."""
    tasks = report.partition("Sched Debug Version")[0].split("task:")
    busy = [task for task in tasks if "state:I" not in task and "state:P" not in task]
    return "\n".join(line for line in "task:".join(busy).splitlines() if "] ? " not in line)
