"""Signals end a machine whichever thread gets them, and whenever they come."""

import os
import signal
import threading
from collections.abc import Callable

import pytest

from vmm_reference.cli.run import Signals, run_on_terminal
from vmm_reference.config import MachineConfig
from vmm_reference.machine import Machine
from vmm_reference.outcome import Outcome

pytestmark = pytest.mark.kvm

SPIN = "1: jmp 1b"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_that_the_main_thread_does_not_get_ends_the_machine(
    config: Callable[..., MachineConfig], number: signal.Signals
) -> None:
    """As one that comes in the moment before it waits: no system call of its is interrupted."""
    quiet, other = os.pipe()
    machine = Machine(config(SPIN), console=(quiet, other))

    def send() -> None:
        while "first_run" not in machine.timeline:
            pass
        signal.pthread_kill(threading.get_ident(), number)

    before = signal.getsignal(number)
    thread = threading.Thread(target=send)
    thread.start()
    assert run_on_terminal(machine) == 128 + number
    thread.join()
    assert machine.outcome is Outcome.STOPPED
    assert signal.getsignal(number) is before
    os.close(quiet)
    os.close(other)


def test_a_signal_before_the_machine_runs_is_told_when_it_does(
    config: Callable[..., MachineConfig],
) -> None:
    """In the order in which they came; those that nobody asked for are not told."""
    told: list[int] = []
    machine = Machine(config(SPIN))

    def tell(number: int) -> None:
        told.append(number)
        if number == signal.SIGUSR2:
            machine.stop()

    with Signals(machine, tell, signal.SIGUSR1, signal.SIGUSR2):
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR2)
        with machine:
            assert machine.wait(60) is Outcome.STOPPED
    assert told == [signal.SIGUSR1, signal.SIGUSR2]
