"""One thread a vCPU: run, dispatch what it exited for, park, stop.

The thread leaves Python only inside KVM_RUN, where the interpreter's lock is released. Everything
a guest does ends in a bus access or in an outcome of the machine; nothing it does ends the thread
by surprise.
"""

from __future__ import annotations

import threading

from kvm_ioctls import exits

from .outcome import Outcome

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from kvm_ioctls import Vcpu

    from .bus import Bus

__all__ = ["VcpuThread"]


class VcpuThread:
    """Runs one vCPU on a thread of its own until it is stopped or its guest ends the machine.

    Args:
        vcpu: ready to run; this thread alone uses it while it runs.
        ports: the port I/O space.
        mmio: the memory-mapped I/O space.
        ended: called at most once, on this thread, with the outcome and a detail for the user.
        first_run: called on this thread just before the first KVM_RUN.
    """

    def __init__(
        self,
        vcpu: Vcpu,
        ports: Bus,
        mmio: Bus,
        ended: Callable[[Outcome, str], None],
        first_run: Callable[[], None] | None = None,
    ) -> None:
        self.vcpu = vcpu
        self._ports = ports
        self._mmio = mmio
        self._ended = ended
        self._first_run = first_run
        self._stopping = False
        self._lock = threading.Lock()  # no pause may follow on a stop
        self._finished = False
        self._running = threading.Event()  # cleared while the vCPU is to be parked
        self._running.set()
        self._parked = threading.Event()
        self._thread = threading.Thread(target=self._main, name=f"vcpu{vcpu.id}", daemon=True)

    def stand_by(self) -> None:
        """Start the thread, with the vCPU parked until `start`."""
        self._running.clear()
        self._thread.start()

    def start(self) -> None:
        """Let the vCPU run, on a thread that is started unless it stands by."""
        if self._thread.ident is None:
            self._thread.start()
        else:
            self.resume()

    @property
    def thread(self) -> int:
        """Its thread, as `threading.get_native_id` has it; 0 before it starts."""
        return self._thread.native_id or 0

    def pause(self) -> None:
        """Ask the vCPU to stop between two instructions; `wait_parked` waits until it has."""
        with self._lock:
            if self.paused:  # it is parked, or about to be
                return
            self._parked.clear()
            if not self._stopping:  # else it would park instead of ending
                self._running.clear()
        if self._finished:  # its thread does not run, and nothing would ever say so again
            self._parked.set()
        self.vcpu.kick()

    @property
    def paused(self) -> bool:
        """Whether it was asked to stop, and not to run again."""
        return not self._running.is_set()

    def wait_parked(self, timeout: float) -> bool:
        """Whether the vCPU is parked, after at most `timeout` seconds."""
        return self._parked.wait(timeout)

    def resume(self) -> None:
        """Let a parked vCPU run again."""
        self._running.set()

    def stop(self) -> None:
        """Ask the thread to end. It may be called from any thread, this one included."""
        with self._lock:
            self._stopping = True
            self._running.set()
        self.vcpu.kick()

    def join(self) -> None:
        """Wait for the thread to end; not from the thread itself."""
        if self._thread.is_alive():
            self._thread.join()

    def _main(self) -> None:
        try:
            self._park()
            if self._first_run is not None and not self._stopping:
                self._first_run()
            self._loop()
        except Exception as error:
            # A defect of ours or a host that fails: the machine ends and says so.
            self._ended(Outcome.HOST_FAILURE, f"vCPU {self.vcpu.id}: {error!r}")
        finally:
            self._finished = True
            self._parked.set()

    def _loop(self) -> None:
        run, ports, mmio = self.vcpu.run, self._ports, self._mmio
        while not self._stopping:
            match run():
                case exits.IoOut(port=port, size=size, data=data):
                    if len(data) == size:
                        ports.write(port, data)
                    else:  # string output: one access after another to the same port
                        for start in range(0, len(data), size):
                            ports.write(port, data[start : start + size])
                case exits.IoIn(port=port, size=size, data=view):
                    for start in range(0, len(view), size):
                        view[start : start + size] = ports.read(port, size)
                case exits.MmioWrite(address=address, data=data):
                    mmio.write(address, data)
                case exits.MmioRead(address=address, data=view):
                    view[:] = mmio.read(address, len(view))
                case exits.Interrupted():
                    self._park()
                case exits.Hlt():  # only where the local APIC is not in the kernel
                    self._ended(Outcome.POWER_OFF, "the guest halted")
                    return
                case exits.Shutdown():
                    self._ended(Outcome.TRIPLE_FAULT, f"vCPU {self.vcpu.id}")
                    return
                case other:
                    self._ended(Outcome.KVM_INTERNAL_ERROR, f"vCPU {self.vcpu.id}: {other!r}")
                    return

    def _park(self) -> None:
        if not self._running.is_set():
            self._parked.set()
            self._running.wait()
