"""KVM_RUN, the page shared with the kernel, and the kick."""

from __future__ import annotations

import os

from kvm_ioctls._fd import Descriptor
from kvm_ioctls._native import ffi, lib
from kvm_ioctls.exits.decoders import decoders, interrupted
from kvm_ioctls.exits.io import IoIn, IoOut, MmioRead, MmioWrite, unpack_io, unpack_mmio

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

    from kvm_ioctls.exits.base import Exit
    from kvm_ioctls.hot import HotExits

__all__ = ["VcpuRun"]

_run = lib.kvmi_run
_KICKED = lib.KVMI_KICKED
_POSTED = lib.KVMI_POSTED
_EINTR = 4
_IO, _MMIO = 2, 6
_unpack_io, _unpack_mmio = unpack_io, unpack_mmio

_kick_signal = 0


def _install_kick_signal() -> int:
    """The signal that kicks are sent with; its handler does nothing and is installed once."""
    global _kick_signal
    if not _kick_signal:
        result = lib.kvmi_kick_signal()
        if result < 0:
            from kvm_ioctls.errors import KvmError

            raise KvmError("sigaction", -result, {}, "every real-time signal has a handler already:"
                           " kick() needs one that nobody uses")  # fmt: skip
        _kick_signal = result
    return _kick_signal


class VcpuRun(Descriptor):
    """The part of a vCPU that runs."""

    id: int
    _hot: HotExits | None = None

    def _init_run(self, fd: int, mmap_size: int) -> None:
        signal = _install_kick_signal()
        address = ffi.new("uint8_t **")
        result = lib.kvmi_map(fd, 0, mmap_size, address)
        if result < 0:
            self._fail("mmap", -result, {"size": mmap_size})
        # Whoever holds a view of the run page keeps it mapped: a view can never point nowhere.
        self._page_owner: Any = ffi.gc(
            address[0], lambda page, size=mmap_size: lib.kvmi_unmap(page, size)
        )
        self._page: memoryview = memoryview(ffi.buffer(self._page_owner, mmap_size)).cast("B")
        self._control = ffi.new("kvmi_vcpu *")
        lib.kvmi_vcpu_init(self._control, fd, address[0], signal)

    def run(self) -> Exit:
        """KVM_RUN: run the guest until something needs the caller, without the GIL.

        Returns:
            A value of kvm_ioctls.exits, made for `match`. Views in it (`data` of a read) point into
            the run page: answer by writing to them before the next run. `Interrupted` when a
            signal or kick() ended the run; then, as after every exit, simply run again. A signal
            with a Python handler has its handler run before this method's caller goes on, so
            KeyboardInterrupt comes out of here on the main thread.

        Raises:
            KvmError: KVM could not run the guest; EBUSY if another thread is running it.
            ClosedError: the vCPU has been closed.
        """
        reason = _run(self._control)
        if reason == _IO:  # what most exits are, without a call: caches are cold after an exit
            page = self._page
            direction, size, port, count, offset = _unpack_io(page, 32)
            data = page[offset : offset + size * count]
            if direction:
                return IoOut(port, size, count, data.tobytes())
            return IoIn(port, size, count, data)
        if reason == _MMIO:
            page = self._page
            address, _, length, is_write = _unpack_mmio(page, 32)
            data = page[40 : 40 + (length if length < 8 else 8)]
            return MmioWrite(address, data.tobytes()) if is_write else MmioRead(address, data)
        return decoders[reason](self._page) if reason >= 0 else self._other(reason)

    def _other(self, reason: int) -> Exit:
        """What run() returns when C did not give it a reason of the kernel's."""
        if reason == _POSTED and self._hot is not None:
            self._hot.flush()
            reason = lib.kvmi_take_held(self._control)
            if reason >= 0:
                return decoders[reason](self._page)
        if reason == _KICKED or reason == -_EINTR:
            return interrupted(reason == _KICKED)
        return self._fail_run(-reason)

    def _fail_run(self, errno: int) -> NoReturn:
        self._fail(lib.KVM_RUN, errno, {"vcpu": self.id})

    def serve_hot(self, hot: HotExits | None) -> None:
        """Serve declared exits in C from the next run on; None goes back to serving none.

        See kvm_ioctls.hot. Call it while the vCPU does not run.

        Raises:
            KvmError: EBUSY if it runs, or if an exit waits for posted writes that the handler
                refused: run() again first.
        """
        self.fileno()
        handle = ffi.NULL if hot is None else hot._hot
        result = lib.kvmi_serve_hot(self._control, handle, 0 if hot is None else hot.limit)
        if result < 0:
            self._fail("serve_hot", -result, {"vcpu": self.id})
        self._hot = hot

    @property
    def served(self) -> int:
        """How many declared exits were served without returning."""
        return int(self._control.served)

    def kick(self) -> None:
        """End the run under way in another thread, or else the next one: from any thread.

        A kick is never lost: exactly as with an event, any number of kicks before the run reports
        `Interrupted(kicked=True)` count as one, and the next kick after that counts again. It costs
        a store, and a signal to the running thread only if there is one. The signal is real-time,
        the first that nobody used when the first vCPU was made, its handler is a no-op in C, and
        Python's own signal handling is not involved; a blocking call that it meets in that thread
        is restarted by Python. A closed vCPU ignores it.

        Raises:
            KvmError: EAGAIN if for a second the process's queue of real-time signals was full.
        """
        owner = self._page_owner
        if owner is None:
            return
        result = lib.kvmi_kick(self._control)
        if result < 0:
            self._fail("tgkill", -result, {"signal": _kick_signal})

    @property
    def run_page(self) -> memoryview:
        """The struct kvm_run and the pages behind it, shared with the kernel.

        A view taken from here stays valid after close().
        """
        return self._page

    @property
    def request_interrupt_window(self) -> bool:
        """Whether the next run returns `IrqWindowOpen` once the guest can take an interrupt.

        Only where no interrupt controller is in the kernel.
        """
        return bool(self._shared()[0])

    @request_interrupt_window.setter
    def request_interrupt_window(self, wanted: bool) -> None:
        self._shared()[0] = wanted

    @property
    def ready_for_interrupt_injection(self) -> bool:
        """Whether interrupt() would be taken at once, as of the last exit."""
        return bool(self._shared()[12])

    @property
    def if_flag(self) -> bool:
        """Whether the guest had interrupts enabled at the last exit."""
        return bool(self._shared()[13])

    @property
    def run_flags(self) -> int:
        """KVM_RUN_X86_*: what else was true at the last exit, such as system-management mode."""
        return int.from_bytes(self._shared()[14:16], "little")

    @property
    def cr8(self) -> int:
        """The task priority; without a controller in the kernel the next run takes it from here."""
        return int.from_bytes(self._shared()[16:24], "little")

    @cr8.setter
    def cr8(self, value: int) -> None:
        self._shared()[16:24] = value.to_bytes(8, "little")

    @property
    def apic_base(self) -> int:
        """The APIC base MSR; without a controller in the kernel the next run takes it from here."""
        return int.from_bytes(self._shared()[24:32], "little")

    @apic_base.setter
    def apic_base(self, value: int) -> None:
        self._shared()[24:32] = value.to_bytes(8, "little")

    def _shared(self) -> memoryview:
        """The run page; ClosedError if it is gone."""
        if self._fd < 0:
            self._fail("run page", 9, {"vcpu": self.id})
        return self._page

    @property
    def runs(self) -> int:
        """How often KVM_RUN was entered."""
        return int(self._control.runs)

    @property
    def kicks(self) -> int:
        """How many runs a kick has ended."""
        return int(self._control.kicks)

    @property
    def kick_signals(self) -> int:
        """How many kicks met a running thread and sent it the signal."""
        return int(self._control.signals)

    def close(self) -> None:
        """End a run under way in another thread, wait for it, and close; again: nothing."""
        fd, self._fd = self._fd, -1
        if fd < 0:
            return
        lib.kvmi_retire(self._control)
        os.close(fd)
        # The mapping holds a reference to the VM in the kernel: it goes now, not with the object.
        self._page_owner = None
        self._page = memoryview(b"")
        self._hot = None
