"""A machine that stands still, is saved to a folder, or moves to another host.

Everything here is called from the owner's threads, one call at a time; what it moves, and how, is
`vmm_reference.state`.
"""

from __future__ import annotations

from .errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os
    import threading
    from collections.abc import Callable
    from typing import Any

    from .board import Board
    from .config import MachineConfig
    from .loop import Loop
    from .outcome import Outcome
    from .state.moving import Progress, Report
    from .state.outgoing import Outgoing
    from .state.snapshot import Saving

__all__ = ["Transfer"]


class Transfer:
    """The part of `Machine` by which it is paused, saved and moved."""

    config: MachineConfig
    _board: Board | None
    _loop: Loop
    _standstill: threading.RLock
    _ending: tuple[Outcome, str] | None
    _outgoing: Outgoing | None
    _paused: bool

    def pause(self) -> None:
        """Park every vCPU between two instructions; devices finish what they were asked for.

        Raises:
            TimeoutError: a vCPU does not come back from the kernel.
        """
        with self._standstill:
            self._movable("pause")
            if self._board is not None:
                self._paused = True
                self._board.pause()

    def resume(self) -> None:
        """Let parked vCPUs run on.

        Raises:
            HostError: a migration was cut, and the machine may run on the other side.
        """
        with self._standstill:
            self._movable("resume")
            if self._board is not None:
                self._paused = False
                self._board.resume()

    def snapshot(
        self,
        folder: str | os.PathLike[str],
        *,
        base: str | os.PathLike[str] | None = None,
        track: bool = False,
    ) -> str:
        """Save the machine to a folder; it goes on afterwards, or stays paused if it was.

        Most of the memory is written while the guest runs. Whatever goes wrong, what the folder
        held before stays whole.

        Args:
            folder: of the snapshot; one that is there already is replaced.
            base: the folder of the latest snapshot, taken or restored with `track`: only what has
                changed since is written.
            track: let the next snapshot be a difference to this one. Until then the guest's first
                write to each page costs it an exit to KVM.

        Returns:
            The snapshot's identity, the digest of its manifest.

        Raises:
            HostError: the folder can't be written, `base` is not the latest snapshot, or the
                machine does not run.
            TimeoutError: a vCPU does not come back from the kernel.
        """
        return self._save(folder, base=base, track=track)

    def _save(
        self,
        folder: str | os.PathLike[str],
        *,
        base: str | os.PathLike[str] | None = None,
        track: bool = False,
        at_rest: Callable[[Saving], object] = lambda _: None,
    ) -> str:
        """Save it; `at_rest` is called while the guest stands still, on the I/O thread."""
        from .state.snapshot import Saving

        def alive() -> None:
            if self._board is None or self._ending is not None:
                raise HostError(f"snapshot {folder}", "the machine does not run", "start it first")

        def save() -> None:
            alive()
            saving.paused()
            at_rest(saving)

        with self._standstill:
            self._movable(f"snapshot {folder}")
            self._lasting(f"snapshot {folder}")
            alive()
            assert self._board is not None
            saving = Saving(self._board, self.config, folder, base=base, track=track)
            was_paused = self._paused
            try:
                if not was_paused:
                    saving.running()
                    self.pause()
                try:
                    self._loop.call(save)
                finally:
                    if not was_paused:
                        self.resume()
                return saving.commit()
            except BaseException:
                saving.abandon()
                raise

    def migrate(
        self,
        address: str,
        *,
        progress: Callable[[Progress], object] | None = None,
        **options: Any,
    ) -> Report:
        """Move the running machine to the VMM that waits at an address; it has ended here then.

        Args:
            address: `tcp:HOST:PORT` or `unix:PATH`, where `Incoming` (`vmm run --incoming`) waits.
            progress: called now and then, on this thread.
            options: fields of `vmm_reference.state.moving.Options`.

        Raises:
            MigrationError: it has not moved. Mostly it runs on here; where `runs` is false it is
                paused, and `recover` or `resolve` goes on.
            ConfigError: an option is none.
            HostError: the machine does not run.
        """
        from .machine import Machine
        from .state.connection import Address
        from .state.moving import Options
        from .state.outgoing import Outgoing

        with self._standstill:
            self._movable("migration")
            self._lasting("migration")
            chosen = Options(**options)
            assert isinstance(self, Machine)
            self._outgoing = Outgoing(self, Address.parse(address), chosen, progress)
            return self._outgoing.run()

    def cancel_migration(self) -> None:
        """Let the machine stay here, unless its migration has been decided; from any thread."""
        if self._outgoing is not None:
            self._outgoing.cancel()

    def recover(self, address: str | None = None) -> Report:
        """Meet the other side of a migration again that was cut, and bring it to its end.

        Args:
            address: where the other side is; by default where it was.

        Raises:
            MigrationError: it could not; the machine is as it was.
            HostError: there is nothing to recover.
        """
        from .state.connection import Address

        with self._standstill:
            if self._outgoing is None:
                raise HostError("recovery", "no migration was begun", "there is nothing to recover")
            return self._outgoing.recover(None if address is None else Address.parse(address))

    def resolve(self) -> None:
        """Let the machine run on here after a migration that was cut.

        Only who knows that the other side does not run it, and never will, may say so.

        Raises:
            HostError: the other side has run it for certain, or there is nothing to resolve.
        """
        with self._standstill:
            if self._outgoing is None:
                raise HostError("resolve", "no migration was begun", "there is nothing to resolve")
            self._outgoing.resolve()

    def _movable(self, what: str) -> None:
        """Refuse what can't be while the machine is neither here nor there."""
        if self._outgoing is not None and not self._outgoing.side.phase.runs:
            hint = "vmm migrate --recover or --resolve brings that to its end"
            raise HostError(what, "the machine is being handed over", hint)

    def _lasting(self, what: str) -> None:
        """Refuse what would leave a disk behind."""
        for name, device in self.config.named_devices().items():
            if getattr(device, "overlay", ""):
                hint = "give the machine an image of its own"
                raise HostError(what, f"{name} has an overlay that ends here", hint)
