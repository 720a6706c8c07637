"""Kicks: they end the run under way or the next one, from any thread, and are never lost."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
import time

import pytest

from kvm_ioctls import exits
from kvm_ioctls.errors import ClosedError, KvmError
from kvm_ioctls.testing import Guest, Mode

pytestmark = pytest.mark.kvm

SPIN = "1: jmp 1b"
KICKED = exits.Interrupted(kicked=True)


class Runner(threading.Thread):
    """Runs a vCPU until told to stop, and counts the kicks that arrive."""

    def __init__(self, guest: Guest) -> None:
        super().__init__(daemon=True)
        self.guest = guest
        self.arrived = threading.Semaphore(0)
        self.stop = False
        self.others = 0
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            while not self.stop:
                if self.guest.run() == KICKED:
                    self.arrived.release()
                else:
                    self.others += 1
        except BaseException as error:
            self.error = error


def _finish(runner: Runner) -> None:
    runner.stop = True
    runner.guest.vcpu.kick()
    runner.join(10)
    assert not runner.is_alive()
    assert runner.error is None


@pytest.mark.parametrize(
    "source",
    [SPIN, "1: mov $1, %al; out %al, $0x10; jmp 1b"],
    ids=["guest that never exits", "guest made of exits"],
)
def test_every_kick_arrives(source: str) -> None:
    """A kick at a random moment of a run always ends that run or the next one."""
    chance = random.Random(1)
    with Guest(source, Mode.LONG, cpl=3) as guest:
        runner = Runner(guest)
        runner.start()
        for _ in range(1500):
            pause = time.perf_counter_ns() + chance.randrange(60_000)
            while time.perf_counter_ns() < pause:
                pass
            guest.vcpu.kick()
            assert runner.arrived.acquire(timeout=10), "a kick was lost"
        _finish(runner)
        assert guest.vcpu.kicks >= 1500


def test_naive_store_does_not_end_a_run() -> None:
    """The guest of the test above goes on for ever if only immediate_exit is stored."""
    with Guest(SPIN, Mode.LONG, cpl=3) as guest:
        runner = Runner(guest)
        runner.start()
        time.sleep(0.05)
        guest.vcpu.run_page[1] = 1
        assert not runner.arrived.acquire(timeout=0.2)
        guest.vcpu.run_page[1] = 0
        guest.vcpu.kick()
        assert runner.arrived.acquire(timeout=10)
        _finish(runner)


def test_kick_before_the_run() -> None:
    """A kick while nobody runs ends the next run at once, without a signal, and only that one."""
    with Guest("hlt") as guest:
        guest.vcpu.kick()
        guest.vcpu.kick()
        assert guest.run() == KICKED
        assert guest.run() == exits.Hlt()
        assert guest.vcpu.kick_signals == 0


def test_kick_ends_a_halted_vcpu() -> None:
    """A vCPU that sleeps in the kernel, waiting for an interrupt, is woken by a kick."""
    with Guest("cli; hlt", irqchip=True) as guest:
        runner = Runner(guest)
        runner.start()
        time.sleep(0.05)
        guest.vcpu.kick()
        assert runner.arrived.acquire(timeout=10)
        _finish(runner)


def test_kicks_from_many_threads() -> None:
    """Kicks from several threads at once need no lock, and the last one is not lost."""
    with Guest(SPIN, Mode.LONG, cpl=3) as guest:
        runner = Runner(guest)
        runner.start()

        def kick_often() -> None:
            for _ in range(500):
                guest.vcpu.kick()

        kickers = [threading.Thread(target=kick_often) for _ in range(4)]
        for kicker in kickers:
            kicker.start()
        for kicker in kickers:
            kicker.join()
        while runner.arrived.acquire(timeout=0.3):
            pass
        guest.vcpu.kick()
        assert runner.arrived.acquire(timeout=10)
        _finish(runner)


def test_unfinished_read_survives_a_kick() -> None:
    """A kick between a read's exit and its completion loses neither the kick nor the answer."""
    with Guest("in $0x60, %al; out %al, $0x61; hlt") as guest:
        match guest.run():
            case exits.IoIn(data=view):
                view[0] = 7
        guest.vcpu.kick()
        assert guest.run() == KICKED
        assert guest.run() == exits.IoOut(0x61, 1, 1, b"\x07")


def test_python_signals_are_left_alone() -> None:
    """No Python handler is installed, replaced or called by a kick."""
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    with Guest(SPIN, Mode.LONG, cpl=3) as guest:
        runner = Runner(guest)
        runner.start()
        guest.vcpu.kick()
        assert runner.arrived.acquire(timeout=10)
        _finish(runner)
    after = {number: signal.getsignal(number) for number in signal.valid_signals()}
    assert {n for n in before if before[n] != after[n]} <= {
        n for n in before if n >= signal.SIGRTMIN and after[n] is None
    }


def test_python_signal_ends_the_run_and_its_handler_runs() -> None:
    """A signal with a Python handler ends a run on the main thread and the handler is called."""
    called: list[int] = []
    old = signal.signal(signal.SIGALRM, lambda number, frame: called.append(number))
    try:
        with Guest(SPIN, Mode.LONG, cpl=3) as guest:
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            assert guest.run() == exits.Interrupted(kicked=False)
            assert called == [signal.SIGALRM]
    finally:
        signal.signal(signal.SIGALRM, old)


def test_second_runner_is_refused() -> None:
    """A vCPU that runs in one thread is not run in another."""
    with Guest(SPIN, Mode.LONG, cpl=3) as guest:
        runner = Runner(guest)
        runner.start()
        time.sleep(0.05)
        with pytest.raises(KvmError, match="already"):
            guest.run()
        _finish(runner)


def test_close_ends_a_run() -> None:
    """Closing a vCPU that runs in another thread ends that run, and the thread learns why."""
    with Guest(SPIN, Mode.LONG, cpl=3) as guest:
        runner = Runner(guest)
        runner.start()
        time.sleep(0.05)
        guest.vcpu.close()
        runner.join(10)
        assert isinstance(runner.error, ClosedError)
        guest.vcpu.kick()


def test_a_full_signal_queue_delays_a_kick_only() -> None:
    """Many pending kicks need one queued signal: the queue's limit is out of reach."""
    with Guest(SPIN, Mode.LONG, cpl=3) as guest:
        runner = Runner(guest)
        runner.start()
        time.sleep(0.02)
        for _ in range(20_000):
            guest.vcpu.kick()
        assert runner.arrived.acquire(timeout=10)
        _finish(runner)


def test_no_signal_is_left_for_kicks() -> None:
    """Where every real-time signal has a handler, the first vCPU is refused, and says why."""
    program = """
import signal
from kvm_ioctls import Kvm, KvmError
for number in range(signal.SIGRTMIN, signal.SIGRTMAX + 1):
    signal.signal(number, lambda number, frame: None)
with Kvm() as kvm, kvm.create_vm() as vm:
    try:
        vm.create_vcpu(0)
    except KvmError as error:
        print(error)
    signal.signal(signal.SIGRTMAX, signal.SIG_DFL)
    vcpu = vm.create_vcpu(1)
    vcpu.kick()
    print("kicked" if vcpu.run().kicked else "lost")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                          timeout=50)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        "sigaction(): Device or resource busy (EBUSY); every real-time signal has a handler"
        " already: kick() needs one that nobody uses\nkicked\n"
    )
