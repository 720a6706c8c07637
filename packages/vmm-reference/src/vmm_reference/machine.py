"""A machine from its configuration: started, waited for, stopped; restarted when it resets itself.

Each power-on is a `Board` of its own, with new memory, new devices and a new KVM virtual machine,
so that a reset leaves nothing behind. What outlives a reset is here: the I/O loop, the console's
other end and the outcome.
"""

from __future__ import annotations

import threading
import time

from kvm_ioctls import Kvm

from .board import Board
from .control import Control
from .errors import ConfigError
from .loop import READ, Loop
from .outcome import Outcome
from .transfer import Transfer

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os
    from collections.abc import Callable
    from types import TracebackType
    from typing import Any

    from vm_memory import GuestMemory

    from .backends.console import Console
    from .backends.stream import StreamInput, StreamOutput
    from .config import MachineConfig
    from .state.outgoing import Outgoing
    from .state.snapshot import Restored

__all__ = ["Machine"]

# How long the end of the guest's output may take to reach a slow reader once the guest is gone.
_DRAIN_SECONDS = 5.0


class Machine(Control, Transfer):
    """A virtual machine, usable as a context manager that starts it and takes it down.

    Args:
        config: what it is.
        console: descriptors for the serial console's input and output, such as `(0, 1)`; the
            default keeps it in memory as `console`.

    Attributes:
        config: as given, with what it leaves to chance chosen, and what has changed since.
        outcome: how it ended, or None while it runs.
        detail: what there is to say about the outcome.
        timeline: seconds on the monotonic clock at which things happened: `start`, `loaded`,
            `first_run`, `first_output`, `end`.
        resets: how many times the guest reset itself and was restarted.

    Raises:
        KvmError: on start, if the host's KVM refuses.
        ConfigError: on start, if the kernel or the initrd can't be loaded.

    Example: see the package's README; a run needs a kernel.
    """

    def __init__(self, config: MachineConfig, *, console: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.config = config
        self.outcome: Outcome | None = None
        self.detail = ""
        self.timeline: dict[str, float] = {}
        self.resets = 0
        self._lock = threading.RLock()  # held for moments: a vCPU that ends the machine takes it
        self._standstill = threading.RLock()  # held by who pauses, resumes or saves
        self._done = threading.Event()
        self._board: Board | None = None
        self._started = False
        self._ending: tuple[Outcome, str] | None = None
        self._plug_pulled: Outcome | None = None  # from outside; no reset outlives it
        self._loop = Loop(self._failed)
        self._input: StreamInput | None = None
        self._output: StreamOutput | None = None
        self._console: Console | None = None
        self._restored: Restored | None = None  # until the first power-on
        self._paused = False
        self._outgoing: Outgoing | None = None
        if console is None:
            from .backends.console import Console

            self._console = Console(self._loop, self._receive)
            self._transmit = self._console.transmit
        else:
            from .backends.stream import StreamInput, StreamOutput

            self._input = StreamInput(self._loop, console[0], self._receive)
            self._output = StreamOutput(self._loop, console[1], self._written)
            self._transmit = self._output.send

    @property
    def console(self) -> Console:
        """The console in memory.

        Raises:
            AttributeError: the machine was made with descriptors for its console.
        """
        if self._console is None:
            raise AttributeError("this machine's console is on file descriptors")
        return self._console

    @property
    def status(self) -> int:
        """The exit status of `vmm run`: the outcome's, or the one that the guest has set.

        Raises:
            ValueError: the machine has not ended.
        """
        if self.outcome is None:
            raise ValueError("the machine has not ended: it has no exit status")
        if self.outcome is Outcome.DEBUG_EXIT:
            return (int(self.detail) << 1 | 1) & 0xFF
        return self.outcome.status

    def device(self, name: str) -> Any:
        """How a running device is controlled: what its factory returned; see its documentation.

        Args:
            name: the device's `id`, by default its kind and a number, such as `net0`.

        Raises:
            KeyError: the machine has no such device, or does not run.
        """
        if self._board is None:
            raise KeyError(name)
        return self._board.devices[name].control

    def filter_input(self, keys: Callable[[bytes], bytes]) -> None:
        """Pass what comes from the input's descriptor through `keys` first. Before `start`."""
        if self._input is not None:
            self._input.keys = keys

    def on_readable(self, fd: int, callback: Callable[[int], None]) -> None:
        """Call `callback(events)` on the I/O thread whenever `fd` can be read, once that runs.

        The descriptor stays the caller's, to be closed when the machine is. Should that thread
        stand still at a page that its source alone has, unread for seconds, the page is given up.
        """
        if self._board is not None and self._board.missing is not None:
            numbers = [thread.native_id or 0 for thread in threading.enumerate()]
            vcpus = self._board.threads()
            self._board.missing.listen_for(fd, [each for each in numbers if each not in vcpus])
        self._loop.call_soon(lambda: self._loop.add(fd, READ, callback))

    def start(self) -> None:
        """Power on. What can't be had is an error, and nothing is left behind."""
        self.timeline["start"] = time.monotonic()
        self._power_on()
        self._loop.start()
        self._started = True
        if self._input is not None:
            self._loop.call_soon(self._input.start)

    def wait(self, timeout: float | None = None) -> Outcome:
        """Wait for the machine to end.

        Args:
            timeout: seconds, or None without limit.

        Raises:
            TimeoutError: it still runs after that long.
        """
        if not self._done.wait(timeout) or self.outcome is None:
            raise TimeoutError(f"the machine still runs after {timeout:g} s")
        return self.outcome

    def stop(self, outcome: Outcome = Outcome.STOPPED) -> None:
        """End the machine as pulling its plug would; from any thread or a signal handler."""
        self._plug_pulled = outcome
        self._ended(outcome, "")
        if self._outgoing is not None:  # it may stand still between two hosts
            self._outgoing.let_go(self._carry_out)

    @classmethod
    def restore(
        cls,
        folder: str | os.PathLike[str],
        how: str = "copy-on-write",
        *,
        console: tuple[int, int] | None = None,
        track: bool = False,
        **overrides: Any,
    ) -> Machine:
        """A machine from a snapshot; `start`, or entering it, lets it go on.

        Args:
            folder: of the snapshot.
            how: `eager` reads and proves all memory first; `copy-on-write` maps the file, which
                must stay as it is; `on-demand` reads what the guest touches at once and the rest
                in the background.
            console: as for a new machine.
            track: let the next snapshot be a difference to this one.
            overrides: fields of `MachineConfig` that are others here, such as `drives`.

        Raises:
            FormatError: something in the folder is not what was written; it is named.
            ConfigError: what the configuration names is not there.
            HostError: the folder can't be read, or this host can't continue the machine.
        """
        from .cpu.compat import refuse_other_cpu
        from .state.snapshot import Restore, open_snapshot

        known = [way.value for way in Restore]
        if how not in known:
            raise ConfigError("how", how, f"must be one of {', '.join(known)}")
        restored = open_snapshot(folder, Restore(how), overrides, track=track)
        try:
            refuse_other_cpu(restored.vcpus[0].cpuid)
            machine = cls(restored.config, console=console)
        except BaseException:
            restored.discard()
            raise
        machine._restored = restored
        return machine

    def fork(self, count: int, folder: str | os.PathLike[str], **overrides: Any) -> list[Machine]:
        """Copies of the machine as it is now, which share the memory that none of them writes.

        Each has its own generation identifier (the device `vmgenid`), overlays in the place of
        drives that it may write, and addresses, sockets and taps of its own, which count on from
        those of the configuration (`cloned` of each kind of device). They are this process's, and
        not started; a template process (`vmm_reference.state.clone`) has less to keep for each.

        The machine goes on with its drives. What it may write is copied while it stands still,
        and the overlays lie on that: at once where the folder's file system shares blocks between
        files and has the image too, else for as long as copying what is no hole of it takes.

        Args:
            count: how many.
            folder: where the snapshot and the copies of drives go that they live on, until the last
                of them has ended.
            overrides: fields of `MachineConfig` that are others in all of them.

        Raises:
            HostError, ConfigError, TimeoutError: as for `snapshot` and `restore`.
        """
        from .state.clone import identity, on_copies

        images: dict[str, str] = {}
        with self._standstill:
            self._save(folder, at_rest=lambda saving: images.update(saving.copy_drives()))
            config = on_copies(self.config, images)
        clones: list[Machine] = []
        try:
            for number in range(count):
                fields = identity(config, number)
                clones.append(Machine.restore(folder, **(fields | overrides)))
        except BaseException:
            for clone in clones:
                clone.close()
            raise
        return clones

    def describe(self) -> dict[str, object]:
        """The machine's state in plain values: `state`, and `migration` where one was begun."""
        found: dict[str, object] = {"state": "Paused" if self._paused else "Running"}
        if self.outcome is not None:
            found = {"state": "Ended", "outcome": self.outcome.value, "detail": self.detail}
        if self._outgoing is not None:
            found["migration"] = self._outgoing.side.phase.value
        return found

    def _prepare(self, memory: GuestMemory) -> None:
        """Be ready for the state of a machine that another VMM runs: all but running."""
        self.timeline["start"] = time.monotonic()
        self._power_on(incoming=memory)
        assert self._board is not None
        self._board.stand_by()
        self._loop.stand_by()

    def _go(self) -> None:
        """Let the devices of what was prepared work; the rest is `_run`'s, and can't fail."""
        assert self._board is not None
        self._board.begin()

    def _run(self) -> None:
        """Let the vCPUs and the I/O loop of what was prepared run."""
        assert self._board is not None
        self._board.run()
        self._loop.start()
        self._started = True
        if self._input is not None:
            self._loop.call_soon(self._input.start)

    def _announce(self) -> None:
        """Tell the network where the machine is now."""
        if self._board is not None:
            self._loop.call_soon(self._board.announce)

    def _gone(self, outcome: Outcome, detail: str) -> None:
        """The machine ran elsewhere: it ends here, before the I/O loop does anything else."""
        with self._lock:
            if self._ending is None:
                self._ending = outcome, detail
        if self._outgoing is not None:
            self._outgoing.let_go(self._carry_out)
        self._done.wait()

    def close(self) -> None:
        """Stop the machine if it runs, and give everything back. Idempotent."""
        if self._started and not self._done.is_set():
            self.stop()
            self._done.wait()
        self._loop.stop()
        if self._output is not None:
            self._output.drain(_DRAIN_SECONDS)
        if self._console is not None:
            self._console.end()
        if self._board is not None:
            self._board.close()
            self._board = None
        if self._restored is not None:
            self._restored.discard()
            self._restored = None

    @property
    def dropped_output(self) -> int:
        """Bytes of the guest's output that nobody could be given."""
        board = self._board.serial.dropped if self._board is not None else 0
        return board + (self._output.dropped if self._output is not None else 0)

    def __enter__(self) -> Machine:
        if not self._started:  # one that came from another host runs already
            try:
                self.start()
            except BaseException:
                self.close()
                raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # From here on: what the board, the loop and the console's other end call.

    def _power_on(self, incoming: GuestMemory | None = None) -> None:
        restored, self._restored = self._restored, None
        if restored is None and incoming is None:
            self.config = self.config.settled()  # a reset changes nothing of it
        with Kvm() as kvm:
            self._board = Board(
                self.config,
                kvm,
                self._loop,
                transmit=self._send,
                room=self._room,
                ended=self._ended,
                timeline=self.timeline,
                restored=restored,
                incoming=incoming,
            )
        self._board.removed = self._removed
        self._board.cpus_changed = self._cpus_changed
        self._board.modules_changed = self._modules_changed
        if incoming is not None:
            return
        try:
            self._board.start()
        except BaseException:
            self._board.stop()
            raise

    def _ended(self, outcome: Outcome, detail: str) -> None:
        """The first end counts; the loop carries it out, so that no vCPU waits for itself."""
        with self._lock:
            if self._ending is not None:
                return
            self._ending = outcome, detail
        self._loop.call_soon(self._carry_out)

    def _carry_out(self) -> None:
        if self._board is None or self._ending is None:
            return
        outcome, detail = self._ending
        try:
            self._board.stop()
        except Exception as error:  # nobody would ever learn that it has ended
            outcome, detail = Outcome.HOST_FAILURE, f"{type(error).__name__}: {error}"
        asked, self._reset_asked = self._reset_asked, False
        if outcome is Outcome.RESET and (asked or self.config.on_reset == "restart"):
            if self._plug_pulled is not None:
                outcome = self._plug_pulled
            elif not (detail := self._restart()):
                return
            else:
                outcome = Outcome.HOST_FAILURE
        self.timeline["end"] = time.monotonic()
        self.outcome, self.detail = outcome, detail
        self._done.set()
        if self._console is not None:
            self._console.end()

    def _restart(self) -> str:
        """Power on again; says what went wrong, or nothing."""
        assert self._board is not None
        self._board.close()
        self.resets += 1
        self._ending = None
        try:
            self._power_on()
        except Exception as error:
            return f"restart: {error}"
        if self._plug_pulled is not None:  # while this was under way
            self._ended(self._plug_pulled, "")
        return ""

    def _failed(self, error: BaseException) -> None:
        self._ended(Outcome.HOST_FAILURE, f"{type(error).__name__}: {error}")

    def _send(self, data: bytes) -> None:
        self.timeline.setdefault("first_output", time.monotonic())
        self._transmit(data)
        if self._console is not None and self._board is not None:
            self._board.serial.transmitted(len(data))  # in memory it is gone at once

    def _written(self, count: int) -> None:
        if self._board is not None:
            self._board.transmitted(count)

    def _receive(self, data: bytes) -> int:
        return self._board.receive(data) if self._board is not None else 0

    def _room(self) -> None:
        if self._input is not None:
            self._input.more()
        elif self._console is not None:
            self._console.more()
